"""recipes/chat.py as a user meets it: what it writes while a model thinks, searches and reads."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from recipe_modules import Refusal, load_recipe

if TYPE_CHECKING:
    from chat_server import ChatServer, Messages

TURNS = ["<think> Look it up. </think>\n<search> Emma author </search>", "Hm.", "<answer> Jane Austen </answer>"]


@pytest.fixture
def flags(chat_server: ChatServer, corpus: Path) -> list[str]:
    """Return flags that work, with a scripted model behind an endpoint and real passages."""

    def write(messages: Messages) -> str:
        return TURNS[len(messages) // 2]

    chat_server.write = write
    endpoint = ["--model", "scripted", "--generator", "endpoint", "--endpoint_url", chat_server.url]
    return [*endpoint, "--corpus", str(corpus)]


def test_one_question_is_answered_in_view(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    load_recipe("chat").main([*flags, "--question", "Who wrote Emma?"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "<think> Look it up. </think>",
        "<search> Emma author </search>",
        "  searching with bm25 ...",
        "  Doc 1: Emma is a novel by Jane Austen, published in 1815.",
        "Hm.",
        "  no action",
    ]
    assert lines[6:8] == ["<answer> Jane Austen </answer>", "  answer: Jane Austen"]
    assert lines[8].startswith("  1 search, 3 turns, ") and len(lines) == 9


def test_questions_are_answered_until_an_empty_line(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO("Who wrote Emma?\n And again? \n\nNever asked\n"))
    load_recipe("chat").main(flags)
    printed = capsys.readouterr().out
    assert printed.startswith("  scripted (policy) with bm25; an empty line ends\n")
    assert printed.count("  answer: Jane Austen\n") == 2


def test_a_failure_ends_one_question_and_not_the_chat(
    flags: list[str], chat_server: ChatServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_server.write = lambda messages: 401 if "bad" in messages[0]["content"] else "<answer> yes </answer>"
    monkeypatch.setattr("sys.stdin", StringIO("bad\ngood\n"))
    load_recipe("chat").main(flags)
    printed = capsys.readouterr().out
    assert "  error: the endpoint at " in printed and "HTTP status 401" in printed
    assert "  answer: yes\n" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--question", " "], "the question is empty"),
        (["--agent", "nobody"], "the agent 'nobody' is unknown; there are policy, direct"),
        (["--endpoint_url", "http://127.0.0.1:9/v1", "--endpoint_key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
    ],
)
def test_a_mistake_gets_one_sentence(refusal: Refusal, flags: list[str], change: list[str], message: str) -> None:
    assert message in refusal("chat", [*flags, *change])


def test_a_failure_of_the_only_question_is_an_error(
    refusal: Refusal, flags: list[str], chat_server: ChatServer
) -> None:
    chat_server.write = lambda messages: 401
    assert "HTTP status 401" in refusal("chat", [*flags, "--question", "Who wrote Emma?"])
