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
from zerosearch.engines import SearchEngine, SearchError
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
    engine: Literal["bm25", "simulated"] = field(default="bm25", metadata={"help": "The search engine."})
    corpus: str | None = field(default=None, metadata={"help": "For bm25: passages, JSONL in wiki-18's format."})
    simulator_url: str = field(default="http://127.0.0.1:6001/v1", metadata={"help": "For simulated: its address."})
    simulator_max_tokens: int = field(default=600, metadata={"help": "For simulated: longest reply, in tokens."})
    p_noise: float = field(default=0.0, metadata={"help": "For simulated: how likely a search gets noisy documents."})
    num_documents: int = field(default=5, metadata={"help": "Documents a search (Section 4)."})
    generator: Literal["vllm", "transformers"] = field(default="vllm", metadata={"help": "What runs the policy."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling, noise and bootstrap."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into an output_dir that is not empty."})


@dataclass(frozen=True)
class EvaluationSettings(RolloutSettings):
    """The budgets of the rollout, and how it samples: the likeliest token always."""

    temperature: float = 0.0  # the paper does not say; its code sampled at 1.0 (our choice)


def make_engine(arguments: EvaluationArguments) -> SearchEngine:
    """Return the engine that the policy searches with."""
    if arguments.engine == "bm25":
        from zerosearch.engines.bm25 import BM25Engine

        if arguments.corpus is None:
            raise UserError("--engine bm25 needs --corpus, a JSONL file of passages")
        return BM25Engine(arguments.corpus, arguments.num_documents)
    from zerosearch.engines.simulated import SimulatedEngine

    engine = SimulatedEngine(
        arguments.simulator_url,
        template=PROMPTS[arguments.prompt][1],
        max_tokens=arguments.simulator_max_tokens,
        num_documents=arguments.num_documents,
    )
    engine.check()
    return engine


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check all that can be checked early, answer the questions, write and print the scores."""
    with user_mistakes():
        arguments, settings = TrlParser((EvaluationArguments, EvaluationSettings)).parse_args_and_config(argv)
    if not 0.0 <= arguments.p_noise <= 1.0:
        raise UserError(f"p_noise is {arguments.p_noise}: a probability lies in [0, 1]")
    output_dir = claim_output_dir(arguments.output_dir, overwrite=arguments.overwrite_output_dir)
    questions = load_questions(
        arguments.dataset, arguments.dataset_split, PROMPTS[arguments.prompt][0], arguments.dataset_limit
    )
    engine = make_engine(arguments)
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
