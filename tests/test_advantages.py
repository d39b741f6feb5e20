"""Advantages worked out by hand."""

from __future__ import annotations

import math

import torch

from zerosearch.advantages import group_normalized, raw_return

NAN = math.nan


def test_reinforce_takes_the_reward_as_it_is() -> None:
    assert raw_return(torch.tensor([0.0, 0.5, 1.0, NAN])).tolist() == [0.0, 0.5, 1.0, 0.0]


def test_grpo_normalises_within_each_group() -> None:
    # Group 1: mean 0.5, deviation sqrt(((-0.5)^2 + 0.5^2) / 1) = 0.7071. Group 2: no deviation, nothing to learn.
    advantages = group_normalized(torch.tensor([0.0, 1.0, 0.3, 0.3]), num_generations=2, epsilon=0.0)
    torch.testing.assert_close(advantages[:2], torch.tensor([-0.70711, 0.70711]), atol=1e-5, rtol=0)
    assert advantages[2:].isnan().all()  # 0 / 0: epsilon is what keeps such a group quiet
    assert group_normalized(torch.tensor([0.3, 0.3]), num_generations=2).tolist() == [0.0, 0.0]


def test_grpo_divides_by_n_minus_1_and_adds_epsilon() -> None:
    # mean 1, deviations -1, 0, 1: variance 2 / 2 = 1.
    advantages = group_normalized(torch.tensor([0.0, 1.0, 2.0]), num_generations=3, epsilon=1.0)
    torch.testing.assert_close(advantages, torch.tensor([-0.5, 0.0, 0.5]))


def test_a_failed_search_takes_part_in_no_statistic() -> None:
    # Known: 0 and 2, mean 1, deviation sqrt(2).
    advantages = group_normalized(torch.tensor([0.0, NAN, 2.0]), num_generations=3, epsilon=0.0)
    torch.testing.assert_close(advantages, torch.tensor([-0.70711, 0.0, 0.70711]), atol=1e-5, rtol=0)


def test_a_group_with_one_known_reward_teaches_nothing() -> None:
    assert group_normalized(torch.tensor([NAN, 1.0, NAN, NAN]), num_generations=2).tolist() == [0.0, 0.0, 0.0, 0.0]
