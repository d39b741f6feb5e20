"""Collect real searches for Search Simulation Tuning: a model answers questions with a real engine (Section 3.3).

    python recipes/collect_traces.py --dataset train.jsonl --model qwen2.5-7b-instruct --endpoint_url https://HOST/v1 \
        --endpoint_key_env OPENAI_API_KEY --engine google --google_max_usd 20 --output_dir outputs/traces
    python recipes/collect_traces.py --dataset train.jsonl --model Qwen/Qwen2.5-7B-Instruct --generator vllm \
        --engine retriever --output_dir outputs/traces

The output folder gets traces.jsonl, a line a search: question, golden answers, query, documents, and how the
trajectory ended. A trajectory is on the disk when it ends, and every reply of the engine in a cache: after a kill, an
error or a limit the same command goes on, and nothing is paid for twice. `--max_usd` counts the endpoint too, by its
`--endpoint_usd_read` and `--endpoint_usd_written`. Next: recipes/judge_traces.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.data import load_questions
from zerosearch.engines import SearchError
from zerosearch.engines.account import LimitReached, Limits
from zerosearch.engines.options import EngineOptions, make_engine
from zerosearch.errors import UserError
from zerosearch.evaluation.collect import collect_traces
from zerosearch.files import sole_writer
from zerosearch.generation import GenerationError
from zerosearch.generation.chat_endpoint import EndpointOptions
from zerosearch.generation.loading import GeneratorKind, open_generator
from zerosearch.prompts import PAPER
from zerosearch.rollout.in_flight import close_engine
from zerosearch.rollout.loop import RolloutSettings

# How the model is asked. The paper does not give the words it collected with.
AGENT = PAPER.policy


@dataclass
class CollectArguments:
    """Which questions, and which model answers them."""

    dataset: str = field(metadata={"help": "A .jsonl or .parquet file, or a dataset on the Hub: training questions."})
    model: str = field(metadata={"help": "The endpoint's model, or a folder or Hub id (paper: Qwen2.5-7B-Instruct)."})
    output_dir: str = field(metadata={"help": "Folder for the traces; resumed if it holds an earlier command's."})
    generator: GeneratorKind = field(
        default="endpoint", metadata={"help": "What runs the model; endpoint: any OpenAI-style server."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    max_usd: float | None = field(default=None, metadata={"help": "Stop when this command has cost so much."})
    max_seconds: float | None = field(default=None, metadata={"help": "Stop when this command has taken so long."})
    questions_in_flight: int = field(default=64, metadata={"min": 1, "help": "Questions under way at once."})
    max_failed: int = field(default=10, metadata={"min": 1, "help": "Give up when so many questions lost a search."})


@dataclass
class CollectEngine(EngineOptions):
    """The engine to collect from: a real one, for a simulator has nothing to learn from another."""

    engine: Literal["google", "api", "retriever", "bm25"] = field(  # type: ignore[assignment]
        default="google", metadata={"help": "The search engine (paper: Google)."}
    )


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Answer the questions, and write every search."""
    arguments, engine_options, endpoint, settings = parse(
        CollectArguments, CollectEngine, EndpointOptions, RolloutSettings, argv=argv
    )
    limits = Limits(arguments.max_usd, arguments.max_seconds)
    questions = load_questions(arguments.dataset, arguments.dataset_split, arguments.dataset_limit).to_list()
    output_dir = Path(arguments.output_dir)
    with sole_writer(output_dir), ExitStack() as stack:
        engine_options.search_cache = engine_options.search_cache or str(output_dir / "searches.sqlite")
        engine = make_engine(engine_options, PAPER.simulator)
        stack.callback(close_engine, engine)
        try:
            generator, identity = stack.enter_context(
                open_generator(arguments.model, arguments.generator, endpoint, settings.max_trajectory_tokens)
            )
            results = collect_traces(
                output_dir,
                questions=questions,
                generator=generator,
                engine=engine,
                settings=settings,
                agent=AGENT,
                seed=arguments.seed,
                about={**identity, "dataset": arguments.dataset, "generator": arguments.generator}
                | {"prompt": AGENT.template},
                limits=limits,
                max_live=arguments.questions_in_flight,
                max_failed=arguments.max_failed,
            )
        except (SearchError, GenerationError, LimitReached) as error:
            raise UserError(f"{error}; what was finished is kept, and the same command goes on") from error
    traces, usd = output_dir / "traces.jsonl", results["this_command"]["usd"]
    say(f"{results['n']:,} of {len(questions):,} questions, EM {results['em']['mean']:.3f}; this cost {usd:.2f} USD")
    if missing := results["stopped"] or results["lost"]:
        say(f"{missing}; the same command goes on")
    say(f"traces: {traces}; judge them: python recipes/judge_traces.py --traces {traces}")


if __name__ == "__main__":
    main()
