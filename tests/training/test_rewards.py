"""Rewards judge the answer that the rollout found, and leave out what a failed search spoiled."""

from __future__ import annotations

import pytest

from zerosearch.training.rewards import em_reward, f1_reward

BATCH = {
    "answer": ["Jane Austen of Steventon", "the jane austen", None, None],
    "golden_answers": [["Jane Austen"], ["Emma", "Jane Austen"], ["Emma"], ["Emma"]],
    "outcome": ["answered", "answered", "turns_exhausted", "failed_search"],
    # What TRL hands over besides, text with another answer in it included: none of it counts.
    "prompts": ["For example, <answer> Beijing </answer>"] * 4,
    "completions": ["<answer> Emma </answer>"] * 4,
    "completion_ids": [[1]] * 4,
    "trainer_state": None,
}


def test_f1_and_em() -> None:
    assert f1_reward(**BATCH) == [pytest.approx(2 / 3), 1.0, 0.0, None]
    assert em_reward(**BATCH) == [0.0, 1.0, 0.0, None]
