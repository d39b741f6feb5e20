"""The page and the terminal's table of a run. Both show what its files hold: differences, counts and means at most."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zerosearch import __version__
from zerosearch.evaluation.tables import NOT_A_NUMBER, aligned, interval, is_finite, number, with_interval
from zerosearch.report.plots import SMOOTH_FROM, SMOOTH_STEPS, draw_training
from zerosearch.report.run import POLICIES, SIMULATED, Run, Scores, read_run
from zerosearch.report.transcripts import pieces, read_examples

REPORT_NAME = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run's folder and return its path; the page says what is missing.

    Raises `UserError` if the folder holds no run, or a file in it is malformed.
    """
    import jinja2

    run = read_run(run_dir)
    examples = read_examples(run.folder, run.engine)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # documents and answers are untrusted text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, duration=duration, interval=interval, change=change, path=shown_path, pieces=pieces
    )
    environment.tests["finite"] = is_finite
    page = environment.get_template("page.html").render(
        run=run,
        simulated=SIMULATED,
        before=run.headline("before"),
        after=run.headline("after"),
        datasets=_by_dataset(run),
        drawings=draw_training(run.log) if run.log else [],
        smoothed=(SMOOTH_FROM, SMOOTH_STEPS),
        examples=examples,
        made=dict(_made(run)),
        notes=[*run.notes(), *examples.notes],
        version=__version__,
    )
    path = run.folder / REPORT_NAME
    path.write_text(page, encoding="utf-8")
    return path


def summary_table(run_dir: Path) -> str:
    """Return the scores of a run as plain text for a terminal of 100 columns, a line to an evaluation."""
    run = read_run(run_dir)
    rows = [["engine", "policy", "EM [95 %]", "F1 [95 %]", "answered", "searches", "turns", "n"]]
    for engine, policy, scores in run.evaluations:
        em, f1 = with_interval(scores.get("em")), with_interval(scores.get("f1"))
        rates = number(scores.get("answer_rate")), number(scores.get("searches"), 2), number(scores.get("turns"), 2)
        rows.append([engine, policy, em, f1, *rates, str(scores.get("n", NOT_A_NUMBER))])
    lines = [aligned(rows)] if run.scores else []
    if run.results:
        queries, steps, generator, seed = (
            run.results.get(key, NOT_A_NUMBER)
            for key in ("real_engine_queries_in_training", "steps", "generator", "seed")
        )
        training, everything = (duration(run.results.get(key)) for key in ("train_seconds", "total_seconds"))
        lines.append(f"real-engine queries in training: {queries}")
        lines.append(
            f"{steps} steps in {training}, everything in {everything}; generated with {generator}, seed {seed}"
        )
    return "\n".join([*lines, *run.notes()])


def change(before: Any, after: Any, digits: int = 3) -> str:
    """Write after minus before with its sign, or nothing if one of them is not a number."""
    first, last = (value.get("mean") if isinstance(value, dict) else value for value in (before, after))
    return f"{last - first:+.{digits}f}" if is_finite(first) and is_finite(last) else ""


def duration(seconds: Any) -> str:
    """Write seconds as "2 min 41 s"."""
    if not is_finite(seconds):
        return NOT_A_NUMBER
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def shown_path(path: Any) -> str:
    """Write a path below the current folder from there on, and anything else as it is."""
    text = str(path)
    return os.path.relpath(text) if Path(text).is_absolute() and Path(text).is_relative_to(Path.cwd()) else text


def _by_dataset(run: Run) -> dict[str, dict[str, Scores]]:
    """Return the scores with the headline's engine, dataset by dataset; a side that was not evaluated is empty."""
    sides = {policy: run.headline(policy).get("by_dataset") or {} for policy in POLICIES}
    return {
        name: {policy: sides[policy].get(name, {}) for policy in POLICIES} for name in sides["before"] | sides["after"]
    }


def _made(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what is known of how the run was made, as (term, text)."""
    for term, key in (("seed", "seed"), ("steps", "steps"), ("generated with", "generator")):
        if key in run.results:
            yield term, str(run.results[key])
    for term, key in (("training", "train_seconds"), ("everything", "total_seconds")):
        if key in run.results:
            yield term, duration(run.results[key])
    for policy in POLICIES:
        yield (
            f"policy {policy}",
            _joined(shown_path(s["model"]) for _, one, s in run.evaluations if one == policy and "model" in s),
        )
    yield "evaluated on", _joined(scores["dataset"] for *_, scores in run.evaluations if "dataset" in scores)
    seconds = [scores.get("seconds") for *_, scores in run.evaluations]
    if seconds and all(map(is_finite, seconds)):
        yield f"{len(seconds)} evaluations", duration(sum(seconds))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU cores where this page was written", str(cores)  # no file says where the run was made
    found = [scores.get("versions") or {} for *_, scores in run.evaluations]
    for package in sorted({package for versions in found for package in versions}):
        yield package, _joined(versions[package] for versions in found if package in versions)


def _joined(values: Iterator[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
