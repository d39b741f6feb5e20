"""The simulated engine against a real HTTP server that answers as told: well, badly, late or not at all."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from zerosearch import http
from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.simulated import SimulatedEngine, SimulatorCounts
from zerosearch.errors import UserError
from zerosearch.prompts import PROMPTED_SIMULATOR
from zerosearch.protocol import split_documents

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


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_BACK_OFF_S", 0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as state:
        yield state


@contextmanager
def serving() -> Iterator[Server]:
    """Serve on a free port."""
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
    try:
        yield state
    finally:
        http_server.shutdown()
        http_server.server_close()


def in_turn(*answers: tuple[int, str]) -> Callable[[int], tuple[int, str]]:
    """Answer the first request with the first, and so on; the last one answers all that follow."""
    return lambda place: answers[min(place, len(answers) - 1)]


def after(seconds: float) -> Callable[[int], tuple[int, str]]:
    """Answer well, late."""

    def answer(place: int) -> tuple[int, str]:
        time.sleep(seconds)
        return reply_of(*FIVE)

    return answer


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
    engine = SimulatedEngine(server.url, "sim-3b", timeout_s=0.2)
    given_up = threading.Event()

    def answer(place: int) -> tuple[int, str]:
        engine.client.timeout_s = 30.0  # from the second call on, so that a busy machine may take its time
        if place == 0:
            given_up.wait(30)
        return reply_of(*FIVE)

    server.answer = answer
    (result,) = search(engine, REQUEST)
    given_up.set()
    assert result == SearchResult(FIVE, noisy=False, retries=engine.client.counts["retries"]) and result.retries >= 1


def test_retries_are_bounded_and_the_error_names_the_remedy(server: Server) -> None:
    server.answer = in_turn((500, "Doc 1: Internal Server Error"))
    message = (
        f"{server.url}/chat/completions failed, attempt 3 of 3: HTTP status 500.*serve_simulator.py --model sim-3b"
    )
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
    assert result == SearchResult(("one", "two", "three"), noisy=False, retries=1, short_replies=2)
    first, second = server.requests
    assert first.pop("seed") != second.pop("seed")  # the same seed would give the same reply
    assert first == second


LEAK = reply_of("one", "Emma is by JANE  Austen.", "three", "four", "five")
CLEAN = reply_of(*FIVE)


@pytest.mark.parametrize(
    ("replies", "used", "calls"),
    [
        pytest.param([LEAK, CLEAN], CLEAN, 2, id="the clean one is used"),
        pytest.param([LEAK, LEAK], LEAK, 2, id="asked twice at most"),
        pytest.param([CLEAN], CLEAN, 1, id="nothing to ask again for"),
        pytest.param([LEAK, reply_of("one", "two")], reply_of("one", "two"), 2, id="clean before full"),
        pytest.param([LEAK, completion("")], LEAK, 2, id="no documents are none"),
        pytest.param([reply_of("one"), LEAK], reply_of("one"), 2, id="a full one that leaks is not better"),
    ],
)
def test_a_noisy_reply_with_an_answer_in_it_is_asked_for_again_where_one_wishes(
    server: Server, replies: list[tuple[int, str]], used: tuple[int, str], calls: int
) -> None:
    server.answer = in_turn(*replies)
    engine = SimulatedEngine(server.url, "sim-3b", ask_leaks_again=True)
    (result,) = search(engine, replace(REQUEST, p_noise=1.0))
    text = json.loads(used[1])["choices"][0]["message"]["content"]
    assert result.documents == split_documents(text, 5) and result.noisy
    assert len(server.requests) == calls


@pytest.mark.parametrize(("p_noise", "ask_leaks_again"), [(0.0, True), (1.0, False)])
def test_useful_replies_may_answer_and_so_may_noisy_ones_by_default(
    server: Server, p_noise: float, ask_leaks_again: bool
) -> None:
    server.answer = in_turn(LEAK)
    engine = SimulatedEngine(server.url, "sim-3b", ask_leaks_again=ask_leaks_again)
    (result,) = search(engine, replace(REQUEST, p_noise=p_noise))
    assert result.retries == 0


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
    twenty = threading.Barrier(20, timeout=30)

    def answer(place: int) -> tuple[int, str]:
        twenty.wait()  # for so many at once, three times
        return reply_of(*FIVE)

    server.answer = answer
    engine = SimulatedEngine(server.url, "sim-3b", max_concurrency=20)
    requests = [SearchRequest(f"query {row}", "Q?", ("a",), key=(row,)) for row in range(60)]
    results = search(engine, *requests)
    assert [result.documents for result in results] == [FIVE] * 60
    assert server.most_in_flight == 20
    assert len(server.connections) == 20


def test_a_prompted_simulator_gets_an_example_and_its_noisy_form_no_answer(server: Server) -> None:
    requests = [SearchRequest("Emma author", "Who wrote Emma?", ("Jane Austen",), p_noise=p) for p in (0.0, 1.0)]
    search(SimulatedEngine(server.url, "sim-3b", PROMPTED_SIMULATOR), *requests)
    noisy, useful = sorted(map(prompt_of, server.requests), key=lambda prompt: "whose answer is" in prompt)
    assert 'the question: "Who wrote Emma?" whose answer is Jane Austen.' in useful
    assert useful.endswith("\n\nQuery: Emma author\nUseful Output:\n")
    assert "Jane Austen" not in noisy and "Who wrote Emma?" not in noisy
    assert noisy.endswith("\n\nQuery: Emma author\nNoisy Output:\n")


def by_quality(place: int, server: Server) -> tuple[int, str]:
    quality = "noisy" if "Noisy Output" in prompt_of(server.requests[place]) else "useful"
    return reply_of(*(f"{quality} {number}" for number in range(1, 6)))


def test_a_coin_for_each_document_mixes_two_replies(server: Server) -> None:
    server.answer = lambda place: by_quality(place, server)
    requests = [SearchRequest(f"query {row}", "Q?", ("a",), p_noise=0.3, key=(0, 1, row, 0, 0)) for row in range(200)]
    results = search(SimulatedEngine(server.url, "sim-3b", coin="document", max_concurrency=16), *requests)
    shares = Counter(round(5 * (result.noisy_share or 0.0)) for result in results)
    assert len(shares) >= 5  # 0 to 4 or 5 of five
    assert 0.25 < sum(noisy * count for noisy, count in shares.items()) / 1000 < 0.35
    for result in results:
        qualities = [document.split()[0] for document in result.documents]
        assert qualities.count("noisy") == 5 * (result.noisy_share or 0.0)
        assert result.noisy is (qualities.count("noisy") >= 3)
        for quality in ("noisy", "useful"):  # each reply's documents in their order, none twice
            written = [document for document in result.documents if document.startswith(quality)]
            assert written == [f"{quality} {number}" for number in range(1, len(written) + 1)]
    alike = sum(1 for result in results if result.noisy_share in (0.0, 1.0))
    assert len(server.requests) == alike + 2 * (200 - alike)  # a second reply only where it is needed


def test_short_replies_are_counted(server: Server) -> None:
    engine = SimulatedEngine(server.url, "sim-3b")
    server.answer = in_turn(reply_of("one"), reply_of(*FIVE))
    (result,) = search(engine, REQUEST)
    assert result.short_replies == 1
    server.answer = in_turn(reply_of("one"))
    (result,) = search(engine, REQUEST)
    assert result.short_replies == 2
    server.answer = in_turn(completion(""))
    with pytest.raises(SearchError):
        search(engine, REQUEST)
    assert engine.counts == SimulatorCounts(replies=6, well_formed_replies=1, short_replies=5, failed_searches=1)


def test_an_adapter_is_asked_before_its_base(server: Server) -> None:
    listed = [{"id": "base", "parent": None}, {"id": "tuned", "parent": "base"}]
    server.models = (200, json.dumps({"data": listed}))
    engine = SimulatedEngine(server.url)
    engine.check()
    assert engine.model == "tuned"


def requests_of(count: int, first: int = 0) -> list[SearchRequest]:
    return [SearchRequest(f"query {row}", "Q?", ("a",), key=(row,)) for row in range(first, first + count)]


def test_several_servers_share_the_searches_and_one_that_dies_fails_none(server: Server) -> None:
    with serving() as dying:
        engine = SimulatedEngine(f"{server.url}, {dying.url}/", "sim-3b", max_concurrency=8)
        search(engine, *requests_of(40))
        assert (len(server.requests), len(dying.requests)) == (20, 20)
        dying.answer = in_turn((500, "out of memory"))
        results = search(engine, *requests_of(40, first=100))
        assert [result.documents for result in results] == [FIVE] * 40
        assert sum(result.retries for result in results) == 20 == engine.account.retries


def test_all_servers_down_is_a_search_error_after_bounded_retries(server: Server) -> None:
    with serving() as other:
        for one in (server, other):
            one.answer = in_turn((500, "out of memory"))
        engine = SimulatedEngine([server.url, other.url], "sim-3b", max_retries=3)
        message = (
            f"the simulator at {server.url}/chat/completions, {other.url}/chat/completions failed, attempt 4 of 4"
        )
        with pytest.raises(SearchError, match=f"{message}: .*out of memory.*serve_simulator"):
            search(engine, REQUEST)
        assert (len(server.requests), len(other.requests)) == (2, 2)


def test_check_asks_every_server(server: Server) -> None:
    with pytest.raises(UserError, match=r"no simulator answers at http://127\.0\.0\.1:9/v1 "):
        SimulatedEngine(f"{server.url},http://127.0.0.1:9/v1").check()
    with serving() as other:
        other.models = (200, json.dumps({"data": [{"id": "another"}]}))
        with pytest.raises(UserError, match=f"the server at {other.url} has no model 'sim-3b', but: another"):
            SimulatedEngine([server.url, other.url]).check()


THOUGHT = "They want noise. The answer is Jane Austen.\nDoc 1: no\nDoc 2: no"
WRITTEN = "\n".join(f"Doc {number}: {text}" for number, text in enumerate(FIVE, start=1))


@pytest.mark.parametrize("reply", [f"<think>{THOUGHT}</think>\n\n{WRITTEN}", f"{THOUGHT}\n</think>\n{WRITTEN}"])
def test_a_thought_is_not_a_document(server: Server, reply: str) -> None:
    server.answer = in_turn(completion(reply))
    engine = SimulatedEngine(server.url, "sim-3b")
    assert search(engine, REQUEST)[0].documents == FIVE
    assert engine.counts.well_formed_replies == 1


def test_a_thought_cut_off_holds_no_documents_and_is_asked_for_again(server: Server) -> None:
    server.answer = in_turn(completion(f"<think>\n{THOUGHT}"), reply_of(*FIVE))
    (result,) = search(SimulatedEngine(server.url, "sim-3b"), REQUEST)
    assert (result.documents, result.short_replies) == (FIVE, 1)
    server.answer = in_turn(completion(f"<think>\n{THOUGHT}"))
    with pytest.raises(SearchError, match="wrote no documents"):
        search(SimulatedEngine(server.url, "sim-3b"), REQUEST)


def test_content_in_parts_is_read(server: Server) -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}, {"type": "text", "text": WRITTEN}]
    server.answer = in_turn((200, json.dumps({"choices": [{"message": {"content": parts}}]})))
    assert search(SimulatedEngine(server.url, "sim-3b"), REQUEST)[0].documents == FIVE


def test_half_a_character_is_replaced(server: Server) -> None:
    server.answer = in_turn(reply_of("caf\ud83d", "nul \x00", *FIVE[2:]))
    (result,) = search(SimulatedEngine(server.url, "sim-3b"), REQUEST)
    assert result.documents == ("caf\ufffd", "nul \ufffd", *FIVE[2:])


def test_a_password_in_the_address_is_in_no_message(server: Server) -> None:
    url = server.url.replace("http://", "http://user:p4ss@")
    server.answer = in_turn(completion(""))
    with pytest.raises(SearchError, match="wrote no documents") as nothing:
        search(SimulatedEngine(url, "sim-3b"), REQUEST)
    with pytest.raises(UserError, match="has no model") as wrong:
        SimulatedEngine(url, "sim-7b").check()
    absent = SimulatedEngine("http://user:p4ss@127.0.0.1:9/v1", "sim-3b", max_retries=0)
    with pytest.raises(SearchError, match=r"\*\*\*@127\.0\.0\.1:9") as failed:
        search(absent, REQUEST)
    with pytest.raises(UserError, match=r"no simulator answers at http://\*\*\*@") as nobody:
        absent.check()
    shown = [str(error.value) for error in (nothing, wrong, failed, nobody)]
    assert "p4ss" not in f"{shown} {absent.identity()}"


def test_the_users_hub_token_and_offline_mode_stay_out_of_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    search(SimulatedEngine(server.url, "sim-3b"), REQUEST)
    assert not any("secret" in value for headers in server.headers for value in headers.values())
