"""The retriever's server, asked as the clients of Search-R1 and of the paper's code ask, and as nobody should."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import pytest
import requests
from retriever_parts import asked, serving

from zerosearch.engines import retriever_server
from zerosearch.engines.bm25 import BM25Index
from zerosearch.engines.corpus import Found, PassageFile
from zerosearch.engines.retriever_server import RetrieverServer

pytest_plugins = ("recipe_modules",)  # fixtures

ROOT = Path(__file__).parents[2]
EMMA = {"id": "0", "contents": '"Emma"\nEmma is a novel by Jane Austen, published in 1815.'}
AUSTEN = {"id": "1", "contents": '"Jane Austen"\nJane Austen was born in Steventon, a village in Hampshire.'}


@pytest.fixture(scope="module")
def index(corpus: Path) -> BM25Index:
    return BM25Index(corpus)


def test_search_r1_s_own_requests(index: BM25Index) -> None:
    # As search_r1/llm_agent/generation.py sends it, and as its retrieval_request.py does.
    (status, reply), (_, batch), (_, plain), (_, none) = asked(
        index,
        {"queries": ["novel by Austen"], "topk": 2, "return_scores": True},
        {"queries": ["novel 1815", "zebra", "county town"], "topk": 3, "return_scores": True},
        {"queries": ["novel", "village"], "topk": None},
        {"queries": [], "topk": 3, "return_scores": True},
    )
    assert status == 200
    assert [found["document"] for found in reply["result"][0]] == [EMMA, AUSTEN]
    scores = [found["score"] for found in reply["result"][0]]
    assert scores == sorted(scores, reverse=True) and scores[1] > 0
    assert [len(found) for found in batch["result"]] == [1, 0, 1], "one list a query, in their order"
    assert batch["result"][2][0]["document"]["contents"].startswith('"Hampshire"')
    assert plain == {"result": [[EMMA], [AUSTEN]]}, "without scores the documents stand by themselves"
    assert none == {"result": []}


def test_search_r1_s_client_reads_our_replies(index: BM25Index) -> None:
    """The reading half of Search-R1's client (`_passages2string`), on a reply of ours."""
    ((_, reply),) = asked(index, {"queries": ["novel"], "topk": 3, "return_scores": True})
    text = ""
    for place, found in enumerate(reply["result"][0]):
        content = found["document"]["contents"]
        title = content.split("\n")[0]
        text += f"Doc {place + 1}(Title: {title}) " + "\n".join(content.split("\n")[1:]) + "\n"
    assert text == 'Doc 1(Title: "Emma") Emma is a novel by Jane Austen, published in 1815.\n'


def test_a_plain_requests_client(index: BM25Index) -> None:
    """A blocking client of another library, which Search-R1's is."""

    async def ask() -> requests.Response:
        async with serving(RetrieverServer(index)) as address:
            body = {"queries": ["novel"], "topk": 1, "return_scores": True}
            return await asyncio.to_thread(requests.post, address, json=body, timeout=30)

    response = asyncio.run(ask())
    assert response.status_code == 200 and response.headers["Content-Type"].startswith("application/json")
    assert response.json()["result"][0][0]["document"] == EMMA


def test_the_request_of_the_paper_s_code(index: BM25Index) -> None:
    (_, reply), (_, none), (_, default) = asked(
        index, {"query": "novel by Austen", "top_k": 2}, {"query": "zebra", "top_k": 2}, {"query": "Hampshire"}, topk=1
    )
    assert reply == [
        {"text": "Emma is a novel by Jane Austen, published in 1815."},
        {"text": "Jane Austen was born in Steventon, a village in Hampshire."},
    ]
    assert none == []
    assert len(default) == 1


