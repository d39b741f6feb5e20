"""Results for people: tables for the terminal, and tables in the paper's shape in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from zerosearch.data import BENCHMARKS
from zerosearch.text import printable

Results = Mapping[str, Any]  # what results.json holds

NOT_A_NUMBER = "n/a"


def results_table(results: Results) -> str:
    """Return the results as a short table: a line a dataset, and their mean where there are several."""
    lines = dict(results["by_dataset"])
    if len(lines) > 1:
        lines["mean of datasets"] = results["macro_average"]
    return _scores_table("dataset", lines)


def matrix_table(evaluations: Mapping[str, Results]) -> str:
    """Return several evaluations as a short table: a line each, over all its questions."""
    return _scores_table("evaluation", evaluations)


def comparison_table(differences: Results) -> str:
    """Return a paired comparison as a table, a line a dataset, then all: how much better the second run is."""
    lines = {**differences["by_dataset"], "all questions": differences}
    if len(differences["by_dataset"]) > 1:
        lines["mean of datasets"] = differences["macro_average"]
    rows = [["dataset", "n", "EM difference [95 %]", "F1 difference [95 %]", "better", "worse", "same"]]
    for name, found in lines.items():
        n, better, worse, same = (str(found.get(key, "")) for key in ("n", "better", "worse", "same"))
        em, f1 = (with_interval(found[key], sign="+") for key in ("em", "f1"))
        rows.append([name, n, em, f1, better, worse, same])
    return aligned(rows)


def markdown_tables(evaluations: Mapping[str, Results]) -> str:
    """Return evaluations by name as Markdown: EM in percent in the shape of the paper's Table 3, then all the rest.

    A cell is "mean [low, high]", a 95 % interval; the average is the plain mean of the datasets, as in the paper.
    """
    found = {name for results in evaluations.values() for name in results["by_dataset"]}
    columns = [name for name in BENCHMARKS if name in found] + sorted(found - BENCHMARKS.keys())
    titles = [BENCHMARKS[name].title if name in BENCHMARKS else name for name in columns]
    table = [["method", *titles, *(["Avg"] if len(columns) > 1 else [])]]
    rest = [["method", "n", "EM", "cover-EM", "F1", "answered", "searches", "turns"]]
    for name, results in evaluations.items():
        cells = [percent(results["by_dataset"].get(column, {}).get("em")) for column in columns]
        table.append([name, *cells, *([percent(results["macro_average"]["em"])] if len(columns) > 1 else [])])
        scores = [percent(results[metric]) for metric in ("em", "cover_em", "f1")]
        answered, searches, turns = number(100 * results["answer_rate"], 1), *_rates(results)[1:]
        rest.append([name, str(results["n"]), *scores, answered, searches, turns])
    parts = [
        "Exact match by dataset, percent [95 % interval over questions].",
        markdown(table),
        "All questions together. Cover-EM is what the paper's code calls EM; answered in percent, searches and turns "
        "a trajectory.",
        markdown(rest),
        *(printable(f"{name}: {one['stopped']}.") for name, one in evaluations.items() if one.get("stopped")),
    ]
    passes = {name: results["pass_at_k"] for name, results in evaluations.items() if "pass_at_k" in results}
    if passes:
        ks = sorted({k for scores in passes.values() for k in scores}, key=int)
        lines = ([name, *(percent(scores.get(k)) for k in ks)] for name, scores in passes.items())
        head = ["method", *(f"pass@{k}" for k in ks)]
        parts += ["At least one of k samples an exact match.", markdown([head, *lines])]
    return "\n\n".join(parts) + "\n"


def measured_table(results: Results) -> str:
    """Return the `rows` of a measurement as Markdown; its `columns` say which, the title and the digits.

    A number is written with its digits, `{mean, low, high}` with its interval, text as it is, and null as "-".
    """
    columns = results["columns"]
    rows = [[_measured(row[one["key"]], one.get("digits", 3)) for one in columns] for row in results["rows"]]
    return markdown([[one["title"] for one in columns], *rows])


def _measured(value: Any, digits: int) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int):
        return f"{value:,}"
    return with_interval(value, digits) if isinstance(value, dict) else number(value, digits)


def is_finite(value: object) -> TypeGuard[float]:
    """Say whether a value is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: object, digits: int = 3, sign: str = "") -> str:
    """Write a number, or the mean of `{mean, low, high}`; what is missing or not finite is "n/a"."""
    value = value.get("mean") if isinstance(value, Mapping) else value
    return f"{value:{sign}.{digits}f}" if is_finite(value) else NOT_A_NUMBER


def interval(score: object, digits: int = 3, sign: str = "") -> str:
    """Write the interval of `{mean, low, high}` as "[low, high]", or nothing if there is none."""
    low, high = (score.get("low"), score.get("high")) if isinstance(score, Mapping) else (None, None)
    return f"[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]" if is_finite(low) and is_finite(high) else ""


def with_interval(score: object, digits: int = 3, sign: str = "") -> str:
    """Write `{mean, low, high}` as "mean [low, high]"; `sign` "+" writes the sign of positive numbers."""
    return f"{number(score, digits, sign)} {interval(score, digits, sign)}".rstrip()


def percent(score: Mapping[str, float] | None) -> str:
    """Write `{mean, low, high}` in percent, "-" for None."""
    return "-" if score is None else with_interval({name: 100 * value for name, value in score.items()}, digits=1)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the head first, in columns for a terminal: names and intervals flush left, numbers flush right."""
    columns = []
    for place, column in enumerate(zip(*(map(_in_one_line, row) for row in rows), strict=True)):
        side = "<" if place == 0 or "[" in column[0] else ">"
        columns.append([f"{cell:{side}{max(map(len, column))}}" for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Return rows, the head first, as a Markdown table."""
    cells = [[_in_one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    head, *lines = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, f"|---{'|---:' * (len(cells[0]) - 1)}|", *lines])


def _in_one_line(cell: str) -> str:
    """Return a cell, which may name a dataset or a model of others, so that it can be printed."""
    return printable(" ".join(cell.split()))


def _scores_table(what: str, lines: Mapping[str, Results]) -> str:
    rows = [[what, "n", "EM [95 %]", "F1 [95 %]", "cover-EM", "answered", "searches", "turns"]]
    for name, results in lines.items():
        em, f1 = (with_interval(results.get(metric)) for metric in ("em", "f1"))
        rows.append([name, str(results.get("n") or ""), em, f1, number(results.get("cover_em")), *_rates(results)])
    return aligned(rows)


def _rates(results: Results) -> list[str]:
    digits = {"answer_rate": 3, "searches": 2, "turns": 2}
    return [number(results[name], digits[name]) if name in results else "" for name in digits]
