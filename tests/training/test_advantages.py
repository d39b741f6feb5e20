"""Advantages worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zerosearch.training.advantages import (
    custom_advantages,
    group_normalized,
    leave_one_out,
    masked_gae,
    raw_return,
    token_rewards,
    whiten,
)

NAN = math.nan


def test_reinforce_takes_the_reward_as_it_is() -> None:
    assert raw_return(torch.tensor([0.0, 0.5, 1.0, NAN]), 2, "none").tolist() == [0.0, 0.5, 1.0, 0.0]


def test_a_baseline_is_the_mean_of_the_known_rewards_of_group_or_batch() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.5, NAN, 0.0])
    # Means of the groups of two: 0.5, 0.5 and 0 (one is unknown); of the batch: 2 / 5.
    assert raw_return(rewards, 2, "group").tolist() == [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert raw_return(rewards, 2, "batch").tolist() == pytest.approx([-0.4, 0.6, 0.1, 0.1, 0.0, -0.4])


def test_rloo_takes_off_the_mean_of_the_others() -> None:
    # Group 1: 1 - (0 + 0.5) / 2, 0 - (1 + 0.5) / 2, 0.5 - (1 + 0) / 2. Group 2: known are 1 and 0.
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, NAN, 0.0])
    assert leave_one_out(rewards, 3).tolist() == [0.75, -0.75, 0.0, 1.0, 0.0, -1.0]
    assert leave_one_out(torch.tensor([NAN, 1.0, NAN, NAN]), 2).tolist() == [0.0] * 4


def test_grpo_normalises_within_each_group() -> None:
    # Group 1: mean 0.5, deviation sqrt(((-0.5)^2 + 0.5^2) / 1) = 0.7071. Group 2: no deviation, nothing to learn.
    advantages = group_normalized(torch.tensor([0.0, 1.0, 0.3, 0.3]), num_generations=2, epsilon=0.0)
    torch.testing.assert_close(advantages[:2], torch.tensor([-0.70711, 0.70711]), atol=1e-5, rtol=0)
    assert advantages[2:].isnan().all()  # 0 / 0: epsilon is what keeps such a group quiet
    by_default = group_normalized(torch.tensor([0.0, 1.0, 0.3, 0.3]), num_generations=2)  # 0.5 / (0.70711 + 0.0001)
    torch.testing.assert_close(by_default, torch.tensor([-0.70701, 0.70701, 0.0, 0.0]), atol=4e-6, rtol=0)


def test_grpo_divides_by_n_minus_1_of_the_known_rewards_and_adds_epsilon() -> None:
    # mean 1, deviations -1, 0, 1: variance 2 / 2 = 1.
    advantages = group_normalized(torch.tensor([0.0, 1.0, 2.0]), num_generations=3, epsilon=1.0)
    torch.testing.assert_close(advantages, torch.tensor([-0.5, 0.0, 0.5]))
    # Known of the first group: 0 and 2, mean 1, deviation sqrt(2).
    advantages = group_normalized(torch.tensor([0.0, NAN, 2.0, 0.0, 1.0, 2.0]), num_generations=3, epsilon=0.0)
    torch.testing.assert_close(advantages, torch.tensor([-0.70711, 0, 0.70711, -1, 0, 1]), atol=1e-5, rtol=0)
    assert group_normalized(torch.tensor([NAN, 1.0, NAN, NAN]), num_generations=2).tolist() == [0.0, 0.0, 0.0, 0.0]


def test_grpo_scales_by_the_group_the_batch_or_not_at_all() -> None:
    # Groups (0, 1) and (2, 3), means 0.5 and 2.5; of the batch: mean 1.5, deviation sqrt(5 / 3) = 1.29099.
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert group_normalized(rewards, 2, scale="none").tolist() == [-0.5, 0.5, -0.5, 0.5]
    batch = group_normalized(rewards, 2, epsilon=0.0, scale="batch")
    torch.testing.assert_close(batch, torch.tensor([-0.3873, 0.3873, -0.3873, 0.3873]), atol=1e-4, rtol=0)
    batch = group_normalized(rewards, 2, epsilon=1.0, scale="batch")  # 0.5 / 2.29099
    torch.testing.assert_close(batch, torch.tensor([-0.2182, 0.2182, -0.2182, 0.2182]), atol=1e-4, rtol=0)


# Two trajectories: policy tokens at 0, 1 | 4 with an observation of two tokens between, and at 0 alone.
MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 0]])


def test_ppo_rewards_the_last_policy_token_and_charges_each_for_the_kl() -> None:
    logps = torch.tensor([[-1.0, -2.0, 9.0, 9.0, -3.0], [-1.0, 9.0, 9.0, 9.0, 9.0]])
    reference = torch.tensor([[-2.0, -2.0, 0.0, 0.0, -1.0], [-1.5, 0.0, 0.0, 0.0, 0.0]])
    # k1 = log p - log p_ref: 1, 0, -2 and 0.5, times beta 0.1. The second search failed: no reward.
    rewards = token_rewards(torch.tensor([0.5, NAN]), MASK, logps, reference, beta=0.1)
    expected = torch.tensor([[-0.1, 0.0, 0.0, 0.0, 0.7], [-0.05, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)
    assert token_rewards(torch.tensor([0.5]), MASK[:1], logps[:1], None, beta=0.0).tolist() == [[0, 0, 0, 0, 0.5]]


def test_an_observation_is_one_transition_for_gae() -> None:
    rewards = torch.tensor([[0.0, 0.0, 7.0, 7.0, 1.0], [1.0, 7.0, 7.0, 7.0, 7.0]])
    values = torch.tensor([[0.5, 0.4, 9.0, 9.0, 0.8], [0.25, 9.0, 9.0, 9.0, 9.0]])
    # gamma 0.5, lambda 0.5. delta_4 = 1 - 0.8 = 0.2; delta_1 = 0.5 x 0.8 - 0.4 = 0; delta_0 = 0.5 x 0.4 - 0.5 = -0.3.
    # A_4 = 0.2; A_1 = 0 + 0.25 x 0.2 = 0.05; A_0 = -0.3 + 0.25 x 0.05 = -0.2875.
    advantages, returns = masked_gae(rewards, values, MASK, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-0.2875, 0.05, 0, 0, 0.2], [0.75, 0, 0, 0, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.2125, 0.45, 0, 0, 1.0], [1.0, 0, 0, 0, 0]]))


def test_with_gamma_and_lambda_1_the_return_is_the_sum_of_rewards_to_come() -> None:
    rewards = torch.tensor([[-0.25, 0.5, 7.0, 7.0, 1.0]])
    values = torch.tensor([[3.0, 0.5, 9.0, 9.0, -2.0]])
    advantages, returns = masked_gae(rewards, values, MASK[:1], gamma=1.0, lam=1.0)
    assert returns.tolist() == [[1.25, 1.5, 0.0, 0.0, 1.0]]
    assert advantages.tolist() == [[-1.75, 1.0, 0.0, 0.0, 3.0]]


def test_whitening_looks_at_policy_tokens_only() -> None:
    # 1, 2, 3 and 6: mean 3, variance (4 + 1 + 0 + 9) / 3.
    advantages = torch.tensor([[1.0, 2.0, 99.0, 99.0, 3.0], [6.0, 99.0, 99.0, 99.0, 99.0]])
    deviation = math.sqrt(14 / 3)
    expected = torch.tensor([[-2.0, -1.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0]]) / deviation
    torch.testing.assert_close(whiten(advantages, MASK, torch.tensor([1.0, 2.0, 3.0, 6.0])), expected)
    # With another rank's 0 and 0: mean 2, variance (1 + 0 + 1 + 16 + 4 + 4) / 5 = 5.2.
    everyone = torch.tensor([1.0, 2.0, 3.0, 6.0, 0.0, 0.0])
    torch.testing.assert_close(whiten(advantages, MASK, everyone)[1, 0].item(), 4 / math.sqrt(5.2))
    assert whiten(advantages[1:], MASK[1:], torch.tensor([6.0])).tolist() == [[0.0] * 5], "one token has no deviation"
    two = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(whiten(two[None], torch.ones(1, 2), two)[0], torch.tensor([-1.0, 1.0]) / math.sqrt(2))
    same = torch.tensor([2.0, 2.0])
    assert whiten(same[None], torch.ones(1, 2), same).tolist() == [[0.0, 0.0]], "epsilon keeps what is alike quiet"


TURNS = [
    SimpleNamespace(num_tokens=2, num_observation_tokens=1),
    SimpleNamespace(num_tokens=1, num_observation_tokens=0),
]
LONG = SimpleNamespace(turns=TURNS, completion_ids=[7] * 5)  # an end of sequence was appended
SHORT = SimpleNamespace(turns=TURNS[1:], completion_ids=[7])


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (torch.tensor([1.0, NAN]), [1.0, 0.0]),
        ([[1.0, 2.0], [3.0]], [[1, 1, 0, 2, 0], [3, 0, 0, 0, 0]]),  # one a turn
        ([[1, 2, 3, 4, NAN], 6], [[1, 2, 3, 4, 0], [6, 0, 0, 0, 0]]),  # one a token; one a trajectory
        ([torch.tensor(5.0), torch.tensor([6.0])], [[5, 5, 0, 5, 0], [6, 0, 0, 0, 0]]),
    ],
)
def test_a_users_advantages_are_spread_over_the_policys_tokens(returned: Any, expected: list[Any]) -> None:
    trajectories: Any = [LONG, SHORT]
    found = custom_advantages(lambda *_: returned, torch.zeros(2), trajectories, 1, slice(0, 2))
    assert found.tolist() == expected
    second = custom_advantages(lambda *_: returned, torch.zeros(2), trajectories, 1, slice(1, 2)).tolist()
    assert second == [row[:1] if isinstance(row, list) else row for row in expected[1:]], "of one rank"
