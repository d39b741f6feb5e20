"""A plot shows the values it was given, a gap where there is none, and round numbers beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from zerosearch.report.plots import (
    PANELS,
    Drawing,
    curves_plot,
    draw_panel,
    draw_time,
    draw_training,
    outcome_plot,
    running_mean,
    values_of,
    write_fidelity_plot,
)

SVG = "{http://www.w3.org/2000/svg}"
REWARD, KL = ((*names, series) for names, series in PANELS.items() if names[0] in ("KL", "Reward"))


def texts(drawing: Drawing) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(str(drawing.plot)).iter(f"{SVG}text")]


def curves(drawing: Drawing, colour: str) -> list[str]:
    """Return the path data of what is drawn in a colour, markers aside."""
    paths = ElementTree.fromstring(str(drawing.plot)).iter(f"{SVG}path")
    return [path.get("d", "") for path in paths if f"fill: none; stroke: {colour}" in path.get("style", "")]


def test_a_run_of_one_step_is_drawn() -> None:
    times = {"time/generating_s": 1, "time/waiting_s": 1, "time/idle_s": 1, "time/rollout_s": 3, "time/step_s": 4}
    drawings = draw_training([{"step": 1, "reward": 0.5, "kl": 0.1, "search/searches": 2.0, **times}])
    assert [drawing.title for drawing in drawings if drawing.plot] == ["Reward", "Searches and turns", "KL", "Time"]
    assert "<use " in str(drawings[0].plot)  # a lone point is a dot


def test_steps_that_are_not_finite_are_gaps() -> None:
    values = [0.1, math.nan, math.inf, 0.2, 0.3, None, True]
    drawing = draw_panel(*KL, [{"step": step, "kl": value} for step, value in enumerate(values, start=1)])
    (line,) = curves(drawing, "var(--blue)")
    assert (line.count("M"), line.count("L")) == (2, 1)  # nothing is drawn from 0.1 to 0.2
    assert str(drawing.plot).count("<use ") == 1  # 0.1 stands alone
    assert "nan" not in str(drawing.plot) and "inf" not in str(drawing.plot)
    assert [numbers for _, numbers in drawing.legend] == ["0.1 → 0.3"]


def test_the_axes_hold_zero_and_round_numbers() -> None:
    log = [{"step": step, "kl": 0.05 + step / 1000, "reward": 0.4} for step in range(1, 61)]
    assert texts(draw_panel(*KL, log)) == ["1", "21", "40", "60", "0", "0.05", "0.1", "0.15"]
    assert texts(draw_panel(*KL, [{"step": 7, "kl": 0.0}])) == ["7", "0", "0.25", "0.5", "0.75", "1"]
    assert texts(draw_panel(*REWARD, log))[4:] == ["0", "0.25", "0.5", "0.75", "1"]  # a reward's end is 1


def test_many_steps_get_a_running_mean() -> None:
    log = [{"step": step, "kl": step % 2} for step in range(1, 31)]
    few, many = draw_panel(*KL, log[:19]), draw_panel(*KL, log[:20])
    assert (len(curves(few, "var(--blue)")), len(curves(many, "var(--blue)"))) == (1, 2)
    assert [few.legend[0][1], many.legend[0][1]] == ["1 → 1", "0.6 → 0.4"]


def test_a_running_mean_looks_back_and_keeps_gaps() -> None:
    values = values_of([{"kl": value} for value in (1, 2, math.nan, 4, 5, 6)], "kl")
    assert running_mean(values)[[0, 1, 3, 5]] == pytest.approx([1, 1.5, 7 / 3, 17 / 4])
    assert math.isnan(running_mean(values)[2])


def test_the_time_split_weighs_an_entry_by_the_steps_it_stands_for() -> None:
    times = {f"time/{name}_s": seconds for name, seconds in {"generating": 1, "waiting": 2, "idle": 1}.items()}
    whole = times | {"time/rollout_s": 4, "time/step_s": 6}
    drawing = draw_time([{"step": 10, **whole}, {"step": 15, **whole}, {"step": 20, **times}])
    assert [(one.label, numbers) for one, numbers in drawing.legend] == [
        ("generating", "15.0 s in all, 17%"),
        ("waiting for search", "30.0 s in all, 33%"),
        ("idle", "15.0 s in all, 17%"),
        ("training", "30.0 s in all, 33%"),
    ]
    assert drawing.notes == ("1 of 3 logged steps have no complete time split and are left out.",)
    too_long = [{"step": 1, **times, "time/rollout_s": 4, "time/step_s": 3}]
    ahead = [{"step": 1, **whole, "sampling/staleness": 1}]
    for unsplit in (too_long, ahead):
        assert draw_time(unsplit) == Drawing(
            "Time", "seconds per step", notes=("Left out: no logged step has a complete time split.",)
        )


def test_curves_of_several_runs_show_their_names_as_text() -> None:
    logs = {"a\x1b$x$": [{"step": 1, "kl": 0.1}], "b": [{"step": 1, "kl": 0.2}]}
    root = ElementTree.fromstring(curves_plot(logs, ["kl"]))
    assert {r"a\x1b$x$", "b", "kl", "step"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_a_fidelity_card_is_drawn_with_its_rates_and_noise(tmp_path: Path) -> None:
    card: dict[str, Any] = {"useful_answer_rate": 0.9, "useful_answer_rate_interval": [0.8, 1.0]}
    text = write_fidelity_plot(card, tmp_path / "a.v2").read_text()
    assert "that answer the query" in text and "requested noise" not in text
    card["noise"] = [{"requested": 0.5, "realised": 0.6, "realised_interval": [0.5, 0.7]}]
    path = write_fidelity_plot(card, tmp_path / "a.v2")
    text = path.read_text()
    assert path == tmp_path / "a.v2.svg"
    assert "that answer the query" in text and "requested noise" in text and "realised, by the documents" in text
    assert write_fidelity_plot(card, tmp_path / "b").read_text() == text  # the same card, the same file


def test_policies_are_drawn_at_the_fidelity_of_their_simulators() -> None:
    em = {"mean": 0.8, "low": 0.7, "high": 0.9}
    card = {"useful_answer_rate": 0.98, "noisy_leak_rate": 0.25}
    row = {"name": "the demo's", "em": em, "fidelity": card}
    text = outcome_plot([row, row | {"name": "half $noise", "fidelity": card | {"noisy_leak_rate": 0.5}}])
    shown = [one.text for one in ElementTree.fromstring(text.partition("?>")[2]).iter(f"{SVG}text")]
    assert shown.count("the demo's") == shown.count("half $noise") == 1, "in the legend"
    assert text.count("noisy replies") == 1 and shown.count("0.8") == 3, "two panels, of one height"
    assert "noisy replies that leak the answer" in shown and "useful replies that answer the query" in shown
