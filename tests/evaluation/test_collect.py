"""Collecting against servers that speak OpenAI's chat protocol and SerpAPI's: nothing lost, nothing paid for twice."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jsonl_files import rows_of, write_rows
from recipe_modules import Refusal, load_recipe
from searching import wait_until

from zerosearch.simulator.traces import read_traces

if TYPE_CHECKING:
    from chat_server import ChatServer, Messages
    from paid_search import PaidSearch

ROOT = Path(__file__).parents[2]


def look_up_twice(messages: Messages) -> str:
    """Search for the book of the question, then for what all questions ask, then answer; number 3 answers at once."""
    number = re.findall(r"book (\d+)", messages[0]["content"])[0]
    turn = sum(message["role"] == "assistant" for message in messages) if number != "3" else 2
    return [f"<search> book {number} </search>", "<search> who </search>", f"<answer> Author {number} </answer>"][turn]


@pytest.fixture
def arguments(
    chat_server: ChatServer, paid_search: PaidSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.setenv("SERPAPI_API_KEY", "serp-key")
    monkeypatch.setenv("CHAT_KEY", "chat-key")
    chat_server.write = look_up_twice
    rows = [{"id": f"q{n}", "question": f"Who wrote book {n}?", "golden_answers": [f"Author {n}"]} for n in range(24)]
    questions = write_rows(tmp_path / "questions.jsonl", (row | {"dataset": "books"} for row in rows))
    return [
        *("--dataset", str(questions), "--model", "qwen", "--output_dir", str(tmp_path / "out")),
        *("--endpoint_url", chat_server.url, "--endpoint_key_env", "CHAT_KEY", "--questions_in_flight", "4"),
        *("--google_url", paid_search.url, "--google_queries_per_s", "10000"),
    ]


def collect(arguments: list[str]) -> None:
    load_recipe("collect_traces").main(arguments)


def test_every_search_is_kept_with_what_became_of_it(
    arguments: list[str],
    chat_server: ChatServer,
    paid_search: PaidSearch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments += ["--endpoint_usd_written", "10"]
    collect(arguments)
    traces = read_traces(tmp_path / "out/traces.jsonl")
    assert len(traces) == 46  # two each, but for the question that is answered at once
    assert next(trace for trace in traces if trace["query"] == "book 7") == {
        **{"id": "q7", "dataset": "books", "question": "Who wrote book 7?", "golden_answers": ["Author 7"]},
        **{"turn": 0, "query": "book 7", "documents": ["book 7: It rains."], "policy_answer": "Author 7"},
        **{"outcome": "answered", "em": 1.0, "f1": 1.0, "engine": "google", "policy": "qwen"},
    }
    assert paid_search.queries.count("who") == 1  # the same query of 23 questions: paid for once
    assert set(chat_server.keys) == {"Bearer chat-key"}
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["n"], results["searches"], results["em"]["mean"], results["lost"]) == (24, 46 / 24, 1.0, None)
    cost = results["usage"]["tokens_written"] * 10 / 1e6 + 24 * 275 / 30_000  # 23 books and "who"
    assert results["this_command"]["usd"] == pytest.approx(cost)
    assert "24 of 24 questions, EM 1.000" in capsys.readouterr().out
    assert not any(b"-key" in path.read_bytes() for path in (tmp_path / "out").iterdir())
    replies = len(chat_server.requests)
    collect(arguments)  # nothing is left to do
    assert len(chat_server.requests) == replies and len(paid_search.queries) == 24
    assert read_traces(tmp_path / "out/traces.jsonl") == traces
    (tmp_path / "out/traces.jsonl").unlink()
    with pytest.raises(SystemExit):
        collect([*arguments, "--seed", "1"])
    assert "holds another evaluation" in capsys.readouterr().err
    assert not (tmp_path / "out/traces.jsonl").exists(), "a folder that is refused is left as it is"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--google_max_queries", "10"], "the limit of 10 queries to google is reached"),
        (["--google_max_usd", "0.1"], "the limit of 0.1 USD for google is reached"),
        (["--max_usd", "0.1"], "stopped at the limit of 0.1 USD"),
    ],
)
def test_a_limit_stops_it_and_the_same_command_goes_on(
    arguments: list[str],
    paid_search: PaidSearch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    collect([*arguments, *flags])
    out = capsys.readouterr().out
    assert message in out and "the same command goes on" in out
    assert 5 <= len(paid_search.queries) <= 16
    assert 2 <= len(rows_of(tmp_path / "out/trajectories.jsonl")) <= 16
    collect(arguments)
    assert len(rows_of(tmp_path / "out/trajectories.jsonl")) == 24
    assert len(read_traces(tmp_path / "out/traces.jsonl")) == 46
    assert len(paid_search.queries) == len(set(paid_search.queries)) == 24


@pytest.mark.parametrize(
    ("server", "status", "message"),
    [
        ("google", 401, "Google through serpapi .* 401.*refused.*SERPAPI_API_KEY.* goes on"),
        ("chat", 402, "the endpoint .* 402.*out of order.* goes on"),
    ],
)
def test_a_wrong_key_or_an_empty_balance_ends_the_run_in_one_sentence(
    arguments: list[str],
    chat_server: ChatServer,
    paid_search: PaidSearch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    server: str,
    status: int,
    message: str,
) -> None:
    if server == "google":
        paid_search.refuses = lambda query: status if re.search(r"[6-9]|\d\d", query) else 200
    else:
        chat_server.write = lambda messages: look_up_twice(messages) if len(chat_server.requests) < 20 else status
    with pytest.raises(SystemExit) as caught:
        collect(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error) and "-key" not in error
    assert len(paid_search.queries) < 20  # it did not go through all the questions
    assert len(rows_of(tmp_path / "out/trajectories.jsonl")) >= 2
    paid_search.refuses, chat_server.write = lambda query: 200, look_up_twice
    collect(arguments)
    assert len(rows_of(tmp_path / "out/trajectories.jsonl")) == 24


def test_searches_that_fail_one_by_one_are_counted_and_tried_again_next_time(
    arguments: list[str],
    paid_search: PaidSearch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paid_search.refuses = lambda query: 400 if query == "book 5" else 200
    collect(arguments)
    assert "1 of 24 questions lost a search: Google" in capsys.readouterr().out
    outcomes = Counter(row["outcome"] for row in rows_of(tmp_path / "out/trajectories.jsonl"))
    assert outcomes == {"answered": 23, "failed_search": 1}
    assert {trace["id"] for trace in read_traces(tmp_path / "out/traces.jsonl")}.isdisjoint({"q3", "q5"})
    with pytest.raises(SystemExit):
        collect([*arguments, "--max_failed", "1"])
    assert "1 of 24 questions lost a search, so there are no scores: Google" in capsys.readouterr().err
    paid_search.refuses = lambda query: 200
    collect(arguments)
    assert len(read_traces(tmp_path / "out/traces.jsonl")) == 46


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "simulated"], "invalid choice: 'simulated'"),
        (["--endpoint_key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--google_key_file", "/none"], "key file /none cannot be read"),
        (["--max_failed", "0"], "max_failed is 0"),
        (["--max_usd", "0"], "the limit of usd is 0"),
        (["--dataset", "none.jsonl"], "there is no file none.jsonl"),
        (["--output_dir", f"{__file__}/x"], f"the output folder {__file__}/x cannot be used"),
    ],
)
def test_a_mistake_gets_one_sentence(refusal: Refusal, arguments: list[str], flags: list[str], message: str) -> None:
    assert message in refusal("collect_traces", [*arguments, *flags])


@pytest.mark.slow
def test_killed_half_way_and_started_again_no_query_is_paid_for_twice(
    arguments: list[str], paid_search: PaidSearch, tmp_path: Path
) -> None:
    paid_search.holds = lambda number: number >= 12
    command = [sys.executable, str(ROOT / "recipes/collect_traces.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        # Four are in flight then, all of them kept waiting.
        wait_until(lambda: len(paid_search.queries) >= 16 and paid_search.in_flight >= 4, 120)
        os.kill(process.pid, signal.SIGKILL)
    before = Counter(paid_search.queries)
    with sqlite3.connect(tmp_path / "out/searches.sqlite") as database:
        paid = [json.loads(text)["query"] for (text,) in database.execute("SELECT request FROM replies")]
    assert (len(before), len(paid)) == (16, 12)  # lost with the kill: no more than was in flight
    log = tmp_path / "out/trajectories.jsonl"
    assert len(rows_of(log)) == 12  # 11 whose search was paid for, and the one that needs none
    paid_search.holds = lambda number: False
    with log.open("ab") as file:  # as if the kill had come in the middle of a line
        file.write(b'{"row": 12, "id": "q1')
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ended in half a line" in done.stderr
    after = Counter(paid_search.queries)
    assert all(after[query] == before[query] for query in paid)
    assert sorted(row["row"] for row in rows_of(log)) == list(range(24))
    assert len(read_traces(tmp_path / "out/traces.jsonl")) == 46