BAD: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{queries: 1}", 400, "the body is not JSON"),
    "nothing": (b"", 400, "the body is not JSON"),
    "too deep": (b"[" * 100_000, 400, "the body is not JSON"),
    "not UTF-8": (b'{"queries": ["\xff"]}', 400, "the body is not JSON"),
    "too large": (b"x" * (17 * 2**20), 413, "the body exceeds 16,777,216 bytes"),
    "a list": ([1], 422, "body: Input should be a valid dictionary"),
    "no queries": ({"topk": 3}, 422, "body: Value error, the body needs either queries, a list of texts, or query"),
    "both protocols": ({"queries": ["a"], "query": "a"}, 422, "the body needs either queries"),
    "queries, one text": ({"queries": "novel"}, 422, "body.queries: Input should be a valid list"),
    "queries, a number": ({"queries": ["a", 1]}, 422, "body.queries.1: Input should be a valid string"),
    "many numbers": ({"queries": [1] * 10_000}, 422, "body.queries.0: Input should be a valid string"),
    "a long query": ({"queries": ["a" * 10_001]}, 422, "body.queries.0: String should have at most 10000 characters"),
    "query, a list": ({"query": ["a"]}, 422, "body.query: Input should be a valid string"),
    "topk 0": ({"queries": ["a"], "topk": 0}, 422, "body.topk: Input should be greater than or equal to 1"),
    "topk too large": (
        {"queries": ["a"], "topk": 10**9},
        422,
        "body.topk: Input should be less than or equal",
    ),
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


def test_bad_input_is_told_what_is_wrong(index: BM25Index) -> None:
    """The form of the errors is FastAPI's, which Search-R1's server is written in."""
    replies = asked(index, *(body for body, *_ in BAD.values()))
    for (status, reply), (name, (_, expected, message)) in zip(replies, BAD.items(), strict=True):
        detail = reply["detail"]
        if not isinstance(detail, str):
            (error,) = detail
            detail = f"{'.'.join(map(str, error['loc']))}: {error['msg']}"
        assert (status, message in detail) == (expected, True), (name, status, detail[:200])


def test_other_pages_methods_and_encodings_are_refused_as_json(index: BM25Index) -> None:
    assert asked(index, {}, path="/search") == [(404, {"detail": "Not Found"})]

    async def ask() -> list[tuple[int, Any]]:
        async with serving(RetrieverServer(index)) as address, aiohttp.ClientSession() as session:
            replies = [await session.get(address)]
            for name, value in (
                ("Content-Type", "application/json; charset=punycode"),
                ("Content-Type", "application/json; charset=undefined"),
                ("Content-Type", "application/json; charset=klingon"),
                ("Content-Encoding", "gzip"),
            ):
                replies.append(await session.post(address, data=b'{"queries": ["a"]}', headers={name: value}))
            return [(reply.status, await reply.json()) for reply in replies]

    refused = (415, {"detail": "the body must be JSON in UTF-8, not compressed"})
    assert asyncio.run(ask()) == [(405, {"detail": "Method Not Allowed"}), refused, refused, refused, refused]


def test_half_a_character_is_replaced_where_it_enters(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"id": float("nan"), "contents": "caf\ud83d \0 bar"}) + "\n")
    ((status, reply),) = asked(BM25Index(path), {"queries": ["bar \ud83d"]})
    assert (status, reply) == (200, {"result": [[{"id": None, "contents": "caf\ufffd \ufffd bar"}]]})


