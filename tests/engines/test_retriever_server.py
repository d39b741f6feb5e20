"""The retriever's server, asked as the clients of Search-R1 and of the paper's code ask, and as nobody should."""

from __future__ import annotations

import gzip
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from http_servers import free_ports
from recipe_modules import Refusal, load_recipe
from retriever_parts import ask_and_end, health, post, serving

from zerosearch.engines import retriever_server
from zerosearch.engines.bm25 import BM25Index
from zerosearch.engines.corpus import Found
from zerosearch.engines.retriever_server import listen
from zerosearch.errors import UserError

EMMA = {"id": "0", "contents": '"Emma"\nEmma is a novel by Jane Austen, published in 1815.'}
AUSTEN = {"id": "1", "contents": '"Jane Austen"\nJane Austen was born in Steventon, a village in Hampshire.'}


@pytest.fixture(scope="module")
def index(corpus: Path) -> BM25Index:
    return BM25Index(corpus)


@pytest.fixture(scope="module")
def address(index: BM25Index) -> Iterator[str]:
    with serving(index) as address:
        yield address


def test_search_r1_s_own_requests(address: str) -> None:
    # As search_r1/llm_agent/generation.py sends it, and as its retrieval_request.py does.
    status, reply = post(address, {"queries": ["novel by Austen"], "topk": 2, "return_scores": True})
    assert status == 200
    assert [found["document"] for found in reply["result"][0]] == [EMMA, AUSTEN]
    scores = [found["score"] for found in reply["result"][0]]
    assert scores == sorted(scores, reverse=True) and scores[1] > 0
    _, batch = post(address, {"queries": ["novel 1815", "zebra", "county town"], "topk": 3, "return_scores": True})
    assert [len(found) for found in batch["result"]] == [1, 0, 1], "one list a query, in their order"
    assert batch["result"][2][0]["document"]["contents"].startswith('"Hampshire"')
    plain = {"result": [[EMMA], [AUSTEN]]}  # without scores the documents stand by themselves
    assert post(address, {"queries": ["novel", "village"], "topk": None}) == (200, plain)
    assert post(address, {"queries": [], "topk": 3, "return_scores": True}) == (200, {"result": []})
    assert post(address, json.dumps({"queries": ["novel"]}).encode()) == (200, {"result": [[EMMA]]})  # curl -d


def test_the_request_of_the_paper_s_code(index: BM25Index) -> None:
    with serving(index, topk=1) as address:
        assert post(address, {"query": "novel by Austen", "top_k": 2}) == (
            200,
            [
                {"text": "Emma is a novel by Jane Austen, published in 1815."},
                {"text": "Jane Austen was born in Steventon, a village in Hampshire."},
            ],
        )
        assert post(address, {"query": "zebra", "top_k": 2}) == (200, [])
        assert len(post(address, {"query": "Hampshire"})[1]) == 1


BAD: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{queries: 1}", 400, "the body is not JSON"),
    "nothing": (b"", 400, "the body is not JSON"),
    "too deep": (b"[" * 100_000, 400, "the body is not JSON"),
    "not UTF-8": (b'{"queries": ["\xff"]}', 400, "the body is not JSON"),
    "compressed": (gzip.compress(b'{"queries": ["a"]}'), 400, "the body is not JSON"),
    "too large": (b"x" * (17 * 2**20), 413, "the body exceeds 16,777,216 bytes"),
    "a list": ([1], 422, "body: Input should be a valid dictionary"),
    "no queries": ({"topk": 3}, 422, "body: Value error, the body needs either queries, a list of texts, or query"),
    "both protocols": ({"queries": ["a"], "query": "a"}, 422, "the body needs either queries"),
    "queries, one text": ({"queries": "novel"}, 422, "body.queries: Input should be a valid list"),
    "queries, a number": ({"queries": ["a", 1]}, 422, "body.queries.1: Input should be a valid string"),
    "many numbers": ({"queries": [1] * 10_000}, 422, "body.queries.0: Input should be a valid string"),
    "a long query": ({"queries": ["a" * 10_001]}, 422, "body.queries.0: String should have at most 10000 characters"),
    "half a character": ({"queries": 5, "\ud83d": "\ud83d"}, 422, "body.queries: Input should be a valid list"),
    "query, a list": ({"query": ["a"]}, 422, "body.query: Input should be a valid string"),
    "topk 0": ({"queries": ["a"], "topk": 0}, 422, "body.topk: Input should be greater than or equal to 1"),
    "topk too large": ({"queries": ["a"], "topk": 10**9}, 422, "body.topk: Input should be less than or equal"),
    "topk a text": ({"queries": ["a"], "topk": "3"}, 422, "body.topk: Input should be a valid integer"),
    "topk true": ({"queries": ["a"], "topk": True}, 422, "body.topk: Input should be a valid integer"),
    "top_k a fraction": ({"query": "a", "top_k": 2.5}, 422, "body.top_k: Input should be a valid integer"),
    "scores": ({"queries": ["a"], "return_scores": "yes"}, 422, "body.return_scores: Input should be a valid boolean"),
    "a huge reply": (
        {"queries": ["a"] * 20_000, "topk": 1000},
        422,
        "queries times topk is 20,000,000: at most 50,000 in a request; send several",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_what_is_wrong(address: str, case: str) -> None:
    """The form of the errors is FastAPI's, which Search-R1's server is written in."""
    body, expected, message = BAD[case]
    status, reply = post(address, body)
    detail = reply["detail"]
    if not isinstance(detail, str):
        (error,) = detail
        assert error.keys() == {"type", "loc", "msg"}, "the input is not sent back"
        detail = f"{'.'.join(map(str, error['loc']))}: {error['msg']}"
    assert status == expected and message in detail


def test_a_reply_is_bounded(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retriever_server, "LARGEST_REPLY_BYTES", 200)
    assert post(address, {"queries": ["novel"]})[0] == 200
    message = "the reply would exceed 200 bytes; ask fewer queries"
    assert post(address, {"queries": ["novel"] * 3}) == (413, {"detail": message})


@pytest.mark.parametrize(
    "header",
    [{"Content_Type": f"application/json; charset={name}"} for name in ("punycode", "undefined", '"klingon"')]
    + [{"Content_Encoding": "gzip"}],
)
def test_other_encodings_are_refused(address: str, header: dict[str, str]) -> None:
    refused = (415, {"detail": "the body must be JSON in UTF-8, not compressed"})
    assert post(address, b'{"queries": ["a"]}', **header) == refused
    assert post(address, b'{"queries": []}', Content_Type='application/json; charset="UTF-8"; a=b')[0] == 200


def test_half_a_character_is_replaced_where_it_enters(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"id": float("nan"), "contents": "caf\ud83d \0 bar"}) + "\n")
    with serving(BM25Index(path)) as address:
        found = {"result": [[{"id": None, "contents": "caf\ufffd \ufffd bar"}]]}
        assert post(address, {"queries": ["bar \ud83d"]}) == (200, found)


