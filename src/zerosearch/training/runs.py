"""What a training run needs around its trainer: the weights to start from, and what its searches have cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import ModelConfig

from zerosearch.engines import SearchEngine
from zerosearch.engines.account import cost_table
from zerosearch.files import read_json
from zerosearch.generation.loading import whole_model
from zerosearch.training.config import SearchConfig

WRITTEN = ("trajectories.jsonl", "engine_queries.json")  # by the trainer, beside what TRL writes


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
