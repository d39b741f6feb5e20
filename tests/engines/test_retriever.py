"""The retriever's client, against our server and against servers of the formats it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from http_servers import Server, in_turn
from retriever_parts import serving
from searching import searched

from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.bm25 import BM25Engine
from zerosearch.engines.retriever import RetrieverEngine, RetrieverProtocol
from zerosearch.errors import UserError

REQUEST = SearchRequest("novel by Austen", "Who wrote Emma?", ("Jane Austen",))

both = pytest.mark.parametrize("protocol", ["search-r1", "zerosearch"])


@pytest.fixture
def server(http_server: Server) -> Server:
    """A server of somebody else's."""
    http_server.url += "/retrieve"
    return http_server


def found(server: Server, protocol: RetrieverProtocol, **options: Any) -> SearchResult:
    (result,) = searched(RetrieverEngine(server.url, protocol, **options), REQUEST)
    return result


@both
def test_over_the_network_as_in_the_process(protocol: RetrieverProtocol, corpus: Path) -> None:
    direct = BM25Engine(corpus)
    queries = ["novel by Austen", "Hampshire village", "zebra"]

    with serving(direct.index) as address:
        engine = RetrieverEngine(address, protocol)
        engine.check()

        results = searched(engine, *(SearchRequest(query, "Q?", ("a",)) for query in queries))
    assert [result.documents for result in results] == [direct.lookup(query) for query in queries]
    assert results[0].documents[0] == "Emma is a novel by Jane Austen, published in 1815."
    assert engine.identity()["index"] == direct.index.identity()
    assert (engine.account.queries, engine.account.sent, engine.account.failures) == (3, 3, 0)


ROWS = [
    {"id": "7", "contents": '"Emma"\nA novel.'},
    {"id": "8", "contents": "No title, only text."},
    {"id": "9", "contents": '"Steventon"\nA village.'},
]
DOCUMENTS = ("Emma: A novel.", "No title, only text.", "Steventon: A village.")
FOUND = SearchResult(DOCUMENTS, titles=("Emma", "", "Steventon"))


def test_search_r1_s_format(server: Server) -> None:
    reply = {"result": [[{"document": row, "score": 1.5} for row in ROWS]]}
    server.answer = in_turn((200, reply), (200, {"result": [ROWS]}), (200, reply))
    assert found(server, "search-r1") == FOUND
    # Its own server fails without scores.
    assert server.requests == [{"queries": ["novel by Austen"], "topk": 5, "return_scores": True}]
    assert found(server, "search-r1").documents == DOCUMENTS
    assert found(server, "search-r1", num_documents=2).documents == DOCUMENTS[:2]


def test_the_format_of_the_paper_s_code(server: Server) -> None:
    server.answer = in_turn((200, [{"text": "one", "score": 0.1}, {"text": " "}, {"text": "two"}]))
    assert found(server, "zerosearch") == SearchResult(("one", "two"))
    assert server.requests == [{"query": "novel by Austen", "top_k": 5}]


@pytest.mark.parametrize(
    ("protocol", "reply"),
    [
        ("search-r1", {"result": []}),
        ("search-r1", {"result": [["a text"]]}),
        ("search-r1", {"result": [[{"document": {"text": "no contents"}}]]}),
        ("search-r1", {"result": {"0": [{"contents": "a"}]}}),
        ("search-r1", [{"text": "the other protocol"}]),
        ("zerosearch", {"result": [[]]}),
        ("zerosearch", [{"contents": "no text"}]),
        ("zerosearch", ["a text"]),
    ],
)
def test_another_format_is_a_failed_call_and_shown(server: Server, protocol: RetrieverProtocol, reply: Any) -> None:
    server.answer = in_turn((200, reply))
    engine = RetrieverEngine(server.url, protocol, max_retries=0)
    (error,) = searched(engine, REQUEST, keep_errors=True)
    assert isinstance(error, SearchError)
    assert f"its reply is not of the form expected: {json.dumps(reply)}" in str(
        error
    ) and "recipes/serve_retriever.py serves one" in str(error)
    assert len(server.seen) == 1 and engine.account.failures == 1


def test_a_retriever_without_health_is_known_by_its_address(server: Server) -> None:
    server.answer = lambda place: (404, "") if server.seen[place].path == "/health" else (200, {"result": [[]]})
    url = server.url.replace("http://", "http://user:p4ss@")
    engine = RetrieverEngine(url)
    assert engine.identity()["index"] is None
    engine.check()
    shown = url.replace("user:p4ss", "***")
    assert engine.identity() == {
        "engine": "retriever",
        "protocol": "search-r1",
        "index": {"url": shown},
        "num_documents": 5,
    }


def test_the_wrong_protocol_and_no_server_are_found_before_the_run(server: Server) -> None:
    server.answer = in_turn((200, [{"text": "one"}]))
    with pytest.raises(UserError, match="in the protocol search-r1"):
        RetrieverEngine(server.url).check()
    with pytest.raises(UserError, match=r"at http://\*\*\*@127.0.0.1:9/.*serve_retriever.py --corpus"):
        RetrieverEngine("http://user:p4ss@127.0.0.1:9/retrieve").check()
    with pytest.raises(UserError, match="this is not an http address"):
        RetrieverEngine("http://[::1").check()
