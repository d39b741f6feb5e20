"""From rewards to advantages, on plain tensors: N trajectories, G to a group, T tokens.

REINFORCE, RLOO and GRPO have one number per trajectory, which holds for each of its policy tokens; PPO has one for
each policy token. A reward of NaN marks a trajectory that nothing can be learned from (its search failed): its
advantage is 0, and it takes part in no statistic.

A user's `AdvantageFunction` gets the rewards (N,), the N trajectories and the size of a group, consecutive
trajectories of one question; by name the columns of the dataset, a list of N each, and `log_likelihoods`, what the
policy thinks of texts (`training.likelihoods`): like a reward function it takes `**kwargs`. It returns one
number a trajectory, (N,), or a list for each trajectory with one number a turn or one a completion token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from zerosearch.errors import UserError
from zerosearch.rollout.trajectory import Trajectory

AdvantageFunction = Callable[..., Any]

Baseline = Literal["none", "group", "batch"]
Scale = Literal["group", "batch", "none"]


def raw_return(rewards: torch.Tensor, num_generations: int, baseline: Baseline) -> torch.Tensor:
    """Return r - b, (N,) to (N,): REINFORCE. b is 0, the mean of the group, or the mean of the batch.

    Without a baseline, as in the code of the paper, it is never below 0 for rewards in [0, 1]: good trajectories are
    reinforced, and bad ones only lose by comparison.
    """
    if baseline == "group":
        return _centered(rewards.view(-1, num_generations)).view(-1)
    if baseline == "batch":
        return _centered(rewards[None])[0]
    return rewards.nan_to_num(nan=0.0)


def leave_one_out(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Return r_i - mean of the group's other rewards, (N,) to (N,): RLOO.

    Equals (r_i - mean of the group) G / (G - 1). A group of which fewer than two rewards are known has advantage 0.
    """
    groups = rewards.view(-1, num_generations)  # (N / G, G)
    count = (~groups.isnan()).sum(1, keepdim=True)
    return (_centered(groups) * count / (count - 1)).where(count > 1, 0.0).view(-1)


def group_normalized(
    rewards: torch.Tensor, num_generations: int, epsilon: float = 1e-4, scale: Scale = "group"
) -> torch.Tensor:
    """Return (r - mean) / (std + epsilon) within each group, (N,) to (N,): GRPO.

    Consecutive `num_generations` rewards form a group. The deviation divides by n - 1; `epsilon` is TRL's, 1e-6 in the
    paper's code. A group of which fewer than two rewards are known has advantage 0. `scale` takes the deviation of the
    whole batch, or none, instead (TRL's `scale_rewards`).
    """
    groups = rewards.view(-1, num_generations)  # (N / G, G)
    count = (~groups.isnan()).sum(1, keepdim=True)
    centered = _centered(groups)
    if scale == "group":
        centered = centered / (_deviation(groups) + epsilon)
    elif scale == "batch":
        centered = centered / (_deviation(rewards[None]) + epsilon)
    return centered.where(count > 1, 0.0).view(-1)


def token_rewards(
    rewards: torch.Tensor, mask: torch.Tensor, logps: torch.Tensor, ref_logps: torch.Tensor | None, beta: float
) -> torch.Tensor:
    """Return PPO's reward of each policy token, (N,) and (N, T) to (N, T).

    -beta (log p - log p_ref), the k1 estimate of the KL, at each token under `mask`, and the trajectory's reward at
    the last of them; 0 elsewhere.
    """
    mask = mask.bool()
    penalty = torch.zeros_like(logps) if ref_logps is None else beta * (logps - ref_logps)
    later = mask.flip(1).cumsum(1).flip(1)  # tokens under the mask from here on
    outcome = rewards.nan_to_num(nan=0.0)[:, None] * (later == 1)
    return (outcome - penalty).where(mask, 0.0)


