"""Train a policy to search. The decisions stand at the top: copy this file, change one, run both.

    accelerate launch recipes/grpo.py --config recipes/configs/qwen2.5-3b.yaml
    python recipes/grpo.py --config recipes/configs/hotpotqa-smoke.yaml --output_dir outputs/smoke

A value comes from the dataclasses' defaults, then `--config FILE.yaml`, then flags. `recipes/accelerate/` has launch
configurations for one and several devices. With `--engine simulated`, start a simulator first
(recipes/serve_simulator.py). Algorithm, noise, masking, budgets and sampling are flags: see SearchConfig.
"""

from __future__ import annotations

import zerosearch  # noqa: F401 (first: it sets what the libraries below read)

# isort: split
from dataclasses import replace
from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from zerosearch.checkpoints import training_run
from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import load_questions
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.options import EngineOptions, TrainingEngineOptions, make_engine
from zerosearch.errors import UserError, user_mistakes
from zerosearch.generation import GenerationError
from zerosearch.generation.loading import check_checkpoint, load_tokenizer, model_options, start_weights
from zerosearch.prompts import PROMPT_SETS, Agent, PromptSet
from zerosearch.rollout.in_flight import close_engine
from zerosearch.training.advantages import AdvantageFunction
from zerosearch.training.config import RunOptions, SearchConfig
from zerosearch.training.rewards import f1_reward
from zerosearch.training.runs import WRITTEN, costs
from zerosearch.training.sentinel import Collapse, train_watched
from zerosearch.training.trainer import NoiseFunction, SearchTrainer

# What the answers are worth: functions of TRL's signature, added up. Each gets the columns of the dataset and, for
# every row, `answer`, `outcome` and `trajectories` (its turns with their queries, documents, noise and times).
REWARDS = [f1_reward]

# How rewards are credited. None: as --algorithm says. Or a function of the rewards (N,), the N trajectories and the
# size of a group that returns one number a trajectory, or for each a list of one number a turn or a token. It gets the
# columns of the dataset, too, and `log_likelihoods` (zerosearch.training.likelihoods).
ADVANTAGES: AdvantageFunction | None = None

# How likely a search is noisy. None: Eq. 1, from --noise_start to --noise_end. Or a function of the step, the number
# of steps and TRL's log so far that returns a probability.
NOISE: NoiseFunction | None = None


def choose_agent(prompts: PromptSet) -> Agent:
    """Return how the policy is asked and how documents are shown to it; `dataclasses.replace` makes another."""
    return prompts.policy


def choose_engine(options: EngineOptions, prompts: PromptSet) -> SearchEngine:
    """Return the engine that the policy learns from; return one of your own here to train against it."""
    return make_engine(options, prompts.simulator)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check what can be checked early, then train, save and push."""
    usage = "grpo.py --config FILE.yaml [--flag VALUE ...]   (--help lists all flags)"
    arguments, options, config, model = parse(
        RunOptions, TrainingEngineOptions, SearchConfig, ModelConfig, argv=argv, usage=usage
    )
    if (arguments.eval_dataset is None) != (config.eval_strategy == "no"):
        raise UserError("an evaluation in training needs both: --eval_dataset, and --eval_strategy steps or epoch")
    prompts = PROMPT_SETS[arguments.prompt]
    with training_run(config, arguments.overwrite_output_dir, WRITTEN) as checkpoint:
        check_checkpoint(checkpoint, model.use_peft)
        tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, config.trust_remote_code)
        questions = load_questions(arguments.dataset, arguments.dataset_split, arguments.dataset_limit)
        engine = choose_engine(options, prompts)
        eval_questions, eval_engine = None, engine
        if arguments.eval_dataset:
            eval_questions = load_questions(
                arguments.eval_dataset, arguments.eval_dataset_split, arguments.eval_dataset_limit
            )
        if arguments.eval_engine:  # the price of an hour is that of the machine behind the other one
            eval_options = replace(options, engine=arguments.eval_engine, engine_usd_per_hour=0.0)
            eval_engine = make_engine(eval_options, prompts.simulator)
        config.model_init_kwargs = model_options(model, config)
        with user_mistakes(ImportError, RuntimeError):  # TRL's word on what does not fit together
            trainer = SearchTrainer(
                model=start_weights(model, config),
                reward_funcs=REWARDS,
                args=config,
                engine=engine,
                agent=choose_agent(prompts),
                advantages=ADVANTAGES,
                noise=NOISE,
                train_dataset=questions,
                eval_dataset=eval_questions,
                eval_engine=eval_engine,
                processing_class=tokenizer,
                peft_config=get_peft_config(model),
                quantization_config=get_quantization_config(model),
            )
        try:
            train_watched(trainer, checkpoint)
            trainer.save_model(config.output_dir)
            trainer.save_state()
        except (SearchError, GenerationError, Collapse) as error:  # their message says what to do, no traceback would
            raise UserError(str(error)) from error
        finally:
            close_engine(engine)
            if eval_engine is not engine:
                close_engine(eval_engine)
        if config.push_to_hub:
            trainer.push_to_hub(dataset_name=None if Path(arguments.dataset).exists() else arguments.dataset)
        if config.process_index == 0:
            print(costs(Path(config.output_dir), engine, eval_engine))


if __name__ == "__main__":
    main()
