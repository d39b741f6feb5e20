"""The cache: what is kept comes back, what is not there is asked for once, by however many processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from searching import searched

from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.account import Account
from zerosearch.engines.cache import Cache, CachedEngine
from zerosearch.errors import UserError

REQUEST = SearchRequest("Emma author", "Who wrote Emma?", ("Jane Austen",), p_noise=0.5, key=(0, 1, 2, 3, 0))


class Rain:
    """An engine that says how often it was asked."""

    name = "rain"
    max_concurrency = 8

    def __init__(self, reads_query_only: bool = False, delay_s: float = 0.0, **identity: Any) -> None:
        self.reads_query_only, self.delay_s, self._identity = reads_query_only, delay_s, identity
        self.asked: list[SearchRequest] = []
        self.failing = self.closed = False

    async def search(self, request: SearchRequest) -> SearchResult:
        self.asked.append(request)
        await asyncio.sleep(self.delay_s)
        if self.failing:
            raise SearchError("no rain today")
        return SearchResult((f"rain {len(self.asked)} on {request.query}", "Töne"), noisy=True, retries=2)

    async def aclose(self) -> None:
        self.closed = True

    def identity(self) -> dict[str, Any]:
        return {"engine": self.name, **self._identity}


def test_a_cached_answer_needs_no_engine_and_says_the_same(tmp_path: Path) -> None:
    rain = Rain()
    (recorded,) = searched(CachedEngine(tmp_path / "new/c.sqlite", rain), REQUEST)
    assert recorded == SearchResult(("rain 1 on Emma author", "Töne"), noisy=True, retries=2)
    assert rain.closed
    silent = Rain()
    silent.failing = True
    replaying = CachedEngine(tmp_path / "new/c.sqlite", silent, cache_only=True)
    assert searched(replaying, REQUEST) == [replace(recorded, retries=0)], "no call was repeated this time"
    assert silent.asked == []
    assert (replaying.account.queries, replaying.account.replayed, replaying.account.sent) == (1, 1, 0)


def test_what_results_held_in_an_earlier_version_is_passed_over(tmp_path: Path) -> None:
    engine = CachedEngine(tmp_path / "c.sqlite", Rain())
    engine.cache.put(engine._described(REQUEST), {"documents": ["rain"], "noisy": True, "noisy_share": 1.0})
    assert searched(engine, REQUEST) == [SearchResult(("rain",), noisy=True)]


@pytest.mark.parametrize(
    "change",
    [
        {"query": "Emma novel"},
        {"question": "Who wrote Persuasion?"},
        {"golden_answers": ("Austen",)},
        {"p_noise": 1.0},  # at 0.5 the coin of this key falls on useful
        {"key": (0, 1, 2, 3, 1)},
    ],
)
def test_what_a_simulator_reads_tells_searches_apart(change: dict[str, Any], tmp_path: Path) -> None:
    rain, other = Rain(), replace(REQUEST, **change)
    engine = CachedEngine(tmp_path / "c.sqlite", rain)
    searched(engine, REQUEST, other, other)
    assert rain.asked == [REQUEST, other]


def test_the_coin_counts_not_the_odds_at_which_it_was_tossed(tmp_path: Path) -> None:
    rain = Rain()
    searched(CachedEngine(tmp_path / "c.sqlite", rain), REQUEST, replace(REQUEST, p_noise=0.0))
    assert len(rain.asked) == 1


def test_a_real_engine_reads_the_query_alone(tmp_path: Path) -> None:
    rain, other = Rain(reads_query_only=True), replace(REQUEST, question="Q?", p_noise=0.0, key=())
    first, second = searched(CachedEngine(tmp_path / "c.sqlite", rain), REQUEST, other)
    assert len(rain.asked) == 1 and first.documents == second.documents


def test_another_engine_has_answers_of_its_own(tmp_path: Path) -> None:
    one, two = Rain(model="3B"), Rain(model="7B")
    for engine in (one, two, one):
        searched(CachedEngine(tmp_path / "c.sqlite", engine), REQUEST)
    assert (len(one.asked), len(two.asked)) == (1, 1)


def test_the_same_search_in_flight_is_sent_once(tmp_path: Path) -> None:
    rain = Rain(delay_s=0.05)
    results = searched(CachedEngine(tmp_path / "c.sqlite", rain), *[REQUEST] * 20)
    assert len(rain.asked) == 1
    assert {result.documents for result in results} == {("rain 1 on Emma author", "Töne")}


def test_a_miss_in_cache_only_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    searched(CachedEngine(tmp_path / "c.sqlite", Rain()), REQUEST)
    rain = Rain()
    engine = CachedEngine(tmp_path / "c.sqlite", rain, cache_only=True)
    with pytest.raises(SearchError, match="no answer of rain to the query 'Emma novel'; run the same command without"):
        asyncio.run(engine.search(replace(REQUEST, query="Emma novel")))
    assert rain.asked == []


def test_a_failure_is_not_kept(tmp_path: Path) -> None:
    rain = Rain()
    rain.failing = True
    engine = CachedEngine(tmp_path / "c.sqlite", rain)
    for _ in range(2):
        with pytest.raises(SearchError, match="no rain today"):
            asyncio.run(engine.search(REQUEST))
    rain.failing = False
    assert searched(engine, REQUEST)[0].documents[0] == "rain 3 on Emma author"


def test_searches_are_booked_once(tmp_path: Path) -> None:
    rain = Rain()
    rain.account = Account("rain")  # type: ignore[attr-defined]
    engine = CachedEngine(tmp_path / "c.sqlite", Rain())
    searched(engine, REQUEST, REQUEST)
    assert (engine.account.queries, engine.account.sent, engine.account.replayed) == (2, 1, 1)
    assert CachedEngine(tmp_path / "c.sqlite", rain).account is rain.account  # type: ignore[attr-defined]


def test_a_model_that_nobody_named_is_the_one_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    with pytest.raises(ValueError, match="does not know its model yet"):
        CachedEngine(path, Rain(model=None))
    searched(CachedEngine(path, Rain(model="3B", top=5)), REQUEST)
    replaying = CachedEngine(path, Rain(model=None, top=5), cache_only=True)
    assert replaying.identity() == {"engine": "rain", "model": "3B", "top": 5}
    assert len(searched(replaying, REQUEST)) == 1
    with pytest.raises(UserError, match="holds: none"):
        CachedEngine(path, Rain(model=None, top=3), cache_only=True)
    searched(CachedEngine(path, Rain(model="7B", top=5)), REQUEST)
    with pytest.raises(UserError, match=r"name the model of rain.*3B.*7B"):
        CachedEngine(path, Rain(model=None, top=5), cache_only=True)


def test_a_file_that_is_not_a_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no cache"):
        CachedEngine(tmp_path / "none.sqlite", Rain(), cache_only=True)
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("Years of work. " * 100)
    for cache_only in (False, True):
        with pytest.raises(UserError, match="cannot be used"):
            CachedEngine(thesis, Rain(), cache_only=cache_only)
    assert thesis.read_text() == "Years of work. " * 100


def test_a_cache_in_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.sqlite"
    searched(CachedEngine(path, Rain()), REQUEST)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    path.chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        assert len(searched(CachedEngine(path, Rain(), cache_only=True), REQUEST)) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["c.sqlite"], "nothing is written beside it"
    finally:
        tmp_path.chmod(0o700)


def test_what_a_writer_has_not_yet_put_into_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.sqlite"
    writer = CachedEngine(path, Rain())
    asyncio.run(writer.search(REQUEST))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert len(searched(CachedEngine(path, Rain(), cache_only=True), REQUEST)) == 1
    writer.cache.close()


def record_many(path: Path, process: int) -> None:
    requests = [replace(REQUEST, query=f"query {process} {number}") for number in range(50)]
    searched(CachedEngine(path, Rain()), *requests)


def test_processes_share_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=record_many, args=(path, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    replaying = CachedEngine(path, Rain(), cache_only=True)
    requests = [replace(REQUEST, query=f"query {process} {number}") for process in range(2) for number in range(50)]
    assert len(searched(replaying, *requests)) == 100


def test_a_reply_outlives_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from zerosearch.engines.cache import Cache;"
        "Cache(sys.argv[1]).put({'query': 'Emma'}, {'verdict': None, 'reply': 'T\\u00f6ne \\ud83d'});"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.sqlite")], check=False)
    assert killed.returncode == -signal.SIGKILL
    cache = Cache(tmp_path / "c.sqlite")
    assert cache.get({"query": "Emma"}) == {"verdict": None, "reply": "Töne \ud83d"}
    assert cache.get({"query": "emma"}) is None


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "old.sqlite") as old:
        old.execute("CREATE TABLE verdicts (key TEXT)")
    with pytest.raises(UserError, match="is not a cache of this version: name another file"):
        Cache(tmp_path / "old.sqlite")


def test_a_full_disk_and_a_damaged_file_get_one_sentence(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c.sqlite")
    cache._database.execute("PRAGMA max_page_count = 4")
    with pytest.raises(UserError, match=r"the cache .*c.sqlite cannot be used: database or disk is full"):
        cache.put({"query": "Emma"}, "x" * 100_000)
    cache.close()
    whole = (tmp_path / "c.sqlite").read_bytes()
    (tmp_path / "c.sqlite").write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(UserError, match=r"the cache .*c.sqlite cannot be used: database disk image is malformed"):
        Cache(tmp_path / "c.sqlite").get({"query": "Emma"})
