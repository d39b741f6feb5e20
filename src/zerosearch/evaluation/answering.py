"""Answer questions by the rollout of training, every trajectory on file as it ends: for evaluation and collection.

An output folder holds
    manifest.json        who answers what, and how; written first, and a resume must match it
    trajectories.jsonl   a line a trajectory, as they end; in the order of the questions once all have
What is on file is not asked again by a resume, whatever stopped the command: a kill, an error, or a limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zerosearch.data import data_hash
from zerosearch.engines import SearchEngine, SearchRequest, SearchResult, engine_identity
from zerosearch.engines.account import Limits, Spending
from zerosearch.errors import UserError
from zerosearch.files import JsonlLog, read_json, read_jsonl, write_json, write_jsonl
from zerosearch.generation import Generator, RemoteGenerator
from zerosearch.generation.chat_endpoint import EndpointGenerator
from zerosearch.prompts import PAPER, Agent
from zerosearch.rollout.loop import Event, RolloutSettings, run_rollouts
from zerosearch.rollout.trajectory import Trajectory

RECORD_COLUMNS = "row sample dataset id question golden_answers answer outcome searches turns".split()
MAX_LIVE = 512  # trajectories in flight: enough to keep a GPU busy, few enough that the first end soon

Record = dict[str, Any]  # a line of trajectories.jsonl


class NoEngine:
    """Stands where an agent that never searches has its engine."""

    name = "none"
    max_concurrency = 1

    async def search(self, request: SearchRequest) -> SearchResult:
        raise AssertionError("an agent that never searches has searched")

    async def aclose(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Answers:
    """The trajectories on file, in the order of the questions, out of `num_wanted`; and what the command spent."""

    manifest: dict[str, Any]
    records: list[Record]
    num_wanted: int
    num_new: int  # of this command
    spending: Spending

    @property
    def lost(self) -> list[str]:
        """Return the errors of the trajectories that lost a search."""
        return [record["error"] for record in self.records if record["outcome"] == "failed_search"]


def answer_questions(
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
    max_failed: int | None = None,
) -> Answers:
    """Answer the questions, rows `{id, question, golden_answers, dataset}`, and write `trajectories.jsonl`.

    `engine` may be `None` for an agent that never searches. `p_noise` is for the simulated engine: how likely a search
    is asked for noisy documents. `seed` keys sampling and noise. `num_samples` trajectories answer each question.
    `about` (model, dataset, ...) goes into the manifest as it is. With `resume`, what `output_dir` holds of the same
    manifest is kept; trajectories that lost a search are rolled out again.
    It ends early at one of the `limits` or of the engine's own, where the engine refuses (a wrong key, an empty
    balance), and after `max_failed` lost searches.
    Raises `UserError` if `output_dir` holds another manifest than the one to resume.
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
    path = output_dir / "trajectories.jsonl"
    records = _finished(path, json.loads(json.dumps(manifest))) if resume else {}
    write_json(output_dir / "manifest.json", manifest)
    (output_dir / "results.json").unlink(missing_ok=True)
    write_jsonl(path, records.values())
    log = JsonlLog(path)
    places = [(row, sample) for row in range(len(rows)) for sample in range(num_samples)]
    missing = [place for place in places if place not in records]
    spending = Spending(generator, engine, limits or Limits())
    num_failed = 0

    def watch(index: int, trajectory: Trajectory, event: Event) -> None:
        nonlocal num_failed
        if event == "end":
            row, sample = missing[index]
            prompt = generator.tokenizer.decode(trajectory.prompt_ids)
            record = trajectory.to_record(rows[row], prompt) | {"row": row, "sample": sample}
            record["search_results"] = search_results(trajectory)
            if isinstance(generator, EndpointGenerator):  # its turns, and its notes on documents
                record["usage"] = asdict(generator.usage_of([index, index + len(missing)]))
            if trajectory.error:
                record["error"] = trajectory.error
            log.append(record)
            records[row, sample] = record
            num_failed += trajectory.outcome == "failed_search"

    if isinstance(generator, RemoteGenerator):
        max_live = min(max_live, 2 * generator.max_concurrency)  # so that few are in flight when a limit is reached
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
            watch=watch,
            may_go_on=lambda: spending.may_go_on() and (max_failed is None or num_failed < max_failed),
        )
    finally:
        log.close()
    in_order = [records[place] for place in sorted(records)]
    write_jsonl(path, in_order)
    return Answers(manifest, in_order, len(places), len(in_order) - len(places) + len(missing), spending)


def search_results(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Return each search with its documents, whole, and the turn it belongs to; `None` for one before the first."""
    turns = enumerate(trajectory.turns)
    numbered = [(None, trajectory.lookup), *turns] if trajectory.lookup else list(turns)
    return [
        {"turn": number, "query": turn.content, "documents": list(turn.documents)}
        for number, turn in numbered
        if turn.latency_s is not None
    ]


def check_samples(num_samples: int, settings: RolloutSettings) -> None:
    """Raise `UserError` for a number of samples that cannot be, or that would all be the same."""
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}: it must be at least 1")
    if num_samples > 1 and settings.temperature == 0.0:
        raise UserError("num_samples above 1 needs a temperature above 0: greedy samples are all the same")


def read_trajectories(path: Path) -> list[Record]:
    """Read trajectories, except for a last line that a kill cut short. Raises `UserError` for another broken one."""
    records = []
    for place, record in read_jsonl(path, skip_half_line=True):
        lacks = [name for name in RECORD_COLUMNS if name not in record]
        if lacks:
            raise UserError(f"{place} is not a trajectory of an evaluation: it lacks {', '.join(lacks)}")
        records.append(record)
    return records


def _finished(path: Path, manifest: Mapping[str, Any]) -> dict[tuple[int, int], Record]:
    """Return the trajectories of an earlier command by row and sample, without those that lost a search."""
    if not (path.parent / "manifest.json").is_file():
        return {}
    _check_same(manifest, path.parent)
    JsonlLog(path).close()  # drops half a line, and says so
    records = read_trajectories(path)
    return {(one["row"], one["sample"]): one for one in records if one["outcome"] != "failed_search"}


def _check_same(manifest: Mapping[str, Any], output_dir: Path) -> None:
    """Raise `UserError` that names the first difference between the manifest of a folder and that of this command.

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
