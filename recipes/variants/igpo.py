"""IGPO (Wang et al. 2025, arXiv 2510.14967): a turn is worth what it adds to the probability of the golden answer.

    python recipes/variants/igpo.py --config recipes/configs/tinyworld.yaml --output_dir outputs/igpo

The probability is exp of the mean log-probability of the answer's tokens under the policy, at the end of the turn's
observation. The last turn is worth the reward. All of a group's turns are normalised together, and a turn's advantage
is the discounted sum from it on. The authors' code sums first, then subtracts the mean of the group token by token;
and it puts a thought before the answer, for which a small policy has no words.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import torch

from zerosearch.rollout.trajectory import Trajectory
from zerosearch.training.advantages import group_normalized

sys.path.append(str(Path(__file__).parents[1]))
import grpo

GAMMA = 1.0
LEAD = "<answer>"  # between the turn's observation and the answer


def advantages(
    rewards: torch.Tensor,
    trajectories: Sequence[Trajectory],
    group: int,
    golden_answers: Sequence[Sequence[str]],
    log_likelihoods: Callable[[list[tuple[list[int], str, str]]], list[float]],
    **kwargs: Any,
) -> list[list[float]]:
    """Return one number a turn."""
    asked = []
    for trajectory, answers in zip(trajectories, golden_answers, strict=True):
        end = 0
        for turn in trajectory.turns:  # before the first, before the second, ...
            asked.append((trajectory.prompt_ids + trajectory.completion_ids[:end], LEAD, f" {answers[0]}"))
            end += turn.num_tokens + turn.num_observation_tokens
    probabilities = iter([exp(logp) for logp in log_likelihoods(asked)])
    found = []
    for start in range(0, len(trajectories), group):
        worth = []
        for place in range(start, start + group):
            before = [next(probabilities) for _ in trajectories[place].turns]
            gains = [now - then for then, now in pairwise(before)]
            worth.append([*gains, float(rewards[place])] if before else [])
        together = torch.tensor([value for turns in worth for value in turns])
        normalised = iter(group_normalized(together, max(len(together), 1)).tolist())
        for turns in worth:
            own = [next(normalised) for _ in turns]
            found.append([sum(GAMMA**k * value for k, value in enumerate(own[turn:])) for turn in range(len(own))])
    return found


grpo.ADVANTAGES = advantages

if __name__ == "__main__":
    grpo.main()
