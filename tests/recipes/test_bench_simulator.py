"""recipes/bench/simulator.py: the same searches for both servers, none of them twice, and true ratios."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from zerosearch.tinyworld.world import World

if TYPE_CHECKING:
    from chat_server import ChatServer

pytest_plugins = ("chat_server", "recipe_modules")  # fixtures


@pytest.fixture
def bench(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("bench/simulator")


def test_no_round_repeats_the_searches_of_another(bench: ModuleType) -> None:
    world = World.draw(1)
    rounds = [bench.searches(world, 64, number) for number in range(3)]
    assert rounds[0] == bench.searches(world, 64, 0)
    assert [len(requests) for requests in rounds] == [64] * 3
    asked = {(request.question, request.query, request.key) for requests in rounds for request in requests}
    assert len(asked) == 3 * 64
    first = rounds[0][: bench.SEARCHES_PER_QUESTION]
    assert len({request.question for request in first}) == 1, "one question after the other"


def test_only_one_prompt_has_a_long_beginning_that_all_searches_share(bench: ModuleType) -> None:
    short, long = bench.templates(World.draw(1)).values()
    assert long.endswith(short) and "{" not in long.removesuffix(short)
    assert len(long) > 4 * len(short)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_tokens", "0"], "max_tokens is 0: it must be at least 1"),
        (["--port", "abc"], "invalid int value: 'abc'"),
        (["--output", "/dev/null/bench/file.json"], "Not a directory: '/dev/null/bench'"),
        (["--model", "no/such/folder/"], "the model 'no/such/folder/' is no folder here"),
    ],
)
def test_mistakes_get_one_sentence(refusal: Callable[[str, list[str]], str], flags: list[str], message: str) -> None:
    assert message in refusal("bench/simulator", flags)


def test_both_servers_are_asked_the_same_and_their_ratio_is_told(
    bench: ModuleType, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "SEARCHES", {1: 3, 4: 8})
    monkeypatch.setattr(bench, "ROUNDS", 2)
    chat_server.write = lambda messages: "Doc 1: It rains."
    server = SimpleNamespace(base_url=chat_server.url)
    rows = bench.measure({"on": server, "off": server}, bench.BenchArguments())
    assert [(row["prompt"], row["in_flight"]) for row in rows] == [
        (prompt, in_flight) for prompt in ("short", "shared example") for in_flight in (1, 4)
    ]
    for row in rows:
        low, high = row["ratio_spread"]
        assert 0 < low <= row["ratio"] <= high
        assert row["ratio"] == pytest.approx((low + high) / 2), "of two rounds"
    bodies = [str(request["messages"]) + str(request["seed"]) for request in chat_server.requests]
    # Two prompts, 3 and 8 searches, two rounds and one to warm up; each search once at either server.
    assert len(bodies) == 2 * 2 * (3 + 8) * 3
    assert all(bodies.count(body) == 2 for body in bodies)
    assert len(bench.table(rows).splitlines()) == 2 + 4
    bench.plot(rows, tmp_path / "simulator.svg")
    assert "<svg" in (tmp_path / "simulator.svg").read_text()
