"""What trajectory records come to: scores with intervals, pass@k, and the difference of two runs.

A question is the unit: its samples are averaged first, and intervals are bootstrap percentiles over questions. They
say how much a score would move with other questions of the same kind, not with another training run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from zerosearch.errors import UserError
from zerosearch.intervals import INTERVAL, resampled_means
from zerosearch.metrics import cover_exact_match, exact_match, f1
from zerosearch.rollout.trajectory import OUTCOMES

METRICS = {"em": exact_match, "f1": f1, "cover_em": cover_exact_match}

Record = dict[str, Any]
Scores = dict[str, dict[str, float]]  # metric -> mean, low, high


def summarize(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return the scores of trajectory records: over all questions, by dataset, and as the plain mean of the datasets.

    `em`, `f1` and `cover_em` are `{"mean", "low", "high"}` with a bootstrap 95 % interval; `answer_rate` is a share,
    `searches` and `turns` are means a trajectory, `n` counts questions and `outcomes` trajectories. Where a question
    has several samples, `pass_at_k` follows. The same seed gives the same intervals.
    """
    if not records:
        raise ValueError("no records to summarize")
    by_dataset: dict[str, list[list[Record]]] = {}
    for samples in of_questions(records):
        by_dataset.setdefault(samples[0]["dataset"], []).append(samples)
    rng = np.random.default_rng(seed)
    means, resampled, sets = [], [], {}
    for name, questions in by_dataset.items():
        scores = score_table(questions)
        means.append(scores.mean(axis=0))  # (metrics,)
        resampled.append(resampled_means(scores, rng))  # (resamples, metrics)
        sets[name] = {**counts(questions), **with_intervals(means[-1], resampled[-1])}
    questions = [samples for members in by_dataset.values() for samples in members]
    scores = score_table(questions)
    summary = {
        **with_intervals(scores.mean(axis=0), resampled_means(scores, rng)),
        **counts(questions),
        "macro_average": with_intervals(np.mean(means, axis=0), np.mean(resampled, axis=0)),
        "by_dataset": sets,
    }
    if max(map(len, questions)) > 1:
        summary["pass_at_k"] = pass_at_k(questions, rng)
    return summary


def of_questions(records: Sequence[Record]) -> list[list[Record]]:
    """Return the records by question, in their order; a record without a `row` is a question of its own."""
    grouped: dict[Any, list[Record]] = {}
    for place, record in enumerate(records):
        grouped.setdefault(("row", record["row"]) if "row" in record else place, []).append(record)
    return list(grouped.values())


def score_table(questions: Sequence[Sequence[Record]]) -> np.ndarray:
    """Score every question by every metric, the mean of its samples; (questions, metrics)."""
    return np.array(
        [
            np.mean(
                [[metric(one["answer"], one["golden_answers"]) for metric in METRICS.values()] for one in samples], 0
            )
            for samples in questions
        ]
    )


def with_intervals(means: np.ndarray, resampled: np.ndarray, names: Sequence[str] = tuple(METRICS)) -> Scores:
    """Return `{"mean", "low", "high"}` for each name, from means (names,) and resampled means (..., names)."""
    low, high = np.percentile(resampled, INTERVAL, axis=0)
    return {
        name: {"mean": float(means[place]), "low": float(low[place]), "high": float(high[place])}
        for place, name in enumerate(names)
    }


def pass_at_k(questions: Sequence[Sequence[Record]], rng: np.random.Generator) -> Scores:
    """Return how likely one of k samples is an exact match, for k = 1, 2, 4, ... and the number of samples.

    Unbiased: of n samples with c right, 1 - C(n - c, k) / C(n, k). A question with fewer than k samples is left out.
    """
    most = max(map(len, questions))
    found: Scores = {}
    for k in sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most}):
        passed = []
        for samples in questions:
            n, right = len(samples), sum(exact_match(one["answer"], one["golden_answers"]) for one in samples)
            if n >= k:
                passed.append([1.0 - comb(n - int(right), k) / comb(n, k)])
        table = np.array(passed)  # (questions, 1)
        found |= with_intervals(table.mean(axis=0), resampled_means(table, rng), [str(k)])
    return found


def counts(questions: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Return what records tell besides scores: how many, how many answered, searches and turns, how they ended."""
    records = [record for samples in questions for record in samples]
    size = len(records)
    ended = Counter(record["outcome"] for record in records)
    return {
        "n": len(questions),
        "answer_rate": sum(record["answer"] is not None for record in records) / size,
        "searches": sum(record["searches"] for record in records) / size,
        "turns": sum(record["turns"] for record in records) / size,
        "outcomes": {outcome: ended[outcome] for outcome in OUTCOMES},
    }


def compare(first: Sequence[Record], second: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return how much better the second run is than the first on the questions that both have, with 95 % intervals.

    Paired: the differences of single questions are resampled, which is sharper than two intervals side by side.
    `better`, `worse` and `same` count questions by exact match; `by_dataset` and `macro_average` as in `summarize`.
    Raises `UserError` if the runs share no question.
    """
    ours, theirs = _by_key(first), _by_key(second)
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise UserError("the two runs share no question: compare runs of the same data")
    differences = score_table([theirs[key] for key in shared]) - score_table([ours[key] for key in shared])
    rng = np.random.default_rng(seed)
    datasets = np.array([key[0] for key in shared])
    means, resampled, sets = [], [], {}
    for name in dict.fromkeys(datasets.tolist()):
        members = differences[datasets == name]
        means.append(members.mean(axis=0))
        resampled.append(resampled_means(members, rng))
        sets[name] = {**_won(members), **with_intervals(means[-1], resampled[-1])}
    return {
        **with_intervals(differences.mean(axis=0), resampled_means(differences, rng)),
        **_won(differences),
        "unpaired": len(ours) + len(theirs) - 2 * len(shared),
        "macro_average": with_intervals(np.mean(means, axis=0), np.mean(resampled, axis=0)),
        "by_dataset": sets,
    }


def _by_key(records: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Return the samples of each question by what names it; a question that comes twice is refused."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for samples in of_questions(records):
        key = (str(samples[0]["dataset"]), str(samples[0]["id"]), samples[0]["question"])
        if key in found:
            raise UserError(f"the question {key[1]!r} of {key[0]} comes twice, so runs cannot be compared by it")
        found[key] = samples
    return found


def _won(differences: np.ndarray) -> Mapping[str, int]:
    em = differences[:, list(METRICS).index("em")]
    return {
        "n": len(em),
        "better": int((em > 0).sum()),
        "worse": int((em < 0).sum()),
        "same": int((em == 0).sum()),
    }
