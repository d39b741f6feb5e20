"""Collect search traces: an evaluation with a real engine, of which every search is kept (Section 3.3).

Beside what an evaluation writes, the output folder gets traces.jsonl, a line a search: question, golden answers,
query, documents, how the trajectory ended.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from zerosearch.errors import UserError
from zerosearch.evaluation.answering import read_trajectories
from zerosearch.evaluation.evaluate import evaluate
from zerosearch.files import read_json, write_jsonl


def collect_traces(output_dir: Path, **arguments: Any) -> dict[str, Any]:
    """Evaluate, resuming what is in the folder, and write `traces.jsonl`; return the results.

    Takes and raises what `evaluate` does. Traces of what was finished are written in any case, but never into a folder
    that is refused, such as one of another evaluation.
    """
    try:
        return evaluate(output_dir=output_dir, resume=True, **arguments)
    finally:
        is_refused = isinstance(sys.exception(), UserError)
        if not is_refused and (output_dir / "trajectories.jsonl").is_file():
            write_traces(output_dir)


def write_traces(output_dir: Path) -> None:
    """Write traces.jsonl from the trajectories in a folder, except for those that lost a search."""
    manifest = read_json(output_dir / "manifest.json")
    traces = (
        {
            **{name: record[name] for name in ("id", "dataset", "question", "golden_answers")},
            **search,
            "policy_answer": record["answer"],
            **{name: record[name] for name in ("outcome", "em", "f1")},
            "engine": manifest["engine"],
            "policy": manifest.get("model"),
        }
        for record in read_trajectories(output_dir / "trajectories.jsonl")
        if record["outcome"] != "failed_search"
        for search in record["search_results"]
    )
    write_jsonl(output_dir / "traces.jsonl", traces)
