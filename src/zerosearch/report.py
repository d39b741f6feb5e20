"""The report of a run: one HTML page that needs no network, and a short table for the terminal.

Reads what training and evaluation left in a folder, and computes nothing but differences, counts and means of it:

    results.json                                    the run in short
    policy/trainer_state.json                       the log over steps
    policy/trajectories.jsonl                       trajectories sampled in training
    evaluation/{before,after}-ENGINE/results.json   scores with their intervals
    evaluation/{before,after}-ENGINE/trajectories.jsonl

What is missing is left out, and the page says so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from zerosearch import transcripts
from zerosearch.errors import UserError
from zerosearch.plots import Series, interval_plot, is_smoothed, line_plot, stack_plot, swatch

REPORT_NAME = "report.html"
TEMPLATE_NAME = "report_template.html"
SIMULATED = "simulated"  # the one engine that is not real
POLICIES = ("before", "after")  # training


@dataclass(frozen=True)
class Run:
    """What a run left in its folder. What is missing is empty, and `notes` has a sentence on it."""

    folder: Path
    results: dict[str, Any]
    log: list[dict[str, Any]]  # one entry a logged step, in order
    scores: dict[str, dict[str, dict[str, Any]]]  # engine, then "before" or "after": real engines come first
    notes: list[str] = field(default_factory=list)

    @property
    def engine(self) -> str | None:
        """Name the engine of the headline: the one results.json names, else the first evaluated."""
        return self.results.get("engine") or next(iter(self.scores), None)


@dataclass(frozen=True)
class Panel:
    """A plot over steps: its title, what a value is, and its series as (label, key of the log, colour, style)."""

    title: str
    unit: str
    series: tuple[tuple[str, str, str, Any], ...]
    top: float | None = None
    optional_keys: frozenset[str] = frozenset()


PANELS = (
    Panel(
        "Reward",
        "mean of a step's trajectories",
        (("reward", "reward", "policy", "line"), ("exact match", "rewards/em_reward/mean", "noisy", "dashed")),
        top=1.0,
        optional_keys=frozenset({"rewards/em_reward/mean"}),
    ),
    Panel(
        "Searches and turns",
        "mean per question",
        (("turns", "search/turns", "noisy", "dashed"), ("searches", "search/searches", "policy", "line")),
    ),
    Panel(
        "Noise",
        "share of searches answered with noisy documents",
        (("realised", "search/noisy_share", "noisy", "dots"), ("requested", "search/p_noise", "policy", "line")),
    ),
    Panel("KL", "to the reference model, nats per policy token", (("KL", "kl", "policy", "line"),)),
    Panel(
        "Tokens",
        "mean per trajectory",
        (
            ("from the environment", "search/observation_tokens", "noisy", "dashed"),
            ("by the policy", "search/policy_tokens", "policy", "line"),
        ),
    ),
)
TIME_TITLE = "Where a step's time goes"
TIME_KEYS = ("time/generating_s", "time/waiting_s", "time/idle_s", "time/rollout_s", "time/step_s")


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run's folder and return its path.

    Raises `UserError` if the folder holds no run, or a file in it is not what it should be.
    """
    run = read_run(run_dir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # documents and answers are untrusted text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, duration=duration, interval=interval_text)
    examples = transcripts.read_examples(run.folder, run.engine)
    page = environment.get_template(TEMPLATE_NAME).render(
        run=run,
        results=run.results,
        engines=list(run.scores),
        rows=list(_evaluations(run)),
        panels=[*(_panel(panel, run.log) for panel in PANELS), _time_panel(run.log)],
        steps=run.log[-1]["step"] if run.log else None,
        pairs=examples.pairs,
        num_paired=examples.num_paired,
        training=examples.training,
        notes=[*run.notes, *examples.notes],
        versions=_versions(run),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )
    path = run.folder / REPORT_NAME
    path.write_text(page, encoding="utf-8")
    return path


def summary_table(run_dir: Path) -> str:
    """Return the scores of a run as plain text, a line to an evaluation, for a terminal of 100 columns."""
    run = read_run(run_dir)
    lines = [("engine", "policy", "EM [95 %]", "F1 [95 %]", "answered", "searches", "turns", "n")]
    for engine, policy, scores in _evaluations(run):
        lines.append(
            (
                engine,
                policy,
                f"{number(_mean(scores, 'em'))} {interval_text(scores.get('em'))}",
                f"{number(_mean(scores, 'f1'))} {interval_text(scores.get('f1'))}",
                number(scores.get("answer_rate")),
                number(scores.get("searches"), 2),
                number(scores.get("turns"), 2),
                f"{scores.get('n', '-')}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.ljust(width) if place < 4 else cell.rjust(width) for place, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([*(line.rstrip() for line in table), *_closing_lines(run)])
