"""Tune a model by TRL's SFTTrainer, resumably: a simulator, or a policy at its cold start."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from zerosearch.checkpoints import FinishedRuns
from zerosearch.errors import UserError, user_mistakes
from zerosearch.generation.loading import check_checkpoint, fit_to_cpu, model_options, start_weights, unsharded_loading
from zerosearch.generation.tokenization import chat_messages
from zerosearch.hub import create_repository
from zerosearch.training.micro_batches import compact_lm_head

# Settings of transformers' that nothing here acts on.
WITHOUT_EFFECT = ("do_train", "do_predict", "hub_strategy", "hub_revision", "hub_always_push")


@dataclass
class TuningConfig(SFTConfig):
    """TRL's settings for a tuning of ours, fitted to the machine; a recipe adds its values."""

    report_to: str = "none"
    save_strategy: str = "no"

    def __post_init__(self) -> None:
        fit_to_cpu(self)
        super().__post_init__()


class Tuner(FinishedRuns, SFTTrainer):
    """TRL's trainer, whose finished runs take no further step."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with compact_lm_head():
            return super().compute_loss(*args, **kwargs)


def tune(
    model: ModelConfig,
    training: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    checkpoint: str | None = None,
    merge: bool = False,
) -> dict[str, Any]:
    """Tune a model on examples, save it, and return what to say of its training. An adapter is merged first.

    An example is `{prompt, completion}`, chat messages, or `{input_ids, labels}`, as TRL takes them.
    With `merge`, the adapter goes to `adapter/` and the output folder holds the model with the adapter merged into it.
    Raises `UserError` for settings that do not work together, and for examples longer than `max_length`.
    """
    check_settings(training)
    check_checkpoint(checkpoint, model.use_peft)
    if "prompt" in examples.column_names:
        examples = examples.map(
            lambda row: {name: chat_messages(tokenizer, row[name]) for name in ("prompt", "completion")}
        )
    model = replace(model, model_name_or_path=start_weights(model, training))
    training.model_init_kwargs = model_options(model, training)
    with user_mistakes(ImportError, RuntimeError, TypeError):  # TRL's word on what does not fit together
        trainer = Tuner(
            model=model.model_name_or_path,
            args=training,
            train_dataset=examples,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    check_lengths(trainer, len(examples))
    trainer.train(resume_from_checkpoint=checkpoint)
    output_dir = Path(training.output_dir)
    trainer.save_model(str(output_dir / "adapter" if merge else output_dir))
    if merge and training.process_index == 0:
        save_merged(model, training, output_dir)
        tokenizer.save_pretrained(output_dir)
    return summary(trainer, model)


def take_over_push(training: SFTConfig) -> str | None:
    """Make the repository that `push_to_hub` asks for and return its whole id; None where this process pushes nothing.

    TRL is kept from pushing: it would do so before all is written, with a card of its own.
    """
    pushes, training.push_to_hub = training.push_to_hub and training.process_index == 0, False
    name = training.hub_model_id or Path(training.output_dir).name
    return create_repository(name, "model", training.hub_private_repo) if pushes else None


def check_settings(training: SFTConfig) -> None:
    """Raise `UserError` for a setting that would be ignored."""
    defaults = {field.name: field.default for field in fields(training)}
    for name in WITHOUT_EFFECT:
        if getattr(training, name) != defaults[name]:
            raise UserError(f"--{name} has no effect here: leave it out")


def check_lengths(trainer: SFTTrainer, num_examples: int) -> None:
    """Refuse examples that TRL has cut or dropped: the model would learn to stop in the middle."""
    longest, prepared = trainer.args.max_length, trainer.train_dataset
    if longest is None or trainer.args.packing:
        return
    cut = num_examples - len(prepared) + sum(len(token_ids) >= longest for token_ids in prepared["input_ids"])
    if cut:
        raise UserError(
            f"{cut:,} of {num_examples:,} examples do not fit into {longest} tokens and would be cut; "
            "pass a larger --max_length, or make them shorter"
        )


def save_merged(model: ModelConfig, training: SFTConfig, output_dir: Path) -> None:
    """Save the base, in its own precision and not in 4 bits, with `adapter/` merged into it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": training.trust_remote_code, **model_options(model, training)}
    with unsharded_loading():
        base = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, **options)
        PeftModel.from_pretrained(base, output_dir / "adapter").merge_and_unload().save_pretrained(output_dir)


def summary(trainer: SFTTrainer, model: ModelConfig) -> dict[str, Any]:
    """Return what the card says of the training."""
    training, losses = trainer.args, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    made = {
        "examples": len(trainer.train_dataset),
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)),
        "batch_size": training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
        "steps": trainer.state.global_step,
        "last_loss": losses[-1] if losses else None,
        "seed": training.seed,
    }
    return made | ({"lora_r": model.lora_r, "lora_alpha": model.lora_alpha} if model.use_peft else {})
