"""What the terminal shows of a trajectory: colours by tag, text as it is decoded, documents; nothing that it obeys."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
from scripted import Library, Writer

from zerosearch.engines import SearchRequest, SearchResult
from zerosearch.generation import SampledTurn, TurnRequest
from zerosearch.prompts import PAPER
from zerosearch.rollout.live import Chat, Screen
from zerosearch.rollout.loop import RolloutSettings

TURNS = ["<think> Look it up. </think>\n<search> Emma author </search>", "Hm.", "<answer> Jane Austen </answer>"]
GREEDY = RolloutSettings(temperature=0.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(pieces: list[str], output: io.StringIO) -> str:
    screen = Screen(output)
    for piece in pieces:
        screen.write(piece)
    screen.end_turn()
    return output.getvalue()


def test_colours_follow_the_tags_however_the_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "<think> a < b </think> <search> Emma </search> x<y"
    dim, yellow, plain = "\033[2m", "\033[33m", "\033[0m"
    whole = written([text], Terminal())
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

    assert visible(written(list(text), Terminal())) == visible(whole)
    monkeypatch.setenv("NO_COLOR", "1")
    assert written(list(text), Terminal()) == f"{text}\n"


def test_a_file_gets_no_colours() -> None:
    assert written(["<think> x </think>"], io.StringIO()) == "<think> x </think>\n"


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


def test_text_appears_as_it_is_decoded(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def write(context: str) -> str:
        return TURNS[-1] if "<information>Doc" in context else TURNS[0]

    generator = TokenByToken(write)
    one = Chat(generator, Library(), PAPER.agents["policy"], GREEDY, "unknown", sys.stdout)
    show = one.generator.show

    def watched(text: str) -> None:
        seen.append(text)
        show(text)

    one.generator.show = watched
    one.ask("Who wrote Emma?")
    assert "".join(seen) == TURNS[0] + TURNS[-1] and max(map(len, seen)) == 4  # a piece at a time
    printed = capsys.readouterr().out
    assert printed.count(TURNS[0]) == 1 and "  Doc 1: Emma: Found for Emma author\n" in printed


def test_documents_put_first_and_notes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def ask(agent: str, write: Callable[[str], str]) -> str:
        chat = Chat(Writer(write), Library(), PAPER.agents[agent], GREEDY, "unknown", sys.stdout)
        chat.ask("Who wrote Emma?")
        return capsys.readouterr().out

    printed = ask("rag", lambda context: "<answer> Jane Austen </answer>")
    assert printed.startswith("  Doc 1: Emma: Found for Who wrote Emma?\n  Doc 2: Rain: It rains.\n<answer>")

    assert "searching" not in ask("rag", lambda context: TURNS[0]), "it may only answer"

    def read_and_answer(context: str) -> str:
        if context.endswith("What helps:\n"):
            return "It is by Jane Austen."
        return TURNS[-1] if "It is by" in context else TURNS[0]

    assert "  read: <information>It is by Jane Austen.</information>\n" in ask("search-o1", read_and_answer)
    assert "  no answer: all turns are used up\n" in ask("direct", lambda context: "I do not know.")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_are_shown_and_not_sent(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    attack = "\x1b]0;OWNED\x07\x1b[2J\x1b[H \x1b]52;c;cm0=\x07 \u202egnp.exe \x9b31m \x00 end"

    class Hostile(Library):
        async def search(self, request: SearchRequest) -> SearchResult:
            return SearchResult((f"Emma {attack}",))

    def write(context: str) -> str:
        return (
            f"{attack} <answer> {attack} </answer>"
            if "<information>Doc" in context
            else f"<search> {attack} </search>"
        )

    output = Terminal() if is_terminal else io.StringIO()
    Chat(Writer(write), Hostile(), PAPER.agents["policy"], GREEDY, "unknown", output).ask(f"Who {attack}?")
    written = output.getvalue()
    for code in ("\033[2m", "\033[33m", "\033[1;32m", "\033[36m", "\033[0m"):  # our own colours
        written = written.replace(code, "")
    assert not set(written) & set("\x1b\x07\x9b\x00\u202e")
    assert written.count(r"\x1b]0;OWNED\x07\x1b[2J\x1b[H") >= 4  # query, documents, text, answer
