"""The page and the terminal's table of a run. Both show what its files hold: differences, counts and means at most."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from zerosearch import __version__
from zerosearch.evaluation.tables import NOT_A_NUMBER, interval, is_finite, matrix_table, number
from zerosearch.files import write_text
from zerosearch.report.plots import SMOOTH_FROM, SMOOTH_STEPS, draw_training
from zerosearch.report.run import POLICIES, SIMULATED, Run, Scores, read_run
from zerosearch.report.transcripts import pieces, read_examples
from zerosearch.text import printable

REPORT_NAME = "report.html"
FACTS = {"seed": "seed", "steps": "steps", "generator": "generated with"}  # of results.json, and how the page says it
DURATIONS = {"train_seconds": "training", "total_seconds": "everything"}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run's folder and return its path; the page says what is missing.

    Raises `UserError` if the folder holds no run, or a file in it is malformed.
    """
    run = read_run(run_dir)
    examples = read_examples(run.folder, run.engine)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # documents and answers are untrusted text
        finalize=lambda value: printable(value) if type(value) is str else value,  # no Markup, which is ours
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
        made=_made(run),
        notes=run.notes(),
        version=__version__,
    )
    path = run.folder / REPORT_NAME
    write_text(path, page)
    return path


def summary_table(run_dir: Path) -> str:
    """Return the scores of a run as plain text for a terminal, a line to an evaluation, and what the run took."""
    run = read_run(run_dir)
    found = {f"{engine} {policy}": scores for engine, policy, scores in run.evaluations}
    lines = [matrix_table(found)] if found else []
    if run.results:
        known = run.results
        lines.append(f"real-engine queries in training: {known.get('real_engine_queries_in_training', NOT_A_NUMBER)}")
        lines.append("; ".join(f"{term} {text}" for term, text in _facts(known).items()))
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


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
    """Return what results.json says of the run besides scores, a text a term."""
    facts = {term: str(results[key]) for key, term in FACTS.items() if key in results}
    return facts | {term: duration(results[key]) for key, term in DURATIONS.items() if key in results}


def _made(run: Run) -> dict[str, str]:
    """Return what is known of how the run was made, a text a term."""
    known, found = run.results, [scores for *_, scores in run.evaluations]
    made = _facts(known)
    for policy in POLICIES:
        models = (scores.get("model", "") for _, one, scores in run.evaluations if one == policy)
        made[f"policy {policy}"] = _joined(map(shown_path, models))
    made["evaluated on"] = _joined(scores.get("dataset", "") for scores in found)
    versions = [scores.get("versions") or {} for scores in found]
    return made | {name: _joined(one.get(name, "") for one in versions) for name in sorted(set().union(*versions))}


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value))
