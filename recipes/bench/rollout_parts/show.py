"""What the rollout bench shows: a table, and a plot of how far each arm is from the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rollout_parts.world import LATENCIES, Cell

COLORS = {"ours": "#0b7285", "lockstep": "#e8590c", "lockstep10": "#f59f00", "trl_tools": "#868e96"}
MARKERS = {"ours": "o", "lockstep": "s", "lockstep10": "D", "trl_tools": "^"}
TICKS = (1, 1.5, 2, 3, 5, 10, 20, 30, 50, 100)

Row = Mapping[str, Any]


def cell_of(row: Row) -> Cell:
    return Cell(row["latency"], row["turns"], row["trajectories"])


def floors_of(rows: Sequence[Row]) -> dict[Cell, Sequence[float]]:
    """Return the floor of each cell, in seconds, run by run."""
    return {cell_of(row): row["seconds"] for row in rows if row["arm"] == "floor"}


def to_floor(row: Row, floor: Sequence[float]) -> list[float]:
    return [seconds / least for seconds, least in zip(row["seconds"], floor, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Write the median of the runs, the least and the greatest."""
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def print_rows(rows: Sequence[Row]) -> None:
    """Print a line for each arm in each cell."""
    floors = floors_of(rows)
    print(
        f"{'latency, searches x trajectories':<33}{'arm':<11}{'seconds':<21}{'x ours':<21}{'x floor':<21}idle  steps"
    )
    for row in rows:
        columns = (row["seconds"], row["ratio_to_ours"], to_floor(row, floors[cell_of(row)]))
        texts = "".join(f"{spread(values):<21}" for values in columns)
        steps = f"{median(row['engine_steps']):g}" if any(row["engine_steps"]) else ""
        print(f"{cell_of(row)!s:<33}{row['arm']:<11}{texts}{row['idle_share']:.2f} {steps}")


def print_in_flight(rows: Sequence[Row]) -> None:
    """Print what a trajectory costs with so many in flight."""
    for row in rows:
        milliseconds = [1000 * seconds for seconds in row["seconds_per_trajectory"]]
        print(f"{row['generator']:<8}{row['trajectories']:>5} in flight: {spread(milliseconds)} ms a trajectory")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw how many floors each arm takes, and how much of that time the engine stands idle."""
    from matplotlib.figure import Figure

    cells = sorted(
        {cell_of(row) for row in rows},
        key=lambda cell: (LATENCIES.index(cell.latency), cell.turns, cell.trajectories),
    )
    floors = floors_of(rows)
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(cells)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    for place, arm in enumerate(COLORS):
        chosen = [row for row in rows if row["arm"] == arm]
        heights = [cells.index(cell_of(row)) + 0.16 * (place - 1.5) for row in chosen]
        ratios = [to_floor(row, floors[cell_of(row)]) for row in chosen]
        middle = [median(runs) for runs in ratios]
        bars = [
            [median(runs) - min(runs) for runs in ratios],
            [max(runs) - median(runs) for runs in ratios],
        ]
        style = {"color": COLORS[arm], "marker": MARKERS[arm], "markersize": 6, "linestyle": "none"}
        left.errorbar(middle, heights, xerr=bars, label=arm, **style)
        right.plot([row["idle_share"] for row in chosen], heights, **style)
    left.axvline(1, color="0.4", linewidth=1)
    left.set(xscale="log", xlabel="time of a rollout, in floors (median; bars from the least to the greatest run)")
    longest = max(max(to_floor(row, floors[cell_of(row)])) for row in rows)
    ticks = [tick for tick in TICKS if tick <= longest] or [1]
    left.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    left.set_yticks(range(len(cells)), labels=[str(cell) for cell in cells])
    left.set_ylabel("latency, searches x trajectories")
    left.invert_yaxis()
    right.set(xlim=(-0.03, 1.03), xlabel="share of time the engine is idle")
    for axes in (left, right):
        axes.grid(axis="x", color="0.9")
        for border in range(1, len(cells)):
            axes.axhline(border - 0.5, color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
