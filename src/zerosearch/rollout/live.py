"""Show a trajectory in the terminal while it happens: text as it is decoded, searches, documents, the answer."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from typing import Any, TextIO

from zerosearch.engines import SearchEngine
from zerosearch.generation import SampledTurn, TurnRequest
from zerosearch.generation.tokenization import decoded_text
from zerosearch.prompts import Agent
from zerosearch.rollout.loop import Event, RolloutSettings, run_rollouts
from zerosearch.rollout.trajectory import Trajectory
from zerosearch.text import clean_text, printable

# Terminal colours, by what is being written.
COLORS = {"think": "\033[2m", "search": "\033[33m", "answer": "\033[1;32m", "documents": "\033[36m", "note": "\033[2m"}
PLAIN = "\033[0m"
TAG = re.compile(r"</?(think|search|answer)>")
LONGEST_TAG = len("</answer>")


class Screen:
    """Write text as it comes, coloured by the tag around it if the output is a terminal.

    Control characters in it are shown, not sent.
    """

    def __init__(self, output: TextIO) -> None:
        self.output = output
        self.has_colors = output.isatty() and "NO_COLOR" not in os.environ
        self.width = shutil.get_terminal_size().columns if output.isatty() else 10_000
        self.pending = ""  # the start of what may become a tag
        self.inside: str | None = None

    def write(self, text: str) -> None:
        """Write a piece of the policy's text; a tag may be split between pieces."""
        text = self.pending + text
        place = 0
        for tag in TAG.finditer(text):
            self._print(text[place : tag.start()], self.inside)
            self._print(tag.group(), "note")
            self.inside = None if tag.group().startswith("</") else tag.group(1)
            place = tag.end()
        rest = text[place:]
        start = rest.rfind("<")
        held = start >= 0 and len(rest) - start < LONGEST_TAG and ">" not in rest[start:]
        self.pending = rest[start:] if held else ""
        self._print(rest[:start] if held else rest, self.inside)

    def end_turn(self) -> None:
        """Write what was held back, and go to a new line."""
        self._print(self.pending, self.inside)
        self.pending, self.inside = "", None
        self._print("\n", None)

    def line(self, text: str, color: str | None = None) -> None:
        """Write a line of our own, no longer than the terminal is wide."""
        text = printable(" ".join(text.split()))
        shown = text if len(text) <= self.width - 2 else f"{text[: self.width - 5]}..."
        self._print(f"  {shown}"[: self.width] + "\n", color)

    def _print(self, text: str, color: str | None) -> None:
        if text:
            code = COLORS.get(color or "", "") if self.has_colors else ""
            self.output.write(f"{code}{printable(text)}{PLAIN}" if code else printable(text))
            self.output.flush()


class LiveGenerator:
    """Show the text of the only trajectory while a generator in this process decodes it; else be that generator."""

    def __init__(self, generator: Any, show: Callable[[str], None]) -> None:
        self.generator, self.show = generator, show
        self.shown = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def submit(self, request: TurnRequest) -> None:
        self.shown = ""
        self.generator.submit(request)

    def step(self) -> list[SampledTurn]:
        finished = self.generator.step()
        under_way = [(turn.request.trajectory, turn.token_ids) for turn in getattr(self.generator, "active", ())]
        written = dict([*under_way, *((turn.trajectory, turn.token_ids) for turn in finished)])
        if 0 in written:  # a turn of the trajectory, and not notes on documents
            text = decoded_text(self.tokenizer, written[0])
            if text.startswith(self.shown) and (finished or not text.endswith("\ufffd")):  # half of a character
                self.show(text[len(self.shown) :])
                self.shown = text
        return finished


class Chat:
    """Answer one question after another, in view."""

    def __init__(
        self,
        generator: Any,
        engine: SearchEngine,
        agent: Agent,
        settings: RolloutSettings,
        answer: str,
        output: TextIO,
    ) -> None:
        self.screen = Screen(output)
        self.is_live = not hasattr(generator, "sample")
        self.generator = LiveGenerator(generator, self.screen.write) if self.is_live else generator
        self.engine, self.agent, self.settings, self.answer = engine, agent, settings, answer
        self.max_turns = agent.turns(settings.max_turns)

    def ask(self, question: str) -> None:
        """Roll out one question, and write what happens as it happens. Raises `SearchError` or `GenerationError`."""
        row = {"question": clean_text(question), "golden_answers": [self.answer]}
        started = time.perf_counter()
        (trajectory,) = run_rollouts(
            [row], self.generator, self.engine, self.settings, agent=self.agent, watch=self._watch
        )
        seconds = time.perf_counter() - started
        self.screen.line(
            f"{_count(trajectory.searches, 'search', 'searches')}, {_count(len(trajectory.turns), 'turn', 'turns')}, "
            f"{trajectory.policy_tokens} tokens, {seconds:.1f} s",
            "note",
        )

    def _watch(self, index: int, trajectory: Trajectory, event: Event) -> None:
        turn = trajectory.turns[-1] if trajectory.turns else trajectory.lookup
        if event == "turn" and turn is not None:
            if not self.is_live:
                self.screen.write(turn.text)
            self.screen.end_turn()
            if turn.kind == "search" and self.agent.gets_documents and len(trajectory.turns) <= self.max_turns:
                self.screen.line(f"searching with {self.engine.name} ...", "note")
        elif event == "observation" and turn is not None:
            if turn.was_read:
                self.screen.line(f"read: {turn.observation}", "documents")
            else:
                self._documents(turn.documents) if turn.kind == "search" else self.screen.line("no action", "note")
        elif event == "end" and trajectory.outcome == "answered":
            self.screen.line(f"answer: {trajectory.answer}", "answer")
        elif event == "end":
            self.screen.line(f"no answer: {trajectory.error or OUTCOMES[trajectory.outcome or 'truncated']}", "note")

    def _documents(self, documents: tuple[str, ...]) -> None:
        for number, document in enumerate(documents, start=1):
            self.screen.line(f"Doc {number}: {document}", "documents")
        if not documents:
            self.screen.line("no documents", "note")


OUTCOMES = {
    "turns_exhausted": "all turns are used up",
    "truncated": "the context is full",
    "failed_search": "a search failed",
}


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
