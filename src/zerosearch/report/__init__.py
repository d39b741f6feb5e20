"""The report of a run: one HTML page that needs no network, and a short table for the terminal.

Reads what training and evaluation left in a folder, and computes nothing but differences, counts and means of it:

    results.json                                         the run in short
    policy/trainer_state.json                            the log over steps
    policy/trajectories.jsonl                            trajectories sampled in training
    evaluation/{before,after}-ENGINE/results.json        scores with their intervals
    evaluation/{before,after}-ENGINE/trajectories.jsonl  what the policy did

What is missing is left out, and the page says so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
from markupsafe import Markup

from zerosearch import __version__
from zerosearch.errors import UserError
from zerosearch.report.panels import PANELS, draw_panel, draw_time
from zerosearch.report.plots import SMOOTH_FROM, SMOOTH_STEPS, interval_plot
from zerosearch.report.transcripts import read_examples

REPORT_NAME = "report.html"
TEMPLATE_NAME = "page.html"  # beside this file, with page.css
SIMULATED = "simulated"  # the one engine that is not real
POLICIES = ("before", "after")  # training
NOT_A_NUMBER = "n/a"
ROUNDING = 1e-3  # a difference up to this between two files is rounding

Scores = dict[str, Any]  # the contents of an evaluation's results.json


@dataclass(frozen=True)
class Run:
    """What a run left in its folder; what is missing is empty."""

    folder: Path
    results: dict[str, Any]
    log: list[dict[str, Any]]  # one entry a logged step, in order
    scores: dict[str, dict[str, Scores]]  # engine, then "before" or "after"; real engines come first

    @property
    def engine(self) -> str | None:
        """The engine of the headline: the one results.json names, else the first evaluated."""
        return self.results.get("engine") or next(iter(self.scores), None)

    def evaluations(self) -> Iterator[tuple[str, str, Scores]]:
        """Yield (engine, "before" or "after", scores), real engines first."""
        for engine, by_policy in self.scores.items():
            for policy in POLICIES:
                if policy in by_policy:
                    yield engine, policy, by_policy[policy]

    def headline(self, policy: str) -> Scores:
        """Return the scores before or after training that the page opens with; empty if there are none."""
        evaluated = self.scores.get(self.engine or "", {}).get(policy)
        if evaluated is not None:
            return evaluated
        mean = self.results.get(f"em_{policy}")
        return {} if mean is None else {"em": {"mean": mean}}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run's folder and return its path.

    Raises `UserError` if the folder holds no run, or a file in it is not what it should be.
    """
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
        number=number, duration=duration, interval=interval_text, change=change_text, path=shown_path
    )
    page = environment.get_template(TEMPLATE_NAME).render(
        run=run,
        simulated=SIMULATED,
        before=run.headline("before"),
        after=run.headline("after"),
        datasets=_by_dataset(run),
        interval_plot=_interval_plot,
        drawings=[*(draw_panel(panel, run.log) for panel in PANELS), draw_time(run.log)] if run.log else [],
        smoothed=(SMOOTH_FROM, SMOOTH_STEPS),
        examples=examples,
        made=list(_made(run)),
        commands=_commands(run),
        notes=[*_notes(run), *examples.notes],
        version=__version__,
    )
    path = run.folder / REPORT_NAME
    path.write_text(page, encoding="utf-8")
    return path


