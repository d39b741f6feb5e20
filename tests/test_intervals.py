"""Bootstrap intervals against the normal approximation, which holds for a mean of many values."""

from __future__ import annotations

import numpy as np
import pytest

from zerosearch.intervals import mean_with_interval, resampled_means


def test_an_interval_is_as_wide_as_the_mean_is_uncertain() -> None:
    values = [1.0] * 300 + [0.0] * 100
    mean, low, high = mean_with_interval(values, np.random.default_rng(0))
    assert mean == 0.75
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5  # 0.0424
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.005)
    assert mean_with_interval([0.5, 0.5], np.random.default_rng(0)) == (0.5, 0.5, 0.5)


def test_the_columns_of_a_row_are_drawn_together() -> None:
    scores = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    means = resampled_means(scores, np.random.default_rng(0))
    assert means.shape == (2000, 2)
    assert means.sum(axis=1) == pytest.approx(np.ones(2000))
