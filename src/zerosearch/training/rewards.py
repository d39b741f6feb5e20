"""Reward functions with TRL's signature: they judge the answer the rollout found, never the text of the trajectory.

A trajectory whose search failed has no reward (`None`): it is no fault of the policy's, and TRL leaves it out of every
statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zerosearch.metrics import exact_match, f1


def f1_reward(
    answer: Sequence[str | None], golden_answers: Sequence[Sequence[str]], outcome: Sequence[str], **kwargs: Any
) -> list[float | None]:
    """Score each answer by F1 against its golden answers (Section 3.5).

    >>> f1_reward(["Port", None], [["Port Elsford"], ["Port Elsford"]], ["answered", "failed_search"])
    [0.6666666666666666, None]
    """
    return _scored(f1, answer, golden_answers, outcome)


def em_reward(
    answer: Sequence[str | None], golden_answers: Sequence[Sequence[str]], outcome: Sequence[str], **kwargs: Any
) -> list[float | None]:
    """Score each answer by exact match (Section 4.1). The paper trains on F1; this is for an ablation.

    >>> em_reward(["the Port Elsford."], [["Port Elsford"]], ["answered"])
    [1.0]
    """
    return _scored(exact_match, answer, golden_answers, outcome)


def _scored(
    metric: Callable[[str | None, Sequence[str]], float],
    answers: Sequence[str | None],
    golden_answers: Sequence[Sequence[str]],
    outcomes: Sequence[str],
) -> list[float | None]:
    return [
        None if outcome == "failed_search" else metric(answer, golden)
        for answer, golden, outcome in zip(answers, golden_answers, outcomes, strict=True)
    ]
