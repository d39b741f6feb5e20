"""From rewards to advantages, on plain tensors: one number per trajectory, which holds for each of its policy tokens.

A reward of NaN marks a trajectory that nothing can be learned from (its search failed): its advantage is 0, and it
takes part in no statistic.
"""

from __future__ import annotations

import torch


def raw_return(rewards: torch.Tensor) -> torch.Tensor:
    """Return the reward itself, (N,) to (N,): REINFORCE without a baseline, as in the code of the paper.

    Never below 0 for rewards in [0, 1]: good trajectories are reinforced, and bad ones only lose by comparison.
    """
    return rewards.nan_to_num(nan=0.0)


def group_normalized(rewards: torch.Tensor, num_generations: int, epsilon: float = 1e-4) -> torch.Tensor:
    """Return (r - mean) / (std + epsilon) within each group, (N,) to (N,): GRPO.

    Consecutive `num_generations` rewards form a group. The deviation divides by n - 1; `epsilon` is TRL's, 1e-6 in the
    paper's code. A group of which fewer than two rewards are known has advantage 0.
    """
    groups = rewards.view(-1, num_generations)  # (N / G, G)
    known = ~groups.isnan()
    count = known.sum(1, keepdim=True)
    centered = (groups - groups.nanmean(1, keepdim=True)).where(known, 0.0)
    variance = centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return (centered / (variance.sqrt() + epsilon)).where(count > 1, 0.0).view(-1)
