"""StepSearch (Wang et al. 2025, arXiv 2505.15107): a search is rewarded for what is new, and fined for what is not.

    python recipes/variants/stepsearch.py --config recipes/configs/tinyworld.yaml --output_dir outputs/stepsearch

The gain of a search is how much nearer its documents come to the golden ones (`golden_documents` of the dataset) than
any before; the fine is the share of its documents that were found before. A turn's advantage is the sum of gains and
fines from it on, and of the answer's reward, normalised over the batch. The authors' code trains with PPO, measures
nearness by TF-IDF, counts gains and fines 0.6 times, and rewards queries that resemble annotated ones: all left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import accumulate
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from zerosearch.errors import UserError
from zerosearch.metrics import normalize_answer
from zerosearch.rollout.trajectory import Trajectory
from zerosearch.training.advantages import group_normalized

sys.path.append(str(Path(__file__).parents[1]))
import grpo


def nearness(first: str, second: str) -> float:
    """Return the cosine of two texts as sets of words."""
    one, other = (set(normalize_answer(text).split()) for text in (first, second))
    return len(one & other) / sqrt(len(one) * len(other)) if one and other else 0.0


def worth_of_searches(trajectory: Trajectory, golden: Sequence[str]) -> list[float]:
    """Return gain less fine for each turn."""
    best, known, found = [0.0] * len(golden), set[str](), []
    for turn in trajectory.turns:
        near = [max((nearness(text, wanted) for text in turn.documents), default=0.0) for wanted in golden]
        gain = fmean(max(now - before, 0.0) for now, before in zip(near, best, strict=True))
        fine = fmean(text in known for text in turn.documents) if turn.documents else 0.0
        best = [max(pair) for pair in zip(near, best, strict=True)]
        known.update(turn.documents)
        found.append(gain - fine)
    return found


def advantages(
    rewards: torch.Tensor,
    trajectories: Sequence[Trajectory],
    group: int,
    golden_documents: Sequence[Sequence[str] | None] | None = None,
    **kwargs: Any,
) -> list[list[float]]:
    """Return one number a turn."""
    if golden_documents is None or not all(golden_documents):
        raise UserError("StepSearch needs golden_documents in every row of the dataset")
    to_go = []
    for reward, trajectory, golden in zip(rewards.tolist(), trajectories, golden_documents, strict=True):
        worth = worth_of_searches(trajectory, golden or [])
        to_go.append([reward + value for value in accumulate(reversed(worth))][::-1])
    together = torch.tensor([value for turns in to_go for value in turns])
    normalised = iter(group_normalized(together, max(len(together), 1)).tolist())
    return [[next(normalised) for _ in turns] for turns in to_go]


grpo.ADVANTAGES = advantages

if __name__ == "__main__":
    grpo.main()
