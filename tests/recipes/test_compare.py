"""recipes/compare.py: two evaluations side by side, and one sentence where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonl_files import write_rows
from recipe_modules import Refusal, load_recipe


def evaluation(folder: Path, answers: list[str], first: int = 0) -> str:
    folder.mkdir()
    alike: dict[str, Any] = {"dataset": "nq", "golden_answers": ["x"], "sample": 0, "step": None}
    alike |= {"outcome": "answered", "searches": 1, "turns": 2, "em": 0.0, "f1": 0.0, "segments": []}
    rows = [
        {**alike, "id": str(n), "row": n, "question": f"{n}?", "answer": answer}
        for n, answer in enumerate(answers, start=first)
    ]
    write_rows(folder / "trajectories.jsonl", rows)
    return str(folder)


def test_it_prints_and_keeps_the_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = evaluation(tmp_path / "a", ["x", "y", "y", "y", "y"])
    second = evaluation(tmp_path / "b", ["x", "x", "x", "x"])
    load_recipe("compare").main(["--first", first, "--second", second, "--output", str(tmp_path / "c.json")])
    printed = capsys.readouterr().out
    assert "all questions  4  +0.750" in printed
    assert "1 questions are in one of the two only, and left out" in printed
    kept = json.loads((tmp_path / "c.json").read_text())
    assert (kept["em"]["mean"], kept["better"], kept["worse"], kept["same"]) == (0.75, 3, 0, 1)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("none", "none holds no evaluation"),
        ("other", "the two runs share no question"),
        ("strange", "line 1 is not a trajectory: it lacks id"),
    ],
)
def test_a_mistake_gets_one_sentence(refusal: Refusal, tmp_path: Path, second: str, message: str) -> None:
    evaluation(tmp_path / "other", ["x"], first=9)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/trajectories.jsonl").write_text('{"question": "Why?"}\n')
    first = evaluation(tmp_path / "a", ["x"])
    assert message in refusal("compare", ["--first", first, "--second", str(tmp_path / second)])
