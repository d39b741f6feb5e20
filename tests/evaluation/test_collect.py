"""Collecting against servers that speak OpenAI's chat protocol and SerpAPI's: nothing lost, nothing paid for twice."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiohttp import web
from http_servers import serving

from zerosearch import http
from zerosearch.simulator.judge import rule_verdicts
from zerosearch.simulator.traces import read_traces

pytest_plugins = ("recipe_modules",)  # fixtures

ROOT = Path(__file__).parents[2]
LoadRecipe = Callable[[str], ModuleType]
Reply = tuple[int, str]


def says(text: str) -> Reply:
    """Stop as an endpoint does: before the stop string, which it keeps to itself."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 100}})


def chat_reply(messages: list[dict[str, str]]) -> Reply:
    """Search twice for the book of the question, then answer; number 3 answers at once."""
    number = re.findall(r"book (\d+)", messages[0]["content"])[0]
    if number == "3":
        return says("<answer> Author 3 ")
    turn = sum(message["role"] == "assistant" for message in messages)
    return says([f"<search> book {number} author ", "<search> who writes ", f"<answer> Author {number} "][turn])


def google_reply(query: str) -> Reply:
    found = [{"title": f"{query} {n}", "snippet": f"Author {query.split()[1]} wrote it."} for n in range(7)]
    return 200, json.dumps({"organic_results": found})


