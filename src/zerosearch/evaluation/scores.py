"""What trajectory records come to: scores with intervals, pass@k, and the difference of two runs.

A question is the unit: its samples are averaged first, and intervals are bootstrap percentiles over questions. They
say how much a score would move with other questions of the same kind, not with another training run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from zerosearch.errors import UserError
from zerosearch.intervals import INTERVAL, resampled_means
from zerosearch.metrics import METRICS
from zerosearch.rollout.trajectory import OUTCOMES

EM = list(METRICS).index("em")  # the column of a table of scores

Record = dict[str, Any]
Samples = list[Record]  # of one question
Scores = dict[str, dict[str, float]]  # metric -> mean, low, high


def summarize(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return the scores of trajectory records: over all questions, by dataset, and as the plain mean of the datasets.

    `em`, `f1` and `cover_em` are `{"mean", "low", "high"}` with a bootstrap 95 % interval; `answer_rate` is a share,
    `searches` and `turns` are means a trajectory, `n` counts questions and `outcomes` trajectories. Where a question
    has several samples, `pass_at_k` follows. The same seed gives the same intervals.
    """
    if not records:
        raise ValueError("no records to summarize")
    by_dataset: dict[str, list[Samples]] = {}
    for samples in of_questions(records):
        by_dataset.setdefault(samples[0]["dataset"], []).append(samples)
    rng = np.random.default_rng(seed)
    summary = averages({name: score_table(questions) for name, questions in by_dataset.items()}, rng)
    for name, questions in by_dataset.items():
        summary["by_dataset"][name] |= counts(questions)
    questions = [samples for members in by_dataset.values() for samples in members]
    if max(map(len, questions)) > 1:
        summary["pass_at_k"] = pass_at_k(questions, rng)
    return summary | counts(questions)


def compare(first: Sequence[Record], second: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return how much better the second run is than the first on the questions that both have, with 95 % intervals.

    Paired: the differences of single questions are resampled, which is sharper than two intervals side by side.
    `better`, `worse` and `same` count questions by exact match; `by_dataset` and `macro_average` as in `summarize`.
    Raises `UserError` if the runs share no question.
    """
    before, after = _by_name(first), _by_name(second)
    shared: dict[str, list[tuple[str, str, str]]] = {}  # dataset -> questions
    for name in before:
        if name in after:
            shared.setdefault(name[0], []).append(name)
    if not shared:
        raise UserError("the two runs share no question: compare runs of the same data")
    differences = {
        dataset: score_table([after[name] for name in names]) - score_table([before[name] for name in names])
        for dataset, names in shared.items()
    }
    found = averages(differences, np.random.default_rng(seed))
    for dataset, rows in differences.items():
        found["by_dataset"][dataset] |= _won(rows)
    every = np.concatenate(list(differences.values()))  # (questions, metrics)
    return found | _won(every) | {"unpaired": len(before) + len(after) - 2 * len(every)}


def averages(by_dataset: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, Any]:
    """Return means with intervals over all questions, of the plain mean of the datasets, and of each dataset.

    `by_dataset` holds a table of scores for each dataset, (questions, metrics).
    """
    means = {name: scores.mean(axis=0) for name, scores in by_dataset.items()}  # (metrics,) each
    resampled = {name: resampled_means(scores, rng) for name, scores in by_dataset.items()}  # (resamples, metrics)
    every = np.concatenate(list(by_dataset.values()))
    return {
        **with_intervals(every.mean(axis=0), resampled_means(every, rng)),
        "macro_average": with_intervals(np.mean(list(means.values()), 0), np.mean(list(resampled.values()), 0)),
        "by_dataset": {name: with_intervals(means[name], resampled[name]) for name in by_dataset},
    }


def of_questions(records: Iterable[Record]) -> list[Samples]:
    """Return the records by question, in their order."""
    grouped: dict[int, Samples] = {}
    for record in records:
        grouped.setdefault(record["row"], []).append(record)
    return list(grouped.values())


def score_table(questions: Sequence[Samples]) -> np.ndarray:
    """Score every question by every metric, the mean of its samples; (questions, metrics)."""
    return np.array([np.mean([_scores(record) for record in samples], axis=0) for samples in questions])


def _scores(record: Record) -> list[float]:
    return [metric(record["answer"], record["golden_answers"]) for metric in METRICS.values()]


def with_intervals(means: np.ndarray, resampled: np.ndarray, names: Iterable[str] = METRICS) -> Scores:
    """Return `{"mean", "low", "high"}` for each name, from means (names,) and resampled means (..., names)."""
    low, high = np.percentile(resampled, INTERVAL, axis=0)
    return {
        name: {"mean": float(means[place]), "low": float(low[place]), "high": float(high[place])}
        for place, name in enumerate(names)
    }


def pass_at_k(questions: Sequence[Samples], rng: np.random.Generator) -> Scores:
    """Return how likely one of k samples is an exact match, for k = 1, 2, 4, ... and the number of samples.

    Unbiased: of n samples with c right, 1 - C(n - c, k) / C(n, k). A question with fewer than k samples is left out.
    """
    num_right = [(len(samples), sum(int(_scores(one)[EM]) for one in samples)) for samples in questions]
    most = max(map(len, questions))
    found: Scores = {}
    for k in sorted({2**power for power in range(most.bit_length())} | {most}):
        passed = np.array([[1.0 - comb(n - right, k) / comb(n, k)] for n, right in num_right if n >= k])
        found |= with_intervals(passed.mean(axis=0), resampled_means(passed, rng), [str(k)])
    return found


def counts(questions: Sequence[Samples]) -> dict[str, Any]:
    """Return what records tell besides scores: how many, how many answered, searches and turns, how they ended."""
    records = [record for samples in questions for record in samples]
    ended = Counter(record["outcome"] for record in records)
    return {
        "n": len(questions),
        "answer_rate": sum(record["answer"] is not None for record in records) / len(records),
        "searches": sum(record["searches"] for record in records) / len(records),
        "turns": sum(record["turns"] for record in records) / len(records),
        "outcomes": {outcome: ended[outcome] for outcome in OUTCOMES},
    }


def _by_name(records: Sequence[Record]) -> dict[tuple[str, str, str], Samples]:
    """Return the samples of each question by what names it; a question that comes twice is refused."""
    found: dict[tuple[str, str, str], Samples] = {}
    for samples in of_questions(records):
        name = (str(samples[0]["dataset"]), str(samples[0]["id"]), samples[0]["question"])
        if name in found:
            raise UserError(f"the question {name[1]!r} of {name[0]} comes twice, so runs cannot be compared by it")
        found[name] = samples
    return found


def _won(differences: np.ndarray) -> dict[str, int]:
    """Count the questions by the sign of their difference of exact match."""
    em = differences[:, EM]
    return {
        "n": len(em),
        "better": int((em > 0).sum()),
        "worse": int((em < 0).sum()),
        "same": int((em == 0).sum()),
    }
