"""A plot shows the values it was given, a gap where there is none, and round numbers beside them."""

from __future__ import annotations

import math
import random
import re

import pytest
from report_run import logged_step

from zerosearch.report.panels import PANELS, draw_panel, draw_time
from zerosearch.report.plots import Series, line_plot, nice_ticks, running_mean, stack_plot


def test_a_run_of_one_step_is_drawn() -> None:
    log = [logged_step(1, random.Random(0))]
    assert all(draw_panel(panel, log).plot for panel in PANELS)
    assert draw_time(log).plot


def test_steps_that_are_not_finite_are_gaps() -> None:
    log = [{"step": step, "kl": value} for step, value in enumerate([0.1, math.nan, math.inf, 0.2, 0.3], start=1)]
    drawing = draw_panel(next(panel for panel in PANELS if panel.title == "KL"), log)
    assert drawing.notes == ("“KL” has gaps: 2 of 5 logged steps have no finite kl.",)
    path = re.search(r' d="([^"]*)"', str(drawing.plot))
    assert path and path[1].count("M") == 2 and path[1].count("L") == 1
    assert "nan" not in str(drawing.plot) and "inf" not in str(drawing.plot)
    assert drawing.legend[0][2] == "0.1 → 0.3"


def test_the_time_split_weighs_an_entry_by_the_steps_it_stands_for() -> None:
    times = {f"time/{name}_s": seconds for name, seconds in {"generating": 1, "waiting": 2, "idle": 1}.items()}
    whole = times | {"time/rollout_s": 4, "time/step_s": 6}
    drawing = draw_time([{"step": 10, **whole}, {"step": 15, **whole}, {"step": 20, **times}])
    numbers = [numbers for _, _, numbers in drawing.legend]
    assert numbers == ["15.0 s in all, 17%", "30.0 s in all, 33%", "15.0 s in all, 17%", "30.0 s in all, 33%"]
    assert drawing.notes == ("1 of 3 logged steps have no complete time split and are left out.",)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0, [0, 0.25, 0.5, 0.75, 1]),
        (0, 60, [0, 20, 40, 60]),
        (-1, 2.9, [-1, 0, 1, 2, 3]),
    ],
)
def test_ticks_are_round_and_cover_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_a_running_mean_looks_back_and_keeps_gaps() -> None:
    assert running_mean([1, 2, 3, 4, 5, 6])[-1] == 4.0
    assert math.isnan(running_mean([1, math.nan, 3])[1])
    assert running_mean([1, math.nan, 3])[2] == 2.0


def test_labels_in_plots_are_escaped() -> None:
    svg = line_plot("<b>", [1, 2], [Series("x", "blue", [0.1, 0.2])]) + stack_plot(
        "<b>", [1], [Series("x", "blue", [1])]
    )
    assert "<b>" not in svg and svg.count("&lt;b&gt;") == 2
