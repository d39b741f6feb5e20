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

import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from transformers.utils.logging import disable_progress_bar

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.engines import SearchError
from zerosearch.engines.options import EngineKind, EngineOptions, make_engine
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import GreedySettings, NoEngine
from zerosearch.generation import GenerationError
from zerosearch.generation.chat_endpoint import EndpointOptions
from zerosearch.generation.loading import GeneratorKind, open_generator
from zerosearch.prompts import PAPER, PROMPT_SETS, PromptSetName
from zerosearch.rollout.in_flight import close_engine
from zerosearch.rollout.live import Chat


@dataclass
class ChatArguments:
    """Whom to ask, and how."""

    model: str = field(metadata={"help": "Folder or Hub id of the policy; for an endpoint, the model's name there."})
    question: str | None = field(default=None, metadata={"help": "Ask this one question and end."})
    agent: str = field(default="policy", metadata={"help": f"How the model is used: {', '.join(PAPER.agents)}."})
    prompt: PromptSetName = field(default="paper", metadata={"help": "The prompt set: see zerosearch.prompts."})
    generator: GeneratorKind = field(
        default="vllm", metadata={"help": "What runs the model; endpoint: any OpenAI-style server, --endpoint_url."}
    )
    answer: str = field(
        default="unknown", metadata={"help": "For simulated, which must be told the answer to write documents."}
    )

    def __post_init__(self) -> None:
        if self.question is not None and not self.question.strip():
            raise UserError("the question is empty")


@dataclass
class ChatEngine(EngineOptions):
    """The engine to search with: by default one that is real and costs nothing."""

    engine: EngineKind = field(default="bm25", metadata={"help": "The search engine."})


def converse(chat: Chat) -> None:
    """Answer what the user types, until an empty line; what stops one question does not stop the next."""
    with suppress(ImportError):
        import readline  # noqa: F401 (earlier lines come back with the arrow keys)
    try:
        while question := input("\n? ").strip():
            try:
                chat.ask(question)
            except KeyboardInterrupt:
                chat.screen.end_turn()
                chat.screen.line("stopped", "note")
            except (SearchError, GenerationError) as error:
                chat.screen.line(f"error: {error}", "note")
    except (EOFError, KeyboardInterrupt):
        print()


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Load the model and the engine, then answer."""
    arguments, engine_options, settings, endpoint = parse(
        ChatArguments, ChatEngine, GreedySettings, EndpointOptions, argv=argv
    )
    prompts = PROMPT_SETS[arguments.prompt]
    (agent,) = prompts.choose([arguments.agent])
    disable_progress_bar()
    with ExitStack() as stack:
        engine = make_engine(engine_options, prompts.simulator) if agent.searches else NoEngine()
        stack.callback(close_engine, engine)
        try:
            generator, _ = stack.enter_context(
                open_generator(arguments.model, arguments.generator, endpoint, settings.max_trajectory_tokens)
            )
            chat = Chat(generator, engine, agent, settings, arguments.answer, sys.stdout)
            if arguments.question:
                chat.ask(arguments.question)
            else:
                chat.screen.line(f"{arguments.model} ({agent.name}) with {engine.name}; an empty line ends", "note")
                converse(chat)
        except (SearchError, GenerationError) as error:
            raise UserError(str(error)) from error


if __name__ == "__main__":
    main()
