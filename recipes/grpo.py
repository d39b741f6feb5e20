"""Train a policy to search. The top of this file is the place to edit for an ablation; run it again, and that is it.

    python recipes/grpo.py --config recipes/configs/hotpotqa-smoke.yaml --output_dir outputs/smoke
    accelerate launch --config_file recipes/accelerate/zero3.yaml recipes/grpo.py --config recipes/configs/qwen2.5-3b.yaml

A value comes from the dataclasses' defaults, then `--config FILE.yaml`, then flags. With `--engine simulated`, start a
simulator first (recipes/serve_simulator.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from zerosearch.data import claim_output_dir, load_questions
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.errors import UserError, exit_on_user_error, user_mistakes
from zerosearch.prompts import (
    POLICY_PROMPT,
    SIMULATOR_PROMPT,
    TINYWORLD_POLICY_PROMPT,
    TINYWORLD_SIMULATOR_PROMPT,
)
from zerosearch.rewards import f1_reward
from zerosearch.rollout import close_engine
from zerosearch.trainer import SearchConfig, SearchTrainer

# ---- Edit here for an ablation. Noise, masking, algorithm, budgets and sampling are flags: see SearchConfig. ----

# --prompt chooses what the policy is asked ({question}) and what the simulator is ({question}, {golden_answer}, ...).
PROMPTS = {
    "paper": (POLICY_PROMPT, SIMULATOR_PROMPT),
    "tinyworld": (TINYWORLD_POLICY_PROMPT, TINYWORLD_SIMULATOR_PROMPT),
}
REWARDS = [f1_reward]  # functions with TRL's signature; they are added up (em_reward is there, too)


def make_engine(arguments: RecipeArguments) -> SearchEngine:
    """Return the engine that the policy learns from. No real engine is asked anything while the simulator is used."""
    if arguments.engine == "bm25":
        from zerosearch.engines.bm25 import BM25Engine

        if arguments.corpus is None:
            raise UserError("--engine bm25 needs --corpus, a JSONL file of passages")
        return BM25Engine(arguments.corpus, num_documents=arguments.num_documents)
    from zerosearch.engines.simulated import SimulatedEngine

    engine = SimulatedEngine(
        arguments.simulator_url, template=PROMPTS[arguments.prompt][1], num_documents=arguments.num_documents
    )
    engine.check()
    return engine


# ---- The rest seldom needs an edit. ----


@dataclass
class RecipeArguments:
    """What to train on and against what."""

    dataset: str = field(metadata={"help": "A .jsonl or .parquet file, or a dataset on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    prompt: Literal["paper", "tinyworld"] = field(
        default="paper", metadata={"help": "The prompts: see PROMPTS above."}
    )
    engine: Literal["simulated", "bm25"] = field(default="simulated", metadata={"help": "The search engine."})
    simulator_url: str = field(
        default="http://127.0.0.1:6001/v1", metadata={"help": "Address of the simulator, an OpenAI-style server."}
    )
    corpus: str | None = field(default=None, metadata={"help": "For bm25: passages, JSONL in wiki-18's format."})
    num_documents: int = field(default=5, metadata={"help": "Documents a search (Section 4)."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into an output_dir that is not empty."})


def load_tokenizer(model: str, model_arguments: ModelConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the policy's tokenizer; a model that is not there, or is no model, is the user's mistake."""
    options = {"revision": model_arguments.model_revision, "trust_remote_code": trust_remote_code}
    try:
        AutoConfig.from_pretrained(model, **options)
        return AutoTokenizer.from_pretrained(model, padding_side="left", **options)
    except (OSError, ValueError) as error:
        raise UserError(f"there is no model {model!r}: {str(error).splitlines()[0]}") from error


def model_options(model_arguments: ModelConfig, config: SearchConfig) -> dict[str, object]:
    """Return the keyword arguments of `from_pretrained`; TRL would drop `--dtype` silently."""
    options = {
        "revision": model_arguments.model_revision,
        "attn_implementation": model_arguments.attn_implementation,
        "dtype": model_arguments.dtype,
    }
    return {name: value for name, value in options.items() if value is not None} | (config.model_init_kwargs or {})


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, check all that can be checked early, train, save, push."""
    with user_mistakes():
        parser = TrlParser(
            (RecipeArguments, SearchConfig, ModelConfig), usage="grpo.py --config FILE.yaml [--flag value ...]"
        )
        arguments, config, model_arguments = parser.parse_args_and_config(argv)
    if model_arguments.model_name_or_path is None:
        raise UserError("name the policy: --model_name_or_path")
    if config.process_index == 0 and not config.resume_from_checkpoint:
        output_dir = claim_output_dir(config.output_dir, overwrite=arguments.overwrite_output_dir)
        (output_dir / "trajectories.jsonl").unlink(missing_ok=True)
    tokenizer = load_tokenizer(model_arguments.model_name_or_path, model_arguments, config.trust_remote_code)
    questions = load_questions(
        arguments.dataset, arguments.dataset_split, PROMPTS[arguments.prompt][0], arguments.dataset_limit
    )
    engine = make_engine(arguments)
    config.model_init_kwargs = model_options(model_arguments, config)
    trainer = SearchTrainer(
        model=model_arguments.model_name_or_path,
        reward_funcs=REWARDS,
        args=config,
        engine=engine,
        train_dataset=questions,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_arguments),
        quantization_config=get_quantization_config(model_arguments),
    )
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except SearchError as error:
        raise UserError(str(error)) from error
    trainer.save_model(config.output_dir)
    trainer.save_state()
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=Path(arguments.dataset).name, tags=["zerosearch"])
    close_engine(engine)


if __name__ == "__main__":
    main()
