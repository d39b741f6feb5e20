"""Intervals: how much a mean over questions, queries or training runs would move with others of the same kind."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles: 95 %
NORMAL = 1.96  # the upper one of the normal distribution, and of Student's t from one degree of freedom on
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def resampled_means(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw as many rows as there are, with replacement, again and again; return each draw's means.

    Takes (rows, columns), returns (NUM_RESAMPLES, columns).
    """
    size = len(scores)
    return np.array([scores[rng.integers(size, size=size)].mean(axis=0) for _ in range(NUM_RESAMPLES)])


def mean_with_interval(values: Sequence[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the mean of the values and the bounds of its interval."""
    scores = np.array(values, dtype=float)[:, None]  # (rows, 1)
    low, high = np.percentile(resampled_means(scores, rng), INTERVAL)
    return float(scores.mean()), float(low), float(high)


def over_seeds(scores: np.ndarray) -> dict[str, float]:
    """Return `{"mean", "low", "high"}` of the scores of training runs, (seeds, questions), with a 95 % interval.

    It holds for other seeds and for other questions: a t interval over the means of the seeds, and a normal one over
    those of the questions, half-widths squared and added. Each of them holds the chance of single answers, so the
    interval is rather too wide. One seed says nothing about others: the interval is that over questions.
    """
    seeds = len(scores)
    by_seed = STUDENT[min(seeds - 1, len(STUDENT)) - 1] * _standard_error(scores.mean(1)) if seeds > 1 else 0.0
    half, mean = math.hypot(by_seed, NORMAL * _standard_error(scores.mean(0))), float(scores.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
