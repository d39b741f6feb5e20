"""The Google engine against local servers that answer as SerpAPI and Serper do, their refusals included."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from http_servers import Server, in_turn

from zerosearch import http
from zerosearch.engines import BudgetSpent, SearchError, SearchRequest, SearchResult, search_api
from zerosearch.engines.cache import CachedEngine
from zerosearch.engines.google import GoogleEngine, GoogleProvider, read_key
from zerosearch.errors import UserError

KEY = "k3y+/with=signs&more"
REQUEST = SearchRequest("emma author & more", "Who wrote Emma?", ("Jane Austen",))

SERPAPI_PAGE: dict[str, Any] = {
    "search_metadata": {"id": "645d", "status": "Success", "total_time_taken": 1.2},
    "search_parameters": {"engine": "google", "q": "emma author & more", "num": "5"},
    "search_information": {"organic_results_state": "Results for exact spelling", "total_results": 1},
    "knowledge_graph": {"title": "Emma"},
    "organic_results": [
        {
            "position": 1,
            "title": "Emma (novel) - Wikipedia",
            "link": "https://a",
            "snippet": "A novel by Jane Austen.",
        },
        {"position": 2, "title": "Emma", "link": "https://b", "snippet": "Emma is a comedy of manners."},
        {"position": 3, "title": "No snippet here", "link": "https://c"},
        {"position": 4, "link": "https://d", "snippet": "No title here."},
        {"position": 5, "link": "https://e"},
        {"position": 6, "title": "Six", "snippet": "6"},
        {"position": 7, "title": "Seven", "snippet": "7"},
    ],
}
SERPER_PAGE: dict[str, Any] = {
    "searchParameters": {"q": "emma author & more", "type": "search", "num": 5, "engine": "google"},
    "answerBox": {"title": "Emma / Author", "answer": "Jane Austen"},
    "organic": SERPAPI_PAGE["organic_results"],
    "credits": 1,
}
DOCUMENTS = (
    "Emma (novel) - Wikipedia: A novel by Jane Austen.",
    "Emma is a comedy of manners.",
    "No snippet here",
    "No title here.",
    "Six: 6",
)
FOUND = SearchResult(DOCUMENTS, titles=("Emma (novel) - Wikipedia", "Emma", "", "", "Six"))
# What SerpAPI answers to a query that Google finds nothing for: status 200, and an error.
SERPAPI_NOTHING = {
    "search_metadata": {"status": "Success"},
    "search_information": {"organic_results_state": "Fully empty", "total_results": 0},
    "error": "Google hasn't returned any results for this query.",
}
SERPER_NOTHING = {"searchParameters": {"q": "x", "type": "search"}, "organic": [], "credits": 1}

Reply = tuple[int, Any]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http, "FIRST_BACK_OFF_S", 0.01)
    with Server().running() as running:
        yield running


def searched(
    server: Server, provider: GoogleProvider, *requests: SearchRequest, **options: Any
) -> tuple[GoogleEngine, list[Any]]:
    """Search; return the engine and what came of each request. Every call that came must be of the service's form."""
    server.seen.clear()
    server.requests.clear()
    engine = GoogleEngine(KEY, provider, url=f"{server.url}/search", **{"queries_per_s": 1000.0, **options})

    async def search() -> list[Any]:
        results = await asyncio.gather(*map(engine.search, requests or [REQUEST]), return_exceptions=True)
        await engine.aclose()
        return results

    results = asyncio.run(search())
    for request, body in zip(server.seen, server.requests, strict=True):
        if provider == "serpapi":
            sent = {"engine": "google", "q": "emma author & more", "num": "5", "api_key": KEY}
            assert (request.method, dict(request.query)) == ("GET", sent)
        else:
            assert (request.method, body) == ("POST", {"q": "emma author & more", "num": 5})
            assert request.headers["X-API-KEY"] == KEY
    return engine, results


both = pytest.mark.parametrize(
    ("provider", "page", "nothing"),
    [("serpapi", SERPAPI_PAGE, SERPAPI_NOTHING), ("serper", SERPER_PAGE, SERPER_NOTHING)],
)


@both
def test_title_and_snippet_of_five_results(
    server: Server, provider: GoogleProvider, page: dict[str, Any], nothing: Any
) -> None:
    server.answer = in_turn((200, page))
    engine, results = searched(server, provider)
    assert results == [FOUND] and len(server.seen) == 1
    assert engine.identity() == {"engine": "google", "provider": provider, "num_documents": 5}


@both
def test_no_results_are_no_documents(
    server: Server, provider: GoogleProvider, page: Any, nothing: dict[str, Any]
) -> None:
    server.answer = in_turn((200, nothing))
    engine, results = searched(server, provider)
    assert results == [SearchResult(())]
    assert (engine.account.sent, engine.account.failures) == (1, 0)