def test_connections_that_send_no_request_are_ended_and_few_are_admitted(
    index: BM25Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retriever_server, "HEAD_S", 0.3)
    monkeypatch.setattr(retriever_server, "BODY_S", 0.3)
    monkeypatch.setattr(retriever_server, "MOST_CONNECTIONS", 20)

    async def send(address: str, *sent: str) -> bytes:
        host, port = address.split("/")[2].split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        reply = b""
        try:
            for part in sent:
                writer.write(part.encode())
                await writer.drain()
                reply += await asyncio.wait_for(reader.read(100), 10)
        except ConnectionError:
            reply += b"reset"
        writer.close()
        return reply

    async def ask() -> tuple[list[bytes], int]:
        async with serving(RetrieverServer(index)) as address:
            head = "POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
            ended = [
                await send(address, "POST /retr"),
                await send(address, head),
                await send(address, head + "\r\n{", "and after the reply", "nothing"),
                await send(address, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n", "GET /health", "nothing"),
            ]
            idle = await asyncio.gather(*(send(address, "P") for _ in range(60)))
            async with aiohttp.ClientSession() as session, session.post(address, json={"queries": ["novel"]}) as reply:
                return [*ended, *idle], reply.status

    (cut, also_cut, slow, kept, *_), status = asyncio.run(ask())
    assert {cut, also_cut} <= {b"", b"reset"}
    assert slow.startswith(b"HTTP/1.1 408 ") and kept.startswith(b"HTTP/1.1 200 ")
    assert status == 200, "it serves when the idle ones are gone"


def test_two_hundred_clients_at_once_and_nothing_lost(index: BM25Index) -> None:
    words = ["novel", "village", "Steventon", "county", "zebra"]
    expected = {word: [index.passages.row(start) for start, _ in index.top(word, 3)] for word in words}

    async def client(address: str, number: int) -> int:
        async with aiohttp.ClientSession() as session:  # a connection of its own, as another process has
            right = 0
            for turn in range(5):
                asked_for = [words[(number + turn) % 5], words[(number * 3 + turn) % 5]]
                body = {"queries": asked_for, "topk": 3, "return_scores": bool(number % 2)}
                async with session.post(address, json=body) as response:
                    found = (await response.json())["result"]
                documents = [[row.get("document", row) for row in rows] for rows in found]
                right += documents == [expected[word] for word in asked_for]
            return right

    async def ask() -> tuple[list[int], Any]:
        async with serving(RetrieverServer(index)) as address:
            right = await asyncio.gather(*(client(address, number) for number in range(200)))
            async with aiohttp.ClientSession() as session:
                return right, await (await session.get(address.replace("retrieve", "health"))).json()

    right, health = asyncio.run(ask())
    assert right == [5] * 200
    assert health["queries"] == 2000
    assert health["batches"] < 1000, "requests that wait are searched together"


class SlowIndex:
    """Finds the first passage once it may; fails on "fail"."""

    def __init__(self, passages: PassageFile) -> None:
        self.passages, self.manifest = passages, {"num_passages": 1}
        self.started, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()
        self.threads: set[str] = set()
        self.searched: list[tuple[int, int]] = []  # queries and documents of each batch

    def search(self, queries: Sequence[str], count: int) -> list[Found]:
        self.threads.add(threading.current_thread().name)
        self.searched.append((len(queries), count))
        self.started.set()
        self.may_end.wait(30)
        if "fail" in queries:
            raise ZeroDivisionError("a secret of the index")
        return [[(0, 1.0)] for _ in queries]

    def identity(self) -> dict[str, Any]:
        return {"kind": "slow", "model": "/home/me/models/e5"}


def test_an_index_that_fails_fails_one_request_and_serves_the_next(index: BM25Index) -> None:
    replies = asked(SlowIndex(index.passages), {"queries": ["fail"]}, {"queries": ["go on"]})
    assert replies[0] == (500, {"detail": "the index failed: ZeroDivisionError"})
    assert replies[1] == (200, {"result": [[EMMA]]})


def test_a_corpus_that_is_cut_while_it_is_served_is_a_failure_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps(EMMA) + "\n")

    async def ask() -> tuple[int, Any]:
        async with serving(RetrieverServer(BM25Index(path))) as address, aiohttp.ClientSession() as session:
            path.write_text("")
            response = await session.post(address, json={"queries": ["novel"]})
            return response.status, await response.json()

    message = "the corpus corpus.jsonl has changed since it was indexed; start again to index it"
    assert asyncio.run(ask()) == (500, {"detail": message})


