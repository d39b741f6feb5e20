"""What the report plots over steps: which keys of the training log, and in what words.

The keys are the ones that `SearchTrainer` logs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from zerosearch.report.plots import SMOOTH_FROM, SMOOTH_STEPS, Series, Style, line_plot, stack_plot, swatch

LogEntry = Mapping[str, Any]  # one logged step: "step" and the values logged with it


@dataclass(frozen=True)
class Panel:
    """A plot over steps: what a value is, and its series as (label, key of the log, colour, style).

    `top` fixes the upper end of the axis. A series of `optional_keys` that was not logged is nothing to speak of.
    """

    title: str
    unit: str
    series: tuple[tuple[str, str, str, Style], ...]
    top: float | None = None
    optional_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """A panel as the page shows it; without a `plot` only its notes."""

    title: str
    unit: str
    plot: Markup | None = None
    legend: tuple[tuple[Markup, str, str], ...] = ()  # sample, label, numbers
    notes: tuple[str, ...] = ()


PANELS = (
    Panel(
        "Reward",
        "mean of the trajectories of a step",
        (("reward", "reward", "blue", "line"), ("exact match", "rewards/em_reward/mean", "orange", "dashed")),
        top=1.0,
        optional_keys=("rewards/em_reward/mean",),
    ),
    Panel(
        "Searches and turns",
        "mean per question",
        (("searches", "search/searches", "blue", "line"), ("turns", "search/turns", "orange", "dashed")),
    ),
    Panel(
        "Noise",
        "share of searches that got noisy documents",
        (("requested", "search/p_noise", "blue", "exact"), ("realised", "search/noisy_share", "orange", "dots")),
    ),
    Panel("KL", "to the reference model", (("KL", "kl", "blue", "line"),)),
    Panel(
        "Tokens",
        "mean per trajectory",
        (
            ("by the policy", "search/policy_tokens", "blue", "line"),
            ("by the environment", "search/observation_tokens", "orange", "dashed"),
        ),
    ),
)
TIME_TITLE, TIME_UNIT = "Time", "seconds per step"
TIME_KEYS = ("time/generating_s", "time/waiting_s", "time/idle_s", "time/rollout_s", "time/step_s")


def draw_panel(panel: Panel, log: Sequence[LogEntry]) -> Drawing:
    """Draw the panel's series; a note names each that was not logged and each gap."""
    series, notes = [], []
    for label, key, css, style in panel.series:
        values = [value_of(entry, key) for entry in log]
        num_gaps = sum(not math.isfinite(value) for value in values)
        if num_gaps == len(values):
            if key not in panel.optional_keys:
                notes.append(f"“{label}” is left out: the log has no finite {key}.")
            continue
        if num_gaps:
            notes.append(f"“{label}” has gaps: {num_gaps} of {len(values)} logged steps have no finite {key}.")
        series.append(Series(label, css, values, style))
    if not series:
        return Drawing(panel.title, panel.unit, notes=tuple(notes))
    plot = line_plot(f"{panel.title} over steps", steps_of(log), series, panel.top)
    legend = tuple((swatch(one), one.label, first_and_last(one)) for one in series)
    return Drawing(panel.title, panel.unit, plot, legend, tuple(notes))


def draw_time(log: Sequence[LogEntry]) -> Drawing:
    """Stack the parts of a step's time. What of the step is no rollout is training."""
    entries = [entry for entry in log if _has_whole_time(entry)]
    if not entries:
        missing = [key for key in TIME_KEYS if not any(math.isfinite(value_of(entry, key)) for entry in log)]
        note = f"Left out: no logged step has a finite {', '.join(missing) or 'and whole time split'}."
        return Drawing(TIME_TITLE, TIME_UNIT, notes=(note,))
    generating, waiting, idle, rollout, step = ([value_of(entry, key) for entry in entries] for key in TIME_KEYS)
    series = [
        Series("generating", "blue", generating),
        Series("waiting for search", "orange", waiting),
        Series("idle", "grey", idle),
        Series("training", "green", [whole - part for whole, part in zip(step, rollout, strict=True)]),
    ]
    num_steps = steps_covered(log, entries)
    total = sum(seconds * steps for seconds, steps in zip(step, num_steps, strict=True))
    legend = []
    for one in series:
        seconds = sum(value * steps for value, steps in zip(one.values, num_steps, strict=True))
        share = f", {seconds / total:.0%}" if total > 0 else ""
        legend.append((swatch(one, stacked=True), one.label, f"{seconds:.1f} s in all{share}"))
    left_out = len(log) - len(entries)
    note = f"{left_out} of {len(log)} logged steps have no complete time split and are left out."
    plot = stack_plot("Seconds per step, by what they went into", steps_of(entries), series)
    return Drawing(TIME_TITLE, TIME_UNIT, plot, tuple(legend), (note,) if left_out else ())


def steps_of(log: Sequence[LogEntry]) -> list[float]:
    """Return the step of each entry."""
    return [entry["step"] for entry in log]


def steps_covered(log: Sequence[LogEntry], entries: Sequence[LogEntry]) -> list[float]:
    """Return how many steps each of `entries`, some of the log's, is the mean of: those since the entry before it."""
    steps = [0, *steps_of(log)]
    since = {step: step - before for before, step in pairwise(steps)}
    return [since[step] for step in steps_of(entries)]


def value_of(entry: LogEntry, key: str) -> float:
    """Return the value logged under a key, NaN for none and for what is no number."""
    value: Any = entry.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def first_and_last(one: Series) -> str:
    """Write the means of the first and last few finite values; of a series that is short or exact, two values."""
    finite = [value for value in one.values if math.isfinite(value)]
    few = SMOOTH_STEPS if len(one.values) >= SMOOTH_FROM and one.style != "exact" else 1
    first, last = finite[:few], finite[-few:]
    return f"{sum(first) / len(first):.3g} → {sum(last) / len(last):.3g}"


def _has_whole_time(entry: LogEntry) -> bool:
    values = [value_of(entry, key) for key in TIME_KEYS]
    rollout, step = values[-2:]
    return all(map(math.isfinite, values)) and rollout <= step
