"""GiGPO (Feng et al. 2025, arXiv 2505.10978): turns that start in the same state are compared with each other, too.

    python recipes/variants/gigpo.py --config recipes/configs/tinyworld.yaml --output_dir outputs/gigpo

A turn's advantage is that of its trajectory in the group (Eq. 3) plus OMEGA times its own among the turns of the same
question that start from the same observation (Eq. 6 and 7), by the discounted reward to come (Eq. 5 and 8). As in the
authors' runs with a search engine, observations are one state from a similarity of 0.9 on, and deviations divide both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch

from zerosearch.rollout.trajectory import Trajectory
from zerosearch.training.advantages import group_normalized

sys.path.append(str(Path(__file__).parents[1]))
import grpo

GAMMA, OMEGA, SIMILARITY = 0.95, 1.0, 0.9


def advantages(
    rewards: torch.Tensor, trajectories: Sequence[Trajectory], group: int, **kwargs: Any
) -> list[list[float]]:
    """Return one number a turn."""
    episode = group_normalized(rewards, group).tolist()  # Eq. 3
    found = [[0.0] * len(trajectory.turns) for trajectory in trajectories]
    for start in range(0, len(trajectories), group):
        for members in states(trajectories[start : start + group]):
            places = [(start + place, turn) for place, turn in members]
            discounts = [GAMMA ** (len(trajectories[place].turns) - 1 - turn) for place, turn in places]
            returns = torch.tensor(discounts) * rewards[[place for place, _ in places]].cpu()  # Eq. 5
            relative = group_normalized(returns, len(returns)).tolist()  # Eq. 7
            for (place, turn), step in zip(places, relative, strict=True):
                found[place][turn] = episode[place] + OMEGA * step  # Eq. 8
    return found


def states(trajectories: Sequence[Trajectory]) -> list[list[tuple[int, int]]]:
    """Return the (trajectory, turn) of one question that start from the same observation, state by state."""
    found: list[tuple[str, list[tuple[int, int]]]] = []
    for place, trajectory in enumerate(trajectories):
        observations = ["", *(turn.observation for turn in trajectory.turns)]
        for turn in range(len(trajectory.turns)):
            seen = observations[turn]
            same = (members for text, members in found if SequenceMatcher(None, text, seen).ratio() >= SIMILARITY)
            if (members := next(same, None)) is None:
                found.append((seen, members := []))
            members.append((place, turn))
    return [members for _, members in found]


grpo.ADVANTAGES = advantages

if __name__ == "__main__":
    grpo.main()
