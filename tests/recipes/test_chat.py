"""recipes/chat.py as a user meets it: what it writes while a model thinks, searches and reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from chat_server import ChatServer, Messages

pytest_plugins = ("chat_server", "recipe_modules")  # fixtures

LoadRecipe = Callable[[str], ModuleType]
TURNS = ["<think> Look it up. </think>\n<search> Emma author </search>", "Hm.", "<answer> Jane Austen </answer>"]


@pytest.fixture
def chat(load_recipe: LoadRecipe) -> ModuleType:
    return load_recipe("chat")


@pytest.fixture
def flags(chat_server: ChatServer, corpus: Path) -> list[str]:
    """Return flags that work, with a scripted model behind an endpoint and real passages."""

    def write(messages: Messages) -> str:
        return TURNS[len(messages) // 2]

    chat_server.write = write
    endpoint = ["--model", "scripted", "--generator", "endpoint", "--endpoint_url", chat_server.url]
    return [*endpoint, "--corpus", str(corpus)]


def test_one_question_is_answered_in_view(
    chat: ModuleType, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    chat.main([*flags, "--question", "Who wrote Emma?"])
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
    chat: ModuleType, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: Iterator[str] = iter(["Who wrote Emma?", " And again? ", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    chat.main(flags)
    printed = capsys.readouterr().out
    assert printed.startswith("  scripted (policy) with bm25; an empty line ends\n")
    assert printed.count("  answer: Jane Austen\n") == 2


def test_a_failure_ends_one_question_and_not_the_chat(
    chat: ModuleType,
    flags: list[str],
    chat_server: ChatServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat_server.write = lambda messages: 401 if "bad" in messages[0]["content"] else "<answer> yes </answer>"
    typed = iter(["bad", "good"])

    def read(prompt: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    chat.main(flags)
    printed = capsys.readouterr().out
    assert "  error: the endpoint at " in printed and "HTTP status 401" in printed
    assert "  answer: yes\n" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--question", " "], "the question is empty"),
        (["--agent", "nobody"], "the agent 'nobody' is unknown; there are policy, direct"),
        (["--endpoint_url", "http://127.0.0.1:9/v1", "--endpoint_key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--max_turns", "-1"], "max_turns is -1"),
    ],
)
def test_a_mistake_gets_one_sentence(
    refusal: Callable[[str, list[str]], str], flags: list[str], change: list[str], message: str
) -> None:
    assert message in refusal("chat", [*flags, *change])


def test_a_failure_of_the_only_question_is_an_error(
    chat: ModuleType, flags: list[str], chat_server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_server.write = lambda messages: 401
    with pytest.raises(SystemExit) as caught:
        chat.main([*flags, "--question", "Who wrote Emma?"])
    assert caught.value.code == 2 and "HTTP status 401" in capsys.readouterr().err