def masked_gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return generalised advantages and returns along the tokens under `mask`, each (N, T); 0 elsewhere.

        delta_j = r_j + gamma V_{j+1} - V_j
        A_j = delta_j + gamma lam A_{j+1},  R_j = A_j + V_j

    j counts tokens under the mask, and V behind the last is 0. So an observation, however long, is one transition from
    the last token before it to the first behind it: it is neither discounted nor given a value of its own.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (N,)
    for place in range(values.shape[1] - 1, -1, -1):
        own = mask[:, place]
        delta = rewards[:, place] + gamma * next_value - values[:, place]
        advantages[:, place] = (delta + gamma * lam * next_advantage).where(own, 0.0)
        next_advantage = advantages[:, place].where(own, next_advantage)
        next_value = values[:, place].where(own, next_value)
    return advantages, (advantages + values).where(mask, 0.0)


def whiten(advantages: torch.Tensor, mask: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """Return (A - mean) / sqrt(variance + epsilon), (N, T) to (N, T); 0 outside the mask.

    The statistics are those of `everyone` (M,), the advantages of all ranks' policy tokens. The variance divides by
    M - 1; epsilon is that of the paper's code.
    """
    if everyone.numel() < 2:
        return torch.zeros_like(advantages)
    whitened = (advantages - everyone.mean()) * (everyone.var() + 1e-8).rsqrt()
    return whitened.where(mask.bool(), 0.0)


def custom_advantages(
    function: AdvantageFunction,
    rewards: torch.Tensor,
    trajectories: Sequence[Trajectory],
    group: int,
    own: slice,
    **by_name: Any,
) -> torch.Tensor:
    """Return the function's advantages of the rows `own` of all (N,): (n,), or (n, T) if they differ by turn or token.

    Raises `UserError` if it does not return one row a trajectory.
    """
    returned = function(rewards, trajectories, group, **by_name)
    if isinstance(returned, torch.Tensor) and returned.shape == rewards.shape:
        return returned[own].to(rewards).nan_to_num(nan=0.0)
    if len(returned) != len(trajectories):
        raise UserError(
            f"the advantage function returned {len(returned)} rows, and there are {len(trajectories)} trajectories"
        )
    return per_token(returned[own], trajectories[own]).to(rewards).nan_to_num(nan=0.0)


def per_token(values: Sequence[Any], trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """Spread numbers, one a trajectory, a turn or a token, over the completion tokens, (n, T).

    A turn's number holds for the tokens of that turn; observations and padding get 0. Raises `UserError` for a list
    that has neither one number a turn nor one a token.
    """
    rows = []
    for numbers, trajectory in zip(values, trajectories, strict=True):
        numbers = [float(numbers)] * len(trajectory.turns) if _is_number(numbers) else list(map(float, numbers))
        if len(numbers) == len(trajectory.turns):
            spread: list[float] = []
            for number, turn in zip(numbers, trajectory.turns, strict=True):
                spread += [number] * turn.num_tokens + [0.0] * turn.num_observation_tokens
            numbers = spread + [0.0] * (len(trajectory.completion_ids) - len(spread))
        if len(numbers) != len(trajectory.completion_ids):
            raise UserError(
                f"the advantage function returned {len(numbers)} numbers for a trajectory of {len(trajectory.turns)} "
                f"turns and {len(trajectory.completion_ids)} tokens: it must be one, one a turn, or one a token"
            )
        rows.append(torch.tensor(numbers))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.ndim == 0)


def _centered(groups: torch.Tensor) -> torch.Tensor:
    """Subtract the mean of the known rewards of each row; 0 where the reward is unknown."""
    return (groups - groups.nanmean(1, keepdim=True)).where(~groups.isnan(), 0.0)


def _deviation(groups: torch.Tensor) -> torch.Tensor:
    """Return the deviation of the known rewards of each row, (R, C) to (R, 1); of fewer than two there is none."""
    count = (~groups.isnan()).sum(1, keepdim=True)
    return (_centered(groups).square().sum(1, keepdim=True) / (count - 1)).sqrt()
