"""The card of a policy, README.md of its folder and on the Hub: how it was trained, and how it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData

from zerosearch.hub import tuned_model, write_card
from zerosearch.metrics import METRICS
from zerosearch.prompts import PROMPT_SETS, Agent
from zerosearch.training.runs import QUERIES, queries_in

if TYPE_CHECKING:
    from zerosearch.training.trainer import SearchTrainer

SETTINGS = (
    *("learning_rate", "beta", "mask_observations", "num_generations", "generation_batch_size", "temperature", "seed"),
    *("max_turns", "max_turn_tokens", "max_observation_tokens", "max_trajectory_tokens"),
)


def describe_policy(trainer: SearchTrainer) -> None:
    """Replace the text of TRL's card, which is about GRPO and a pipeline, and keep its tags, base and dataset."""
    folder, log = Path(trainer.args.output_dir), trainer.state.log_history
    trl_data = ModelCard.load(folder / "README.md").data
    header = ModelCardData(
        library_name="peft" if is_peft_model(trainer.model) else "transformers",
        pipeline_tag="text-generation",
        tags=trl_data.tags,
        base_model=trl_data.base_model,
        datasets=trl_data.datasets,
    )
    made: dict[str, Any] = {"steps": trainer.state.global_step, "rewards": trainer.reward_func_names}
    made |= {setting: getattr(trainer.args, setting) for setting in SETTINGS}
    for value in ("reward", "search/p_noise", *(f"eval_{metric}" for metric in METRICS)):
        if logged := [entry[value] for entry in log if value in entry]:
            made[value] = {"first": logged[0], "last": logged[-1]}
    made["searches"] = queries_in(folder / QUERIES)
    algorithm = trainer.args.algorithm if trainer.advantages is None else "an advantage function of its own"
    trained = f"by {algorithm}, with {trainer.engine.name} to answer its searches"
    _write(folder, header, trainer.agent, trained, made, trainer.hub_model_id)


def describe_cold_start(folder: Path, agent: Agent, made: Mapping[str, Any], repository: str | None) -> None:
    """Write the card of a policy that has learned from demonstrations; `made` says how, `base_model` included."""
    header = tuned_model(folder, made["base_model"])
    _write(folder, header, agent, f"so far by {made['examples']:,} demonstrations alone", made, repository)


def _write(
    folder: Path, header: ModelCardData, agent: Agent, trained: str, made: Mapping[str, Any], repository: str | None
) -> None:
    name = repository or folder
    ask = f"python recipes/chat.py --model {name} --corpus corpus.jsonl --max_turns {made['max_turns']}"
    named = [key for key, prompts in PROMPT_SETS.items() if prompts.policy == agent]
    ask += f" --prompt {named[0]}" if named else ""
    words = {"trained": trained, "ask": ask, "prompt": agent.template}
    write_card(folder, Path(__file__).with_suffix(".md"), header, made, repository, **words)
