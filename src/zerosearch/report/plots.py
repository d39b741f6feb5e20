"""Every picture the project draws, by matplotlib, as SVG: a run over its steps, several runs, a simulator's fidelity.

On the report's page colours become CSS variables, so that one drawing serves a light page, a dark page and paper;
text stays text. Series differ by dash or hatching as well as by colour. A value that is not finite is a gap.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup, escape

from zerosearch.evaluation.tables import is_finite
from zerosearch.files import write_text
from zerosearch.simulator.fidelity_card import RATES
from zerosearch.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LogEntry = Mapping[str, Any]  # one logged step: "step" and the values logged with it
Style = Literal["line", "dashed", "dots", "exact", "area"]  # "exact": a line that needs no running mean

COLOURS = {  # the light theme's; each is a variable of page.css
    "blue": "#0b5cab",
    "orange": "#b9480b",
    "green": "#0a7a59",
    "grey": "#7a828c",
    "rule": "#dfdcd4",
    "soft": "#59616b",
    "card": "#ffffff",
}
HATCHES = {"blue": "", "orange": "////", "grey": "||||", "green": ""}
FIDELITY = dict(RATES[:2])  # of a simulator's card: how often useful replies answer, and noisy ones do
LARGEST = 1e100
SMOOTH_STEPS = 5  # steps in a running mean
SMOOTH_FROM = 20  # fewer points than this are shown as they are


@dataclass(frozen=True)
class Series:
    """One quantity over steps: the key of the training log, its label, its colour and how it is drawn."""

    key: str
    label: str
    colour: str
    style: Style = "line"


@dataclass(frozen=True)
class Drawing:
    """A panel of the page: its plot if it has one, a legend of (series, numbers), and notes on what is missing."""

    title: str
    unit: str
    plot: Markup | None = None
    legend: tuple[tuple[Series, str], ...] = ()
    notes: tuple[str, ...] = ()


PANELS = {  # title, unit: what is drawn
    ("Reward", "mean of the trajectories of a step"): (Series("reward", "reward", "blue"),),
    ("Searches and turns", "mean per question"): (
        Series("search/searches", "searches", "blue"),
        Series("search/turns", "turns", "orange", "dashed"),
    ),
    ("Noise", "share of searches that got noisy documents"): (
        Series("search/p_noise", "requested", "blue", "exact"),
        Series("search/noisy_share", "realised", "orange", "dots"),
    ),
    ("KL", "to the reference model"): (Series("kl", "KL", "blue"),),
    ("Tokens", "mean per trajectory"): (
        Series("search/policy_tokens", "by the policy", "blue"),
        Series("search/observation_tokens", "by the environment", "orange", "dashed"),
    ),
}
TIMES = (
    Series("time/generating_s", "generating", "blue", "area"),
    Series("time/waiting_s", "waiting for search", "orange", "area"),
    Series("time/idle_s", "idle", "grey", "area"),
    Series("time/training_s", "training", "green", "area"),  # what of the step is no rollout
)


def draw_training(log: Sequence[LogEntry]) -> list[Drawing]:
    """Draw the training log, one entry a logged step, panel by panel."""
    return [*(draw_panel(*names, series, log) for names, series in PANELS.items()), draw_time(log)]


def draw_panel(title: str, unit: str, series: Iterable[Series], log: Sequence[LogEntry]) -> Drawing:
    """Draw series over steps; a note names each that was not logged.

    From `SMOOTH_FROM` points on a line is thin, with its running mean over it.
    """
    figure, axes = _panel()
    steps = [entry["step"] for entry in log]
    legend, notes = [], []
    for one in series:
        values = values_of(log, one.key)
        if np.isnan(values).all():
            notes.append(f"“{one.label}” is left out: the log has no finite {one.key}.")
            continue
        smooth = one.style in ("line", "dashed") and len(values) >= SMOOTH_FROM
        _draw_line(axes, steps, values, one, faint=smooth)
        if smooth:
            _draw_line(axes, steps, running_mean(values), one)
        finite, few = values[np.isfinite(values)], SMOOTH_STEPS if smooth or one.style == "dots" else 1
        legend.append((one, f"{finite[:few].mean():.3g} → {finite[-few:].mean():.3g}"))
    if not legend:
        return Drawing(title, unit, notes=tuple(notes))
    axes.update_datalim([(steps[0], 0), (steps[-1], title == "Reward")])  # the axes hold 0, and the highest reward
    return Drawing(title, unit, _inline(figure, axes, f"{title} over steps", steps), tuple(legend), tuple(notes))


def draw_time(log: Sequence[LogEntry]) -> Drawing:
    """Stack the parts of a step's time. An entry stands for the steps since the one before it."""
    title, unit = "Time", "seconds per step"
    edges = np.array([0, *(entry["step"] for entry in log)])
    rollout, step = values_of(log, "time/rollout_s"), values_of(log, "time/step_s")
    parts = np.array([*(values_of(log, one.key) for one in TIMES[:-1]), step - rollout])  # (4, len(log))
    is_ahead = values_of(log, "sampling/staleness") > 0  # such a rollout is no part of the step that trains on it
    parts[:, is_ahead | ~np.all(parts >= 0, axis=0)] = np.nan  # an incomplete split is a gap in all parts
    num_missing = int(np.isnan(parts[0]).sum())
    if num_missing == len(log):
        return Drawing(title, unit, notes=("Left out: no logged step has a complete time split.",))
    figure, axes = _panel()
    tops = parts.cumsum(axis=0)
    for one, low, high in zip(TIMES, [np.zeros(len(log)), *tops], tops, strict=False):
        area = axes.stairs(high, edges, baseline=low, fill=True, linewidth=0, hatch=HATCHES[one.colour])
        area.set(edgecolor=COLOURS[one.colour], hatch_linewidth=2)
        area.set_facecolor(COLOURS["card" if HATCHES[one.colour] else one.colour])
    seconds = np.nansum(parts * np.diff(edges), axis=1)
    total = seconds.sum()
    legend = (
        (one, f"{of_one:.1f} s in all" + (f", {of_one / total:.0%}" if total > 0 else ""))
        for one, of_one in zip(TIMES, seconds, strict=True)
    )
    note = f"{num_missing} of {len(log)} logged steps have no complete time split and are left out."
    plot = _inline(figure, axes, "Seconds per step, by what they went into", edges)
    return Drawing(title, unit, plot, tuple(legend), (note,) if num_missing else ())


