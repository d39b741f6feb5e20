"""Train a policy to search. The top of this file is the place to edit for an ablation: change one thing, run it again.

    accelerate launch recipes/grpo.py --config recipes/configs/qwen2.5-3b.yaml
    python recipes/grpo.py --config recipes/configs/hotpotqa-smoke.yaml --output_dir outputs/smoke

A value comes from the dataclasses' defaults, then `--config FILE.yaml`, then flags. `recipes/accelerate/` has launch
configurations for one and several devices. With `--engine simulated`, start a simulator first
(recipes/serve_simulator.py). Algorithm, noise, masking, budgets and sampling are flags: see SearchConfig.
"""

from __future__ import annotations

import json
import os

# Before torch is imported: on a CPU its threads spin while they wait, and beside a busy simulator a step then takes
# 61 s, not 2.5 s (two cores).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig, get_peft_config, get_quantization_config

from zerosearch.checkpoints import checkpoint_to_resume
from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import load_questions
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.account import cost_table
from zerosearch.engines.options import EngineOptions, make_engine
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir
from zerosearch.generation import GenerationError
from zerosearch.generation.loading import load_tokenizer, whole_model
from zerosearch.prompts import PROMPT_SETS, PromptSetName
from zerosearch.rollout.in_flight import close_engine
from zerosearch.training.rewards import f1_reward
from zerosearch.training.trainer import SearchConfig, SearchTrainer

REWARDS = [f1_reward]  # functions with TRL's signature, added up; zerosearch.training.rewards has em_reward, too


@dataclass
class RecipeArguments:
    """What to train on, and against what."""

    dataset: str = field(metadata={"help": "A .jsonl or .parquet file, or a dataset on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    prompt: PromptSetName = field(default="paper", metadata={"help": "The prompt set: see zerosearch.prompts."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into an output_dir that is not empty."})


def choose_engine(options: EngineOptions, prompt: str) -> SearchEngine:
    """Return the engine that the policy learns from; return one of your own here to train against it."""
    return make_engine(options, simulator_template=PROMPT_SETS[prompt].simulator)


def claim_output(config: SearchConfig, overwrite: bool) -> None:
    """Claim the output folder, for a run that starts afresh; only one rank does, before any of them writes."""
    if config.process_index != 0:
        return
    output_dir = claim_output_dir(config.output_dir, overwrite)
    for name in ("trajectories.jsonl", "engine_queries.json"):  # the trainer adds to them
        (output_dir / name).unlink(missing_ok=True)


def model_options(model_config: ModelConfig, config: SearchConfig) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained`; without them TRL drops `--dtype` silently."""
    options = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
    }
    return {name: value for name, value in options.items() if value is not None} | (config.model_init_kwargs or {})


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check what can be checked early, then train, save and push."""
    usage = "grpo.py --config FILE.yaml [--flag VALUE ...]   (--help lists all flags)"
    arguments, options, config, model_config = parse(
        RecipeArguments, EngineOptions, SearchConfig, ModelConfig, argv=argv, usage=usage
    )
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, config.output_dir)
    if checkpoint is None:
        claim_output(config, arguments.overwrite_output_dir)
    model = model_config.model_name_or_path
    tokenizer = load_tokenizer(model, model_config.model_revision, config.trust_remote_code)
    with config.main_process_first(local=False):  # an adapter is merged into its base, once
        model = whole_model(model, Path(config.output_dir), model_config.model_revision, config.trust_remote_code)
    agent = PROMPT_SETS[arguments.prompt].policy
    questions = load_questions(arguments.dataset, arguments.dataset_split, arguments.dataset_limit)
    engine = choose_engine(options, arguments.prompt)
    config.model_init_kwargs = model_options(model_config, config)
    trainer = SearchTrainer(
        model=model,
        reward_funcs=REWARDS,
        args=config,
        engine=engine,
        agent=agent,
        train_dataset=questions,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        quantization_config=get_quantization_config(model_config),
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (SearchError, GenerationError) as error:  # their message says what to do, a traceback would not
        raise UserError(str(error)) from error
    trainer.save_model(config.output_dir)
    trainer.save_state()
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=None if Path(arguments.dataset).exists() else arguments.dataset)
    counted = Path(config.output_dir, "engine_queries.json")
    if config.process_index == 0 and counted.exists():  # no query was made where nothing was left to train
        sent = json.loads(counted.read_text(encoding="utf-8"))
        account = getattr(engine, "account", None)
        print(cost_table(sent, {engine.name: account.usd_of(sent.get(engine.name, 0))} if account else {}))
    close_engine(engine)


if __name__ == "__main__":
    main()
