"""What a training run writes beside its weights: a few trajectories of each step, and how many searches it sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from typing import Any

from zerosearch.engines import SearchEngine
from zerosearch.engines.account import cost_table
from zerosearch.files import JsonlLog, read_json, read_jsonl, write_json, write_jsonl

TRAJECTORIES, QUERIES = "trajectories.jsonl", "engine_queries.json"
WRITTEN = (TRAJECTORIES, QUERIES)  # in the output folder, beside what TRL writes


def append_trajectories(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append the records of a step to the run's trajectories."""
    with closing(JsonlLog(folder / TRAJECTORIES)) as log:
        log.append(*records)


def forget_later_steps(folder: Path, step: int) -> None:
    """Keep the trajectories up to this step: what came later will be rolled out again."""
    path = folder / TRAJECTORIES
    if path.exists():
        records = (record for _, record in read_jsonl(path, skip_half_line=True))
        write_jsonl(path, takewhile(lambda record: record["step"] <= step, records))


def count_queries(folder: Path, engine: str, sent: int) -> None:
    """Add what was sent to an engine, retries included, to the run's count."""
    path = folder / QUERIES
    queries = read_json(path) if path.exists() else {}
    write_json(path, {**queries, engine: queries.get(engine, 0) + sent})


def costs(folder: Path, engine: SearchEngine) -> str:
    """Return the table of the run's searches and their costs (Table 8); "" where none was made."""
    if not (folder / QUERIES).exists():
        return ""
    sent = read_json(folder / QUERIES)
    account: Any = getattr(engine, "account", None)
    return cost_table(sent, {engine.name: account.usd_of(sent.get(engine.name, 0))} if account else {})