def summary_table(run_dir: Path) -> str:
    """Return the scores of a run as plain text for a terminal of 100 columns, a line to an evaluation."""
    run = read_run(run_dir)
    lines = [["engine", "policy", "EM [95 %]", "F1 [95 %]", "answered", "searches", "turns", "n"]]
    for engine, policy, scores in run.evaluations():
        em, f1 = (f"{number(scores.get(name))} {interval_text(scores.get(name))}".strip() for name in ("em", "f1"))
        rates = number(scores.get("answer_rate")), number(scores.get("searches"), 2), number(scores.get("turns"), 2)
        lines.append([engine, policy, em, f1, *rates, str(scores.get("n", NOT_A_NUMBER))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if place < 4 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in [*(table if run.scores else []), *_summary_lines(run), *_notes(run)])


def read_run(run_dir: Path) -> Run:
    """Read a run's folder.

    Raises `UserError` if it is no folder, holds none of the files, or a file is not what it should be.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    results = _read_json(folder / "results.json")
    state = _read_json(folder / "policy" / "trainer_state.json")
    scores: dict[str, dict[str, Scores]] = {}
    found = {tuple(path.parent.name.split("-", 1)): path for path in folder.glob("evaluation/*-*/results.json")}
    for engine in sorted(
        {engine for policy, engine in found if policy in POLICIES}, key=lambda name: (name == SIMULATED, name)
    ):
        scores[engine] = {
            policy: _read_scores(found[policy, engine]) for policy in POLICIES if (policy, engine) in found
        }
    if results is None and state is None and not scores:
        raise UserError(
            f"{folder} holds no run: none of results.json, policy/trainer_state.json, "
            "evaluation/{before,after}-ENGINE/results.json is there"
        )
    return Run(folder, results or {}, _steps(state, folder / "policy" / "trainer_state.json"), scores)


def number(value: Any, digits: int = 3) -> str:
    """Write a number, or the mean of `{mean, low, high}`; what is missing or not finite is "n/a"."""
    if isinstance(value, dict):
        value = value.get("mean")
    return f"{value:.{digits}f}" if _is_finite(value) else NOT_A_NUMBER


def interval_text(scores: Any) -> str:
    """Write the interval of `{mean, low, high}` as "[low, high]", or nothing if there is none."""
    low, high = (scores.get("low"), scores.get("high")) if isinstance(scores, dict) else (None, None)
    return f"[{low:.3f}, {high:.3f}]" if _is_finite(low) and _is_finite(high) else ""


def change_text(before: Any, after: Any, digits: int = 3) -> str:
    """Write after minus before with its sign, or nothing if one of them is no number."""
    first, last = (value.get("mean") if isinstance(value, dict) else value for value in (before, after))
    if not (_is_finite(first) and _is_finite(last)):
        return ""
    return f"{last - first:+.{digits}f}"


def duration(seconds: Any) -> str:
    """Write seconds as "2 min 41 s"."""
    if not _is_finite(seconds):
        return NOT_A_NUMBER
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"


def shown_path(path: Any) -> str:
    """Write a path below the current folder from there on, and anything else as it is."""
    text = str(path)
    return os.path.relpath(text) if Path(text).is_absolute() and Path(text).is_relative_to(Path.cwd()) else text


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _summary_lines(run: Run) -> Iterator[str]:
    """Yield what stands below the table."""
    if run.results:
        queries = run.results.get("real_engine_queries_in_training", NOT_A_NUMBER)
        yield f"real-engine queries in training: {queries}"
        steps, generator, seed = (run.results.get(key, NOT_A_NUMBER) for key in ("steps", "generator", "seed"))
        training, everything = (duration(run.results.get(key)) for key in ("train_seconds", "total_seconds"))
        yield f"{steps} steps in {training}, everything in {everything}; generated with {generator}, seed {seed}"


def _read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object, None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError alike
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object")
    return value


def _read_scores(path: Path) -> Scores:
    scores = _read_json(path) or {}
    for name in ("em", "f1"):
        score = scores.get(name)
        if not isinstance(score, dict) or "mean" not in score:
            raise UserError(f"{path}: {name!r} is {score!r}, not an object with mean, low and high")
    return scores


def _steps(state: dict[str, Any] | None, path: Path) -> list[dict[str, Any]]:
    """Return the training log, an entry a step in order; evaluations and the summary at the end are left out."""
    if state is None:
        return []
    history = state.get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) and "step" in entry for entry in history):
        raise UserError(f"{path}: 'log_history' is no list of logged steps")
    by_step = {entry["step"]: entry for entry in history if "loss" in entry or "reward" in entry}
    return [by_step[step] for step in sorted(by_step)]


def _notes(run: Run) -> Iterator[str]:
    """Yield a sentence on each thing that is missing, and on each number that two files tell differently."""
    if not run.results:
        yield "results.json is missing: seed, durations and the count of real-engine queries are not known."
    elif not isinstance(run.results.get("real_engine_queries_in_training"), int):
        yield "results.json has no real_engine_queries_in_training: whether a real engine was queried is not known."
    if not run.log:
        yield "policy/trainer_state.json is missing, or has no step of training: there are no plots over steps."
    for engine in dict.fromkeys([*([run.engine] if run.engine else []), *run.scores, SIMULATED]):
        for policy in POLICIES:
            if policy not in run.scores.get(engine, {}):
                yield f"evaluation/{policy}-{engine}/results.json is missing: no scores {policy} training."
    of_engine = run.scores.get(run.engine or "", {})
    for key in ("em_before", "em_after", "f1_after"):
        score, policy = key.split("_")
        told, evaluated = run.results.get(key), of_engine.get(policy, {}).get(score, {}).get("mean")
        if _is_finite(told) and _is_finite(evaluated) and abs(told - evaluated) > ROUNDING:
            yield (
                f"results.json says {key} is {told}, but evaluation/{policy}-{run.engine}/results.json says "
                f"{evaluated}: the files may be of different runs."
            )


def _by_dataset(run: Run) -> dict[str, dict[str, Scores]]:
    """Return the scores with the headline's engine, dataset by dataset; a side that was not evaluated is empty."""
    sides = {policy: run.headline(policy).get("by_dataset") or {} for policy in POLICIES}
    names = dict.fromkeys([*sides["before"], *sides["after"]])
    return {name: {policy: sides[policy].get(name, {}) for policy in POLICIES} for name in names}


def _interval_plot(score: Any, policy: str) -> Markup:
    if not isinstance(score, dict) or not _is_finite(score.get("mean")):
        return Markup("")
    low, high = (score[name] if _is_finite(score.get(name)) else math.nan for name in ("low", "high"))
    return interval_plot(f"{number(score)} {interval_text(score)}".strip(), score["mean"], low, high, policy)


def _made(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what is known of how the run was made, as (term, text)."""
    for term, key in (("seed", "seed"), ("steps", "steps"), ("generated with", "generator")):
        if key in run.results:
            yield term, str(run.results[key])
    for term, key in (("training", "train_seconds"), ("everything", "total_seconds")):
        if key in run.results:
            yield term, duration(run.results[key])
    for policy in POLICIES:
        models = dict.fromkeys(
            shown_path(scores["model"]) for _, one, scores in run.evaluations() if one == policy and "model" in scores
        )
        if models:
            yield f"policy {policy}", ", ".join(models)
    datasets = dict.fromkeys(str(scores["dataset"]) for _, _, scores in run.evaluations() if "dataset" in scores)
    if datasets:
        yield "evaluated on", ", ".join(datasets)
    seconds = [scores.get("seconds") for _, _, scores in run.evaluations()]
    if seconds and all(map(_is_finite, seconds)):
        yield f"{len(seconds)} evaluations", duration(sum(seconds))
    yield "CPU cores where this page was written", str(_num_cores())  # no file says where the run was made
    yield from _versions(run).items()


def _commands(run: Run) -> list[str]:
    """Return the commands that make this run and this page again."""
    page = f"python recipes/report.py --run_dir {shown_path(run.folder)}"
    if not {"seed", "generator"} <= run.results.keys():
        return [page]
    return [f"make demo SEED={run.results['seed']} GENERATOR={run.results['generator']}", page]


def _versions(run: Run) -> dict[str, str]:
    """Return the versions that the evaluations recorded; where they differ, all of them."""
    versions: dict[str, list[str]] = {}
    for _, _, scores in run.evaluations():
        for package, version in (scores.get("versions") or {}).items():
            if str(version) not in versions.setdefault(package, []):
                versions[package].append(str(version))
    return {package: ", ".join(found) for package, found in sorted(versions.items())}


def _num_cores() -> int | None:
    """Return the number of CPU cores this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
