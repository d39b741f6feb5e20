"""recipes/bench/overlap.py: ratios are taken round by round, and a search returns its own question's documents."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from zerosearch.engines import SearchRequest

BENCH = Path(__file__).parents[2] / "recipes" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("overlap")


def run(overlap_steps: int, step_s: float, staleness: list[int]) -> dict[str, Any]:
    return {"overlap_steps": overlap_steps, "step_s": step_s, "staleness": staleness}


def test_ratios_are_those_of_runs_of_the_same_round(bench: ModuleType) -> None:
    one_by_one = [run(0, seconds, [0, 0, 0]) for seconds in (2.0, 4.0, 8.0)]
    overlapped = [run(1, seconds, [0, 1, 1]) for seconds in (1.0, 3.0, 4.8)]
    expected = {"overlap_step_ratio": {"mean": 0.6, "low": 0.5, "high": 0.75}, "max_staleness": 1}
    assert bench.summary([*one_by_one, *overlapped]) == expected
    with pytest.raises(AssertionError):
        bench.summary([run(0, 2.0, [0, 0, 0]), run(1, 1.0, [0, 1, 0])])


def test_a_search_returns_the_documents_of_its_question(bench: ModuleType) -> None:
    world = bench.World("none", 0)
    question = world.row(17)["question"]
    request = SearchRequest("query", question, ("?",), 0.0, key=(42, 3, 999, 0, 2))
    assert asyncio.run(bench.DelayedEngine(world).search(request)).documents == world.documents(17, 2)
