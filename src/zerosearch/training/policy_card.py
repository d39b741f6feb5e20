"""The card of a policy, README.md of its folder and on the Hub: how it was trained, and how it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData

from zerosearch.files import write_text
from zerosearch.metrics import METRICS
from zerosearch.prompts import PROMPT_SETS
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
    name = trainer.hub_model_id or str(folder)
    ask = f"python recipes/chat.py --model {name} --corpus corpus.jsonl --max_turns {trainer.args.max_turns}"
    named = [key for key, prompts in PROMPT_SETS.items() if prompts.policy == trainer.agent]
    ask += f" --prompt {named[0]}" if named else ""
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
    card = ModelCard.from_template(
        header,
        template_path=str(Path(__file__).with_suffix(".md")),
        title=Path(name).name,
        algorithm=trainer.args.algorithm if trainer.advantages is None else "an advantage function of its own",
        engine=trainer.engine.name,
        ask=ask,
        prompt=trainer.agent.template,
        made_with=json.dumps(made, indent=2, ensure_ascii=False),
    )
    write_text(folder / "README.md", f"{card}\n")
