"""Several evaluations by one command: planned by name, a folder each, and only what they write is cleared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted import Library, Writer

from zerosearch.engines.account import LimitReached, Limits
from zerosearch.errors import UserError
from zerosearch.evaluation.matrix import Evaluation, plan_evaluations, run_evaluations
from zerosearch.prompts import PAPER
from zerosearch.rollout.loop import RolloutSettings

ROWS = [{"id": str(n), "dataset": "nq", "question": f"What is {n}?", "golden_answers": ["1"]} for n in range(3)]
DIRECT, COT, RAG = (PAPER.agents[name] for name in ("direct", "cot", "rag"))


class PaidWriter(Writer):
    """Costs a dollar a turn."""

    @property
    def cost_usd(self) -> float:
        return float(len(self.contexts))


def run(todo: list[Evaluation], output_dir: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    announced: list[str] = []

    @contextmanager
    def load(model: str) -> Iterator[tuple[Any, dict[str, str]]]:
        announced.append(f"load {model}")
        yield PaidWriter(lambda context: "<answer> 1 </answer>"), {"model": model}

    settings = RolloutSettings(temperature=0.0)
    options = {"limits": Limits(), "resume": False, "about": {}} | options
    return run_evaluations(todo, ROWS, load, settings, output_dir, announce=announced.append, **options), announced


def test_each_model_is_loaded_once(tmp_path: Path) -> None:
    todo = plan_evaluations(["a/m", "b/m"], [DIRECT, RAG], [Library()], tmp_path)
    found, announced = run(todo, tmp_path)
    assert list(found) == ["a/m direct", "a/m rag", "b/m direct", "b/m rag"]
    assert announced == [
        "load a/m",
        "a/m direct (1 of 4)",
        "a/m rag (2 of 4)",
        "load b/m",
        "b/m direct (3 of 4)",
        "b/m rag (4 of 4)",
    ]
    assert [results["model"] for results in found.values()] == ["a/m", "a/m", "b/m", "b/m"]
    # The documents of the search for the question itself are kept whole, beside the prompt that shows them.
    record = json.loads((tmp_path / "a-m-rag/trajectories.jsonl").read_text().partition("\n")[0])
    documents = ["Emma: Found for What is 0?", "Rain: It rains."]
    assert record["search_results"] == [{"turn": None, "query": "What is 0?", "documents": documents}]


def test_a_new_run_clears_what_it_writes_and_nothing_else(tmp_path: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine.txt"
    mine.write_text("mine")
    (out / "direct").mkdir(parents=True)
    for name in ("direct/trajectories.jsonl", "direct/manifest.json", "results.json", "table.md"):
        (out / name).symlink_to(mine)
    for name in ("searches.sqlite", "notes.txt", "direct/notes.txt"):
        (out / name).write_text("kept")
    (out / "other").mkdir()
    (out / "other/manifest.json").write_text("kept")
    todo = plan_evaluations(["m"], [DIRECT, COT], [], out)
    found, _ = run(todo, out)
    assert list(found) == ["direct", "cot"] and mine.read_text() == "mine"
    kept = ("searches.sqlite", "notes.txt", "direct/notes.txt", "other/manifest.json")
    assert [(out / name).read_text() for name in kept] == ["kept"] * 4
    assert not (out / "results.json").exists() and not (out / "table.md").exists()  # of the earlier run
    assert not (out / "direct/manifest.json").is_symlink()
    (out / "table.md").mkdir()  # not what a run has written
    with pytest.raises(UserError, match=r"Is a directory: '.*table\.md'"):
        run(todo, out)
    (out / "direct").rename(tmp_path / "elsewhere")
    (out / "direct").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"direct is a link: an evaluation is written into a folder"):
        run(todo, out)
    assert (tmp_path / "elsewhere/manifest.json").exists()
    (out / "direct").unlink()
    (out / "direct").touch()
    with pytest.raises(UserError, match=r"the output folder .*direct is a file"):
        run(todo, out, resume=True)


def test_a_limit_ends_it_with_what_there_is(tmp_path: Path) -> None:
    todo = plan_evaluations(["m"], [DIRECT, COT], [], tmp_path)
    with pytest.raises(LimitReached, match="0 of 3 trajectories are finished"):
        run(todo, tmp_path, limits=Limits(seconds=1e-9))
    run(todo[:1], tmp_path)
    found, announced = run(todo, tmp_path, limits=Limits(seconds=1e-9), resume=True)
    assert list(found) == ["direct"]
    stopped = "stopped at the limit of 1e-09 s: 0 of 3 trajectories are finished; --resume true goes on"
    assert announced == ["load m", "direct (1 of 2)", "cot (2 of 2)", stopped]


def test_what_one_evaluation_has_spent_the_next_may_not(tmp_path: Path) -> None:
    todo = plan_evaluations(["m"], [DIRECT, COT], [], tmp_path)
    found, _ = run(todo, tmp_path, limits=Limits(usd=4.0), max_live=1)
    assert [(results["n"], results["this_command"]["usd"]) for results in found.values()] == [(3, 3.0), (1, 1.0)]


def test_names_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"would share a folder: name each model \(a b, a-b\)"):
        plan_evaluations(["a b", "a-b"], [DIRECT], [], tmp_path)
