"""The retriever's client, against our server and against servers of the formats it knows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from http_servers import running
from retriever_parts import serving

from zerosearch import http
from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.bm25 import BM25Engine, BM25Index
from zerosearch.engines.retriever import Protocol, RetrieverEngine
from zerosearch.engines.retriever_server import RetrieverServer
from zerosearch.errors import UserError

pytest_plugins = ("recipe_modules",)  # fixtures

REQUEST = SearchRequest("novel by Austen", "Who wrote Emma?", ("Jane Austen",))

both = pytest.mark.parametrize("protocol", ["search-r1", "zerosearch"])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_BACK_OFF_S", 0.01)


@both
def test_over_the_network_as_in_the_process(protocol: Protocol, corpus: Path) -> None:
    direct = BM25Engine(corpus)
    queries = ["novel by Austen", "Hampshire village", "zebra"]

    async def search() -> tuple[list[SearchResult], RetrieverEngine]:
        async with serving(RetrieverServer(BM25Index(corpus))) as address:
            engine = RetrieverEngine(address, protocol)
            await asyncio.to_thread(engine.check)
            requests = [SearchRequest(query, "Q?", ("a",)) for query in queries]
            results = await asyncio.gather(*map(engine.search, requests))
            await engine.aclose()
            return results, engine

    results, engine = asyncio.run(search())
    assert [result.documents for result in results] == [direct.lookup(query) for query in queries]
    assert results[0].documents[0] == "Emma is a novel by Jane Austen, published in 1815."
    assert engine.identity()["index"] == direct.index.identity()
    assert (engine.account.queries, engine.account.sent, engine.account.failures) == (3, 3, 0)


class Foreign:
    """A server of somebody else's: answers with `replies` one after the other, the last again and again."""

    def __init__(self, *replies: tuple[int, Any]) -> None:
        self.replies, self.bodies = list(replies), list[Any]()

    async def answer(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        status, reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return web.Response(text=json.dumps(reply), status=status, content_type="application/json")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/retrieve", self.answer)
        async with running(app) as address:
            yield f"{address}/retrieve"


def searched(server: Foreign, protocol: Protocol, **options: Any) -> tuple[Any, RetrieverEngine]:
    async def search() -> tuple[Any, RetrieverEngine]:
        async with server.running() as address:
            engine = RetrieverEngine(address, protocol, **options)
            (result,) = await asyncio.gather(engine.search(REQUEST), return_exceptions=True)
            await engine.aclose()
            return result, engine

    return asyncio.run(search())


ROWS = [
    {"id": "7", "contents": '"Emma"\nA novel.'},
    {"id": "8", "contents": "No title, only text."},
    {"id": "9", "contents": '"Steventon"\nA village.'},
]
DOCUMENTS = ("Emma: A novel.", "No title, only text.", "Steventon: A village.")
FOUND = SearchResult(DOCUMENTS, titles=("Emma", "", "Steventon"))


def test_search_r1_s_format() -> None:
    reply = {"result": [[{"document": row, "score": 1.5} for row in ROWS]]}
    server = Foreign((200, reply))
    assert searched(server, "search-r1")[0] == FOUND
    # Its own server fails without scores.
    assert server.bodies == [{"queries": ["novel by Austen"], "topk": 5, "return_scores": True}]
    assert searched(Foreign((200, {"result": [ROWS]})), "search-r1")[0].documents == DOCUMENTS
    assert searched(Foreign((200, reply)), "search-r1", num_documents=2)[0].documents == DOCUMENTS[:2]


def test_the_format_of_the_paper_s_code() -> None:
    server = Foreign((200, [{"text": "one", "score": 0.1}, {"text": "two"}]))
    assert searched(server, "zerosearch")[0] == SearchResult(("one", "two"))
    assert server.bodies == [{"query": "novel by Austen", "top_k": 5}]


@pytest.mark.parametrize(
    ("protocol", "reply"),
    [
        ("search-r1", {"result": []}),
        ("search-r1", {"result": [["a text"]]}),
        ("search-r1", {"result": [[{"document": {"text": "no contents"}}]]}),
        ("search-r1", [{"text": "the other protocol"}]),
        ("zerosearch", {"result": [[]]}),
        ("zerosearch", [{"contents": "no text"}]),
    ],
)
def test_another_format_is_a_failed_call_and_shown(protocol: Protocol, reply: Any) -> None:
    server = Foreign((200, reply))
    error, engine = searched(server, protocol, max_retries=0)
    assert isinstance(error, SearchError) and f"its reply is not of the form expected: {json.dumps(reply)}" in str(
        error
    )
    assert len(server.bodies) == 1 and engine.account.failures == 1


def test_what_may_pass_is_tried_again_within_a_bound() -> None:
    good = (200, {"result": [[{"document": ROWS[0], "score": 1.0}]]})
    result, engine = searched(Foreign((503, {}), (500, {}), good), "search-r1")
    assert result == SearchResult(DOCUMENTS[:1], retries=2, titles=("Emma",))
    assert (engine.account.sent, engine.account.retries) == (3, 2)
    error, engine = searched(Foreign((503, {})), "search-r1", max_retries=2)
    assert isinstance(error, SearchError) and "recipes/serve_retriever.py serves one" in str(error)
    assert (engine.account.sent, engine.account.failures) == (3, 1)


def test_a_retriever_without_health_is_known_by_its_address() -> None:
    async def check() -> dict[str, Any]:
        async with Foreign((200, {"result": [[]]})).running() as address:
            engine = RetrieverEngine(address)
            assert engine.identity()["index"] is None
            await asyncio.to_thread(engine.check)
            assert engine.identity()["index"] == {"url": address}
            return engine.identity()

    assert asyncio.run(check())["protocol"] == "search-r1"


def test_the_wrong_protocol_and_no_server_are_found_before_the_run(corpus: Path) -> None:
    async def check() -> None:
        async with Foreign((200, [{"text": "one"}])).running() as address:
            with pytest.raises(UserError, match="in the protocol search-r1"):
                await asyncio.to_thread(RetrieverEngine(address).check)

    asyncio.run(check())
    with pytest.raises(UserError, match=r"no retriever answers at http://127.0.0.1:9/.*serve_retriever.py --corpus"):
        RetrieverEngine("http://127.0.0.1:9/retrieve").check()
