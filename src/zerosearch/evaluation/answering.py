"""Answer questions by the rollout of training, every trajectory on file as it ends.

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

FIELDS: dict[str, Any] = {  # of `Trajectory.to_record`, as far as they are read again, with their types
    "id": str | None,
    "dataset": str | None,
    "step": int | None,
    "question": str,
    "golden_answers": list,
    "answer": str | None,
    "outcome": str,
    "searches": int,
    "turns": int,
    "em": int | float,
    "f1": int | float,
    "segments": list,
}
PLACE = {"row": int, "sample": int}  # which an evaluation adds
MAX_LIVE = 512  # trajectories in flight: enough to keep a GPU busy, few enough that the first end soon

Record = dict[str, Any]  # a line of trajectories.jsonl


@dataclass
class GreedySettings(RolloutSettings):
    """The budgets of the rollout, and how it samples: the likeliest token always."""

    temperature: float = 0.0  # the paper does not say; its code sampled at 1.0 (our choice)


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
    balance), and when `max_failed` questions have lost a search.
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
        if event != "end":
            return
        row, sample = missing[index]
        record = trajectory.to_record(rows[row], generator.tokenizer.decode(trajectory.prompt_ids))
        record |= {"row": row, "sample": sample, "search_results": search_results(trajectory)}
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


def read_trajectories(path: Path, fields: Mapping[str, Any] = FIELDS | PLACE) -> list[Record]:
    """Read trajectories, except for a last line that a kill cut short. Raises `UserError` for another broken one."""
    records = []
    for place, record in read_jsonl(path, skip_half_line=True):
        for name, kind in fields.items():
            if name not in record or not isinstance(record[name], kind):
                found = f"its {name} is {str(record[name])[:60]!r}" if name in record else f"it lacks {name}"
                raise UserError(f"{place} is not a trajectory: {found}")
        if not record["golden_answers"] or not all(isinstance(answer, str) for answer in record["golden_answers"]):
            raise UserError(f"{place} is not a trajectory: its golden_answers are not texts, one at least")
        records.append(record)
    return records


def _finished(path: Path, manifest: Mapping[str, Any]) -> dict[tuple[int, int], Record]:
    """Return the trajectories of an earlier command by row and sample, without those that lost a search.

    Raises `UserError` that names the first difference between its manifest and that of this command, or that there is
    no manifest.
    """
    manifest_path = path.with_name("manifest.json")
    if not manifest_path.is_file():
        if path.exists():
            raise UserError(f"{path} is not an evaluation's: there is no manifest.json beside it; name another folder")
        return {}
    stored, wanted = _flat(read_json(manifest_path)), _flat(manifest)
    for name in {**wanted, **stored}:
        if stored.get(name) != wanted.get(name):
            difference = f"{name} is {stored.get(name)!r} there, and {wanted.get(name)!r} here"
            raise UserError(
                f"{path.parent} holds another evaluation, which cannot be resumed as this one: {difference}; name "
                "another folder"
            )
    JsonlLog(path).close()  # drops half a line, and says so
    records = read_trajectories(path)
    return {(one["row"], one["sample"]): one for one in records if one["outcome"] != "failed_search"}


def _flat(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with dotted names, without time limits: to raise one is what a resume may be for."""
    flat: dict[str, Any] = {}
    for name, value in manifest.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if not name.endswith("_timeout_s")}