@dataclass
class Servers:
    """An OpenAI-style endpoint and SerpAPI in one server; both count what was asked."""

    url: str = ""
    chat: Callable[[int, list[dict[str, str]]], Reply] = lambda n, messages: chat_reply(messages)
    google: Callable[[int, str], Reply] = lambda n, query: google_reply(query)
    hold: Callable[[int], bool] = lambda n: False  # whether the n-th search waits until this says no
    held: int = 0
    chats: int = 0
    queries: Counter[str] = field(default_factory=Counter)
    keys: set[str | None] = field(default_factory=set)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    monkeypatch.setattr(http, "FIRST_BACK_OFF_S", 0.01)
    state = Servers()

    async def chat(request: web.Request) -> web.StreamResponse:
        state.chats += 1
        state.keys.add(request.headers.get("Authorization"))
        status, text = state.chat(state.chats - 1, (await request.json())["messages"])
        return web.Response(status=status, text=text, content_type="application/json")

    async def google(request: web.Request) -> web.StreamResponse:
        query = request.query["q"]
        state.queries[query] += 1
        state.keys.add(request.query["api_key"])
        number = sum(state.queries.values()) - 1
        status, text = state.google(number, query)
        state.held += 1
        while state.hold(number):
            await asyncio.sleep(0.01)
        state.held -= 1
        return web.Response(status=status, text=text, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/search.json", google)
    with serving(app, shutdown_timeout=0.1) as address:
        state.url = address
        yield state


@pytest.fixture
def arguments(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("SERPAPI_API_KEY", "serp-key")
    monkeypatch.setenv("CHAT_KEY", "chat-key")
    questions = tmp_path / "questions.jsonl"
    rows = [{"id": f"q{n}", "question": f"Who wrote book {n}?", "golden_answers": [f"Author {n}"]} for n in range(40)]
    questions.write_text("".join(json.dumps(row | {"dataset": "books"}) + "\n" for row in rows))
    return [
        *("--dataset", str(questions), "--model", "qwen", "--output_dir", str(tmp_path / "out")),
        *("--endpoint_url", f"{servers.url}/v1", "--endpoint_key_env", "CHAT_KEY"),
        *("--google_url", f"{servers.url}/search.json", "--google_queries_per_s", "10000"),
    ]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_every_search_is_kept_with_what_became_of_it(
    load_recipe: LoadRecipe,
    arguments: list[str],
    servers: Servers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load_recipe("collect_traces").main([*arguments, "--endpoint_usd_read", "10"])
    traces = read_traces(tmp_path / "out/traces.jsonl")
    assert len(traces) == 78  # two each, but for the question that is answered at once
    first = next(trace for trace in traces if trace["query"] == "book 7 author")
    assert first == {
        **{"id": "q7", "dataset": "books", "question": "Who wrote book 7?", "golden_answers": ["Author 7"]},
        **{"turn": 0, "query": "book 7 author"},
        "documents": [f"book 7 author {n}: Author 7 wrote it." for n in range(5)],
        **{
            "policy_answer": "Author 7",
            "outcome": "answered",
            "em": 1.0,
            "f1": 1.0,
            "engine": "google",
            "policy": "qwen",
        },
    }
    assert rule_verdicts(first) == [True] * 5
    assert servers.queries["who writes"] == 1  # the same query of 39 questions: paid for once
    assert servers.keys == {"Bearer chat-key", "serp-key"}
    results = json.loads((tmp_path / "out/collecting.json").read_text())
    assert (results["questions"], results["searches"], results["em"], results["missing"]) == (40, 78, 1.0, 0)
    cost = servers.chats * 1000 * 10 / 1e6 + 40 * 275 / 30_000  # 39 books and "who writes"
    assert results["this_command"]["usd"] == pytest.approx(cost)
    assert "40 of 40 questions, 78 searches, EM 1.000" in capsys.readouterr().out
    manifest = (tmp_path / "out/manifest.json").read_text()
    assert "serp-key" not in manifest and "chat-key" not in manifest
    chats = servers.chats
    load_recipe("collect_traces").main([*arguments, "--endpoint_usd_read", "10"])  # nothing is left to do
    assert servers.chats == chats and sum(servers.queries.values()) == 40
    assert read_traces(tmp_path / "out/traces.jsonl") == traces


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--google_max_queries", "10"], "the limit of 10 queries to google is reached"),
        (["--google_max_usd", "0.1"], "the limit of 0.1 USD for google is reached"),
        (["--max_usd", "0.25", "--endpoint_usd_read", "10"], "stopped at the limit of 0.25 USD"),
    ],
)
def test_a_limit_stops_it_and_the_same_command_goes_on(
    load_recipe: LoadRecipe,
    arguments: list[str],
    servers: Servers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    arguments += ["--questions_in_flight", "2"]
    load_recipe("collect_traces").main([*arguments, *flags])
    out = capsys.readouterr().out
    assert message in out and "the same command goes on" in out
    asked = sum(servers.queries.values())
    assert 5 <= asked <= 12
    finished = len(rows_of(tmp_path / "out/trajectories.jsonl"))
    assert 2 <= finished <= 12
    load_recipe("collect_traces").main(arguments)
    assert len(rows_of(tmp_path / "out/trajectories.jsonl")) == 40
    assert len(read_traces(tmp_path / "out/traces.jsonl")) == 78
    assert set(servers.queries.values()) == {1} and len(servers.queries) == 40


@pytest.mark.parametrize(
    "failure",
    [(429, "slow down"), (500, "oops"), (200, '{"organic_results": [{"ti'), (200, "[]"), (200, '{"error": "x"}')],
)
@pytest.mark.parametrize("server", ["google", "chat"])
def test_what_may_pass_is_tried_again(
    load_recipe: LoadRecipe, arguments: list[str], servers: Servers, tmp_path: Path, server: str, failure: Reply
) -> None:
    if server == "google":
        servers.google = lambda n, query: failure if n < 2 else google_reply(query)
    else:
        servers.chat = lambda n, messages: failure if n < 2 else chat_reply(messages)
    load_recipe("collect_traces").main([*arguments, "--dataset_limit", "3"])
    assert len(read_traces(tmp_path / "out/traces.jsonl")) == 6
    assert all(row["em"] == 1.0 for row in rows_of(tmp_path / "out/trajectories.jsonl"))


@pytest.mark.parametrize(
    ("server", "failure", "message"),
    [
        ("google", (401, '{"error": "Invalid API key."}'), "Google through serpapi .* 401.*Invalid API key.* goes on"),
        (
            "google",
            (429, '{"error": "Your account has run out of searches."}'),
            "run out of searches.*SERPAPI_API_KEY",
        ),
        ("chat", (401, '{"error": {"message": "Incorrect API key provided"}}'), "the endpoint .* 401.*Incorrect API"),
        ("chat", (402, '{"error": {"message": "Insufficient Balance"}}'), "402.*Insufficient Balance.* goes on"),
    ],
)
def test_a_wrong_key_or_an_empty_balance_ends_the_run_in_one_sentence(
    load_recipe: LoadRecipe,
    arguments: list[str],
    servers: Servers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    server: str,
    failure: Reply,
    message: str,
) -> None:
    if server == "google":
        # The first that is refused begins when three questions have ended.
        paid = {"who writes", *(f"book {number} author" for number in range(6))}
        servers.google = lambda n, query: google_reply(query) if query in paid else failure
    else:
        servers.chat = lambda n, messages: chat_reply(messages) if n < 20 else failure
    with pytest.raises(SystemExit) as caught:
        load_recipe("collect_traces").main([*arguments, "--questions_in_flight", "4"])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error)
    assert "serp-key" not in error and "chat-key" not in error
    assert sum(servers.queries.values()) < 30  # it did not go through all the questions
    finished = len(rows_of(tmp_path / "out/trajectories.jsonl"))
    assert finished >= 2
    servers.google, servers.chat = (lambda n, query: google_reply(query)), (lambda n, messages: chat_reply(messages))
    load_recipe("collect_traces").main(arguments)
    assert len(rows_of(tmp_path / "out/trajectories.jsonl")) == 40


def test_searches_that_fail_one_by_one_are_counted_and_tried_again_next_time(
    load_recipe: LoadRecipe,
    arguments: list[str],
    servers: Servers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    servers.google = lambda n, query: (400, "bad query") if query == "book 5 author" else google_reply(query)
    load_recipe("collect_traces").main(arguments)
    assert "1 questions are missing: 1 lost a search" in capsys.readouterr().out
    assert Counter(row["outcome"] for row in rows_of(tmp_path / "out/trajectories.jsonl")) == {
        "answered": 39,
        "failed_search": 1,
    }
    assert {trace["id"] for trace in read_traces(tmp_path / "out/traces.jsonl")}.isdisjoint({"q3", "q5"})
    servers.google = lambda n, query: (400, "bad query")
    with pytest.raises(SystemExit):
        load_recipe("collect_traces").main([*arguments, "--max_failed", "1"])
    assert "1 questions lost a search, the last one so: Google" in capsys.readouterr().err
    servers.google = lambda n, query: google_reply(query)
    load_recipe("collect_traces").main(arguments)
    assert len(rows_of(tmp_path / "out/trajectories.jsonl")) == 40


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "simulated"], "simulated"),
        (["--endpoint_key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--google_key_file", "/none"], "key file /none cannot be read"),
        (["--max_failed", "0"], "max_failed is 0"),
        (["--max_usd", "0"], "the limit of usd is 0"),
        (["--dataset", "none.jsonl"], "there is no file none.jsonl"),
        (
            ["--output_dir", f"{__file__}/x", "--search_cache", ":memory:"],
            f"the output folder {__file__}/x cannot be used",
        ),
    ],
)
def test_a_mistake_gets_one_sentence(
    load_recipe: LoadRecipe,
    arguments: list[str],
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_recipe("collect_traces").main([*arguments, *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error and message in error


def test_another_collection_in_the_folder_is_refused(
    load_recipe: LoadRecipe, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    load_recipe("collect_traces").main([*arguments, "--dataset_limit", "3"])
    with pytest.raises(SystemExit):
        load_recipe("collect_traces").main([*arguments, "--dataset_limit", "3", "--model", "another"])
    assert "model is 'qwen' there, and 'another' here" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_half_way_and_started_again_no_query_is_paid_for_twice(
    arguments: list[str], servers: Servers, tmp_path: Path
) -> None:
    servers.hold = lambda n: n >= 20
    command = [sys.executable, str(ROOT / "recipes/collect_traces.py"), *arguments, "--questions_in_flight", "4"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while servers.held < 4 or sum(servers.queries.values()) < 24:  # four in flight, and all of them kept waiting
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    before = dict(servers.queries)
    with sqlite3.connect(tmp_path / "out/searches.sqlite") as database:
        paid = [json.loads(text)["query"] for (text,) in database.execute("SELECT request FROM replies")]
    assert (len(before), len(paid)) == (24, 20)  # lost with the kill: no more than was in flight
    log = tmp_path / "out/trajectories.jsonl"
    finished = len(rows_of(log))
    assert finished == 20  # 19 whose search was paid for, and the one that needs none
    servers.hold = lambda n: False
    with log.open("ab") as file:  # as if the kill had come in the middle of a line
        file.write(b'{"row": 12, "id": "q1')
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ended in half a line" in done.stderr
    assert all(servers.queries[query] == before[query] for query in paid)
    assert sorted(row["row"] for row in rows_of(log)) == list(range(40))
    assert len(read_traces(tmp_path / "out/traces.jsonl")) == 78
