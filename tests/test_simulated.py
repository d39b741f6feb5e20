"""The simulated engine against a real HTTP server that answers as told: well, badly, late or not at all."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from zerosearch.engines import SearchError, SearchRequest, SearchResult, simulated
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError

FIVE = ("one", "two", "three", "four", "five")
REQUEST = SearchRequest("Emma author", "Who wrote Emma?", ("Jane Austen", "Austen"), key=(0, 1, 2, 3, 4))


def reply_of(*documents: str) -> tuple[int, str]:
    return completion("\n".join(f"Doc {number}: {text}" for number, text in enumerate(documents, start=1)))


def completion(content: str | None) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@dataclass
class Server:
    """What the test tells the server, and what it saw: `answer(place)` is the reply to the place-th chat request."""

    url: str = ""
    answer: Callable[[int], tuple[int, str]] = lambda place: reply_of(*FIVE)
    models: tuple[int, str] = (200, json.dumps({"data": [{"id": "sim-3b"}, {"id": "other"}]}))
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(simulated, "FIRST_BACK_OFF_S", 0.01)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which keeps connections open

        def do_GET(self) -> None:
            self.reply(*state.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                place = len(state.requests)
                state.requests.append({"path": self.path, **body})
                state.headers.append(dict(self.headers))
                state.connections.add(self.client_address)
                state.in_flight += 1
                state.most_in_flight = max(state.most_in_flight, state.in_flight)
            answer = state.answer(place)
            with state.lock:
                state.in_flight -= 1
            self.reply(*answer)

        def reply(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            pass

    class QuietServer(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            pass  # a client that gave up waiting

    http_server = QuietServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
    state.url = f"http://127.0.0.1:{http_server.server_port}/v1"
    yield state
    http_server.shutdown()
    http_server.server_close()


def in_turn(*answers: tuple[int, str]) -> Callable[[int], tuple[int, str]]:
    """Answer the first request with the first, and so on; the last one answers all that follow."""
    return lambda place: answers[min(place, len(answers) - 1)]


def search(engine: SimulatedEngine, *requests: SearchRequest) -> list[SearchResult]:
    async def run() -> list[SearchResult]:
        try:
            return await asyncio.gather(*(engine.search(request) for request in requests))
        finally:
            await engine.aclose()

    return asyncio.run(run())


def test_a_search_asks_in_the_papers_words_and_returns_the_documents(server: Server) -> None:
    (result,) = search(SimulatedEngine(server.url, model="sim-3b"), REQUEST)
    assert result == SearchResult(FIVE, noisy=False, retries=0)
    (request,) = server.requests
    seed = request.pop("seed")
    assert isinstance(seed, int) and 0 <= seed < 2**31
    prompt = (
        "You are the Google search engine.\n"
        "Given a query, you need to generate five useful documents for the query.\n"
        "\n"
        'The user is trying to answer the question: "Who wrote Emma?" whose answer is Jane Austen.\n'
        "Each document should contain about 30 words, and these documents should contain useful information.\n"
        "\n"
        "Query: Emma author\n"
        "Useful Output:\n"
    )
    assert request == {
        "path": "/v1/chat/completions",
        "model": "sim-3b",
        "messages": [{"role": "system", "content": ""}, {"role": "user", "content": prompt}],
        "temperature": 0.8,
        "max_tokens": 600,
    }


def test_the_coin_is_keyed_and_the_prompt_says_how_it_fell(server: Server) -> None:
    requests = [SearchRequest(f"query {row}", "Q?", ("a",), p_noise=0.3, key=(0, 1, row, 0, 0)) for row in range(200)]
    results = search(SimulatedEngine(server.url, "sim-3b", max_concurrency=16), *requests)
    noisy = [bool(result.noisy) for result in results]
    assert 0.2 < sum(noisy) / 200 < 0.4
    asked = {
        line: "noisy" in text
        for text in map(prompt_of, server.requests)
        for line in text.split("\n")
        if "Query" in line
    }
    assert asked == {f"Query: query {row}": fell for row, fell in enumerate(noisy)}
    again = search(SimulatedEngine(server.url, "sim-3b", max_concurrency=16), *reversed(requests))
    assert [bool(result.noisy) for result in reversed(again)] == noisy


def prompt_of(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"]


def test_certain_noise_needs_no_coin(server: Server) -> None:
    never, always = (SearchRequest("q", "Q?", ("a",), p_noise=p_noise) for p_noise in (0.0, 1.0))
    results = search(SimulatedEngine(server.url, "sim-3b"), never, always)
    assert [result.noisy for result in results] == [False, True]
    assert all("seed" not in request for request in server.requests)  # no key: nothing to derive it from


def test_the_seed_is_the_keys(server: Server) -> None:
    other = SearchRequest(REQUEST.query, REQUEST.question, REQUEST.golden_answers, key=(0, 1, 2, 3, 5))
    for request in (REQUEST, other, REQUEST):
        search(SimulatedEngine(server.url, "sim-3b"), request)
    first, second, third = (request["seed"] for request in server.requests)
    assert first == third != second


@pytest.mark.parametrize(
    "failure",
    [
        (500, "Doc 1: Internal Server Error"),
        (503, ""),
        (429, "slow down"),
        (200, "<html>gateway</html>"),
        (200, '{"choices": []}'),
        (200, '{"error": "out of memory"}'),
        (200, "[]"),
    ],
)
def test_a_call_that_fails_is_repeated_and_counted(server: Server, failure: tuple[int, str]) -> None:
    server.answer = in_turn(failure, failure, reply_of(*FIVE))
    (result,) = search(SimulatedEngine(server.url, "sim-3b"), REQUEST)
    assert result == SearchResult(FIVE, noisy=False, retries=2)
    assert len({request["seed"] for request in server.requests}) == 1  # the same question, asked again


def test_a_server_that_is_late_is_asked_again(server: Server) -> None:
    def answer(place: int) -> tuple[int, str]:
        time.sleep(1.0 if place == 0 else 0.0)
        return reply_of(*FIVE)

    server.answer = answer
    (result,) = search(SimulatedEngine(server.url, "sim-3b", timeout_s=0.2), REQUEST)
    assert result == SearchResult(FIVE, noisy=False, retries=1)


def test_retries_are_bounded_and_the_error_names_the_remedy(server: Server) -> None:
    server.answer = in_turn((500, "Doc 1: Internal Server Error"))
    message = f"{server.url} failed, attempt 3 of 3: HTTP status 500.*serve_simulator.py --model sim-3b --port"
    with pytest.raises(SearchError, match=message):
        search(SimulatedEngine(server.url, "sim-3b", max_retries=2), REQUEST)
    assert len(server.requests) == 3


def test_a_refusal_is_final(server: Server) -> None:
    server.answer = in_turn((400, '{"error": {"message": "max_tokens is too large: 600"}}'))
    with pytest.raises(SearchError, match=r"HTTP status 400.*max_tokens is too large: 600"):
        search(SimulatedEngine(server.url, "sim-3b"), REQUEST)
    assert len(server.requests) == 1


def test_nobody_there_is_a_search_error(server: Server) -> None:
    engine = SimulatedEngine("http://127.0.0.1:9/v1", "sim-3b", max_retries=1)
    with pytest.raises(SearchError, match="attempt 2 of 2"):
        search(engine, REQUEST)


def test_a_short_reply_is_asked_for_once_more_and_the_fuller_one_used(server: Server) -> None:
    server.answer = in_turn(reply_of("one", "two"), reply_of("one", "two", "three"))
    (result,) = search(SimulatedEngine(server.url, "sim-3b"), REQUEST)
    assert result == SearchResult(("one", "two", "three"), noisy=False, retries=1)
    first, second = server.requests
    assert first.pop("seed") != second.pop("seed")  # the same seed would give the same reply
    assert first == second


def test_a_second_reply_that_is_shorter_is_not_used(server: Server) -> None:
    server.answer = in_turn(reply_of("one", "two"), completion(""))
    (result,) = search(SimulatedEngine(server.url, "sim-3b"), REQUEST)
    assert result.documents == ("one", "two")


@pytest.mark.parametrize("content", ["", None, "Doc 1:\nDoc 2:", " \n "])
def test_no_documents_twice_is_a_search_error(server: Server, content: str | None) -> None:
    server.answer = in_turn(completion(content))
    with pytest.raises(SearchError, match="wrote no documents for the query 'Emma author', asked twice"):
        search(SimulatedEngine(server.url, "sim-3b"), REQUEST)
    assert len(server.requests) == 2


def test_check_takes_the_first_model_and_refuses_one_that_is_not_served(server: Server) -> None:
    engine = SimulatedEngine(server.url)
    engine.check()
    assert engine.model == "sim-3b"
    with pytest.raises(UserError, match="has no model 'sim-7b', but: sim-3b, other"):
        SimulatedEngine(server.url, model="sim-7b").check()


@pytest.mark.parametrize("models", [(404, "no such page"), (200, "hello"), (200, "[]"), (200, '{"data": 5}')])
def test_check_refuses_a_server_of_another_kind(server: Server, models: tuple[int, str]) -> None:
    server.models = models
    with pytest.raises(UserError, match=f"no simulator answers at {server.url}"):
        SimulatedEngine(server.url).check()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://no-such-host.invalid:9/v1"])
def test_check_names_the_command_that_starts_a_simulator(url: str) -> None:
    with pytest.raises(UserError) as caught:
        SimulatedEngine(url).check()
    assert str(caught.value).startswith(f"no simulator answers at {url}")
    assert str(caught.value).endswith("start one with: python recipes/serve_simulator.py --model SIMULATOR --port 9")


@pytest.mark.parametrize("url", ["localhost:6001", "http://localhost:port/v1", "not an address"])
def test_check_refuses_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UserError, match=f"no simulator answers at {url} .*--port 6001"):
        SimulatedEngine(url).check()


def test_without_a_name_the_first_model_is_asked(server: Server) -> None:
    search(SimulatedEngine(server.url), REQUEST)
    assert server.requests[0]["model"] == "sim-3b"


def test_searches_run_side_by_side_over_connections_that_stay_open(server: Server) -> None:
    def answer(place: int) -> tuple[int, str]:
        time.sleep(0.2)
        return reply_of(*FIVE)

    server.answer = answer
    engine = SimulatedEngine(server.url, "sim-3b", max_concurrency=20)
    requests = [SearchRequest(f"query {row}", "Q?", ("a",), key=(row,)) for row in range(60)]
    results = search(engine, *requests)
    assert [result.documents for result in results] == [FIVE] * 60
    assert server.most_in_flight == 20
    assert len(server.connections) == 20


def test_an_engine_outlives_an_event_loop(server: Server) -> None:
    engine = SimulatedEngine(server.url, "sim-3b")
    assert asyncio.run(engine.search(REQUEST)).documents == FIVE
    assert asyncio.run(engine.search(REQUEST)).documents == FIVE  # the first loop is closed, its connections with it


def test_the_users_hub_token_and_offline_mode_stay_out_of_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    search(SimulatedEngine(server.url, "sim-3b"), REQUEST)
    assert not any("secret" in value for headers in server.headers for value in headers.values())
