"""Collect search traces: a policy answers questions with a real engine, and every search is kept (Section 3.3).

Beside what `answering` writes, the output folder gets
    traces.jsonl      a line a search: question, golden answers, query, documents, how the trajectory ended
    collecting.json   counts and costs of the last command
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zerosearch.engines import SearchEngine
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import Record, answer_questions, read_trajectories
from zerosearch.evaluation.evaluate import versions
from zerosearch.files import read_json, write_json, write_jsonl
from zerosearch.generation import Generator, RemoteGenerator
from zerosearch.rollout.loop import RolloutSettings

GOES_ON = "what was finished is kept, and the same command goes on"


def collect_traces(
    questions: Sequence[Mapping[str, Any]],
    generator: Generator | RemoteGenerator,
    engine: SearchEngine,
    settings: RolloutSettings,
    output_dir: Path,
    *,
    max_failed: int,
    **options: Any,
) -> dict[str, Any]:
    """Answer the questions, write every search to `output_dir/traces.jsonl`, and return counts and costs.

    Goes on where an earlier command stopped. The options are those of `answer_questions`. A question that lost a
    search is asked again next time; after `max_failed` of them the run ends. A limit ends it with what there is;
    `stopped` says so.
    Raises `UserError` for another collection in the folder, a refusal of the engine's (key, balance) and too many
    failures, and what the generator raises; traces of what was finished are written all the same.
    """
    try:
        answers = answer_questions(
            questions, generator, engine, settings, output_dir, resume=True, max_failed=max_failed, **options
        )
    finally:
        if (output_dir / "trajectories.jsonl").is_file():
            write_traces(output_dir)
    lost, spending = answers.lost, answers.spending
    if spending.refused:
        raise UserError(f"{spending.refused}; {GOES_ON}")
    if len(lost) >= max_failed:
        raise UserError(f"{len(lost)} questions lost a search, the last one so: {lost[-1]}")
    records = [record for record in answers.records if record["outcome"] != "failed_search"]
    searches = [search for record in records for search in record["search_results"]]
    results = {
        "questions": len(records),
        "em": sum(record["em"] for record in records) / len(records) if records else None,
        "searches": len(searches),
        "documents": sum(len(search["documents"]) for search in searches),
        "searches_without_documents": sum(not search["documents"] for search in searches),
        "missing": answers.num_wanted - len(records),
        "lost_a_search": len(lost),
        "last_failure": lost[-1] if lost else None,
        "stopped": spending.stopped(),
        "this_command": spending.to_record(answers.num_new - len(lost)),
        "versions": versions(),
    }
    write_json(output_dir / "collecting.json", results)
    return results


def write_traces(output_dir: Path) -> None:
    """Write traces.jsonl from the trajectories in a folder, except for those that lost a search."""
    manifest = read_json(output_dir / "manifest.json")
    records = read_trajectories(output_dir / "trajectories.jsonl")
    traces = (trace for record in records if record["outcome"] != "failed_search" for trace in _traces(record))
    whose = {"engine": manifest["engine"], "policy": manifest.get("model")}
    write_jsonl(output_dir / "traces.jsonl", (trace | whose for trace in traces))


def _traces(record: Record) -> Iterator[dict[str, Any]]:
    for search in record["search_results"]:
        yield {
            **{name: record[name] for name in ("id", "dataset", "question", "golden_answers")},
            **search,
            "policy_answer": record["answer"],
            **{name: record[name] for name in ("outcome", "em", "f1")},
        }