def test_requests_that_wait_are_searched_together_and_one_that_fails_takes_no_other_with_it(
    index: BM25Index,
) -> None:
    slow = SlowIndex(index.passages)
    server = RetrieverServer(slow)

    async def ask() -> list[int]:
        async with serving(server) as address, aiohttp.ClientSession() as session:

            async def post(query: str, topk: int = 3) -> int:
                async with session.post(address, json={"queries": [query], "topk": topk}) as response:
                    return response.status

            slow.may_end.clear()
            first = asyncio.create_task(post("first"))
            await asyncio.to_thread(slow.started.wait, 30)  # it keeps the index busy until the others have arrived
            others = asyncio.gather(post("a"), post("fail"), post("b"), post("c", 1000))
            while server._waiting.qsize() < 4:
                await asyncio.sleep(0.01)
            slow.may_end.set()
            return [await first, *await others]

    assert asyncio.run(ask()) == [200, 200, 500, 200, 200]
    # Those that want 1000 documents are apart: together with thousands of other queries, they would fill the memory.
    assert sorted(slow.searched) == [(1, 3), (1, 3), (1, 3), (1, 3), (1, 1000), (3, 3)]


def test_it_answers_while_it_searches_and_finishes_what_is_under_way(index: BM25Index) -> None:
    slow = SlowIndex(index.passages)
    slow.may_end.clear()

    async def ask() -> tuple[int, int]:
        async with aiohttp.ClientSession() as session:
            async with serving(RetrieverServer(slow)) as address:
                search = asyncio.create_task(session.post(address, json={"queries": ["a"]}))
                await asyncio.to_thread(slow.started.wait, 30)
                health = await session.get(address.replace("retrieve", "health"))
                asyncio.get_running_loop().call_later(0.2, slow.may_end.set)  # when the server has been told to end
            return health.status, (await search).status

    assert asyncio.run(ask()) == (200, 200)
    assert all(name.startswith("index") for name in slow.threads)


def test_health_says_which_index_this_is_and_not_where(index: BM25Index) -> None:
    async def ask(served: Any) -> Any:
        async with serving(RetrieverServer(served)) as address, aiohttp.ClientSession() as session:
            return await (await session.get(address.replace("retrieve", "health"))).json()

    health = asyncio.run(ask(index))
    assert (health["status"], health["passages"]) == ("ok", 4)
    assert health["index"]["kind"] == "bm25" and len(health["index"]["corpus_sha256"]) == 64
    assert asyncio.run(ask(SlowIndex(index.passages)))["index"] == {"kind": "slow", "model": "e5"}, "no path"


def test_the_recipe_serves_on_loopback_and_ends_on_a_signal(corpus: Path, tmp_path: Path) -> None:
    flags = ("--corpus", str(corpus), "--index_dir", str(tmp_path / "index"), "--port", "0")
    command = [sys.executable, str(ROOT / "recipes/serve_retriever.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("retriever ready at http://127.0.0.1:") and "4 passages" in line
        address = line.split()[3].rstrip(":")
        body = {"queries": ["novel"], "topk": 1, "return_scores": False}
        assert requests.post(address, json=body, timeout=30).json() == {"result": [[EMMA]]}
        port = address.split(":")[2].split("/")[0]
        second = subprocess.run(
            [*command[:-1], port], capture_output=True, text=True, timeout=120, check=False, env=os.environ
        )
        assert second.returncode == 2 and "choose another with --port" in second.stderr
        assert second.stderr.count("\n") == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert json.loads((tmp_path / "index/zerosearch.json").read_text())["num_passages"] == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpus", "none.jsonl"], "there is no file none.jsonl"),
        (["--corpus", "none.jsonl", "--kind", "dense"], "--kind dense needs --index_dir"),
        (["--corpus", "none.jsonl", "--topk", "0"], "topk is 0: it must be at least 1"),
    ],
)
def test_a_mistake_gets_one_sentence(
    flags: list[str], message: str, load_recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe: ModuleType = load_recipe("serve_retriever")
    with pytest.raises(SystemExit) as stopped:
        recipe.main(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