def values_of(log: Sequence[LogEntry], key: str) -> np.ndarray:
    """Return the values logged under a key, NaN for what is missing, not a finite number or too large to draw."""
    found = (entry.get(key) for entry in log)
    drawable = [value if is_finite(value) and abs(value) < LARGEST else math.nan for value in found]
    return np.array(drawable, dtype=float)  # (len(log),)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of the last `SMOOTH_STEPS` finite values at each point; a gap stays a gap."""
    finite, window = np.isfinite(values), np.ones(SMOOTH_STEPS)
    sums, counts = (np.convolve(one, window)[: len(values)] for one in (np.nan_to_num(values), finite))
    return np.where(finite, sums / np.maximum(counts, 1), math.nan)


def curves_plot(logs: Mapping[str, Sequence[LogEntry]], keys: Sequence[str]) -> str:
    """Draw the running means of logged values over steps, a panel a key, a line a run; return an SVG file's text."""
    figure = _figure(4.2 * len(keys), 3.2)
    styles = [(colour, dash) for dash in ("-", "--", ":") for colour in ("blue", "orange", "green", "grey")]
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for (name, log), (colour, dash) in zip(logs.items(), cycle(styles), strict=False):
            steps, values = [entry["step"] for entry in log], running_mean(values_of(log, key))
            axes.plot(steps, values, dash, color=COLOURS[colour], label=_words(name))
        axes.set_title(_words(key), loc="left", fontsize="medium", color=COLOURS["soft"])
        axes.set_xlabel("step")
    figure.axes[0].legend(frameon=False)
    return _svg(figure, "curves")


def rows_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the exact match of a table's rows with their intervals, a line each; return an SVG file's text.

    A row has `table`, `name`, `em` as `{mean, low, high}`, and `differs`, whether from the first row of its kind.
    """
    figure = _figure(8, 0.6 + 0.26 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        mean, low, high = (row["em"][key] for key in ("mean", "low", "high"))
        colour = COLOURS["orange" if row["differs"] else "blue"]
        axes.plot([low, high], [place, place], "-", color=colour, linewidth=1.5)
        axes.plot(mean, place, "o" if row["differs"] else "s", color=colour, markersize=4)
        if place and rows[place - 1]["table"] != row["table"]:
            axes.axhline(place - 0.5, color=COLOURS["rule"], linewidth=1)
    axes.set_yticks(range(len(rows)), [_words(f"{row['table']}: {row['name']}") for row in rows])
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel="exact match, 95 % interval over seeds and questions")
    return _svg(figure, "rows")


def outcome_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw policies' exact match against the fidelity of the simulators they learned from; return an SVG file's text.

    A row has `name`, `em` as `{mean, low, high}`, and `fidelity`: the rates of `FIDELITY`, a panel each.
    """
    figure = _figure(8.4, 3.2)
    panels = figure.subplots(1, len(FIDELITY), sharey=True)
    for axes, (rate, words) in zip(panels, FIDELITY.items(), strict=True):
        for row, (colour, marker) in zip(rows, cycle(zip(("blue", "orange", "green", "grey"), "os^D", strict=True))):
            mean, low, high = (row["em"][key] for key in ("mean", "low", "high"))
            style = {"fmt": marker, "color": COLOURS[colour], "label": _words(row["name"])}
            axes.errorbar(row["fidelity"][rate], mean, [[mean - low], [high - mean]], **style)
        axes.set(xlim=(-0.03, 1.03), ylim=(0, 1), xlabel=words)
    panels[0].set_ylabel("exact match, 95 % interval")
    panels[1].legend(frameon=False, fontsize="small", loc="lower right")
    return _svg(figure, "outcome")


