"""Tune a simulator by TRL's SFTTrainer, resumably, and serve it for its measurement."""

from __future__ import annotations

import gc
import socket
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.files import write_text
from zerosearch.generation.loading import base_of_adapter, model_options, start_weights, unsharded_loading
from zerosearch.generation.tokenization import chat_messages
from zerosearch.prompts import SimulatorTemplate
from zerosearch.simulator.cards import simulator_card
from zerosearch.simulator.fidelity import Card, FidelityOptions, measure_simulator
from zerosearch.simulator.held_out import HeldOutQuery
from zerosearch.simulator.server import SERVED_ADAPTER, ServerDied, simulator_server

# Settings of transformers' that nothing here acts on.
WITHOUT_EFFECT = ("do_train", "do_predict", "hub_strategy", "hub_revision", "hub_always_push")


class Tuner(SFTTrainer):
    """An `SFTTrainer` that takes no step beyond the last when a finished run is resumed."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)


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
    if checkpoint and Path(checkpoint, "adapter_config.json").is_file() != model.use_peft:
        raise UserError(f"{checkpoint} is of another tuning, full or LoRA: resume with that, or start anew")
    if "prompt" in examples.column_names:
        examples = examples.map(
            lambda row: {name: chat_messages(tokenizer, row[name]) for name in ("prompt", "completion")}
        )
    model = replace(model, model_name_or_path=start_weights(model, training))
    training.model_init_kwargs = model_options(model, training)
    try:
        trainer = Tuner(
            model=model.model_name_or_path,
            args=training,
            train_dataset=examples,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:  # what TRL refuses
        raise UserError(f"these settings do not work: {error}") from error
    check_lengths(trainer, len(examples))
    trainer.train(resume_from_checkpoint=checkpoint)
    output_dir = Path(training.output_dir)
    trainer.save_model(str(output_dir / "adapter" if merge else output_dir))
    if merge and training.process_index == 0:
        save_merged(model, training, output_dir)
        tokenizer.save_pretrained(output_dir)
    return summary(trainer, model)


def check_settings(training: SFTConfig) -> None:
    """Raise `UserError` for a setting that would be ignored."""
    defaults = {field.name: field.default for field in fields(training)}
    for name in WITHOUT_EFFECT:
        if getattr(training, name) != defaults[name]:
            raise UserError(f"--{name} has no effect here: leave it out")


def check_lengths(trainer: SFTTrainer, num_examples: int) -> None:
    """Refuse examples that TRL has cut or dropped: the simulator would learn to stop in the middle of a document."""
    longest, prepared = trainer.args.max_length, trainer.train_dataset
    if longest is None or trainer.args.packing:
        return
    cut = num_examples - len(prepared) + sum(len(token_ids) >= longest for token_ids in prepared["input_ids"])
    if cut:
        raise UserError(
            f"{cut:,} of {num_examples:,} examples do not fit into {longest} tokens and would be cut; "
            "pass a larger --max_length, or build them with fewer --num_words"
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


def write_readme(
    folder: Path, made: Mapping[str, Any], template: SimulatorTemplate, repository: str | None, fidelity: str = ""
) -> str:
    """Write the model card of a simulator, and return the command that serves it: from the Hub if it goes there.

    `made` says how it was made, `base_model` included; `fidelity` is its measurement as Markdown.
    """
    is_adapter = base_of_adapter(str(folder)) is not None
    commands = [f"python recipes/serve_simulator.py --model {repository or folder}"]
    if repository and is_adapter:  # vLLM serves an adapter from a folder
        commands = [
            f"hf download {repository} --local-dir {folder.name}",
            f"python recipes/serve_simulator.py --model {folder.name}",
        ]
    card = simulator_card(
        title=(repository or folder.resolve().name).split("/")[-1],
        base_model=None if Path(made["base_model"]).exists() else made["base_model"],
        prompt=template if isinstance(template, str) else template.useful,
        about=made,
        fidelity=fidelity,
        serve=commands,
        adapter=is_adapter,
    )
    write_text(folder / "README.md", card)
    return commands[-1]


def measure_tuned(
    folder: Path,
    queries: Sequence[HeldOutQuery],
    options: FidelityOptions,
    template: SimulatorTemplate,
    dtype: str,
    about: Mapping[str, Any],
) -> Card:
    """Serve a simulator just tuned, beside the process that tuned it, and return its fidelity card.

    Raises `UserError` if that fails; the simulator is saved by then.
    """
    gc.collect()
    settings: dict[str, Any] = {"dtype": dtype}
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
        settings = {"vllm_arguments": ("--gpu-memory-utilization", "0.6")}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        with simulator_server(str(folder), port, **settings) as server:
            name = SERVED_ADAPTER if base_of_adapter(str(folder)) else None
            engine = SimulatedEngine(server.base_url, name, template)
            return measure_simulator(engine, queries, options, about)
    except (ServerDied, UserError) as error:
        again = f"python recipes/measure_fidelity.py --model {folder} --queries QUERIES"
        raise UserError(f"the simulator is saved, but could not be measured ({again}): {error}") from error
