"""Plots as inline SVG: a few lines over steps, a stack over steps, an interval on a scale from 0 to 1.

Colours are CSS classes, so that one drawing serves a light page, a dark page and paper; text stays text. Series differ
by dash or hatching as well as by colour. A value that is not finite is a gap, never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 208  # in CSS pixels: about what a card is wide on a phone and in three columns on a desk
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 24  # margins that hold the tick labels
SMOOTH_STEPS = 5  # steps in a running mean
SMOOTH_FROM = 20  # fewer points than this are shown as they are

Style = Literal["line", "dashed", "dots", "exact"]  # "exact": a line that needs no running mean


@dataclass(frozen=True)
class Series:
    """One quantity over steps. `css` names its colour; `values` may hold what is not finite."""

    label: str
    css: str
    values: Sequence[float]  # (num_points,)
    style: Style = "line"


@dataclass(frozen=True)
class Axes:
    """Maps steps and values to pixels. The vertical axis holds 0 and runs from the first tick to the last."""

    first_step: float
    last_step: float
    ticks: Sequence[float]

    def x(self, step: float) -> float:
        span = self.last_step - self.first_step
        share = (step - self.first_step) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def line_plot(title: str, steps: Sequence[float], series: Sequence[Series], top: float | None = None) -> Markup:
    """Draw series over steps; `top` fixes the upper end, for what has a natural one.

    From `SMOOTH_FROM` points on a line is thin, with its running mean over it. At least one value must be finite.
    """
    axes = _axes(steps, [value for one in series for value in one.values], top=top)
    marks: list[Markup] = []
    for one in series:
        if one.style == "dots":
            marks += [
                element("circle", css=f"dot {one.css}", cx=axes.x(step), cy=axes.y(value), r=2.2)
                for step, value in zip(steps, one.values, strict=True)
                if math.isfinite(value)
            ]
            continue
        smooth = is_smoothed(one)
        css = f"curve {one.css}" + (" dashed" if one.style == "dashed" else "")
        marks.append(element("path", css=css + (" faint" if smooth else ""), d=_path(axes, steps, one.values)))
        if smooth:
            marks.append(element("path", css=css, d=_path(axes, steps, running_mean(one.values))))
    return _figure(title, axes, marks)


def stack_plot(title: str, steps: Sequence[float], series: Sequence[Series]) -> Markup:
    """Draw series as parts of a whole, the first at the bottom, one column to a step.

    A step at which a part is not finite is a gap in all of them. At least one step must be whole.
    """
    columns = list(zip(*(one.values for one in series), strict=True))
    whole = [index for index, column in enumerate(columns) if all(map(math.isfinite, column))]
    half = min((later - step for step, later in pairwise(steps)), default=1) / 2
    axes = _axes(steps, [sum(columns[index]) for index in whole], margin=half)
    marks = []
    for place, one in enumerate(series):
        path = ""
        for index in whole:
            low, high = sum(columns[index][:place]), sum(columns[index][: place + 1])
            left, right = axes.x(steps[index] - half), axes.x(steps[index] + half)
            path += f"M{left:.1f} {axes.y(low):.1f}V{axes.y(high):.1f}H{right:.1f}V{axes.y(low):.1f}Z"
        marks.append(element("path", css=f"area {one.css}", d=path))
    return _figure(title, axes, marks)


def interval_plot(title: str, mean: float, low: float, high: float, css: str) -> Markup:
    """Draw a mean and its interval on a scale from 0 to 1 as wide as the place it is put in."""
    marks = [element("line", css="scale", x1="0%", x2="100%", y1=8, y2=8)]
    marks += [element("line", css="tick", x1=f"{at}%", x2=f"{at}%", y1=5, y2=11) for at in (0, 50, 100)]
    if math.isfinite(low) and math.isfinite(high):
        marks.append(
            element("line", css=f"whisker {css}", x1=f"{100 * low:.1f}%", x2=f"{100 * high:.1f}%", y1=8, y2=8)
        )
    marks.append(element("circle", css=f"mean {css}", cx=f"{100 * mean:.1f}%", cy=8, r=4.5))
    body = element("title", text=title) + Markup("").join(marks)
    return element("svg", css="interval", text=body, role="img", height=16)


def swatch(one: Series, stacked: bool = False) -> Markup:
    """Draw a series' sample for a legend."""
    if stacked:
        mark = element("rect", css=f"area {one.css}", x=1, y=1, width=20, height=10)
    elif one.style == "dots":
        mark = Markup("").join(element("circle", css=f"dot {one.css}", cx=x, cy=6, r=2.2) for x in (4, 11, 18))
    else:
        mark = element("path", css=f"curve {one.css} {one.style}", d="M2 6H20")
    return element("svg", css="swatch", text=mark, width=22, height=12, aria_hidden="true")


