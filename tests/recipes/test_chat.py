"""recipes/chat.py as a user meets it: what it writes while a model thinks, searches and reads."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from scripted import Library, Writer

from zerosearch.generation import SampledTurn, TurnRequest
from zerosearch.prompts import PAPER

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
    chat: ModuleType, flags: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        chat.main([*flags, *change])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_failure_of_the_only_question_is_an_error(
    chat: ModuleType, flags: list[str], chat_server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_server.write = lambda messages: 401
    with pytest.raises(SystemExit) as caught:
        chat.main([*flags, "--question", "Who wrote Emma?"])
    assert caught.value.code == 2 and "HTTP status 401" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(chat: ModuleType, pieces: list[str], output: io.StringIO) -> str:
    screen = chat.Screen(output)
    for piece in pieces:
        screen.write(piece)
    screen.end_turn()
    return output.getvalue()


def test_colours_follow_the_tags_however_the_text_is_cut(chat: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "<think> a < b </think> <search> Emma </search> x<y"
    dim, yellow, plain = "\033[2m", "\033[33m", "\033[0m"
    whole = written(chat, [text], Terminal())
    assert whole == (
        f"{dim}<think>{plain}{dim} a < b {plain}{dim}</think>{plain} {dim}<search>{plain}{yellow} Emma {plain}"
        f"{dim}</search>{plain} x<y\n"
    )

    def visible(output: str) -> list[tuple[str, str]]:
        """Return each character with the colour it is written in."""
        characters, color = [], plain
        for part in output.replace("\033", "\0\033").split("\0"):
            code, text = (part[: part.index("m") + 1], part[part.index("m") + 1 :]) if "\033" in part else ("", part)
            color = code or color
            characters += [(character, color) for character in text]
        return characters

    assert visible(written(chat, list(text), Terminal())) == visible(whole)
    monkeypatch.setenv("NO_COLOR", "1")
    assert written(chat, list(text), Terminal()) == f"{text}\n"


def test_a_file_gets_no_colours(chat: ModuleType) -> None:
    assert written(chat, ["<think> x </think>"], io.StringIO()) == "<think> x </think>\n"


class TokenByToken(Writer):
    """Decodes one piece a step, in sight, as the transformers generator does."""

    active: list[Any]

    def submit(self, request: TurnRequest) -> None:
        super().submit(request)
        self.active = []

    def step(self) -> list[SampledTurn]:
        if not self.active:
            (self.turn,) = super().step()
            self.active = [type("Active", (), {"request": self.turn, "token_ids": []})]
        token_ids = self.active[0].token_ids
        token_ids.append(self.turn.token_ids[len(token_ids)])
        if len(token_ids) < len(self.turn.token_ids):
            return []
        self.active = []
        return [self.turn]


def test_text_appears_as_it_is_decoded(chat: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def write(context: str) -> str:
        return TURNS[-1] if "<information>Doc" in context else TURNS[0]

    generator = TokenByToken(write)
    one = chat.Chat(generator, Library(), PAPER.agents["policy"], chat.ChatSettings(), "unknown")
    show = one.generator.show

    def watched(text: str) -> None:
        seen.append(text)
        show(text)

    one.generator.show = watched
    one.ask("Who wrote Emma?")
    assert "".join(seen) == TURNS[0] + TURNS[-1] and max(map(len, seen)) == 4  # a piece at a time
    printed = capsys.readouterr().out
    assert printed.count(TURNS[0]) == 1 and "  Doc 1: Emma: Found for Emma author\n" in printed


def test_documents_put_first_and_notes_are_shown(chat: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(agent: str, write: Callable[[str], str]) -> str:
        chat.Chat(Writer(write), Library(), PAPER.agents[agent], chat.ChatSettings(), "unknown").ask("Who wrote Emma?")
        return capsys.readouterr().out

    printed = ask("rag", lambda context: "<answer> Jane Austen </answer>")
    assert printed.startswith("  Doc 1: Emma: Found for Who wrote Emma?\n  Doc 2: Rain: It rains.\n<answer>")

    def read_and_answer(context: str) -> str:
        if context.endswith("What helps:\n"):
            return "It is by Jane Austen."
        return TURNS[-1] if "It is by" in context else TURNS[0]

    assert "  read: <information>It is by Jane Austen.</information>\n" in ask("search-o1", read_and_answer)
    assert "  no answer: all turns are used up\n" in ask("direct", lambda context: "I do not know.")
