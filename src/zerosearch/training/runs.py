"""The output folder of a training run: one writer, a fresh start or a checkpoint to resume; what the run has cost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trl import ModelConfig

from zerosearch.checkpoints import checkpoint_to_resume
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.account import cost_table
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, read_json, sole_writer
from zerosearch.generation import GenerationError
from zerosearch.generation.loading import whole_model
from zerosearch.training.config import SearchConfig

# What a run writes into its folder; a run that starts afresh there clears these, and nothing else.
WRITTEN = (
    *("checkpoint-*", "merged-*", "runs", "trajectories.jsonl", "engine_queries.json", "trainer_state.json"),
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "training_args.bin", "README.md"),
    *("config.json", "generation_config.json", "adapter_config.json", "chat_template.jinja", "added_tokens.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
)


@contextmanager
def training_run(config: SearchConfig, overwrite: bool) -> Iterator[str | None]:
    """Hold the output folder for this run and yield the checkpoint to resume from, or None for a fresh start.

    The main process clears what an earlier run has written there if `overwrite` says so. A failing engine ends the
    run in one sentence, with a checkpoint saved.
    Raises `UserError` if another run writes there, the folder is in use, or there is no checkpoint to resume.
    """
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, config.output_dir)
    with ExitStack() as held:
        if config.process_index == 0:
            if checkpoint is None:
                claim_output_dir(config.output_dir, overwrite)
            held.enter_context(sole_writer(Path(config.output_dir)))
            if checkpoint is None:
                clear(Path(config.output_dir))
        try:
            yield checkpoint
        except (SearchError, GenerationError) as error:  # their message says what to do, a traceback would not
            raise UserError(str(error)) from error


def clear(folder: Path) -> None:
    """Remove what an earlier training run has written."""
    for path in [path for pattern in WRITTEN for path in folder.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def model_options(model: ModelConfig, config: SearchConfig) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained`; without them TRL drops `--dtype` silently."""
    options = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return {name: value for name, value in options.items() if value is not None} | (config.model_init_kwargs or {})


def policy_weights(model: ModelConfig, config: SearchConfig) -> str:
    """Return the name of the policy's whole weights; an adapter is merged into its base first, once."""
    with config.main_process_first(local=False):
        return whole_model(
            model.model_name_or_path, Path(config.output_dir), model.model_revision, config.trust_remote_code
        )


def costs(config: SearchConfig, engine: SearchEngine) -> str:
    """Return the table of the run's searches and their costs (Table 8); "" where none was made."""
    counted = Path(config.output_dir, "engine_queries.json")
    if not counted.exists():
        return ""
    sent = read_json(counted)
    account: Any = getattr(engine, "account", None)
    return cost_table(sent, {engine.name: account.usd_of(sent.get(engine.name, 0))} if account else {})
