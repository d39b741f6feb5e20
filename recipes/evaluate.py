"""Score a policy: the questions answered with an engine, by the same rollout as in training; greedy by default.

    python recipes/evaluate.py --model outputs/policy --dataset qa.jsonl --engine bm25 --corpus wiki_passages.jsonl \
        --output_dir outputs/evaluation

Writes results.json (scores with 95 % intervals) and trajectories.jsonl (every question) to the output folder. A value
comes from the defaults, then `--config FILE.yaml`, then flags. With `--engine simulated`, start a simulator first
(recipes/serve_simulator.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trl import TrlParser

from zerosearch.data import claim_output_dir, load_questions
from zerosearch.engines import SearchError
from zerosearch.engines.options import EngineKind, EngineOptions, make_engine
from zerosearch.errors import UserError, exit_on_user_error, user_mistakes
from zerosearch.evaluation import evaluate, load_generator, results_table
from zerosearch.prompts import (
    POLICY_PROMPT,
    SIMULATOR_PROMPT,
    TINYWORLD_POLICY_PROMPT,
    TINYWORLD_SIMULATOR_PROMPT,
)
from zerosearch.rollout import RolloutSettings, close_engine

# --prompt chooses what the policy is asked ({question}) and what the simulator is ({question}, {golden_answer}, ...).
PROMPTS = {
    "paper": (POLICY_PROMPT, SIMULATOR_PROMPT),
    "tinyworld": (TINYWORLD_POLICY_PROMPT, TINYWORLD_SIMULATOR_PROMPT),
}


@dataclass
class EvaluationArguments:
    """What to evaluate, on what, with which engine."""

    model: str = field(metadata={"help": "Folder or Hub id of the policy."})
    dataset: str = field(metadata={"help": "A .jsonl or .parquet file, or a dataset on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for results.json and trajectories.jsonl."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a dataset on the Hub."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    prompt: Literal["paper", "tinyworld"] = field(default="paper", metadata={"help": "The prompts: see PROMPTS."})
    p_noise: float = field(default=0.0, metadata={"help": "For simulated: how likely a search gets noisy documents."})
    generator: Literal["vllm", "transformers"] = field(default="vllm", metadata={"help": "What runs the policy."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling, noise and bootstrap."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into an output_dir that is not empty."})


@dataclass(frozen=True)
class EvaluationSettings(RolloutSettings):
    """The budgets of the rollout, and how it samples: the likeliest token always."""

    temperature: float = 0.0  # the paper does not say; its code sampled at 1.0 (our choice)


@dataclass
class EvaluationEngine(EngineOptions):
    """The engine to evaluate with: by default one that is real and costs nothing."""

    engine: EngineKind = field(default="bm25", metadata={"help": "The search engine."})


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check all that can be checked early, answer the questions, write and print the scores."""
    with user_mistakes():
        parser = TrlParser((EvaluationArguments, EvaluationEngine, EvaluationSettings))
        arguments, options, settings = parser.parse_args_and_config(argv)
    if not 0.0 <= arguments.p_noise <= 1.0:
        raise UserError(f"p_noise is {arguments.p_noise}: a probability lies in [0, 1]")
    output_dir = claim_output_dir(arguments.output_dir, overwrite=arguments.overwrite_output_dir)
    questions = load_questions(
        arguments.dataset, arguments.dataset_split, PROMPTS[arguments.prompt][0], arguments.dataset_limit
    )
    engine = make_engine(options, simulator_template=PROMPTS[arguments.prompt][1])
    generator = load_generator(arguments.model, arguments.generator, settings.max_trajectory_tokens)
    about = {"model": arguments.model, "dataset": arguments.dataset, "generator": arguments.generator}
    try:
        results = evaluate(
            questions,
            generator,
            engine,
            settings,
            output_dir,
            p_noise=arguments.p_noise,
            seed=arguments.seed,
            about=about,
        )
    except SearchError as error:
        raise UserError(str(error)) from error
    close_engine(engine)
    print(f"\n{results_table(results)}\n\n{output_dir}/results.json, trajectories.jsonl")


if __name__ == "__main__":
    main()
