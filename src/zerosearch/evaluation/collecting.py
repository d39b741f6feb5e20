"""Collect search traces: a policy answers questions with a real engine, and every search is kept (Section 3.3).

An output folder holds
    manifest.json        what is collected and with what; a later command must match it to go on
    trajectories.jsonl   a line a question, on the disk once it has ended: that question is not asked again
    traces.jsonl         a line a search, made from it
    collecting.json      counts and costs of the last command
Searches are paid for once even so if the engine has a cache: one that a kill cut off from its trajectory included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zerosearch.data import data_hash
from zerosearch.engines import SearchEngine, engine_identity
from zerosearch.engines.account import Limits, Spending
from zerosearch.errors import UserError
from zerosearch.evaluation.evaluate import check_same, versions
from zerosearch.files import JsonlLog, read_jsonl, sole_writer, write_json, write_jsonl
from zerosearch.generation import Generator, RemoteGenerator
from zerosearch.metrics import exact_match, f1
from zerosearch.prompts import PAPER, Agent
from zerosearch.rollout.loop import Event, RolloutSettings, Trajectory, run_rollouts

MAX_FAILED = 10  # questions that lost a search before the run is given up
MAX_LIVE = 64


def collect_traces(
    questions: Sequence[Mapping[str, Any]],
    generator: Generator | RemoteGenerator,
    engine: SearchEngine,
    settings: RolloutSettings,
    output_dir: Path,
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    max_live: int = MAX_LIVE,
    max_failed: int = MAX_FAILED,
    agent: Agent = PAPER.policy,
) -> dict[str, Any]:
    """Answer the questions, keep every search in `output_dir/traces.jsonl`, and return counts and costs.

    Rows are `{id, question, golden_answers, dataset}`. Goes on where an earlier command stopped. `about`
    (model, dataset, ...) goes into the manifest as it is. A question that lost a search is asked again next time;
    after `max_failed` of them the run ends. A limit ends it with what there is; `stopped` says so.
    Raises `UserError` for another collection in the folder, a refusal of the engine's (key, balance) and too many
    failures, and what the generator raises; nothing that was finished is lost.
    """
    manifest = {
        **(about or {}),
        "engine": engine_identity(engine),
        "data_sha256": data_hash(questions),
        "num_questions": len(questions),
        "seed": seed,
        "settings": asdict(settings),
    }
    with sole_writer(output_dir):
        collection = Collection(output_dir, manifest, engine.name)
        missing = [place for place in range(len(questions)) if place not in collection.finished]
        spending = Spending(generator, engine, limits or Limits())
        failures: list[str] = []

        def watch(index: int, trajectory: Trajectory, event: Event) -> None:
            if event == "end" and trajectory.outcome == "failed_search":
                failures.append(trajectory.error)
            elif event == "end":
                collection.add(missing[index], questions[missing[index]], trajectory)

        def may_go_on() -> bool:
            return spending.may_go_on() and len(failures) < max_failed

        if isinstance(generator, RemoteGenerator):
            max_live = min(max_live, 2 * generator.max_concurrency)  # so that little is under way at a limit
        try:
            run_rollouts(
                [questions[place] for place in missing],
                generator,
                engine,
                settings,
                keys=[(seed, 0, place, 0) for place in missing],
                progress=True,
                agent=agent,
                max_live=max_live,
                watch=watch,
                may_go_on=may_go_on,
            )
        finally:
            collection.close()
        if spending.refused:
            raise UserError(f"{spending.refused}; what was collected is kept, and the same command goes on")
        if len(failures) >= max_failed:
            raise UserError(f"{len(failures)} questions lost a search, the last one so: {failures[-1]}")
        results = {
            **collection.counts(),
            "missing": len(questions) - len(collection.finished),
            "lost_a_search": len(failures),
            "last_failure": failures[-1] if failures else None,
            "stopped": spending.stopped(),
            "this_command": spending.to_record(len(missing) - (len(questions) - len(collection.finished))),
            "versions": versions(),
        }
        write_json(output_dir / "collecting.json", results)
    return results


class Collection:
    """What has been collected, on the disk as it comes; `finished` holds the trajectories by the question's place."""

    def __init__(self, output_dir: Path, manifest: Mapping[str, Any], engine: str) -> None:
        self.engine = engine
        self.policy = manifest.get("model")
        manifest = json.loads(json.dumps(manifest))
        if (output_dir / "manifest.json").is_file():
            check_same(manifest, output_dir)
        write_json(output_dir / "manifest.json", manifest)
        path, traces_path = output_dir / "trajectories.jsonl", output_dir / "traces.jsonl"
        self.log = JsonlLog(path)
        self.finished = {row["place"]: row for _, row in read_jsonl(path)}
        # Made anew: a kill may have come between the two files.
        write_jsonl(traces_path, (trace for record in self.finished.values() for trace in self.traces_of(record)))
        self.traces = JsonlLog(traces_path)

    def add(self, place: int, question: Mapping[str, Any], trajectory: Trajectory) -> None:
        """Keep a trajectory that has ended."""
        record = {
            "place": place,
            **{name: question.get(name) for name in ("id", "dataset", "question")},
            "golden_answers": list(question["golden_answers"]),
            "answer": trajectory.answer,
            "outcome": trajectory.outcome,
            "em": exact_match(trajectory.answer, question["golden_answers"]),
            "f1": f1(trajectory.answer, question["golden_answers"]),
            "searches": [
                {"turn": number, "query": turn.content, "documents": list(turn.documents)}
                for number, turn in enumerate(trajectory.turns)
                if turn.latency_s is not None
            ],
        }
        self.log.append(record)
        self.traces.append(*self.traces_of(record))
        self.finished[place] = record

    def traces_of(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a trace for each search of a trajectory."""
        of_question = {name: record[name] for name in ("id", "dataset", "question", "golden_answers")}
        of_trajectory = {"policy_answer": record["answer"], **{name: record[name] for name in ("outcome", "em", "f1")}}
        for search in record["searches"]:
            yield {**of_question, **search, **of_trajectory, "engine": self.engine, "policy": self.policy}

    def counts(self) -> dict[str, Any]:
        """Count what is there by now, whichever command it came from."""
        records = list(self.finished.values())
        searches = [search for record in records for search in record["searches"]]
        return {
            "questions": len(records),
            "em": sum(record["em"] for record in records) / len(records) if records else None,
            "searches": len(searches),
            "documents": sum(len(search["documents"]) for search in searches),
            "searches_without_documents": sum(not search["documents"] for search in searches),
        }

    def close(self) -> None:
        self.log.close()
        self.traces.close()
