"""Scores, intervals, comparisons and tables, on records written out."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from zerosearch.errors import UserError
from zerosearch.evaluation.scores import compare, summarize
from zerosearch.evaluation.tables import (
    comparison_table,
    markdown_tables,
    matrix_table,
    number,
    results_table,
    with_interval,
)


def record(dataset: str, answer: str | None, searches: int = 1, **changed: Any) -> dict[str, Any]:
    """Return a trajectory of a question of its own, whose golden answer is "x"."""
    return {
        "row": next(ROWS),
        "dataset": dataset,
        "answer": answer,
        "golden_answers": ["x"],
        "searches": searches,
        "turns": searches + 1,
        "outcome": "answered",
    } | changed


ROWS = count()
RECORDS = [
    record("nq", "the Jane Austen", golden_answers=["Jane Austen"]),  # EM 1, F1 1, cover 1
    record("nq", "Jane Austen of Steventon", 3, golden_answers=["Jane Austen"]),  # EM 0, F1 2/3, cover 1
    record("nq", None, searches=0, outcome="turns_exhausted"),  # all 0
    record("musique", "London", searches=2),  # all 0
]


def test_scores_are_means_over_questions_by_dataset_and_over_datasets() -> None:
    scores = summarize(RECORDS)
    means = {name: scores[name]["mean"] for name in ("em", "f1", "cover_em")}
    assert means == pytest.approx({"em": 0.25, "f1": 5 / 12, "cover_em": 0.5})
    assert (scores["n"], scores["answer_rate"], scores["searches"], scores["turns"]) == (4, 0.75, 1.5, 2.5)
    assert scores["outcomes"] == {"answered": 3, "turns_exhausted": 1, "truncated": 0, "failed_search": 0}
    nq, musique = scores["by_dataset"]["nq"], scores["by_dataset"]["musique"]
    assert (nq["n"], nq["em"]["mean"], nq["answer_rate"]) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (musique["n"], musique["em"]["mean"], musique["searches"]) == (1, 0.0, 2.0)
    assert scores["macro_average"]["em"]["mean"] == pytest.approx(1 / 6)  # (1/3 + 0) / 2
    assert scores["macro_average"]["cover_em"]["mean"] == pytest.approx(1 / 3)


def halves(dataset: str, n: int) -> list[dict[str, Any]]:
    """Return trajectories of which every other is right."""
    return [record(dataset, "x" if place % 2 else "y") for place in range(n)]


def test_intervals_hold_95_percent() -> None:
    # The normal approximation gives 0.5 +- 1.96 sqrt(0.25 / 400) = 0.5 +- 0.049.
    em = summarize(halves("nq", 400))["em"]
    assert (em["low"], em["high"]) == pytest.approx((0.451, 0.549), abs=0.006)
    # 100 of a set at 0.5, and one of a set that is always right: 0.75 +- 1.96 sqrt(0.25 / 100) / 2 = 0.75 +- 0.049.
    macro = summarize([*halves("half", 100), record("right", "x")])["macro_average"]["em"]
    assert (macro["mean"], macro["low"], macro["high"]) == pytest.approx((0.75, 0.701, 0.799), abs=0.011)


def test_intervals_repeat_with_the_seed_and_vanish_without_variation() -> None:
    records = [record("nq", "x" + " wrong" * place) for place in range(50)]
    assert summarize(records, seed=1) == summarize(records, seed=1)
    assert summarize(records, seed=1)["f1"] != summarize(records, seed=2)["f1"]
    assert summarize([record("nq", "x") for _ in range(5)])["em"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_the_table_has_a_line_a_dataset_and_their_mean() -> None:
    records = [*(record("nq", "x") for _ in range(5)), record("musique", None, searches=2)]
    assert results_table(summarize(records)) == (
        "dataset           n  EM [95 %]             F1 [95 %]             cover-EM  answered  searches  turns\n"
        "nq                5  1.000 [1.000, 1.000]  1.000 [1.000, 1.000]     1.000     1.000      1.00   2.00\n"
        "musique           1  0.000 [0.000, 0.000]  0.000 [0.000, 0.000]     0.000     0.000      2.00   3.00\n"
        "mean of datasets     0.500 [0.500, 0.500]  0.500 [0.500, 0.500]     0.500"
    )
    assert "mean of datasets" not in results_table(summarize([record("nq", "x")]))


def sampled(row: int, answers: list[str | None], dataset: str = "nq") -> list[dict[str, Any]]:
    """Return samples of one question."""
    return [record(dataset, answer, row=row, sample=place) for place, answer in enumerate(answers)]


def test_several_samples_of_a_question_count_as_one_question() -> None:
    scores = summarize([*sampled(0, ["x", "x", "x", None]), *sampled(1, ["y", "y", "y", "x"])])
    assert (scores["n"], scores["em"]["mean"], scores["answer_rate"]) == (2, (3 / 4 + 1 / 4) / 2, 7 / 8)
    # Two questions at 0.25 and 0.75: a draw of both has a mean in {0.25, 0.5, 0.75}.
    assert (scores["em"]["low"], scores["em"]["high"]) == (0.25, 0.75)
    assert sum(scores["outcomes"].values()) == 8


def test_pass_at_k_is_the_chance_that_one_of_k_samples_is_right() -> None:
    scores = summarize([*sampled(0, ["x", "y", "y"]), *sampled(1, ["y", None, "z"])])["pass_at_k"]
    # Of three samples one is right: one of two drawn is right in 2 of 3 cases. The other question never passes.
    assert {k: score["mean"] for k, score in scores.items()} == pytest.approx({"1": 1 / 6, "2": 1 / 3, "3": 1 / 2})
    assert (scores["3"]["low"], scores["3"]["high"]) == (0.0, 1.0)
    assert "pass_at_k" not in summarize(RECORDS)


def test_a_question_with_too_few_samples_is_left_out_of_pass_at_k() -> None:
    scores = summarize([*sampled(0, ["x", "y"]), *sampled(1, ["x"])])["pass_at_k"]
    assert (scores["1"]["mean"], scores["2"]["mean"]) == (3 / 4, 1.0)


def paired(answers: list[str | None], dataset: str = "nq") -> list[dict[str, Any]]:
    return [record(dataset, answer, id=str(n), question=f"{n}?") for n, answer in enumerate(answers)]


def test_two_runs_are_compared_question_by_question() -> None:
    first = paired(["x"] * 40 + ["y"] * 60)
    second = paired(["x"] * 40 + ["x"] * 20 + ["y"] * 40)
    found = compare(first, second[::-1])
    assert (found["better"], found["worse"], found["same"], found["unpaired"]) == (20, 0, 80, 0)
    assert found["em"]["mean"] == 0.2
    # Differences of 0 and 1, a fifth of them 1: 0.2 +- 1.96 sqrt(0.16 / 100) = 0.2 +- 0.078; unpaired, +- 0.138.
    assert found["em"]["low"] == pytest.approx(0.122, abs=0.012)
    assert found["em"]["high"] == pytest.approx(0.278, abs=0.012)
    assert compare(second, first)["em"]["mean"] == -0.2


def test_a_comparison_is_of_the_questions_that_both_runs_have() -> None:
    found = compare(paired(["x", "x", "y"]), paired(["y", "x"]))
    assert (found["n"], found["unpaired"], found["em"]["mean"]) == (2, 1, -0.5)
    with pytest.raises(UserError, match="share no question"):
        compare(paired(["x"]), paired(["x"], dataset="popqa"))
    with pytest.raises(UserError, match="the question '0' of nq comes twice"):
        compare(paired(["x"]) + paired(["x"]), paired(["x"]))


def test_a_comparison_averages_datasets() -> None:
    first = paired(["y"] * 8) + paired(["x"] * 2, "popqa")
    second = paired(["x"] * 8) + paired(["x"] * 2, "popqa")
    found = compare(first, second)
    assert (found["em"]["mean"], found["macro_average"]["em"]["mean"]) == (0.8, 0.5)
    low, high = (f"{found['em'][side]:+.3f}" for side in ("low", "high"))
    assert comparison_table(found) == (
        "dataset            n  EM difference [95 %]     F1 difference [95 %]     better  worse  same\n"
        "nq                 8  +1.000 [+1.000, +1.000]  +1.000 [+1.000, +1.000]       8      0     0\n"
        "popqa              2  +0.000 [+0.000, +0.000]  +0.000 [+0.000, +0.000]       0      0     2\n"
        f"all questions     10  +0.800 [{low}, {high}]  +0.800 [{low}, {high}]       8      0     2\n"
        "mean of datasets      +0.500 [+0.500, +0.500]  +0.500 [+0.500, +0.500]"
    )


def evaluated(*records: dict[str, Any], stopped: str | None = None) -> dict[str, Any]:
    return summarize(list(records)) | {"stopped": stopped}


EVALUATIONS = {
    "direct": evaluated(
        record("popqa", "y", searches=0), record("nq", None, searches=0), stopped="no more \x1b money"
    ),
    "policy": evaluated(record("popqa", "x", searches=2), record("nq", "x of"), record("mine", "x")),
}


def test_the_markdown_table_has_the_papers_shape() -> None:
    assert markdown_tables(EVALUATIONS) == (
        "Exact match by dataset, percent [95 % interval over questions].\n\n"
        "| method | NQ | PopQA | mine | Avg |\n"
        "|---|---:|---:|---:|---:|\n"
        "| direct | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] | - | 0.0 [0.0, 0.0] |\n"
        "| policy | 0.0 [0.0, 0.0] | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] | 66.7 [66.7, 66.7] |\n\n"
        "All questions together. Cover-EM is what the paper's code calls EM; answered in percent, searches and turns "
        "a trajectory.\n\n"
        "| method | n | EM | cover-EM | F1 | answered | searches | turns |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|\n"
        "| direct | 2 | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] | 50.0 | 0.00 | 1.00 |\n"
        "| policy | 3 | 66.7 [0.0, 100.0] | 100.0 [100.0, 100.0] | 88.9 [66.7, 100.0] | 100.0 | 1.33 | 2.33 |\n\n"
        "direct: no more \\x1b money.\n"
    )


def test_the_markdown_has_pass_at_k_where_it_is_known() -> None:
    text = markdown_tables({"policy": evaluated(*sampled(0, ["x", "y"])), "direct": EVALUATIONS["direct"]})
    assert (
        "| method | pass@1 | pass@2 |\n|---|---:|---:|\n| policy | 50.0 [50.0, 50.0] | 100.0 [100.0, 100.0] |" in text
    )


def test_several_evaluations_fit_a_terminal() -> None:
    assert matrix_table(EVALUATIONS) == (
        "evaluation  n  EM [95 %]             F1 [95 %]             cover-EM  answered  searches  turns\n"
        "direct      2  0.000 [0.000, 0.000]  0.000 [0.000, 0.000]     0.000     0.500      0.00   1.00\n"
        "policy      3  0.667 [0.000, 1.000]  0.889 [0.667, 1.000]     1.000     1.000      1.33   2.33"
    )


def test_numbers_are_written_as_people_read_them() -> None:
    values = (0.5, 1, {"mean": 0.25}, None, float("nan"), "x", True)
    assert [number(value) for value in values] == ["0.500", "1.000", "0.250", "n/a", "n/a", "n/a", "n/a"]
    assert with_interval({"mean": 0.5, "low": 0.25, "high": 0.75}, 2, sign="+") == "+0.50 [+0.25, +0.75]"
    assert with_interval({"mean": 0.5, "low": 0.1, "high": float("nan")}) == "0.500"
