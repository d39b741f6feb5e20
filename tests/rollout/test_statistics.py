"""The numbers that a training log shows of a rollout, worked out by hand."""

from __future__ import annotations

import pytest

from zerosearch.rollout.statistics import TrajectoryFacts, rollout_metrics
from zerosearch.rollout.trajectory import RolloutClock, Trajectory, Turn


def test_rollout_metrics_by_hand() -> None:
    turns = [
        Turn("", "search", "q", 3, noisy=True, retries=2, short_replies=1, latency_s=0.1),
        Turn("", "invalid", "", 2),
        Turn("", "search", "q", 3, noisy=False, latency_s=0.3),
        Turn("", "answer", "x", 4),
    ]
    turns[0].num_observation_tokens = 10
    turns[0].is_observation_cut = turns[1].is_cut = turns[2].is_observation_cut = True
    one = Trajectory([1], 0.5, turns=turns, outcome="answered", logprobs=[-3.0, 0.0, -6.0])
    other = Trajectory([1], 0.5, turns=[Turn("", "search", "q", 6, latency_s=0.2)], outcome="failed_search")
    facts = [TrajectoryFacts.of(one), TrajectoryFacts.of(other)]
    metrics = rollout_metrics(facts, [RolloutClock(4.0, 2.0, 1.0), RolloutClock(2.0, 2.0, 0.0)])
    assert metrics == pytest.approx(
        {
            "search/searches": 1.5,
            "search/turns": 2.5,
            "search/policy_tokens": 9.0,
            "search/observation_tokens": 5.0,
            "search/invalid_actions": 0.5,
            "search/cut_turns": 0.5,
            "search/cut_observations": 1.0,
            "search/retries": 1.0,
            "search/short_replies": 0.5,
            "search/answered": 0.5,
            "search/turns_exhausted": 0.0,
            "search/truncated": 0.0,
            "search/failed_search": 0.5,
            "search/logprob": -0.5,
            "search/noisy_share": 0.5,
            "search/latency_median_s": 0.2,
            "search/latency_p95_s": 0.2,
            "time/rollout_s": 3.0,
            "time/generating_s": 2.0,
            "time/waiting_s": 0.5,
            "time/idle_s": 0.5,
        }
    )
