"""Ask a question in the terminal and watch the policy think, search and read; any model, any engine.

    python recipes/chat.py --model outputs/demo/policy --generator transformers --prompt tinyworld \
        --engine bm25 --corpus outputs/demo/data/corpus.jsonl --max_turns 4
    python recipes/chat.py --model gpt-4o-mini --generator endpoint --endpoint_url https://api.openai.com/v1 \
        --endpoint_key_env OPENAI_API_KEY --agent ra-agent --corpus wiki-18.jsonl --question "Who wrote Emma?"

Each question stands alone. Ctrl-C stops an answer, an empty line or Ctrl-D ends. Text appears as it is decoded where
the generator can tell (transformers), else turn by turn. A value comes from the defaults, then `--config FILE.yaml`,
then flags.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read when vLLM is imported; its start fills the screen


from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.options import EngineKind, EngineOptions, make_engine
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import NoEngine
from zerosearch.generation import GenerationError, SampledTurn, Sampling, TurnRequest
from zerosearch.generation.chat_endpoint import EndpointOptions, make_endpoint
from zerosearch.generation.loading import load_generator
from zerosearch.generation.tokenization import decoded_text
from zerosearch.prompts import PAPER, PROMPT_SETS, Agent, PromptSetName
from zerosearch.rollout.in_flight import close_engine
from zerosearch.rollout.loop import Event, RolloutSettings, run_rollouts
from zerosearch.rollout.trajectory import Trajectory

# Terminal colours, by what is being written.
COLORS = {"think": "\033[2m", "search": "\033[33m", "answer": "\033[1;32m", "documents": "\033[36m", "note": "\033[2m"}
PLAIN = "\033[0m"
TAG = re.compile(r"</?(think|search|answer)>")
LONGEST_TAG = len("</answer>")


@dataclass
class ChatArguments:
    """Whom to ask, and how."""

    model: str = field(metadata={"help": "Folder or Hub id of the policy; for an endpoint, the model's name there."})
    question: str | None = field(default=None, metadata={"help": "Ask this one question and end."})
    agent: str = field(default="policy", metadata={"help": f"How the model is used: {', '.join(PAPER.agents)}."})
    prompt: PromptSetName = field(default="paper", metadata={"help": "The prompt set: see zerosearch.prompts."})
    generator: Literal["vllm", "transformers", "endpoint"] = field(
        default="vllm", metadata={"help": "What runs the model; endpoint: any OpenAI-style server, --endpoint_url."}
    )
    answer: str = field(
        default="unknown", metadata={"help": "For simulated, which must be told the answer to write documents."}
    )

    def __post_init__(self) -> None:
        if self.question is not None and not self.question.strip():
            raise UserError("the question is empty")


@dataclass(frozen=True)
class ChatSettings(RolloutSettings):
    """The budgets of the rollout, and how it samples: the likeliest token always."""

    temperature: float = 0.0


@dataclass
class ChatEngine(EngineOptions):
    """The engine to search with: by default one that is real and costs nothing."""

    engine: EngineKind = field(default="bm25", metadata={"help": "The search engine."})


class Screen:
    """Writes text as it comes, coloured by the tag it stands in if the output is a terminal."""

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
        """Write a line of the recipe's own, no longer than the terminal is wide."""
        text = " ".join(text.split())
        shown = text if len(text) <= self.width - 2 else f"{text[: self.width - 5]}..."
        self._print(f"  {shown}"[: self.width] + "\n", color)

    def _print(self, text: str, color: str | None) -> None:
        if text:
            code = COLORS.get(color or "", "") if self.has_colors else ""
            print(f"{code}{text}{PLAIN}" if code else text, end="", file=self.output, flush=True)