def _words(text: str) -> str:
    """Return a name from outside for matplotlib: no formula, and nothing that SVG cannot hold."""
    return printable(text).replace("$", r"\$")


def write_fidelity_plot(card: Mapping[str, Any], prefix: Path) -> Path:
    """Draw a fidelity card's rates and realised against requested noise to `prefix`.svg, and return the path."""
    shown = {name: words.replace(" that ", "\nthat ") for name, words in RATES[:3] if name in card}
    figure = _figure(10, 1.2 + 0.4 * len(shown) + 1.4 * ("noise" in card))
    rates, *more = figure.subplots(1, 1 + ("noise" in card), squeeze=False)[0]
    rates.barh(range(len(shown)), [card[name] for name in shown], height=0.5, color=COLOURS["blue"])
    for row, name in enumerate(shown):
        rates.plot(card[f"{name}_interval"], [row, row], "|-", color=COLOURS["grey"], linewidth=1.5)
    rates.set_yticks(range(len(shown)), shown.values())
    rates.set(xlim=(0, 1), ylim=(max(len(shown), 1) - 0.3, -0.7))
    for noise in more:
        points = card["noise"]
        requested, realised = ([point[key] for point in points] for key in ("requested", "realised"))
        low, high = zip(*(point["realised_interval"] for point in points), strict=True)
        noise.plot([0, 1], [0, 1], color=COLOURS["rule"], linewidth=1)
        noise.fill_between(requested, low, high, color=COLOURS["orange"], alpha=0.2, linewidth=0)
        noise.plot(requested, realised, "o-", color=COLOURS["orange"], label="realised, by the documents")
        noise.set_xlabel("requested noise")
        noise.legend(frameon=False)
    path = prefix.with_name(f"{prefix.name}.svg")
    write_text(path, _svg(figure, "fidelity"))
    return path


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure, of so many inches, whose panels leave room for each other's labels."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _panel() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure((5, 2.9), facecolor="none")  # inches of 72 CSS pixels: about a card's width on the page
    return figure, figure.add_axes((0.11, 0.12, 0.87, 0.83))


def _draw_line(axes: Axes, steps: Sequence[float], values: np.ndarray, one: Series, faint: bool = False) -> None:
    finite = np.isfinite([math.nan, *values, math.nan])
    alone = np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])  # a line through one point shows nothing
    axes.plot(
        steps,
        values,
        linestyle={"dots": "none", "dashed": "-" if faint else "--"}.get(one.style, "-"),
        color=COLOURS[one.colour],
        linewidth=1 if faint else 2.25,
        alpha=0.38 if faint else 0.75 if one.style == "dots" else 1,
        marker="o",
        markersize=4,
        markevery=None if one.style == "dots" else list(alone),
        clip_on=False,
    )


def _inline(figure: Figure, axes: Axes, title: str, steps: Sequence[float] | np.ndarray) -> Markup:
    """Return the figure as an <svg> element in the page's colours."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.dataLim.intervaly
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high if high > low else low + 1)
    axes.set(yticks=ticks, ylim=(ticks[0], ticks[-1]), xticks=np.unique(np.linspace(steps[0], steps[-1], 4).round()))
    axes.margins(x=0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(length=0, pad=6, labelcolor=COLOURS["soft"])
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.patch.set_visible(False)
    svg = _svg(figure, title).partition("<svg")[2]
    svg = re.sub(r'<style.*?</style>|(?<=<g) id="[^"]+"|font-family:[^;]+; ', "", svg, flags=re.DOTALL)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(f'<svg class="plot" role="img" aria-label="{escape(title)}"{svg}')


def _svg(figure: Figure, salt: str) -> str:
    from matplotlib import rc_context

    file = io.StringIO()
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):  # the same data, the same file; text as text
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