REFUSALS: list[tuple[GoogleProvider, Reply, str]] = [
    ("serpapi", (401, {"error": "Invalid API key. Your API key should be here: ..."}), "Invalid API key"),
    ("serpapi", (403, {"error": "Account deleted."}), "403"),
    ("serpapi", (402, {"error": "Payment required."}), "402"),
    ("serpapi", (429, {"error": "Your account has run out of searches."}), "run out of"),
    ("serper", (403, {"message": "Unauthorized.", "statusCode": 403}), "Unauthorized"),
    ("serper", (402, {"message": "Payment Required", "statusCode": 402}), "402"),
    ("serper", (400, {"message": "Not enough credits", "statusCode": 400}), "Not enough"),
]


@pytest.mark.parametrize(("provider", "reply", "message"), REFUSALS)
def test_a_refusal_is_final_named_and_free(
    server: Server, provider: GoogleProvider, reply: Reply, message: str
) -> None:
    server.answer = in_turn(reply)
    engine, (error,) = searched(server, provider)
    assert isinstance(error, SearchError) and message in str(error)
    variable = "SERPAPI_API_KEY" if provider == "serpapi" else "SERPER_API_KEY"
    assert f"check the key in {variable}" in str(error)
    assert len(server.seen) == 1, "no second try"
    assert (engine.account.failures, engine.account.usd) == (1, pytest.approx(0.0))


IN_PASSING: list[tuple[GoogleProvider, Reply]] = [
    ("serpapi", (429, {"error": "You are exceeding 1000 searches per hour."})),
    ("serpapi", (500, {"error": "Something went wrong."})),
    ("serpapi", (200, {"search_metadata": {"status": "Error"}, "error": "We couldn't get valid results."})),
    ("serper", (429, {"message": "Too many requests", "statusCode": 429})),
    ("serper", (500, {"message": "Internal Server Error", "statusCode": 500})),
]


@pytest.mark.parametrize(("provider", "reply"), IN_PASSING)
def test_what_may_pass_is_tried_again_within_a_bound(server: Server, provider: GoogleProvider, reply: Reply) -> None:
    page = SERPAPI_PAGE if provider == "serpapi" else SERPER_PAGE
    server.answer = in_turn(reply, reply, (200, page))
    engine, results = searched(server, provider)
    assert results == [replace(FOUND, retries=2)]
    assert (engine.account.sent, engine.account.retries, engine.account.queries) == (3, 2, 1)

    server.answer = in_turn(reply)
    engine, (error,) = searched(server, provider, max_retries=3)
    assert isinstance(error, SearchError) and error.retries == 3 and "attempt 4 of 4" in str(error)
    assert (len(server.seen), engine.account.retries) == (4, 3)


NOT_PAGES: list[tuple[GoogleProvider, Any]] = [
    ("serper", {}),
    ("serpapi", None),
    ("serpapi", ["organic_results"]),
    ("serpapi", SERPAPI_NOTHING | {"organic_results": "none"}),
    ("serper", SERPER_NOTHING | {"organic": None}),
    ("serper", {"organic": []}),  # results of nothing, unsigned
    ("serpapi", {"organic_results": [{"title": {"a": 1}, "snippet": ["x"]}, None]}),
    ("serper", {"message": "Unauthorized."}),  # a gateway's
    ("serper", {"errors": [{"message": "quota exceeded"}]}),
    ("serper", SERPAPI_PAGE),  # the other provider's
    ("serpapi", SERPER_PAGE),
    ("serpapi", {"search_metadata": {"status": "Processing"}}),
    ("serpapi", {"search_metadata": {"status": "Error"}}),
    ("serpapi", {"search_metadata": "Success"}),
    ("serpapi", SERPAPI_NOTHING | {"error": {"code": 1}}),
]


@pytest.mark.parametrize(("provider", "reply"), NOT_PAGES)
def test_a_reply_that_is_not_a_page_is_a_failed_call_and_free(
    server: Server, provider: GoogleProvider, reply: Any
) -> None:
    server.answer = in_turn((200, json.dumps(reply)))
    engine, (error,) = searched(server, provider, max_retries=0)
    assert isinstance(error, SearchError)
    assert (engine.account.usd, engine.account.sent, engine.account.failures) == (pytest.approx(0.0), 1, 1)


@pytest.mark.parametrize("other", [{"answer_box": {"answer": "Lisbon"}}, {"knowledge_graph": {"title": "Lisbon"}}])
def test_a_page_with_other_things_than_results_has_no_documents(server: Server, other: dict[str, Any]) -> None:
    server.answer = in_turn((200, {"search_metadata": {"status": "Success"}} | other))
    engine, results = searched(server, "serpapi")
    assert results == [SearchResult(())] and engine.account.usd_here == pytest.approx(275 / 30_000)


