"""What a training run writes beside its weights, and what its searches have cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zerosearch.engines import SearchEngine
from zerosearch.engines.account import cost_table
from zerosearch.files import read_json
from zerosearch.training.config import SearchConfig

WRITTEN = ("trajectories.jsonl", "engine_queries.json")  # by the trainer, beside what TRL writes


def costs(config: SearchConfig, engine: SearchEngine) -> str:
    """Return the table of the run's searches and their costs (Table 8); "" where none was made."""
    counted = Path(config.output_dir, "engine_queries.json")
    if not counted.exists():
        return ""
    sent = read_json(counted)
    account: Any = getattr(engine, "account", None)
    return cost_table(sent, {engine.name: account.usd_of(sent.get(engine.name, 0))} if account else {})
