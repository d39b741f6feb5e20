"""Bootstrap intervals against the normal approximation, which holds for a mean of many values."""

from __future__ import annotations

import numpy as np
import pytest

from zerosearch.intervals import mean_with_interval, over_seeds, resampled_means


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


def test_an_interval_over_seeds_holds_for_other_seeds_and_other_questions() -> None:
    scores = np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    # Seeds: means 3/4 and 1/4, standard error 1/4, times 12.706. Questions: 1, 1/2, 0, 1/2: 0.40825 / 2, times 1.96.
    half = (3.1765**2 + 0.40008**2) ** 0.5
    assert over_seeds(scores) == pytest.approx({"mean": 0.5, "low": 0.5 - half, "high": 0.5 + half}, abs=1e-4)
    alone = over_seeds(scores[:1])  # 1, 1, 0, 1: 0.5 / 2, times 1.96
    assert alone == pytest.approx({"mean": 0.75, "low": 0.26, "high": 1.24}, abs=1e-4)


def test_intervals_over_seeds_cover_what_they_say() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        runs, questions = rng.normal(0, 0.05, 5), rng.normal(0, 0.3, 100)
        found = over_seeds(runs[:, None] + questions + rng.normal(0, 0.3, (5, 100)))
        covered += found["low"] <= 0.0 <= found["high"]
    assert 0.94 <= covered / 400 <= 1.0
