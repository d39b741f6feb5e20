"""What training and evaluation left in a run's folder:

results.json                                         the run in short
policy/trainer_state.json                            the log over steps
policy/trajectories.jsonl                            trajectories sampled in training
evaluation/{before,after}-ENGINE/results.json        scores with their intervals
evaluation/{before,after}-ENGINE/trajectories.jsonl  what the policy did
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerosearch.errors import UserError
from zerosearch.evaluation.tables import is_finite
from zerosearch.files import read_json

SIMULATED = "simulated"  # the one engine that is not real
POLICIES = ("before", "after")  # training

Scores = dict[str, Any]  # the contents of an evaluation's results.json


@dataclass(frozen=True)
class Run:
    """What a run left in its folder; what is missing is empty."""

    folder: Path
    results: dict[str, Any]
    log: list[dict[str, Any]]  # one entry a logged step, in order
    scores: dict[str, dict[str, Scores]]  # engine, then "before" or "after"; real engines come first

    @property
    def engine(self) -> str | None:
        """The engine of the headline: the one results.json names, else the first evaluated."""
        return self.results.get("engine") or next(iter(self.scores), None)

    @property
    def evaluations(self) -> list[tuple[str, str, Scores]]:
        """The evaluations as (engine, "before" or "after", scores), real engines first."""
        return [(engine, policy, scores) for engine, both in self.scores.items() for policy, scores in both.items()]

    def headline(self, policy: str) -> Scores:
        """Return the scores before or after training that the page opens with; empty if there are none."""
        return self.scores.get(self.engine or "", {}).get(policy, {})

    def notes(self) -> list[str]:
        """Return a sentence on each file that is missing."""
        lacks = {
            "results.json": "seed, durations and the count of real-engine queries are not known",
            "policy/trainer_state.json": "there are no plots over steps",
            "policy/trajectories.jsonl": "no trajectories of training are shown",
        }
        for engine in dict.fromkeys([*([self.engine] if self.engine else []), *self.scores]):
            for policy in POLICIES:
                folder = f"evaluation/{policy}-{engine}"
                lacks[f"{folder}/results.json"] = f"no scores with {engine} {policy} training"
                if engine == self.engine:
                    lacks[f"{folder}/trajectories.jsonl"] = f"no trajectories {policy} training are shown"
        notes = [f"{name} is missing: {why}." for name, why in lacks.items() if not (self.folder / name).is_file()]
        state = "policy/trainer_state.json"
        if not self.log and (self.folder / state).is_file():
            notes.append(f"{state} holds no step: {lacks[state]}.")
        return notes


def read_run(run_dir: Path) -> Run:
    """Read a run's folder.

    Raises `UserError` if there is no such folder, it holds none of the files, or a file is malformed.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    results, log = _read_json(folder / "results.json"), read_log(folder / "policy" / "trainer_state.json")
    scores: dict[str, dict[str, Scores]] = {}
    for policy in POLICIES:
        for path in folder.glob(f"evaluation/{policy}-*/results.json"):
            scores.setdefault(path.parent.name.removeprefix(f"{policy}-"), {})[policy] = _read_scores(path)
    scores = {engine: scores[engine] for engine in sorted(scores, key=lambda name: (name == SIMULATED, name))}
    if results is None and log is None and not scores:
        raise UserError(
            f"{folder} holds no run: none of results.json, policy/trainer_state.json, "
            "evaluation/{before,after}-ENGINE/results.json is there"
        )
    return Run(folder, results or {}, log or [], scores)


def outcome(folder: Path, engine: str) -> dict[str, Any]:
    """Return what results.json says of a finished run: its scores with this engine, its queries, its steps.

    Raises `UserError` if one of its files is missing.
    """
    before, after = (read_json(folder / f"evaluation/{policy}-{engine}/results.json") for policy in POLICIES)
    queries = read_json(folder / "policy/engine_queries.json")
    return {
        "em_before": before["em"]["mean"],
        "em_after": after["em"]["mean"],
        "em_after_interval": [after["em"]["low"], after["em"]["high"]],
        "f1_after": after["f1"]["mean"],
        "engine": after["engine"],
        "real_engine_queries_in_training": sum(count for name, count in queries.items() if name != SIMULATED),
        "simulated_queries_in_training": queries.get(SIMULATED, 0),
        "steps": read_json(folder / "policy/trainer_state.json")["global_step"],
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _read_scores(path: Path) -> Scores:
    scores = read_json(path)
    for name in ("em", "f1"):
        if not isinstance(scores.get(name), dict) or "mean" not in scores[name]:
            raise UserError(f"{path}: {name!r} is {scores.get(name)!r}, not an object with mean, low and high")
    for name in ("by_dataset", "versions"):
        if not isinstance(scores.get(name, {}), dict):
            raise UserError(f"{path}: {name!r} is {scores[name]!r}, not an object")
    return dict.fromkeys(("p_noise", "answer_rate", "searches", "turns", "n")) | scores


def read_log(path: Path) -> list[dict[str, Any]] | None:
    """Return the training log, an entry a step in order; evaluations and the summary at the end are left out."""
    state = _read_json(path)
    if state is None:
        return None
    history = state.get("log_history")
    if not isinstance(history, list) or not all(
        isinstance(one, dict) and is_finite(one.get("step")) for one in history
    ):
        raise UserError(f"{path}: 'log_history' is not a list of logged steps")
    by_step = {entry["step"]: entry for entry in history if "loss" in entry or "reward" in entry}
    return [by_step[step] for step in sorted(by_step)]