class LiveGenerator:
    """A generator in this process that shows its only trajectory's turn while it is decoded, if it can be seen."""

    def __init__(self, generator: Any, show: Callable[[str], None]) -> None:
        self.generator, self.show = generator, show
        self.tokenizer, self.max_context_tokens = generator.tokenizer, generator.max_context_tokens
        self.shown = ""

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        with self.generator.session(sampling):
            yield

    def submit(self, request: TurnRequest) -> None:
        self.shown = ""
        self.generator.submit(request)

    def step(self) -> list[SampledTurn]:
        finished = self.generator.step()
        written = [turn.token_ids for turn in (*getattr(self.generator, "active", ()), *finished) if _is_shown(turn)]
        if written:
            text = decoded_text(self.tokenizer, written[0])
            if text.startswith(self.shown) and (finished or not text.endswith("\ufffd")):  # half of a character
                self.show(text[len(self.shown) :])
                self.shown = text
        return finished

    def release(self, trajectory: int) -> None:
        self.generator.release(trajectory)


def _is_shown(turn: Any) -> bool:
    """Say whether this is a turn of the trajectory, and not notes on documents."""
    return getattr(turn, "request", turn).trajectory == 0


class Chat:
    """Answers one question after another, in view."""

    def __init__(
        self, generator: Any, engine: SearchEngine, agent: Agent, settings: ChatSettings, answer: str
    ) -> None:
        self.screen = Screen(sys.stdout)
        self.is_live = not hasattr(generator, "sample")
        self.generator = LiveGenerator(generator, self.screen.write) if self.is_live else generator
        self.engine, self.agent, self.settings, self.answer = engine, agent, settings, answer

    def ask(self, question: str) -> None:
        """Roll out one question, and write what happens as it happens."""
        row = {"question": question, "golden_answers": [self.answer]}
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

    def answer_questions(self) -> None:
        """Answer what the user types; what stops one question does not stop the next."""
        for question in questions_of_the_user():
            try:
                self.ask(question)
            except KeyboardInterrupt:
                self.screen.end_turn()
                self.screen.line("stopped", "note")
            except (SearchError, GenerationError) as error:
                self.screen.line(f"error: {error}", "note")

    def _watch(self, index: int, trajectory: Trajectory, event: Event) -> None:
        turn = trajectory.turns[-1] if trajectory.turns else trajectory.lookup
        if event == "turn" and turn is not None:
            if not self.is_live:
                self.screen.write(turn.text)
            self.screen.end_turn()
            if (
                turn.kind == "search"
                and self.agent.gets_documents
                and len(trajectory.turns) <= self.settings.max_turns
            ):
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


def questions_of_the_user() -> Iterator[str]:
    """Yield what is typed, a line a question, until an empty line or the end of the input."""
    with suppress(ImportError):
        import readline  # noqa: F401 (earlier lines come back with the arrow keys)
    while True:
        try:
            line = input("\n? ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            return
        yield line


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Load the model and the engine, then answer."""
    arguments, engine_options, settings, endpoint_options = parse(
        ChatArguments, ChatEngine, ChatSettings, EndpointOptions, argv=argv
    )
    prompts = PROMPT_SETS[arguments.prompt]
    (agent,) = prompts.choose([arguments.agent])
    engine = make_engine(engine_options, prompts.simulator) if agent.searches else NoEngine()
    if arguments.generator == "endpoint":
        generator: Any = make_endpoint(endpoint_options, arguments.model)
    else:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        generator = load_generator(arguments.model, arguments.generator, settings.max_trajectory_tokens)
    chat = Chat(generator, engine, agent, settings, arguments.answer)
    try:
        if arguments.question:
            chat.ask(arguments.question)
        else:
            chat.screen.line(f"{arguments.model} ({agent.name}) with {engine.name}; an empty line ends", "note")
            chat.answer_questions()
    except (SearchError, GenerationError) as error:
        raise UserError(str(error)) from error
    finally:
        close_engine(engine)
        if arguments.generator == "endpoint":
            close_engine(generator)


if __name__ == "__main__":
    main()