def raw(address: str, *parts: str) -> bytes:
    """Send the parts over one connection and return what comes until the server ends it."""
    host, port = address.split("/")[2].split(":")
    reply = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            for part in parts:
                connection.sendall(part.encode())
                time.sleep(0.05)
            while received := connection.recv(1000):
                reply += received
        except ConnectionError:
            pass
    return reply


HEAD = "POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\n"


HALF_SENT: dict[str, tuple[list[str], int]] = {  # what is sent, and how many replies come
    "nothing": ([], 0),
    "half a head": (["POST /retr", "ieve HTTP/1.1\r\n"], 0),
    "half a body": ([HEAD, '{"queries"'], 0),
    "half a second head": ([HEAD, '{"queries": ["a"]}', "POST /retr"], 1),
    "half a second body at once": ([HEAD + '{"queries": ["a"]}' + HEAD, '{"queries"'], 1),
    "idle after two": ([HEAD + '{"queries": ["a"]}' + HEAD + '{"queries": ["a"]}'], 2),
}


def test_a_client_that_sends_no_whole_request_is_dropped(index: BM25Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retriever_server, "REQUEST_S", 1)
    with serving(index) as address, ThreadPoolExecutor(len(HALF_SENT)) as pool:

        def dropped(case: str) -> tuple[str, int, bool]:
            start = time.perf_counter()
            replies = raw(address, *HALF_SENT[case][0]).count(b"HTTP/1.1 200 ")
            return case, replies, 0.9 < time.perf_counter() - start < 5

        assert list(pool.map(dropped, HALF_SENT)) == [
            (case, replies, True) for case, (_, replies) in HALF_SENT.items()
        ]


def test_connections_are_limited(index: BM25Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retriever_server, "REQUEST_S", 1)
    monkeypatch.setattr(retriever_server, "MOST_CONNECTIONS", 20)
    with serving(index) as address, ThreadPoolExecutor(60) as pool:
        start = time.perf_counter()

        def idle(_: int) -> float:
            raw(address)
            return time.perf_counter() - start

        assert sum(seconds < 0.8 for seconds in pool.map(idle, range(60))) >= 40, "those beyond the limit at once"
        assert post(address, {"queries": ["novel"]})[0] == 200, "it serves when the idle ones are gone"


def test_a_hundred_clients_at_once_and_nothing_lost(address: str, index: BM25Index) -> None:
    words = ["novel", "village", "Steventon", "county", "zebra"]
    found = index.find(words, 3)
    expected = {word: [index.row(start) for start, _ in best] for word, best in zip(words, found, strict=True)}
    before = health(address)

    def client(number: int) -> int:
        right = 0
        with requests.Session() as session:
            for turn in range(3):
                asked = [words[(number + turn) % 5], words[(number * 3 + turn) % 5]]
                body = {"queries": asked, "topk": 3, "return_scores": bool(number % 2)}
                found = session.post(address, json=body, timeout=60).json()["result"]
                documents = [[row.get("document", row) for row in rows] for rows in found]
                right += documents == [expected[word] for word in asked]
        return right

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(client, range(100))) == [3] * 100
    assert health(address)["queries"] - before["queries"] == 600


