"""What a training log says about a rollout: how the trajectories went, what they scored, where the time went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from zerosearch.metrics import METRICS
from zerosearch.rollout.trajectory import OUTCOMES, Outcome, RolloutClock, Trajectory


@dataclass(frozen=True)
class TrajectoryFacts:
    """What the metrics need of a trajectory, small enough to be gathered from every rank."""

    counts: dict[str, int]
    outcome: Outcome | None
    noisy: tuple[bool, ...]  # of the searches whose engine has such a notion
    latencies_s: tuple[float, ...]
    logprob: float  # of all the policy's tokens together
    error: str

    @classmethod
    def of(cls, trajectory: Trajectory) -> TrajectoryFacts:
        searched = trajectory.searched_turns
        return cls(
            counts=trajectory.counts(),
            outcome=trajectory.outcome,
            noisy=tuple(turn.noisy for turn in searched if turn.noisy is not None),
            latencies_s=tuple(turn.latency_s for turn in searched if turn.latency_s is not None),
            logprob=sum(trajectory.logprobs),
            error=trajectory.error,
        )


def rollout_metrics(facts: Sequence[TrajectoryFacts], clocks: Sequence[RolloutClock]) -> dict[str, float]:
    """Return the log entries of a rollout, from the facts of all trajectories and the clock of each rank.

    Counts are means per trajectory, outcomes shares, latencies those of single searches, times means over ranks;
    `search/logprob` is the mean log-probability of a policy token, in nats, as it was sampled.
    """
    metrics = {f"search/{name}": fmean(fact.counts[name] for fact in facts) for name in facts[0].counts}
    metrics |= {f"search/{outcome}": fmean(fact.outcome == outcome for fact in facts) for outcome in OUTCOMES}
    tokens = sum(fact.counts["policy_tokens"] for fact in facts)
    metrics["search/logprob"] = sum(fact.logprob for fact in facts) / tokens if tokens else math.nan
    noisy = [coin for fact in facts for coin in fact.noisy]
    metrics["search/noisy_share"] = fmean(noisy) if noisy else 0.0
    latencies = sorted(latency for fact in facts for latency in fact.latencies_s)
    metrics["search/latency_median_s"] = median(latencies) if latencies else 0.0
    metrics["search/latency_p95_s"] = latencies[int(0.95 * (len(latencies) - 1))] if latencies else 0.0
    for name in ("rollout_s", "generating_s", "waiting_s", "idle_s"):
        metrics[f"time/{name}"] = fmean(getattr(clock, name) for clock in clocks)
    return metrics


def answer_scores(trajectory: Trajectory, golden_answers: Sequence[str]) -> dict[str, float]:
    """Return a trajectory's answer by each of `METRICS`; NaN, which TRL leaves out of means, if a search failed."""
    if trajectory.outcome == "failed_search":
        return dict.fromkeys(METRICS, math.nan)
    return {name: metric(trajectory.answer, golden_answers) for name, metric in METRICS.items()}