def is_smoothed(one: Series) -> bool:
    """Say whether `line_plot` draws a running mean over the series."""
    return one.style in ("line", "dashed") and len(one.values) >= SMOOTH_FROM


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of the last `SMOOTH_STEPS` finite values at each point; a gap stays a gap."""
    means = []
    for index, value in enumerate(values):
        window = [one for one in values[max(0, index + 1 - SMOOTH_STEPS) : index + 1] if math.isfinite(one)]
        means.append(sum(window) / len(window) if math.isfinite(value) else math.nan)
    return means


def nice_ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers, evenly spaced, that cover `low` to `high`."""
    if low == high:
        high = low + 1
    span = high - low
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if span / (unit * factor) <= 4.001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def element(tag: str, css: str = "", text: str = "", **attributes: str | float) -> Markup:
    """Return one SVG element; values and text are escaped, an underscore in a name stands for a hyphen."""
    shown = {"class": css} if css else {}
    for name, value in attributes.items():
        key = name if name == "viewBox" else name.replace("_", "-")
        shown[key] = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
    pairs = "".join(f' {name}="{escape(value)}"' for name, value in shown.items())
    return Markup(f"<{tag}{pairs}>{escape(text)}</{tag}>")


def _axes(steps: Sequence[float], values: Sequence[float], top: float | None = None, margin: float = 0.0) -> Axes:
    """Return axes that hold 0, all finite values and `top`; `margin` is the room beside the steps, in steps."""
    finite = [0.0, *(value for value in values if math.isfinite(value)), *([] if top is None else [top])]
    return Axes(steps[0] - margin, steps[-1] + margin, nice_ticks(min(finite), max(finite)))


def _path(axes: Axes, steps: Sequence[float], values: Sequence[float]) -> str:
    """Return path data that breaks at gaps; a lone point is a line of no length, which a round cap makes a dot."""
    path = ""
    for run in _finite_runs(steps, values):
        path += "M" + "L".join(f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in run)
        path += "h0" if len(run) == 1 else ""
    return path


def _finite_runs(steps: Sequence[float], values: Sequence[float]) -> Iterator[list[tuple[float, float]]]:
    run: list[tuple[float, float]] = []
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            run.append((step, value))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _figure(title: str, axes: Axes, marks: Sequence[Markup]) -> Markup:
    parts = [element("title", text=title)]
    for tick in axes.ticks:
        y = axes.y(tick)
        parts.append(element("line", css="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(element("text", css="label end", text=f"{tick:.6g}", x=LEFT - 6, y=y + 4))
    for step in _step_ticks(axes):
        parts.append(element("text", css="label middle", text=f"{step:g}", x=axes.x(step), y=HEIGHT - 6))
    return element(
        "svg", css="plot", text=Markup("").join([*parts, *marks]), role="img", viewBox=f"0 0 {WIDTH} {HEIGHT}"
    )


def _step_ticks(axes: Axes) -> list[float]:
    first, last = math.ceil(axes.first_step), math.floor(axes.last_step)
    if first == last:
        return [first]
    inside = [tick for tick in nice_ticks(first, last) if first <= tick <= last and tick == int(tick)]
    # The first and last step frame the axis; a round number too near to either would run into it.
    room = (last - first) / 8
    return [first, *(tick for tick in inside if first + room < tick < last - room), last]
