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

import gc
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import BENCHMARKS, FLASHRAG, load_question_sets
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.account import LimitReached, Limits, cost_table
from zerosearch.engines.options import EngineOptions, make_engine
from zerosearch.errors import UserError
from zerosearch.evaluation.evaluate import check_samples, evaluate
from zerosearch.evaluation.tables import markdown_tables, matrix_table, results_table
from zerosearch.files import claim_output_dir, sole_writer, write_json, write_text
from zerosearch.generation import GenerationError, Generator, RemoteGenerator
from zerosearch.generation.chat_endpoint import EndpointGenerator, EndpointOptions, make_endpoint
from zerosearch.generation.loading import load_generator, model_identity
from zerosearch.http import CLOSE_TIMEOUT_S, redacted_url, run_in_background
from zerosearch.prompts import PAPER, PROMPT_SETS, Agent, PromptSetName, SimulatorTemplate
from zerosearch.report.plots import scores_plot
from zerosearch.rollout.in_flight import close_engine
from zerosearch.rollout.loop import RolloutSettings

PAID_SEARCHES = "searches.sqlite"  # the cache in the output folder, for an engine that costs money

LoadedModel = tuple[Generator | RemoteGenerator, dict[str, Any]]  # what runs it; which model it is


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
    generator: Literal["vllm", "transformers", "endpoint"] = field(
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


@dataclass(frozen=True)
class Evaluation:
    """One of the evaluations asked for."""

    name: str
    model: str
    agent: Agent
    engine: SearchEngine | None  # None: the agent never searches


def as_list(name: str, values: str | list[str]) -> list[str]:
    """Return the values of a flag: a config file may give one of them by itself."""
    values = [values] if isinstance(values, str) else list(values)
    if len(set(values)) < len(values):
        raise UserError(f"{name} names something twice: {', '.join(values)}")
    return values


def claim_output(arguments: EvaluationArguments) -> Path:
    """Return the output folder: a new one, or with --resume that of the evaluation to go on with."""
    path = Path(arguments.output_dir)
    if arguments.resume:
        return claim_output_dir(path, overwrite=True)
    if any(path.glob("**/manifest.json")) and not arguments.overwrite_output_dir:
        raise UserError(f"{path} holds an evaluation: --resume true goes on, --overwrite_output_dir starts afresh")
    return claim_output_dir(path, arguments.overwrite_output_dir)


def model_labels(models: list[str]) -> list[str]:
    """Return a short name for each model: as few of the last parts of its path as tell all apart."""
    parts = [Path(model).parts for model in models]
    for count in range(1, max(map(len, parts))):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return models


def evaluations(models: list[str], agents: list[Agent], engines: list[SearchEngine]) -> Iterator[Evaluation]:
    """Yield what is to be evaluated, model by model; names say what differs."""
    for model, label in zip(models, model_labels(models), strict=True):
        for agent in agents:
            for engine in engines if agent.searches else [None]:
                parts = [label] if len(models) > 1 else []
                parts += [agent.name]
                parts += [engine.name] if engine and len(engines) > 1 else []
                yield Evaluation(" ".join(parts), model, agent, engine)


def load_model(model: str, arguments: EvaluationArguments, options: EndpointOptions, max_tokens: int) -> LoadedModel:
    """Return the generator that runs a model, and which model that is."""
    if arguments.generator == "endpoint":
        return make_endpoint(options, model), {"model": model, "endpoint": redacted_url(options.endpoint_url or "")}
    return load_generator(model, arguments.generator, max_tokens), model_identity(model)


def run(
    todo: Sequence[Evaluation],
    questions: list[dict[str, Any]],
    arguments: EvaluationArguments,
    settings: EvaluationSettings,
    endpoint_options: EndpointOptions,
    output_dir: Path,
) -> dict[str, Any]:
    """Run the evaluations one after another, each model loaded once, and return the results by name.

    A limit ends them with what there is by then. Raises `UserError` if that is nothing, or something has failed.
    """
    about = {
        "dataset": ", ".join(arguments.dataset),
        "prompt": arguments.prompt,
        "generator": arguments.generator,
        "dataset_limit": arguments.dataset_limit,
        "questions_per_dataset": arguments.num_questions,
    }
    limits = Limits(arguments.max_usd, arguments.max_seconds)
    found: dict[str, Any] = {}
    loaded: str | None = None
    generator: Any = None
    identity: dict[str, Any] = {}
    results: dict[str, Any] = {}
    try:
        for one in todo:
            if found:
                limits = limits.less(results["this_command"]["usd"], results["seconds"])
            if one.model != loaded:
                release(generator)
                generator = None  # the one before goes first: both might not fit
                gc.collect()
                generator, identity = load_model(
                    one.model, arguments, endpoint_options, settings.max_trajectory_tokens
                )
                loaded = one.model
            folder = output_dir if len(todo) == 1 else output_dir / re.sub(r"[^\w.-]+", "-", one.name).strip("-.")
            if len(todo) > 1:
                print(f"\n{one.name} ({len(found) + 1} of {len(todo)})", flush=True)
            with sole_writer(folder):
                results = evaluate(
                    questions,
                    generator,
                    one.engine,
                    settings,
                    folder,
                    agent=one.agent,
                    p_noise=arguments.p_noise,
                    seed=arguments.seed,
                    num_samples=arguments.num_samples,
                    about=about | identity,
                    resume=arguments.resume,
                    limits=limits,
                )
            found[one.name] = results
            if results["stopped"]:
                break
    except (SearchError, GenerationError) as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command with --resume true goes on") from None
    except LimitReached as limit:
        if not found:
            raise UserError(f"{limit}; raise the limit, and go on with --resume true") from limit
        print(f"\n{limit}; --resume true goes on")
    finally:
        release(generator)
    return found


def release(generator: Any) -> None:
    """Close the connections of a generator that has some."""
    if isinstance(generator, EndpointGenerator):
        run_in_background(generator.aclose(), CLOSE_TIMEOUT_S)


def report(found: dict[str, Any], output_dir: Path) -> None:
    """Write the table and the plot, and print the scores."""
    write_text(output_dir / "table.md", markdown_tables(found))
    write_text(output_dir / "scores.svg", scores_plot(found))
    if len(found) == 1:
        print(f"\n{results_table(*found.values())}")
    else:
        write_json(output_dir / "results.json", {"evaluations": found})
        print(f"\n{matrix_table(found)}")
    for name, results in found.items():
        if results["stopped"]:
            print(f"\n{name}: {results['stopped']}; --resume true goes on")
    print(f"\n{output_dir}/results.json, trajectories.jsonl, table.md, scores.svg")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check all that can be checked early, answer the questions, write and print the scores."""
    arguments, engine_options, settings, endpoint_options = parse(
        EvaluationArguments, EvaluationEngines, EvaluationSettings, EndpointOptions, argv=argv
    )
    prompts = PROMPT_SETS[arguments.prompt]
    agents = prompts.choose(arguments.agent)
    check_samples(arguments.num_samples, settings)
    output_dir = claim_output(arguments)
    questions = load_question_sets(
        arguments.dataset,
        arguments.dataset_split,
        arguments.dataset_limit,
        arguments.num_questions,
        arguments.benchmark_source,
    )
    search = any(agent.searches for agent in agents)
    engines = engine_options.ready(output_dir, prompts.simulator) if search else []
    todo = list(evaluations(arguments.model, agents, engines))
    found = run(todo, questions, arguments, settings, endpoint_options, output_dir)
    report(found, output_dir)
    accounts = [account for engine in engines if (account := getattr(engine, "account", None)) and account.queries]
    if accounts:
        queries = {account.engine: account.queries for account in accounts}
        print(f"\n{cost_table(queries, {account.engine: account.usd_here for account in accounts})}")
    for engine in engines:
        close_engine(engine)


if __name__ == "__main__":
    main()
