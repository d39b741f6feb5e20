"""Score policies and baselines: questions answered by the same rollout as in training; greedy by default.

    python recipes/evaluate.py --model outputs/policy --dataset qa.jsonl --engine bm25 --corpus wiki_passages.jsonl \
        --output_dir outputs/evaluation

`--model`, `--agent`, `--engine` and `--dataset` take several values; every agent is then evaluated with every model
and every engine it can use, and one table compares them. The paper's seven benchmarks, 500 questions of each:

    python recipes/evaluate.py --model outputs/policy Qwen/Qwen2.5-3B --agent policy direct cot rag \
        --dataset benchmarks --num_questions 500 --engine bm25 --corpus wiki-18.jsonl --output_dir outputs/table3

Writes results.json (scores with 95 % intervals and a manifest), trajectories.jsonl (every question) and table.md to
the output folder, and with several evaluations a folder for each. One that was killed, or stopped at
`--max_usd`, `--max_seconds` or a limit of `--engine google`, goes on with `--resume true`. What Google or another
service answers stays there, too, in searches.sqlite: no query is paid for twice. A value comes from the defaults, then
`--config FILE.yaml`, then flags. With `--engine simulated`, start a simulator first (recipes/serve_simulator.py).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.data import BENCHMARKS, FLASHRAG, load_question_sets
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.account import LimitReached, Limits, cost_table
from zerosearch.engines.options import EngineKind, EngineOptions, make_engine
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import GreedySettings, check_samples
from zerosearch.evaluation.matrix import claim_evaluation_dir, plan_evaluations, run_evaluations
from zerosearch.evaluation.tables import markdown_tables, matrix_table, results_table
from zerosearch.files import sole_writer, write_json, write_text
from zerosearch.generation import GenerationError
from zerosearch.generation.chat_endpoint import EndpointOptions
from zerosearch.generation.loading import GeneratorKind, open_generator
from zerosearch.prompts import PAPER, PROMPT_SETS, PromptSetName
from zerosearch.rollout.in_flight import close_engine

PAID_SEARCHES = "searches.sqlite"  # the cache in the output folder, for an engine that costs money


@dataclass
class EvaluationArguments:
    """What to evaluate, on what."""

    model: list[str] = field(metadata={"help": "Folders or Hub ids of policies; for an endpoint, its models' names."})
    dataset: list[str] = field(
        metadata={"help": f"Files (.jsonl, .parquet), datasets on the Hub, {', '.join(BENCHMARKS)}, or 'benchmarks'."}
    )
    output_dir: str = field(metadata={"help": "Folder for results, trajectories and table."})
    agent: list[str] = field(
        default_factory=lambda: ["policy"], metadata={"help": f"How the model is used: {', '.join(PAPER.agents)}."}
    )
    prompt: PromptSetName = field(default="paper", metadata={"help": "The prompt set: see zerosearch.prompts."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a dataset on the Hub."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Use the first rows of each dataset only."})
    num_questions: int | None = field(
        default=None, metadata={"help": "Use so many of each dataset, chosen by a hash (500: as many as the paper)."}
    )
    benchmark_source: str = field(
        default=FLASHRAG, metadata={"help": "Where the seven benchmarks are: a Hub id, or a folder in its layout."}
    )
    p_noise: float = field(
        default=0.0, metadata={"min": 0, "max": 1, "help": "For simulated: how likely a search gets noisy documents."}
    )
    generator: GeneratorKind = field(
        default="vllm", metadata={"help": "What runs the model; endpoint: any OpenAI-style server, --endpoint_url."}
    )
    num_samples: int = field(default=1, metadata={"help": "Trajectories a question, for pass@k; with --temperature."})
    seed: int = field(default=0, metadata={"min": 0, "help": "Seed of sampling, noise and bootstrap."})
    max_usd: float | None = field(default=None, metadata={"help": "Stop when this command has cost so much."})
    max_seconds: float | None = field(default=None, metadata={"help": "Stop when this command has taken so long."})
    resume: bool = field(default=False, metadata={"help": "Go on with the evaluation that is in output_dir."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into an output_dir that is not empty."})


@dataclass
class EvaluationEngines(EngineOptions):
    """The engines to evaluate with: by default one that is real and costs nothing."""

    engine: list[str] = field(  # type: ignore[assignment]
        default_factory=lambda: ["bm25"], metadata={"help": "The search engines.", "choices": get_args(EngineKind)}
    )

    def __post_init__(self) -> None:
        self.each()

    def each(self) -> list[EngineOptions]:
        """Return the options of each engine. Raises `UserError` for one that cannot work."""
        return [EngineOptions(**vars(self) | {"engine": kind}) for kind in self.engine]


def report(found: dict[str, Any], engines: list[SearchEngine], output_dir: Path) -> None:
    """Write the table, and print the scores and what the searches cost."""
    write_text(output_dir / "table.md", markdown_tables(found))
    if len(found) > 1:
        write_json(output_dir / "results.json", {"evaluations": found})
    say(f"\n{matrix_table(found) if len(found) > 1 else results_table(*found.values())}")
    for name, results in found.items():
        if results["stopped"]:
            say(f"\n{name}: {results['stopped']}; --resume true goes on")
    say(f"\n{output_dir}/results.json, trajectories.jsonl, table.md")
    accounts = [account for engine in engines if (account := getattr(engine, "account", None)) and account.queries]
    if accounts:
        queries = {account.engine: account.queries for account in accounts}
        say(f"\n{cost_table(queries, {account.engine: account.usd_here for account in accounts})}")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check all that can be checked early, answer the questions, write and print the scores."""
    arguments, engine_options, settings, endpoint = parse(
        EvaluationArguments, EvaluationEngines, GreedySettings, EndpointOptions, argv=argv
    )
    prompts = PROMPT_SETS[arguments.prompt]
    agents = prompts.choose(arguments.agent)
    check_samples(arguments.num_samples, settings)
    limits = Limits(arguments.max_usd, arguments.max_seconds)
    output_dir = claim_evaluation_dir(Path(arguments.output_dir), arguments.resume, arguments.overwrite_output_dir)
    with sole_writer(output_dir), ExitStack() as stack:
        questions = load_question_sets(
            arguments.dataset,
            arguments.dataset_split,
            arguments.dataset_limit,
            arguments.num_questions,
            arguments.benchmark_source,
        )
        engines: list[SearchEngine] = []
        for options in engine_options.each() if any(agent.searches for agent in agents) else []:
            if options.engine in ("google", "api"):  # what it answers is recorded in any case: it is paid for once
                options.search_cache = options.search_cache or str(output_dir / PAID_SEARCHES)
            engines.append(make_engine(options, prompts.simulator))
            stack.callback(close_engine, engines[-1])
        try:
            found = run_evaluations(
                plan_evaluations(arguments.model, agents, engines, output_dir),
                questions,
                lambda model: open_generator(model, arguments.generator, endpoint, settings.max_trajectory_tokens),
                settings,
                output_dir,
                limits=limits,
                announce=lambda text: say(f"\n{text}"),
                about={
                    "dataset": ", ".join(arguments.dataset),
                    "prompt": arguments.prompt,
                    "generator": arguments.generator,
                    "dataset_limit": arguments.dataset_limit,
                    "questions_per_dataset": arguments.num_questions,
                },
                resume=arguments.resume,
                p_noise=arguments.p_noise,
                seed=arguments.seed,
                num_samples=arguments.num_samples,
            )
        except (SearchError, GenerationError) as error:
            raise UserError(str(error)) from error
        except LimitReached as limit:
            raise UserError(f"{limit}; raise the limit, and go on with --resume true") from limit
        except KeyboardInterrupt:
            raise SystemExit("\nstopped; the same command with --resume true goes on") from None
        report(found, engines, output_dir)


if __name__ == "__main__":
    main()