class SlowIndex:
    """Finds the first passage once it may; fails on "fail"."""

    def __init__(self, index: BM25Index) -> None:
        self.row, self.manifest = index.row, {"num_passages": 1}
        self.started, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()
        self.searched: list[tuple[int, int]] = []  # queries and documents of each batch

    def find(self, queries: Sequence[str], count: int) -> list[Found]:
        self.searched.append((len(queries), count))
        self.started.set()
        self.may_end.wait(30)
        if "fail" in queries:
            raise ZeroDivisionError("a secret of the index")
        return [[(0, 1.0)] for _ in queries]

    def identity(self) -> dict[str, Any]:
        return {"kind": "slow", "model": "/home/me/models/e5"}


@pytest.fixture
def slow(index: BM25Index) -> Any:
    return SlowIndex(index)


def test_an_index_that_fails_fails_one_request_and_serves_the_next(slow: Any) -> None:
    with serving(slow) as address:
        assert post(address, {"queries": ["fail"]}) == (500, {"detail": "the index failed: ZeroDivisionError"})
        assert post(address, {"queries": ["go on"]}) == (200, {"result": [[EMMA]]})


@pytest.mark.parametrize("damaged", ["corpus", "index"])
def test_a_file_that_is_cut_while_it_is_served_is_a_failure_that_says_so(damaged: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps(EMMA) + "\n")
    with serving(BM25Index(corpus, tmp_path / "index")) as address:
        cut = corpus if damaged == "corpus" else next((tmp_path / "index/data").glob("*.idx"))
        os.truncate(cut, 0)
        message = f"{cut.name} has changed since it was opened; start again to index it anew"
        assert post(address, {"queries": ["novel"]}) == (500, {"detail": message})


def test_requests_that_wait_are_searched_together_and_one_that_fails_takes_no_other_with_it(slow: Any) -> None:
    slow.may_end.clear()
    with serving(slow) as address, ThreadPoolExecutor(5) as pool:

        def ask(query: str, topk: int = 3) -> Any:
            return pool.submit(post, address, {"queries": [query], "topk": topk})

        first = ask("first")
        assert slow.started.wait(30)  # it keeps the index busy until the others have arrived
        others = [ask("a"), ask("fail"), ask("b"), ask("c", 1000)]
        assert health(address)["status"] == "ok", "it answers while it searches"
        time.sleep(0.5)
        slow.may_end.set()
        assert [one.result()[0] for one in (first, *others)] == [200, 200, 500, 200, 200]
    # Those that want 1000 documents are apart: together with thousands of other queries, they would fill the memory.
    assert sorted(slow.searched) == [(1, 3), (1, 3), (1, 3), (1, 3), (1, 1000), (3, 3)]


def test_what_is_under_way_is_finished_when_the_server_ends(slow: Any) -> None:
    slow.may_end.clear()
    with ThreadPoolExecutor(1) as pool:
        with serving(slow) as address:
            search = pool.submit(post, address, {"queries": ["a"]})
            assert slow.started.wait(30)
            threading.Timer(0.2, slow.may_end.set).start()
        assert search.result()[0] == 200


def test_health_says_which_index_this_is_and_not_where(address: str, slow: Any) -> None:
    told = health(address)
    assert (told["status"], told["passages"]) == ("ok", 4)
    assert told["index"]["kind"] == "bm25" and len(told["index"]["corpus_sha256"]) == 64
    with serving(slow) as other:
        assert health(other)["index"] == {"kind": "slow", "model": "e5"}, "no path"


def test_the_recipe_serves_on_loopback_and_ends_on_a_signal(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_ports()
    address = f"http://127.0.0.1:{port}/retrieve"
    flags = ["--corpus", str(corpus), "--index_dir", str(tmp_path / "index"), "--port", str(port)]
    serve = partial(load_recipe("serve_retriever").main, flags)
    assert ask_and_end(serve, address, {"queries": ["novel"], "topk": 1}) == (200, {"result": [[EMMA]]})
    assert capsys.readouterr().out == f"retriever ready at {address}: 4 passages (Ctrl-C ends it)\n"
    assert json.loads((tmp_path / "index/zerosearch.json").read_text())["num_passages"] == 4


def test_a_port_that_is_taken_is_one_sentence(address: str) -> None:
    with pytest.raises(UserError, match="choose another with --port"):
        listen("127.0.0.1", int(address.split(":")[2].split("/")[0]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpus", "none.jsonl"], "there is no file none.jsonl"),
        (["--corpus", "none.jsonl", "--engine", "dense"], "--engine dense needs --index_dir"),
        ([], "--engine bm25 needs --corpus, a JSONL file of passages"),
        (["--corpus", "none.jsonl", "--topk", "0"], "topk is 0: it must be at least 1"),
    ],
)
def test_a_mistake_gets_one_sentence(flags: list[str], message: str, refusal: Refusal) -> None:
    assert message in refusal("serve_retriever", flags)
