"""Score policies and baselines: questions answered by the same rollout as in training; greedy by default.

    python recipes/evaluate.py --model outputs/policy --dataset qa.jsonl --engine bm25 --corpus wiki_passages.jsonl \
        --output_dir outputs/evaluation

`--model`, `--agent`, `--engine` and `--dataset` take several values; every agent is then evaluated with every model
and every engine it can use, and one table compares them. The paper's seven benchmarks, 500 questions of each:

    python recipes/evaluate.py --model outputs/policy Qwen/Qwen2.5-3B --agent policy direct cot rag \
        --dataset benchmarks --num_questions 500 --engine bm25 --corpus wiki-18.jsonl --output_dir outputs/table3

Writes results.json (scores with 95 % intervals and a manifest), trajectories.jsonl (every question), table.md and
scores.svg to the output folder, and with several evaluations a folder for each. One that was killed, or stopped at
`--max_usd`, `--max_seconds` or a limit of `--engine google`, goes on with `--resume true`. What Google answers stays
there, too, in searches.sqlite: no query is paid for twice. A value comes from the defaults, then
`--config FILE.yaml`, then flags. With `--engine simulated`, start a simulator first (recipes/serve_simulator.py).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import BENCHMARKS, FLASHRAG, load_question_sets
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.account import LimitReached, Limits, cost_table
from zerosearch.engines.options import EngineOptions, make_engine
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import check_samples
from zerosearch.evaluation.matrix import claim_evaluation_dir, plan_evaluations, run_evaluations
from zerosearch.evaluation.tables import markdown_tables, matrix_table, results_table
from zerosearch.files import sole_writer, write_json, write_text
from zerosearch.generation import GenerationError
from zerosearch.generation.chat_endpoint import EndpointOptions
from zerosearch.generation.loading import GeneratorKind, open_generator
from zerosearch.prompts import PAPER, PROMPT_SETS, PromptSetName, SimulatorTemplate
from zerosearch.report.plots import scores_plot
from zerosearch.rollout.in_flight import close_engine
from zerosearch.rollout.loop import RolloutSettings
from zerosearch.text import printable

PAID_SEARCHES = "searches.sqlite"  # the cache in the output folder, for an engine that costs money


@dataclass
class EvaluationArguments:
    """What to evaluate, on what."""

    model: list[str] = field(metadata={"help": "Folders or Hub ids of policies; for an endpoint, its models' names."})
    dataset: list[str] = field(
        metadata={"help": f"Files (.jsonl, .parquet), datasets on the Hub, {', '.join(BENCHMARKS)}, or 'benchmarks'."}
    )
    output_dir: str = field(metadata={"help": "Folder for results, trajectories, table and plot."})
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

    def __post_init__(self) -> None:
        for name in ("model", "dataset", "agent"):
            setattr(self, name, as_list(name, getattr(self, name)))


@dataclass(frozen=True)
class EvaluationSettings(RolloutSettings):
    """The budgets of the rollout, and how it samples: the likeliest token always."""

    temperature: float = 0.0  # the paper does not say; its code sampled at 1.0 (our choice)


@dataclass
class EvaluationEngines(EngineOptions):
    """The engines to evaluate with: by default one that is real and costs nothing."""

    engine: list[str] = field(  # type: ignore[assignment]
        default_factory=lambda: ["bm25"], metadata={"help": "The search engines."}
    )

    def __post_init__(self) -> None:
        self.engine = as_list("engine", self.engine)
        self.each()

    def each(self) -> list[EngineOptions]:
        """Return the options of each engine. Raises `UserError` for one that cannot work."""
        shared = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "engine"}
        return [EngineOptions(engine=kind, **shared) for kind in self.engine]  # type: ignore[arg-type]

    def ready(self, output_dir: Path, template: SimulatorTemplate) -> list[SearchEngine]:
        """Return the engines. What Google answers is recorded in any case: it is paid for once."""
        options = self.each()
        for one in options:
            if one.engine == "google":
                one.search_cache = one.search_cache or str(output_dir / PAID_SEARCHES)
        return [make_engine(one, template) for one in options]


def as_list(name: str, values: str | list[str]) -> list[str]:
    """Return the values of a flag: a config file may give one of them by itself."""
    values = [values] if isinstance(values, str) else list(values)
    if len(set(values)) < len(values):
        raise UserError(f"{name} names something twice: {', '.join(values)}")
    return values


def report(found: dict[str, Any], engines: list[SearchEngine], output_dir: Path) -> None:
    """Write the table and the plot, and print the scores and what the searches cost."""
    write_text(output_dir / "table.md", markdown_tables(found))
    write_text(output_dir / "scores.svg", scores_plot(found))
    if len(found) == 1:
        print(f"\n{results_table(*found.values())}")
    else:
        write_json(output_dir / "results.json", {"evaluations": found})
        print(f"\n{matrix_table(found)}")
    for name, results in found.items():
        if results["stopped"]:
            print(printable(f"\n{name}: {results['stopped']}; --resume true goes on"))
    print(f"\n{output_dir}/results.json, trajectories.jsonl, table.md, scores.svg")
    accounts = [account for engine in engines if (account := getattr(engine, "account", None)) and account.queries]
    if accounts:
        queries = {account.engine: account.queries for account in accounts}
        print(f"\n{cost_table(queries, {account.engine: account.usd_here for account in accounts})}")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check all that can be checked early, answer the questions, write and print the scores."""
    arguments, engine_options, settings, endpoint = parse(
        EvaluationArguments, EvaluationEngines, EvaluationSettings, EndpointOptions, argv=argv
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
        search = any(agent.searches for agent in agents)
        engines = engine_options.ready(output_dir, prompts.simulator) if search else []
        for engine in engines:
            stack.callback(close_engine, engine)
        try:
            found = run_evaluations(
                plan_evaluations(arguments.model, agents, engines, output_dir),
                questions,
                lambda model: open_generator(model, arguments.generator, endpoint, settings.max_trajectory_tokens),
                settings,
                output_dir,
                limits=limits,
                announce=lambda text: print(f"\n{printable(text)}", flush=True),
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
