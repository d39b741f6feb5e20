"""The simulated engine against a real HTTP server that answers as told: well, badly, or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from chat_server import ChatServer
from http_servers import in_turn
from searching import searched

from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.simulated import SimulatedEngine, SimulatorCounts
from zerosearch.errors import UserError
from zerosearch.prompts import simulator_messages

FIVE = ("one", "two", "three", "four", "five")
REQUEST = SearchRequest("Emma author", "Who wrote Emma?", ("Jane Austen", "Austen"), key=(0, 1, 2, 3, 4))

Reply = tuple[int, Any]


def reply_of(*documents: str) -> Reply:
    return completion("\n".join(f"Doc {number}: {text}" for number, text in enumerate(documents, start=1)))


def completion(content: Any) -> Reply:
    return 200, {"choices": [{"message": {"role": "assistant", "content": content}}]}


@pytest.fixture
def server(chat_server: ChatServer) -> ChatServer:
    chat_server.answer = in_turn(reply_of(*FIVE))
    return chat_server


def prompt_of(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"]


def requests_of(count: int, first: int = 0, p_noise: float = 0.0) -> list[SearchRequest]:
    rows = range(first, first + count)
    return [SearchRequest(f"query {row}", "Q?", ("a",), p_noise=p_noise, key=(0, 1, row, 0, 0)) for row in rows]


def test_a_search_asks_in_the_papers_words_and_returns_the_documents(server: ChatServer) -> None:
    (result,) = searched(SimulatedEngine(server.url, model="sim-3b"), REQUEST)
    assert result == SearchResult(FIVE, noisy=False, retries=0)
    (request,) = server.requests
    seed = request.pop("seed")
    assert isinstance(seed, int) and 0 <= seed < 2**31
    messages = simulator_messages(
        question="Who wrote Emma?", golden_answers=["Jane Austen"], query="Emma author", noisy=False
    )
    assert request == {"model": "sim-3b", "messages": messages, "temperature": 0.8, "max_tokens": 600}


def test_the_coin_is_keyed_and_the_prompt_says_how_it_fell(server: ChatServer) -> None:
    requests = requests_of(100, p_noise=0.3)
    noisy = [bool(result.noisy) for result in searched(SimulatedEngine(server.url, "sim-3b"), *requests)]
    assert 0.2 < sum(noisy) / 100 < 0.4
    lines = [(text.split("\n"), "noisy" in text) for text in map(prompt_of, server.requests)]
    assert {text[-3]: fell for text, fell in lines} == {f"Query: query {row}": fell for row, fell in enumerate(noisy)}
    again = searched(SimulatedEngine(server.url, "sim-3b"), *reversed(requests))
    assert [bool(result.noisy) for result in reversed(again)] == noisy


def test_certain_noise_needs_no_coin(server: ChatServer) -> None:
    never, always = (SearchRequest("q", "Q?", ("a",), p_noise=p_noise) for p_noise in (0.0, 1.0))
    results = searched(SimulatedEngine(server.url, "sim-3b"), never, always)
    assert [result.noisy for result in results] == [False, True]
    assert all("seed" not in request for request in server.requests)  # no key: nothing to derive it from


def test_the_seed_is_the_keys(server: ChatServer) -> None:
    for request in (REQUEST, replace(REQUEST, key=(0, 1, 2, 3, 5)), REQUEST):
        searched(SimulatedEngine(server.url, "sim-3b"), request)
    first, second, third = (request["seed"] for request in server.requests)
    assert first == third != second


def test_a_call_that_fails_is_repeated_counted_and_at_last_an_error_that_names_the_remedy(server: ChatServer) -> None:
    server.answer = in_turn((500, "Doc 1: Internal Server Error"))
    engine = SimulatedEngine(server.url, "sim-3b", max_retries=2)
    message = f"{server.url}/chat/completions failed, attempt 3 of 3: HTTP status 500.*--model sim-3b"
    with pytest.raises(SearchError, match=message):
        searched(engine, REQUEST)
    assert (engine.account.sent, engine.account.retries, engine.account.failures) == (3, 2, 1)
    assert len({request["seed"] for request in server.requests}) == 1, "the same question, asked again"


@pytest.mark.parametrize(
    "refusal",
    [
        "System role not supported",  # Gemma
        "After the optional system message, conversation roles must alternate user/assistant/user",  # Mistral
        "Only user and assistant roles are supported!",
    ],
)
def test_a_template_that_refuses_the_system_message_is_asked_without_it(server: ChatServer, refusal: str) -> None:
    def answer(place: int) -> Reply:
        refused = server.requests[place]["messages"][0]["role"] == "system"
        return (400, {"error": {"message": refusal}}) if refused else reply_of(*FIVE)

    server.answer = answer
    engine = SimulatedEngine(server.url, "sim-3b", max_concurrency=1)
    results = searched(engine, *requests_of(1), *requests_of(3, first=10))
    assert [result.documents for result in results] == [FIVE] * 4
    assert [len(request["messages"]) for request in server.requests[-3:]] == [1, 1, 1], "it is remembered"
    server.answer = in_turn((400, {"error": {"message": refusal}}))
    server.requests.clear()
    with pytest.raises(SearchError, match="HTTP status 400"):
        searched(SimulatedEngine(server.url, "sim-3b"), REQUEST)
    assert [len(request["messages"]) for request in server.requests] == [2, 1], "asked again once"


LEAK = ("one", "Emma is by JANE Austen.", "three", "four", "five")


@pytest.mark.parametrize(
    ("replies", "used", "asked", "short"),
    [
        pytest.param([("one", "two"), ("one", "two", "three")], ("one", "two", "three"), 2, 2, id="the fuller one"),
        pytest.param([("one", "two"), ()], ("one", "two"), 2, 2, id="the first if it is fuller"),
        pytest.param([("one",), FIVE], FIVE, 2, 1, id="full at last"),
        pytest.param([LEAK, FIVE], FIVE, 2, 0, id="the one that does not leak"),
        pytest.param([LEAK, LEAK], LEAK, 2, 0, id="asked twice at most"),
        pytest.param([FIVE], FIVE, 1, 0, id="nothing to ask again for"),
        pytest.param([LEAK, ("one", "two")], ("one", "two"), 2, 1, id="clean before full"),
        pytest.param([LEAK, ()], LEAK, 2, 1, id="no documents are none"),
        pytest.param([("one",), LEAK], ("one",), 2, 1, id="a full one that leaks is not better"),
    ],
)
def test_a_short_or_leaking_reply_is_asked_for_once_more(
    server: ChatServer, replies: list[tuple[str, ...]], used: tuple[str, ...], asked: int, short: int
) -> None:
    server.answer = in_turn(*(reply_of(*documents) for documents in replies))
    engine = SimulatedEngine(server.url, "sim-3b", ask_leaks_again=True)
    (result,) = searched(engine, replace(REQUEST, p_noise=1.0))
    assert result == SearchResult(used, noisy=True, retries=asked - 1, short_replies=short)
    assert len({request["seed"] for request in server.requests}) == asked  # one seed would give the same reply
    assert engine.counts == SimulatorCounts(asked, asked - short, short)


@pytest.mark.parametrize(("p_noise", "ask_leaks_again"), [(0.0, True), (1.0, False)])
def test_useful_replies_may_answer_and_so_may_noisy_ones_by_default(
    server: ChatServer, p_noise: float, ask_leaks_again: bool
) -> None:
    server.answer = in_turn(reply_of(*LEAK))
    engine = SimulatedEngine(server.url, "sim-3b", ask_leaks_again=ask_leaks_again)
    (result,) = searched(engine, replace(REQUEST, p_noise=p_noise))
    assert result.retries == 0


@pytest.mark.parametrize("content", ["", None, "Doc 1:\nDoc 2:", " \n "])
def test_no_documents_twice_is_a_search_error(server: ChatServer, content: str | None) -> None:
    server.answer = in_turn(completion(content))
    engine = SimulatedEngine(server.url, "sim-3b")
    with pytest.raises(SearchError, match="wrote no documents for the query 'Emma author', asked twice"):
        searched(engine, REQUEST)
    assert len(server.requests) == 2 and engine.account.failures == 1


THOUGHT = "They want noise. The answer is Jane Austen.\nDoc 1: no\nDoc 2: no"
WRITTEN = "\n".join(f"Doc {number}: {text}" for number, text in enumerate(FIVE, start=1))
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}, {"type": "text", "text": WRITTEN}]


@pytest.mark.parametrize(
    "content", [f"<think>{THOUGHT}</think>\n\n{WRITTEN}", f"{THOUGHT}\n</think>\n{WRITTEN}", PARTS]
)
def test_a_thought_is_not_a_document(server: ChatServer, content: Any) -> None:
    server.answer = in_turn(completion(content))
    engine = SimulatedEngine(server.url, "sim-3b")
    assert searched(engine, REQUEST)[0].documents == FIVE
    assert engine.counts.well_formed_replies == 1


def test_check_takes_the_first_model_and_refuses_one_that_is_not_served(server: ChatServer) -> None:
    server.models = (200, {"data": [{"id": "sim-3b"}, {"id": "other"}]})
    engine = SimulatedEngine(server.url)
    engine.check()
    assert engine.model == "sim-3b"
    with pytest.raises(UserError, match="has no model 'sim-7b', but: sim-3b, other"):
        SimulatedEngine(server.url, model="sim-7b").check()
    unchecked = SimulatedEngine(server.url)
    searched(unchecked, REQUEST)
    assert server.requests[0]["model"] == unchecked.identity()["model"] == "sim-3b"


@pytest.mark.parametrize(
    ("info", "end"),
    [
        pytest.param((200, {"added_tokens_decoder": {"7": "<|im_end|>", "8": " "}}), "< |im_end|>", id="named"),
        pytest.param((404, {"detail": "Not Found"}), "<|im_end|>", id="another kind of server"),
        pytest.param((200, {"added_tokens_decoder": {"7": 8}}), "<|im_end|>", id="another form"),
    ],
)
def test_added_tokens_that_a_server_names_are_plain_text(server: ChatServer, info: Reply, end: str) -> None:
    server.tokenizer_info = info
    engine = SimulatedEngine(server.url)
    engine.check()
    searched(engine, SearchRequest("Emma<|im_end|>", "Who wrote <|im_end|> Emma?", ("Jane<|im_end|>",)))
    prompt = prompt_of(server.requests[0])
    assert f"Query: Emma{end}\n" in prompt and f'"Who wrote {end} Emma?" whose answer is Jane{end}.' in prompt
    assert prompt.count("im_end|>") == 3


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://127.0.0.1:9/v1", 9),
        ("http://no-such-host.invalid:9/v1", 9),
        ("localhost:6001", 6001),
        ("http://localhost:port/v1", 6001),
        ("not an address", 6001),
    ],
)
def test_check_names_the_command_that_starts_a_simulator(url: str, port: int) -> None:
    with pytest.raises(UserError) as caught:
        SimulatedEngine(url).check()
    assert str(caught.value).startswith(f"no simulator answers at {url} ")
    assert str(caught.value).endswith(
        f"start one with: python recipes/serve_simulator.py --model SIMULATOR --port {port}"
    )


def test_several_servers_share_the_searches_and_one_that_dies_fails_none(server: ChatServer) -> None:
    with ChatServer().running() as dying:
        dying.answer = in_turn(reply_of(*FIVE))
        engine = SimulatedEngine(f"{server.url}, {dying.url}/v1/", "sim-3b", max_concurrency=8)
        searched(engine, *requests_of(40))
        assert (len(server.requests), len(dying.requests)) == (20, 20)
        dying.answer = in_turn((500, "out of memory"))
        results = searched(engine, *requests_of(40, first=100))
        assert [result.documents for result in results] == [FIVE] * 40
        assert sum(result.retries for result in results) == 20 == engine.account.retries


def test_check_asks_every_server(server: ChatServer) -> None:
    with pytest.raises(UserError, match=r"no simulator answers at http://127\.0\.0\.1:9/v1 "):
        SimulatedEngine(f"{server.url},http://127.0.0.1:9/v1").check()
    with ChatServer().running() as other:
        other.models = (200, {"data": [{"id": "another"}]})
        with pytest.raises(UserError, match=f"the server at {other.url}/v1 has no model 'scripted', but: another"):
            SimulatedEngine([server.url, f"{other.url}/v1"]).check()


def test_a_password_in_the_address_is_in_no_message(server: ChatServer) -> None:
    url = server.url.replace("http://", "http://user:p4ss@")
    server.answer = in_turn(completion(""))
    with pytest.raises(SearchError, match="wrote no documents") as nothing:
        searched(SimulatedEngine(url, "sim-3b"), REQUEST)
    with pytest.raises(UserError, match="has no model") as wrong:
        SimulatedEngine(url, "sim-7b").check()
    absent = SimulatedEngine("http://user:p4ss@127.0.0.1:9/v1", "sim-3b", max_retries=0)
    with pytest.raises(SearchError, match=r"\*\*\*@127\.0\.0\.1:9") as failed:
        searched(absent, REQUEST)
    with pytest.raises(UserError, match=r"no simulator answers at http://\*\*\*@") as nobody:
        absent.check()
    shown = [str(error.value) for error in (nothing, wrong, failed, nobody)]
    assert "p4ss" not in f"{shown} {absent.identity()}"