def test_the_rate_holds_for_searches_in_flight(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = 100.0, list[float]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(search_api, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(search_api, "asyncio", SimpleNamespace(sleep=sleep))
    server.answer = in_turn((200, SERPER_PAGE))
    searched(server, "serper", *[REQUEST] * 8, queries_per_s=20.0)
    assert len(server.seen) == 8
    assert sorted(pauses) == pytest.approx([place / 20 for place in range(8)])


def test_the_limit_on_queries_counts_retries(server: Server) -> None:
    server.answer = in_turn((500, {"error": "Something went wrong."}), (200, SERPAPI_PAGE))
    engine, results = searched(server, "serpapi", *[REQUEST] * 5, max_queries=3, max_concurrency=1)
    assert len(server.seen) == 3 == engine.account.sent
    spent = [result for result in results if isinstance(result, BudgetSpent)]
    assert len(spent) >= 2 and "the limit of 3 queries to google is reached" in str(spent[0])


def test_the_limit_on_money_holds_for_searches_in_flight(server: Server) -> None:
    server.answer = in_turn((200, SERPER_PAGE))
    engine, results = searched(server, "serper", *[REQUEST] * 30, max_usd=0.010)  # Serper's list: 0.001 a query
    assert len(server.seen) == 10
    assert sum(isinstance(result, BudgetSpent) for result in results) == 20
    assert engine.account.usd == pytest.approx(0.010)
    assert (engine.account.queries, engine.account.sent, engine.account.failures) == (10, 10, 0)


def test_a_plan_of_ones_own_has_its_own_price(server: Server) -> None:
    server.answer = in_turn((200, SERPAPI_PAGE))
    engine, _ = searched(server, "serpapi", REQUEST, REQUEST, usd_per_query=0.015)
    assert engine.account.usd_here == pytest.approx(0.030)


@pytest.mark.parametrize(("credits", "usd"), [(2, 0.002), (True, 0.001), (-1_000_000, 0.001), ("2", 0.001)])
def test_serper_says_when_a_query_cost_more(server: Server, credits: Any, usd: float) -> None:
    server.answer = in_turn((200, SERPER_PAGE | {"credits": credits}))
    engine, _ = searched(server, "serper")
    assert engine.account.usd == pytest.approx(usd)


def test_a_blank_query_is_not_sent(server: Server) -> None:
    _, results = searched(server, "serpapi", SearchRequest("  ", "Q?", ("a",)))
    assert results == [SearchResult(())] and server.seen == []


@both
def test_the_key_is_in_no_message_log_or_cache(
    server: Server,
    provider: GoogleProvider,
    page: dict[str, Any],
    nothing: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)

    async def search() -> str:
        server.answer = in_turn((200, page))
        good = CachedEngine(tmp_path / "c.sqlite", GoogleEngine(KEY, provider, url=server.url))
        await good.search(REQUEST)
        await good.aclose()
        server.answer = lambda place: (500, {"error": f"wrong key {KEY} in {server.seen[place].url}"})
        failures = []
        for url in (server.url, "http://127.0.0.1:9/search"):
            bad = GoogleEngine(KEY, provider, url=url, max_retries=1)
            with pytest.raises(SearchError) as caught:
                await bad.search(REQUEST)
            await bad.aclose()
            failures.append(f"{bad!r} {caught.value!r} {traceback.format_exception(caught.value)}")
        return str(failures)

    said = asyncio.run(search())
    assert "***" in said and "retried in" in caplog.text, "there was something to hide"
    forms = ("k3y", "with=signs", "with%3Dsigns")
    for text in (said, caplog.text, *(path.read_bytes().decode("latin-1") for path in tmp_path.iterdir())):
        assert not any(form in text for form in forms)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SERPAPI_API_KEY", "SER_API_KEY", "SERPER_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match="serper needs a key: set SERPER_API_KEY, or pass --google_key_file"):
        read_key("serper")
    monkeypatch.setenv("SER_API_KEY", "of-the-paper")
    assert read_key("serpapi") == "of-the-paper"
    monkeypatch.setenv("SERPAPI_API_KEY", " ours\n")
    assert read_key("serpapi") == "ours"
    (tmp_path / "key").write_text("from-a-file\n")
    assert read_key("serpapi", tmp_path / "key") == "from-a-file"


@pytest.mark.parametrize("content", ["", "two words", "secret\nsecond line"])
def test_a_file_that_holds_no_key_is_refused_without_being_shown(content: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(UserError, match=r"is empty|holds a space, a line break or another") as caught:
        read_key("serper", tmp_path / "key")
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read: FileNotFoundError"):
        read_key("serper", tmp_path / "none")
