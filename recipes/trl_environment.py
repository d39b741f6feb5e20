"""Train a model that calls tools with TRL's own GRPOTrainer, on any engine (start a simulator first).

python recipes/trl_environment.py --model_name_or_path Qwen/Qwen3-0.6B --dataset train.jsonl
"""

from __future__ import annotations

import zerosearch  # noqa: F401 (first: it sets what the libraries below read)

# isort: split
from dataclasses import dataclass, field
from functools import partial

from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import load_questions
from zerosearch.engines import SearchError
from zerosearch.engines.options import EngineOptions, make_engine
from zerosearch.environment import Curriculum, SearchEnvironment, answer_reward
from zerosearch.errors import UserError
from zerosearch.generation.loading import load_tokenizer, model_options
from zerosearch.noise import NoiseSchedule
from zerosearch.prompts import PROMPT_SETS, PromptSetName
from zerosearch.rollout.in_flight import close_engine


@dataclass
class RecipeArguments:
    """What to train on, and how it is asked."""

    dataset: str = field(metadata={"help": "A .jsonl or .parquet file, or a dataset on the Hub."})
    prompt: PromptSetName = field(default="paper", metadata={"help": "The prompt set: see zerosearch.prompts."})
    agent: str = field(default="tools", metadata={"help": "The agent whose prompt it is."})


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments, options, config, model = parse(RecipeArguments, EngineOptions, GRPOConfig, ModelConfig, argv=argv)
    prompts = PROMPT_SETS[arguments.prompt]
    (agent,) = prompts.choose([arguments.agent])
    engine = make_engine(options, prompts.simulator)
    curriculum = Curriculum(NoiseSchedule(0.0, 0.5), config.seed)  # Eq. 1
    config.model_init_kwargs = model_options(model, config)
    trainer = GRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=answer_reward,
        args=config,
        train_dataset=load_questions(arguments.dataset).map(lambda row: {"prompt": agent.messages(row["question"])}),
        processing_class=load_tokenizer(model.model_name_or_path),
        environment_factory=partial(SearchEnvironment, engine, curriculum),
        callbacks=[curriculum],
        peft_config=get_peft_config(model),
    )
    try:
        trainer.train()
    except SearchError as error:  # its message says what to do, no traceback would
        raise UserError(str(error)) from error
    finally:
        close_engine(engine)
    trainer.save_model(config.output_dir)


if __name__ == "__main__":
    main()
