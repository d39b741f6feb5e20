"""The output folder of a training run: one writer, a fresh start or a checkpoint to resume, and no secrets in it.

A checkpoint is written file by file, `trainer_state.json` last, and older ones are removed after that. So a run killed
at any moment leaves a whole one behind it: the last whose `trainer_state.json` can be read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, sole_writer

if TYPE_CHECKING:
    from transformers import TrainingArguments


# What TRL's trainers write into their output folder.
WRITTEN = (
    *("checkpoint-*", "merged-*", "runs", "completions", "README.md", "trainer_state.json", "training_args.bin"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "adapter_config.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)


class FinishedRuns:
    """Mixed into a Trainer of transformers, which by itself takes one more step when a finished run is resumed."""

    def _run_epoch(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc] # of the Trainer


@contextmanager
def training_run(config: TrainingArguments, overwrite: bool, written: Sequence[str] = ()) -> Iterator[str | None]:
    """Hold the output folder for this run, and yield the checkpoint to resume from, or None for a fresh start.

    A fresh start with `overwrite` clears what an earlier run has written: WRITTEN, and the recipe's own names or
    patterns, `written`. Only the main process does any of this. The arguments are not saved: they may hold secrets.
    Raises `UserError` if another run holds the folder, it is in use, or there is no checkpoint to resume from.
    """
    keep_arguments_private(config)
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, str(config.output_dir))
    if config.process_index != 0:
        yield checkpoint
        return
    folder = Path(str(config.output_dir))
    if checkpoint is None:
        claim_output_dir(folder, overwrite)
    with sole_writer(folder):
        if checkpoint is None:
            clear(folder, [*WRITTEN, *written])
        yield checkpoint


def clear(folder: Path, written: Sequence[str]) -> None:
    """Remove what a run has written into its folder, by name or pattern; of links, only the link.

    Raises `UserError` if there is something to remove and the folder holds the current one, as "" and "." do: files of
    these names are hardly a run's.
    """
    found = [path for pattern in written for path in folder.glob(pattern)]
    if found and Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"the output folder {folder} holds the current folder; nothing is overwritten there")
    for path in found:
        if path.name.startswith("checkpoint-") and not path.name.removeprefix("checkpoint-").isdigit():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def keep_arguments_private(config: TrainingArguments) -> None:
    """Move `--hub_token` to HF_TOKEN, where the Hub's client looks, and keep a Trainer from saving its arguments.

    It would pickle them into training_args.bin beside each model, and upload that; nothing reads the file.
    """
    from transformers import trainer

    if config.hub_token:
        os.environ["HF_TOKEN"], config.hub_token = config.hub_token, None
    trainer.TRAINING_ARGS_NAME = os.devnull  # joined to a folder, it stays /dev/null


def checkpoint_to_resume(asked: str | None, output_dir: str) -> str | None:
    """Return the checkpoint to go on from: the folder named, or for "true" the last whole one in the output folder.

    None for None and "false". Raises `UserError` if there is none.
    """
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        if not is_whole(Path(asked)):
            raise UserError(f"there is no checkpoint to resume from: {asked}")
        return asked
    whole = whole_checkpoints(Path(output_dir))
    if not whole:
        raise UserError(f"there is no checkpoint to resume from: {output_dir}")
    return str(whole[max(whole)])


def whole_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in a run's folder that were written to their end, by step."""
    found = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return {int(step): path for path, step in found.items() if step.isdigit() and is_whole(path)}


def is_whole(checkpoint: Path) -> bool:
    """Say whether a checkpoint was written to its end."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
