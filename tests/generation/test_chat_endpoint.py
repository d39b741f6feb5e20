"""The endpoint generator in the rollout, against a server that keeps stop strings to itself as real ones do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_rollouts import ScriptedEngine

from zerosearch.errors import UserError
from zerosearch.generation import GenerationError
from zerosearch.generation.chat_endpoint import (
    EndpointGenerator,
    EndpointOptions,
    PieceTokenizer,
    as_turn,
)
from zerosearch.http import ChatReply, run_in_background
from zerosearch.prompts import INVALID_ACTION_HINT
from zerosearch.rollout.loop import RolloutSettings, run_rollouts

if TYPE_CHECKING:
    from chat_server import ChatServer, Messages

MakeGenerator = Callable[..., EndpointGenerator]
SETTINGS = RolloutSettings(max_turns=2, temperature=0.0)


def library() -> ScriptedEngine:
    """Return an engine that finds one document about whatever it is asked."""
    return ScriptedEngine(lambda request: [f"All about {request.query}."])


def rows(count: int = 1) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {n}?", "question": f"Question {n}?", "golden_answers": ["yes"]} for n in range(count)
    ]


@pytest.fixture
def generator(chat_server: ChatServer) -> Iterator[MakeGenerator]:
    """Return what makes generators on the server, and close them all in the end."""
    made = []

    def make(model: str | None = None, **options: Any) -> EndpointGenerator:
        named = {f"endpoint_{name}": value for name, value in options.items()}
        made.append(EndpointGenerator(EndpointOptions(chat_server.url, **named), model))
        return made[-1]

    yield make
    for one in made:
        run_in_background(one.aclose(), 30)


@given(st.text() | st.just("Łódź?\n\n<search> 東京 🙂 </search>\t\x00\x00\ud800"))
def test_text_goes_to_pieces_and_back_without_loss(text: str) -> None:
    tokenizer = PieceTokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == text
    assert len(tokenizer("Who wrote Emma?")["input_ids"]) == 4  # "Who ", "wrot", "e Em", "ma?"


@pytest.mark.parametrize("tells_stop_string", [False, True])
def test_a_trajectory_is_a_conversation(
    chat_server: ChatServer, tells_stop_string: bool, generator: MakeGenerator
) -> None:
    turns = ["Hm.", "<think> a < b </think>\n<search> Łódź </search> and more", "<answer> yes </answer>."]

    def write(messages: Messages) -> str:
        return turns[len(messages) // 2]

    chat_server.write, chat_server.tells_stop_string = write, tells_stop_string
    (trajectory,) = run_rollouts(rows(), generator(), library(), SETTINGS)
    assert (trajectory.answer, trajectory.outcome, trajectory.searches) == ("yes", "answered", 1)
    searched = "<think> a < b </think>\n<search> Łódź </search>"
    assert [turn.text for turn in trajectory.turns] == ["Hm.", searched, "<answer> yes </answer>"]
    assert chat_server.requests[-1]["messages"] == [
        {"role": "user", "content": "Question 0?"},
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": INVALID_ACTION_HINT},
        {"role": "assistant", "content": searched},
        {"role": "user", "content": "\n\n<information>Doc 1: All about Łódź.</information>\n\n"},
    ]
    ids = zip(trajectory.logprobs, trajectory.env_mask, strict=True)
    assert all(math.isnan(logprob) for logprob, is_policy in ids if is_policy)
    request = chat_server.requests[0]
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("scripted", 500, 0.0)
    assert request["stop"] == ["</search>", "</answer>"] and "seed" not in request


def test_conversations_of_many_trajectories_do_not_mix(chat_server: ChatServer, generator: MakeGenerator) -> None:
    def write(messages: Messages) -> str:
        subject = messages[0]["content"].split()[1]
        assert all(subject.strip("?") in message["content"] for message in messages)
        return f"<answer> {subject} </answer>" if len(messages) > 2 else f"<search> {subject} </search>"

    chat_server.write = write
    trajectories = run_rollouts(rows(40), generator(), library(), SETTINGS)
    assert [trajectory.answer for trajectory in trajectories] == [f"{n}?" for n in range(40)]


def test_a_turn_cut_by_its_limit_is_a_turn(chat_server: ChatServer, generator: MakeGenerator) -> None:
    chat_server.write = lambda messages: "<answer> yes </answer>" if len(messages) > 1 else "word " * 30
    settings = RolloutSettings(max_turns=2, max_turn_tokens=20, temperature=0.0)
    (trajectory,) = run_rollouts(rows(), generator(), library(), settings)
    assert [turn.kind for turn in trajectory.turns] == ["invalid", "answer"]


def test_usage_and_cost_are_the_servers_own_or_an_estimate(chat_server: ChatServer, generator: MakeGenerator) -> None:
    policy = generator(usd_read=1e6, usd_written=2e6)  # a dollar a token, and two
    run_rollouts(rows(), policy, library(), SETTINGS)  # reads "Question 0?", writes "<answer> yes"
    assert (policy.usage.replies, policy.usage.tokens_read, policy.usage.tokens_written) == (1, 2, 2)
    assert policy.cost_usd == 2 * 1 + 2 * 2
    assert policy.usage_of([0]) == policy.usage and policy.usage_of([1]).replies == 0
    chat_server.tells_usage = False
    run_rollouts(rows(), policy, library(), SETTINGS)
    assert (policy.usage.replies, policy.usage.estimated) == (2, 1)
    assert (policy.usage.tokens_read, policy.usage.tokens_written) == (2 + 3, 2 + 6)  # pieces of four characters
    assert policy.usage_of([0]).replies == 1  # of the rollout under way


def test_the_body_can_be_changed_for_servers_that_refuse_a_field(
    chat_server: ChatServer, generator: MakeGenerator
) -> None:
    sampled = RolloutSettings(temperature=0.7, top_p=0.9)
    run_rollouts(rows(), generator(model="m", body='{"stop": null, "user": "u"}'), library(), sampled)
    request = chat_server.requests[0]
    assert (request["model"], request["temperature"], request["top_p"], request["user"]) == ("m", 0.7, 0.9, "u")
    assert "stop" not in request and request["seed"] < 2**31


def test_the_key_is_sent_and_never_shown(
    chat_server: ChatServer, generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-key")
    chat_server.write = lambda messages: 401
    with pytest.raises(
        GenerationError, match=r"HTTP status 401.*check its address, model and key, and resume"
    ) as caught:
        run_rollouts(rows(), generator(model="m", key_env="SOME_KEY"), library(), SETTINGS)
    assert chat_server.keys == ["Bearer secret-key"]
    assert "secret-key" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EndpointOptions(), "--endpoint_url"),
        (EndpointOptions("http://x/v1", endpoint_key_env="NO_SUCH_KEY"), "variable NO_SUCH_KEY is not set"),
        (EndpointOptions("http://x/v1", endpoint_body="{"), "endpoint_body is not JSON"),
        (EndpointOptions("http://x/v1", endpoint_body="[1]"), "must be a JSON object"),
        (EndpointOptions("http://x/v1", endpoint_usd_read=-1), "endpoint_usd_read is -1: it must be at least 0"),
        (EndpointOptions("http://x/v1", endpoint_concurrency=0), "endpoint_concurrency is 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options: EndpointOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EndpointGenerator(options, "m")


@pytest.mark.parametrize(
    ("text", "finish_reason", "stop_string", "turn", "finish"),
    [
        ("<search> q ", "stop", None, "<search> q </search>", "stop"),
        ("<search> q", "stop", "</search>", "<search> q</search>", "stop"),
        ("<think> I could <answer> or </think> <search> q ", "stop", None, None, "stop"),
        ("x </search> y </answer>", "stop", None, "x </search>", "stop"),  # it did not stop: what follows is no turn
        ("<search> q", "length", None, "<search> q", "length"),
        ("I know.", "stop", None, "I know.", "eos"),
        ("", "content_filter", None, "", "eos"),
        ("<search> q", None, None, "<search> q", "eos"),
    ],
)
def test_a_reply_becomes_a_turn(
    text: str, finish_reason: str | None, stop_string: str | None, turn: str | None, finish: str
) -> None:
    expected = f"{text}</search>" if turn is None else turn
    assert as_turn(ChatReply(text, finish_reason, stop_string)) == (expected, finish)


def test_a_reply_of_nothing_but_open_thoughts_takes_linear_time() -> None:
    start = time.perf_counter()
    assert as_turn(ChatReply("<think>" * 40_000, "stop")) == ("<think>" * 40_000, "eos")
    assert time.perf_counter() - start < 1.0


def test_a_key_is_stripped_and_a_password_in_the_address_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "k\n")
    policy = EndpointGenerator(EndpointOptions("http://user:p4ss@x/v1", "SOME_KEY"), "m")
    assert policy.client.headers == {"Authorization": "Bearer k"} and policy.name == "the endpoint http://***@x/v1"
    monkeypatch.setenv("SOME_KEY", "one\ntwo")
    with pytest.raises(UserError, match="the key of SOME_KEY holds a space, a line break or another"):
        EndpointGenerator(EndpointOptions("http://x/v1", "SOME_KEY"), "m")
