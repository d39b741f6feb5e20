"""Bootstrap intervals: how much a mean over questions or queries would move with others of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles: 95 %


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
