"""The descriptions in recipes/engines against local servers that answer as the services document, errors included."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from http_servers import Server, in_turn

from zerosearch import http
from zerosearch.engines import BudgetSpent, SearchError, SearchRequest, SearchResult
from zerosearch.engines.search_api import SearchAPI, SearchAPIEngine, read_api
from zerosearch.errors import UserError

DESCRIPTIONS = Path(__file__).parents[2] / "recipes/engines"
KEY = "k3y/with=signs"
QUERY = "emma author & more {key}"  # braces in a query are text
REQUEST = SearchRequest(QUERY, "Who wrote Emma?", ("Jane Austen",))
FOUND = SearchResult(("Emma - Wikipedia: A novel by Jane Austen.", "It rains."), titles=("Emma - Wikipedia", ""))


def results_in(text: str) -> list[dict[str, Any]]:
    """Return two results, the second without a title, and one that has nothing to read; `text` names their text."""
    return [
        {"title": "Emma - Wikipedia", "url": "https://a", text: "A novel by Jane Austen."},
        {"title": None, "url": "https://b", text: " It rains. "},
        {"url": "https://c"},
    ]


class Service(NamedTuple):
    """What a service gets for a search, and answers."""

    method: str
    sent: dict[str, Any]  # params of a GET, body of a POST
    header: tuple[str, str]
    page: dict[str, Any]
    nothing: dict[str, Any]  # a page without results
    refusal: tuple[int, Any]  # final
    passing: tuple[int, Any]  # it may be better the next time
    no_page: dict[str, Any]


SERVICES = {
    "searxng": Service(
        "GET",
        {"q": QUERY, "format": "json", "language": "en"},
        ("Host", "127.0.0.1"),
        {"query": QUERY, "number_of_results": 0, "results": results_in("content"), "answers": [], "infoboxes": []},
        {"query": QUERY, "number_of_results": 0, "results": [], "unresponsive_engines": []},
        (403, "<!doctype html><title>403 Forbidden</title>"),
        (200, {"query": QUERY, "results": [], "unresponsive_engines": [["google", "too many requests"]]}),
        {"error": "no"},
    ),
    "brave": Service(
        "GET",
        {"q": QUERY, "count": "5", "text_decorations": "false"},
        ("X-Subscription-Token", KEY),
        {
            "type": "search",
            "query": {"original": QUERY},
            "web": {"type": "search", "results": results_in("description")},
        },
        {"type": "search", "query": {"original": QUERY}, "mixed": {"main": []}},
        (401, {"type": "ErrorResponse", "error": {"code": "SUBSCRIPTION_TOKEN_INVALID", "status": 401}}),
        (429, {"type": "ErrorResponse", "error": {"code": "RATE_LIMITED", "status": 429}}),
        {"type": "ErrorResponse", "error": {"code": "OPTION_NOT_IN_PLAN"}},
    ),
    "tavily": Service(
        "POST",
        {"query": QUERY, "max_results": 5, "search_depth": "basic"},
        ("Authorization", f"Bearer {KEY}"),
        {"query": QUERY, "answer": None, "images": [], "results": results_in("content"), "response_time": 1.0},
        {"query": QUERY, "answer": None, "images": [], "results": [], "response_time": 1.0},
        (432, {"detail": {"error": "This request exceeds your plan's set usage limit."}}),
        (429, {"detail": {"error": "Your request has been blocked due to excessive requests."}}),
        {"detail": {"error": "Unauthorized"}},
    ),
    "elasticsearch": Service(
        "POST",
        {
            "size": 5,
            "query": {"multi_match": {"query": QUERY, "fields": ["title", "text"]}},
            "_source": ["title", "text"],
        },
        ("Authorization", f"ApiKey {KEY}"),
        {
            "took": 3,
            "timed_out": False,
            "_shards": {"total": 1, "successful": 1, "skipped": 0, "failed": 0},
            "hits": {"hits": [{"_id": "1", "_score": 2.5, "_source": row} for row in results_in("text")]},
        },
        {
            "took": 1,
            "timed_out": False,
            "hits": {"total": {"value": 0, "relation": "eq"}, "max_score": None, "hits": []},
        },
        (404, {"error": {"type": "index_not_found_exception"}, "status": 404}),
        (200, {"took": 1, "timed_out": True, "hits": {"hits": []}}),
        {"took": 1, "timed_out": False},
    ),
}

each = pytest.mark.parametrize("name", SERVICES)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http, "FIRST_BACK_OFF_S", 0.01)
    with Server().running() as running:
        yield running


def searched(api: SearchAPI, *requests: SearchRequest, **options: Any) -> tuple[SearchAPIEngine, list[Any]]:
    """Search; return the engine and what came of each request."""
    engine = SearchAPIEngine(api, KEY, **options)

    async def search() -> list[Any]:
        results = await asyncio.gather(*map(engine.search, requests or [REQUEST]), return_exceptions=True)
        await engine.aclose()
        return results

    return engine, asyncio.run(search())


def described(name: str, server: Server, **changes: Any) -> SearchAPI:
    """Return the description with the address of the local server, at a rate for tests."""
    api = read_api(DESCRIPTIONS / f"{name}.yaml")
    path = api.url.split("/", 3)[3]
    return api.model_copy(update={"url": f"{server.url}/{path}", "queries_per_s": 1000.0, **changes})


def test_every_description_is_tried() -> None:
    assert {path.stem for path in DESCRIPTIONS.glob("*.yaml")} == set(SERVICES)


@each
def test_a_search_is_sent_as_documented_and_the_page_is_read(server: Server, name: str) -> None:
    service = SERVICES[name]
    server.answer = in_turn((200, service.page))
    engine, results = searched(described(name, server))
    assert results == [FOUND]
    (request,) = server.seen
    sent = dict(request.query) if service.method == "GET" else server.requests[0]
    assert (request.method, sent) == (service.method, service.sent)
    assert request.headers[service.header[0]].startswith(service.header[1])
    assert engine.account.usd == pytest.approx(engine.api.usd_per_query)


@each
def test_no_results_are_no_documents(server: Server, name: str) -> None:
    server.answer = in_turn((200, SERVICES[name].nothing))
    engine, results = searched(described(name, server))
    assert results == [SearchResult(())] and engine.account.failures == 0


@each
def test_a_refusal_is_final_free_and_says_what_to_do(server: Server, name: str) -> None:
    server.answer = in_turn(SERVICES[name].refusal)
    engine, (error,) = searched(described(name, server))
    assert isinstance(error, SearchError) and len(server.seen) == 1
    assert str(error).startswith(f"the search service {name} at http://127.0.0.1:")
    assert str(error).endswith(f"; {engine.api.remedy}") and KEY not in str(error)
    assert engine.account.usd == pytest.approx(0.0)


@each
def test_what_may_pass_is_tried_again(server: Server, name: str) -> None:
    service = SERVICES[name]
    server.answer = in_turn(service.passing, (200, service.page))
    _, (result,) = searched(described(name, server))
    assert result.documents == FOUND.documents and result.retries == 1


@each
@pytest.mark.parametrize("reply", [None, [], {}, {"results": "none"}, "page"])
def test_a_reply_that_is_no_page_is_a_failed_call(server: Server, name: str, reply: Any) -> None:
    server.answer = in_turn((200, SERVICES[name].no_page if reply == "page" else json.dumps(reply)))
    engine, (error,) = searched(described(name, server), max_retries=0)
    assert isinstance(error, SearchError) and "its reply" in str(error)
    assert (engine.account.failures, engine.account.usd) == (1, pytest.approx(0.0))


def test_a_query_may_stand_in_the_address(server: Server) -> None:
    server.answer = in_turn((200, {"pages": [{"title": "Emma", "about": "A novel."}]}))
    api = SearchAPI(name="mine", url=f"{server.url}/find/{{query}}?n={{num_documents}}", results="pages", text="about")
    _, (result,) = searched(api, SearchRequest("a/b?c", "Q?", ("a",)), num_documents=7)
    assert result.documents == ("Emma: A novel.",)
    assert server.seen[0].raw_path == "/find/a%2Fb%3Fc?n=7"


def test_limits_and_blank_queries(server: Server) -> None:
    server.answer = in_turn((200, SERVICES["tavily"].page))
    engine, results = searched(described("tavily", server, max_usd=0.02), *[REQUEST] * 5)
    assert sum(isinstance(result, BudgetSpent) for result in results) == 3
    assert (len(server.seen), engine.account.usd) == (2, pytest.approx(0.016))
    _, results = searched(described("tavily", server), SearchRequest(" ", "Q?", ("a",)))
    assert results == [SearchResult(())] and len(server.seen) == 2


def test_the_key_is_in_no_message_or_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.answer = lambda place: (500, {"error": f"wrong key {KEY}"})
    engine, (error,) = searched(described("brave", server), max_retries=1)
    said = f"{engine!r} {error} {caplog.text}"
    assert "***" in said and "k3y" not in said


def test_an_identity_is_of_what_results_depend_on(server: Server) -> None:
    api = described("brave", server)
    identity = SearchAPIEngine(api, KEY).identity()
    assert identity.keys() == {"engine", "description_sha256", "num_documents"} and identity["engine"] == "brave"
    assert SearchAPIEngine(api.model_copy(update={"usd_per_query": 1.0}), "other").identity() == identity
    assert SearchAPIEngine(api.model_copy(update={"text": "title"}), KEY).identity() != identity


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    api = read_api(DESCRIPTIONS / "brave.yaml")
    for variable in api.key_variables:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match="brave needs a key: set BRAVE_API_KEY"):
        api.key()
    monkeypatch.setenv("BRAVE_SEARCH_API_KEY", " second\n")
    assert api.key() == "second"
    assert read_api(DESCRIPTIONS / "searxng.yaml").key() == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: mine\nurl: http://a\nresults: r\n", "text: Field required"),
        ("name: mine\nurl: http://a\nresults: r\ntext: t\nresult: r\n", "result: Extra inputs are not permitted"),
        (
            "name: mine\nurl: http://a\nresults: r\ntext: t\nparams: {safe: false}\n",
            "params.safe: Input should be a v",
        ),
        ("name: mine\nurl: http://a\nresults: r\ntext: t\nqueries_per_s: 0\n", "queries_per_s: Input should be gre"),
        ("- a list", ": Input should be a valid dictionary"),
        ("name: [", "ParserError: while parsing a flow node"),
    ],
)
def test_a_file_that_describes_nothing_gets_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_api(tmp_path / "mine.yaml")
    assert f"mine.yaml does not describe a search service: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)
