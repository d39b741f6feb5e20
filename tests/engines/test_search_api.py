"""Google's sellers and the services in recipes/engines, against local servers that answer as they do, errors too."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import searching
from http_servers import Server, in_turn

from zerosearch.engines import BudgetSpent, SearchError, SearchRequest, SearchResult, search_api
from zerosearch.engines.cache import CachedEngine
from zerosearch.engines.google import PROVIDERS, GoogleEngine, read_key
from zerosearch.engines.search_api import SearchAPI, SearchAPIEngine, read_api
from zerosearch.errors import UserError

DESCRIPTIONS = Path(__file__).parents[2] / "recipes/engines"
KEY = "k3y+/with=signs&more"
QUERY = "emma author & more {key}"  # braces in a query are text
REQUEST = SearchRequest(QUERY, "Who wrote Emma?", ("Jane Austen",))
FOUND = SearchResult(
    ("Emma - Wikipedia: A novel by Jane Austen.", "It rains.", "Only a title", "Five: 5", "Six: 6"),
    titles=("Emma - Wikipedia", "", "", "Five", "Six"),
)
NEVER = 1e9  # queries a second: as good as no limit


def results_in(text: str) -> list[dict[str, Any]]:
    """Return what is found: one result without a title, one with nothing to read; `text` names their text."""
    return [
        {"title": "Emma - Wikipedia", "url": "https://a", text: "A novel by Jane Austen."},
        {"title": None, "url": "https://b", text: " It rains. "},
        {"url": "https://c"},
        {"title": "Only a title", "url": "https://d"},
        *({"title": title, text: str(number)} for number, title in enumerate(("Five", "Six", "Seven"), start=5)),
    ]


Reply = tuple[int, Any]


class Service(NamedTuple):
    """What a service gets for a search, and answers."""

    method: str
    sent: dict[str, Any]  # params of a GET, body of a POST
    header: tuple[str, str]
    page: dict[str, Any]
    nothing: list[dict[str, Any]]  # pages without results
    refusals: list[Reply]  # final
    passing: list[Reply]  # it may be better the next time
    not_pages: list[Any]


SERPAPI_NOTHING = {  # of status 200, and an error
    "search_metadata": {"status": "Success"},
    "search_information": {"organic_results_state": "Fully empty", "total_results": 0},
    "error": "Google hasn't returned any results for this query.",
}
SERVICES = {
    "serpapi": Service(
        "GET",
        {"engine": "google", "q": QUERY, "num": "5", "api_key": KEY},
        ("Host", "127.0.0.1"),
        {
            "search_metadata": {"id": "645d", "status": "Success", "total_time_taken": 1.2},
            "search_information": {"organic_results_state": "Results for exact spelling", "total_results": 1},
            "knowledge_graph": {"title": "Emma"},
            "organic_results": results_in("snippet"),
        },
        [SERPAPI_NOTHING, {"search_metadata": {"status": "Success"}, "answer_box": {"answer": "Lisbon"}}],
        [
            (401, {"error": "Invalid API key. Your API key should be here: ..."}),
            (402, {"error": "Payment required."}),
            (403, {"error": "Account deleted."}),
            (429, {"error": "Your account has run out of searches."}),
        ],
        [
            (429, {"error": "You are exceeding 1000 searches per hour."}),
            (500, {"error": "Something went wrong."}),
            (200, {"search_metadata": {"status": "Error"}, "error": "We couldn't get valid results."}),
        ],
        [
            ["organic_results"],
            SERPAPI_NOTHING | {"organic_results": "none"},
            SERPAPI_NOTHING | {"error": {"code": 1}},
            {"organic_results": [{"title": {"a": 1}, "snippet": ["x"]}, None]},
            {"searchParameters": {"q": QUERY}, "organic": results_in("snippet")},  # the other seller's
            {"search_metadata": {"status": "Processing"}},
            {"search_metadata": {"status": "Error"}},
            {"search_metadata": "Success"},
        ],
    ),
    "serper": Service(
        "POST",
        {"q": QUERY, "num": 5},
        ("X-API-KEY", KEY),
        {
            "searchParameters": {"q": QUERY, "type": "search", "num": 5, "engine": "google"},
            "answerBox": {"title": "Emma / Author", "answer": "Jane Austen"},
            "organic": results_in("snippet"),
            "credits": 1,
        },
        [{"searchParameters": {"q": QUERY, "type": "search"}, "organic": [], "credits": 1}],
        [
            (400, {"message": "Not enough credits", "statusCode": 400}),
            (402, {"message": "Payment Required", "statusCode": 402}),
            (403, {"message": "Unauthorized.", "statusCode": 403}),
        ],
        [
            (429, {"message": "Too many requests", "statusCode": 429}),
            (500, {"message": "Internal Server Error", "statusCode": 500}),
        ],
        [
            {"searchParameters": {"q": QUERY}, "organic": None},
            {"organic": []},  # results of nothing, unsigned
            {"message": "Unauthorized."},  # a gateway's
            {"errors": [{"message": "quota exceeded"}]},
        ],
    ),
    "searxng": Service(
        "GET",
        {"q": QUERY, "format": "json", "language": "en"},
        ("Host", "127.0.0.1"),
        {"query": QUERY, "number_of_results": 0, "results": results_in("content"), "answers": [], "infoboxes": []},
        [{"query": QUERY, "number_of_results": 0, "results": [], "unresponsive_engines": []}],
        [(403, "<!doctype html><title>403 Forbidden</title>")],
        [(200, {"query": QUERY, "results": [], "unresponsive_engines": [["google", "too many requests"]]})],
        [{"error": "no"}],
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
        [{"type": "search", "query": {"original": QUERY}, "mixed": {"main": []}}],
        [(401, {"type": "ErrorResponse", "error": {"code": "SUBSCRIPTION_TOKEN_INVALID", "status": 401}})],
        [(429, {"type": "ErrorResponse", "error": {"code": "RATE_LIMITED", "status": 429}})],
        [{"type": "ErrorResponse", "error": {"code": "OPTION_NOT_IN_PLAN"}}],
    ),
    "tavily": Service(
        "POST",
        {"query": QUERY, "max_results": 5, "search_depth": "basic"},
        ("Authorization", f"Bearer {KEY}"),
        {"query": QUERY, "answer": None, "images": [], "results": results_in("content"), "response_time": 1.0},
        [{"query": QUERY, "answer": None, "images": [], "results": [], "response_time": 1.0}],
        [(432, {"detail": {"error": "This request exceeds your plan's set usage limit."}})],
        [(429, {"detail": {"error": "Your request has been blocked due to excessive requests."}})],
        [{"detail": {"error": "Unauthorized"}}],
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
        [{"took": 1, "timed_out": False, "hits": {"total": {"value": 0}, "max_score": None, "hits": []}}],
        [(404, {"error": {"type": "index_not_found_exception"}, "status": 404})],
        [(200, {"took": 1, "timed_out": True, "hits": {"hits": []}})],
        [{"took": 1, "timed_out": False}],
    ),
}


def each(kind: str) -> Callable[[Any], Any]:
    """Try every service with everything that it answers of this kind."""
    cases = [(name, reply) for name, service in SERVICES.items() for reply in getattr(service, kind)]
    return pytest.mark.parametrize(("name", "reply"), cases)


def engine_of(name: str, server: Server, **options: Any) -> SearchAPIEngine:
    """Return an engine that asks the local server as it would the service."""
    limits = {"queries_per_s": NEVER, "usd_per_query": None, "max_queries": None, "max_usd": None}
    changes = {limit: options.pop(limit, value) for limit, value in limits.items()}
    if name in PROVIDERS:
        return GoogleEngine(KEY, name, url=f"{server.url}/search", **changes, **options)  # type: ignore[arg-type]
    api = read_api(DESCRIPTIONS / f"{name}.yaml")
    changes["url"] = f"{server.url}/{api.url.split('/', 3)[3]}"
    told = {limit: value for limit, value in changes.items() if value is not None}
    return SearchAPIEngine(api.model_copy(update=told), KEY, **options)


searched = partial(searching.searched, keep_errors=True)


def test_every_description_is_tried() -> None:
    assert {path.stem for path in DESCRIPTIONS.glob("*.yaml")} | PROVIDERS.keys() == SERVICES.keys()


@pytest.mark.parametrize("name", SERVICES)
def test_a_search_is_sent_as_documented_and_the_page_is_read(http_server: Server, name: str) -> None:
    service = SERVICES[name]
    http_server.answer = in_turn((200, service.page))
    engine = engine_of(name, http_server)
    assert searched(engine, REQUEST) == [FOUND]
    (request,) = http_server.seen
    sent = dict(request.query) if service.method == "GET" else http_server.requests[0]
    assert (request.method, sent) == (service.method, service.sent)
    assert request.headers[service.header[0]].startswith(service.header[1])
    assert engine.account.usd == pytest.approx(engine.api.usd_per_query)


@each("nothing")
def test_no_results_are_no_documents(http_server: Server, name: str, reply: Any) -> None:
    http_server.answer = in_turn((200, reply))
    engine = engine_of(name, http_server)
    assert searched(engine, REQUEST) == [SearchResult(())]
    assert (engine.account.sent, engine.account.failures) == (1, 0)


@each("refusals")
def test_a_refusal_is_final_free_and_says_what_to_do(http_server: Server, name: str, reply: Reply) -> None:
    http_server.answer = in_turn(reply)
    engine = engine_of(name, http_server)
    (error,) = searched(engine, REQUEST)
    assert isinstance(error, SearchError) and len(http_server.seen) == 1
    who = f"Google through {name}" if name in PROVIDERS else f"the search service {name}"
    assert str(error).startswith(f"{who} at http://127.0.0.1:") and f"HTTP status {reply[0]}: " in str(error)
    assert str(error).endswith(f"; {engine.api.remedy}") and KEY not in str(error)
    assert (engine.account.failures, engine.account.usd) == (1, pytest.approx(0.0))


@each("passing")
def test_what_may_pass_is_tried_again(http_server: Server, name: str, reply: Reply) -> None:
    http_server.answer = in_turn(reply, reply, (200, SERVICES[name].page))
    engine = engine_of(name, http_server)
    assert searched(engine, REQUEST) == [replace(FOUND, retries=2)]
    assert (engine.account.sent, engine.account.retries, engine.account.queries) == (3, 2, 1)
    assert engine.account.usd == pytest.approx(engine.api.usd_per_query), "a call that fails is free"


NO_PAGES = [(name, reply) for name in SERVICES for reply in (None, [], {}, {"results": "none"})]
NO_PAGES += [(name, reply) for name, service in SERVICES.items() for reply in service.not_pages]


@pytest.mark.parametrize(("name", "reply"), NO_PAGES)
def test_a_reply_that_is_no_page_is_a_failed_call_and_free(http_server: Server, name: str, reply: Any) -> None:
    http_server.answer = in_turn((200, json.dumps(reply)))
    engine = engine_of(name, http_server, max_retries=0)
    (error,) = searched(engine, REQUEST)
    assert isinstance(error, SearchError)
    assert (engine.account.sent, engine.account.failures, engine.account.usd) == (1, 1, pytest.approx(0.0))


def test_a_query_may_stand_in_the_address(http_server: Server) -> None:
    http_server.answer = in_turn((200, {"pages": [{"title": "Emma", "about": "A novel."}]}))
    url = f"{http_server.url}/find/{{query}}?n={{num_documents}}"
    engine = SearchAPIEngine(SearchAPI(name="mine", url=url, results="pages", text="about"), KEY, num_documents=7)
    (result,) = searched(engine, SearchRequest("a/b?c", "Q?", ("a",)))
    assert result.documents == ("Emma: A novel.",)
    assert http_server.seen[0].raw_path == "/find/a%2Fb%3Fc?n=7"


def test_the_number_of_documents_may_stand_in_a_header(http_server: Server) -> None:
    http_server.answer = in_turn((200, {"pages": [{"about": "A novel."}]}))
    named = {"headers": {"X-Count": "{num_documents}"}, "results": "pages", "text": "about"}
    (result,) = searched(SearchAPIEngine(SearchAPI(name="mine", url=http_server.url, **named), KEY), REQUEST)
    assert result.documents == ("A novel.",) and http_server.seen[0].headers["X-Count"] == "5"


def test_a_blank_query_is_not_sent(http_server: Server) -> None:
    assert searched(engine_of("serpapi", http_server), SearchRequest("  ", "Q?", ("a",))) == [SearchResult(())]
    assert http_server.seen == []


def test_the_rate_holds_for_searches_in_flight(http_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = 100.0, list[float]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(search_api, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(search_api, "asyncio", SimpleNamespace(sleep=sleep))
    http_server.answer = in_turn((200, SERVICES["brave"].page))
    searched(engine_of("brave", http_server, queries_per_s=20.0), *[REQUEST] * 8)
    assert len(http_server.seen) == 8
    assert sorted(pauses) == pytest.approx([place / 20 for place in range(8)])


def test_the_limit_on_queries_counts_retries(http_server: Server) -> None:
    http_server.answer = in_turn((500, ""), (200, SERVICES["serpapi"].page))
    engine = engine_of("serpapi", http_server, max_queries=3, max_concurrency=1)
    spent = [result for result in searched(engine, *[REQUEST] * 5) if isinstance(result, BudgetSpent)]
    assert len(http_server.seen) == 3 == engine.account.sent
    assert len(spent) >= 2 and "the limit of 3 queries to google is reached" in str(spent[0])


@pytest.mark.parametrize(("name", "max_usd", "paid"), [("serper", 0.010, 10), ("tavily", 0.02, 2)])
def test_the_limit_on_money_holds_for_searches_in_flight(
    http_server: Server, name: str, max_usd: float, paid: int
) -> None:
    http_server.answer = in_turn((200, SERVICES[name].page))
    engine = engine_of(name, http_server, max_usd=max_usd)
    results = searched(engine, *[REQUEST] * 30)
    assert sum(isinstance(result, BudgetSpent) for result in results) == 30 - paid
    assert engine.account.usd == pytest.approx(paid * engine.api.usd_per_query)
    account = engine.account
    assert (len(http_server.seen), account.queries, account.sent, account.failures) == (paid, paid, paid, 0)


def test_a_plan_of_ones_own_has_its_own_price(http_server: Server) -> None:
    http_server.answer = in_turn((200, SERVICES["serpapi"].page))
    engine = engine_of("serpapi", http_server, usd_per_query=0.015)
    searched(engine, REQUEST, REQUEST)
    assert engine.account.usd_here == pytest.approx(0.030)


@pytest.mark.parametrize(("credits", "usd"), [(2, 0.002), (True, 0.001), (-1_000_000, 0.001), ("2", 0.001)])
def test_serper_says_when_a_query_cost_more(http_server: Server, credits: Any, usd: float) -> None:
    http_server.answer = in_turn((200, SERVICES["serper"].page | {"credits": credits}))
    engine = engine_of("serper", http_server)
    searched(engine, REQUEST)
    assert engine.account.usd == pytest.approx(usd)


@pytest.mark.parametrize("name", ["serpapi", "serper", "brave"])
def test_the_key_is_in_no_message_log_or_cache(
    http_server: Server, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def search() -> str:
        http_server.answer = in_turn((200, SERVICES[name].page))
        good = CachedEngine(tmp_path / "c.sqlite", engine_of(name, http_server))
        await good.search(REQUEST)
        await good.aclose()
        http_server.answer = lambda place: (500, {"error": f"wrong key {KEY} in {http_server.seen[place].url}"})
        failures = []
        for server in (http_server, Server("http://127.0.0.1:9")):
            bad = engine_of(name, server, max_retries=1)
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


def test_an_identity_is_of_what_results_depend_on(http_server: Server) -> None:
    google = engine_of("serper", http_server, usd_per_query=1.0).identity()
    assert google == {"engine": "google", "provider": "serper", "num_documents": 5}
    api = engine_of("brave", http_server).api
    identity = SearchAPIEngine(api, KEY).identity()
    assert identity.keys() == {"engine", "description_sha256", "num_documents"} and identity["engine"] == "brave"
    assert SearchAPIEngine(api.model_copy(update={"usd_per_query": 1.0}), "other").identity() == identity
    assert SearchAPIEngine(api.model_copy(update={"text": "title"}), KEY).identity() != identity


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apis = [*PROVIDERS.values(), *map(read_api, DESCRIPTIONS.glob("*.yaml"))]
    for variable in (variable for api in apis for variable in api.key_variables):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match="serper needs a key: set SERPER_API_KEY, or pass --google_key_file"):
        read_key("serper")
    brave, searxng = (read_api(DESCRIPTIONS / f"{name}.yaml") for name in ("brave", "searxng"))
    with pytest.raises(UserError, match="brave needs a key: set BRAVE_API_KEY"):
        brave.key()
    monkeypatch.setenv("BRAVE_SEARCH_API_KEY", " second\n")
    assert (brave.key(), searxng.key()) == ("second", "")
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


def test_a_description_that_gives_a_name_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"{MINE}text: t\nparams: {{a: b, a: c}}\n")
    with pytest.raises(UserError, match=r"mine\.yaml gives a twice"):
        read_api(tmp_path / "mine.yaml")


MINE = "name: mine\nurl: http://a\nresults: r\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINE, "text: Field required"),
        (f"{MINE}text: t\nresult: r\n", "result: Extra inputs are not permitted"),
        (f"{MINE}text: t\nparams: {{safe: false}}\n", "params.safe: Input should be a v"),
        (f"{MINE}text: t\nqueries_per_s: 0\n", "queries_per_s: Input should be gre"),
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
