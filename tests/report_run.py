"""A run's folder as `make demo` leaves it, made up here so that no data is stored: for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from jsonl_files import write_rows

from zerosearch.prompts import INVALID_ACTION_HINT, TINYWORLD
from zerosearch.protocol import format_observation

WRONG, RIGHT = "Port Kelso", "Mount Tarn"


def segments(searches: list[bool | None], answer: str | None, hint: bool = False) -> list[dict[str, Any]]:
    """Return a trajectory's segments: a search for each entry (noisy, useful or no such notion), then the answer."""
    question = "Where does the partner of Ada Holt hail from?"
    found = [{"source": "prompt", "text": TINYWORLD.policy.prompt(question), "noisy": None}]
    if hint:
        found.append({"source": "policy", "text": "<think> Look up. </think> <search> </search>", "noisy": None})
        found.append({"source": "hint", "text": INVALID_ACTION_HINT, "noisy": None})
    for place, noisy in enumerate(searches):
        query = ("Ada Holt lives with", "Hugo Marsh hails from")[place % 2]
        facts = ("Ada Holt lives with Hugo Marsh.", f"Hugo Marsh hails from {RIGHT}.")
        documents = [
            "Ada Holt: looks for new friends." if noisy else facts[place % 2],
            "Flora Pike: Flora Pike hails from New Selby.",
            "Hugo Dahl: Hugo Dahl works with care.",
            "Ada Brandt: Ada Brandt lives with Oscar Stone.",
            "Hugo Marsh is seldom in the news.",
        ]
        found.append(
            {"source": "policy", "text": f"<think> Look up. </think> <search> {query} </search>", "noisy": None}
        )
        found.append({"source": "documents", "text": format_observation(documents), "noisy": noisy})
    last = (
        f"<think> Hugo Marsh hails from {answer}. </think> <answer> {answer} </answer>" if answer else "<think> Look"
    )
    return [*found, {"source": "policy", "text": last, "noisy": None}]


def record(identifier: str, right: bool, searches: list[bool | None], **changed: Any) -> dict[str, Any]:
    """Return a trajectory's record, `Trajectory.to_record`."""
    answer = RIGHT if right else WRONG
    return {
        "id": identifier,
        "dataset": "tinyworld",
        "question": "Where does the partner of Ada Holt hail from?",
        "golden_answers": [RIGHT],
        "step": None,
        "answer": answer,
        "outcome": "answered",
        "searches": len(searches),
        "turns": len(searches) + 1,
        "policy_tokens": 34,
        "observation_tokens": 96,
        "p_noise": None,
        "f1": float(right),
        "em": float(right),
        "segments": segments(searches, answer),
    } | changed


def scores(em: float, f1: float, searches: float, **changed: Any) -> dict[str, Any]:
    """Return what `recipes/evaluate.py` writes to results.json."""
    return {
        "model": "outputs/demo/policy",
        "engine": "bm25",
        "dataset": "tinyworld:7",
        "n": 400,
        "seed": 0,
        "p_noise": 0.0,
        "generator": "transformers",
        "seconds": 31.5,
        "em": {"mean": em, "low": em - 0.046, "high": em + 0.045},
        "f1": {"mean": f1, "low": f1 - 0.041, "high": f1 + 0.043},
        "cover_em": {"mean": em, "low": em - 0.046, "high": em + 0.045},
        "answer_rate": 0.9575,
        "searches": searches,
        "turns": searches + 1,
        "outcomes": {"answered": 383, "turns_exhausted": 17},
        "versions": {"zerosearch": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0", "trl": "1.16.0"},
        "by_dataset": {},
    } | changed


def logged_step(step: int, rng: random.Random) -> dict[str, Any]:
    learned = 1 - math.exp(-step / 14)
    searches, p_noise = 1.15 + 0.9 * learned + rng.gauss(0, 0.06), 0.1 + 0.4 * (4 ** (step / 60) - 1) / 3
    generating, waiting, idle = 0.61 + rng.random() / 5, 0.42 + rng.random() / 4, 0.05 + rng.random() / 30
    rollout = generating + waiting + idle
    return {
        "step": step,
        "epoch": step / 60,
        "reward": 0.33 + 0.45 * learned + rng.gauss(0, 0.035),
        "kl": 0.06 * learned + abs(rng.gauss(0, 0.004)),
        "loss": rng.gauss(0, 0.01),
        "search/searches": searches,
        "search/turns": searches + 1,
        "search/policy_tokens": 26 + 9 * learned + rng.gauss(0, 1),
        "search/observation_tokens": 48 * searches,
        "search/p_noise": p_noise,
        "search/noisy_share": min(1.0, max(0.0, p_noise + rng.gauss(0, 0.04))),
        "time/generating_s": generating,
        "time/waiting_s": waiting,
        "time/idle_s": idle,
        "time/rollout_s": rollout,
        "time/step_s": rollout + 0.78 + rng.random() / 6,
    }


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(folder: Path) -> Path:
    """Write the folder of a run of 60 steps, evaluated with both engines."""
    rng = random.Random(0)
    log = [logged_step(step, rng) for step in range(1, 61)]
    write_json(folder / "policy/trainer_state.json", {"log_history": [*log, {"step": 60, "train_runtime": 161.2}]})
    write_rows(
        folder / "policy/trajectories.jsonl",
        [
            record(f"t{step}", step > 20, [True, False, False], step=step, p_noise=0.1 + step / 150)
            | {"segments": segments([step % 20 == 0, False, step % 3 == 0], RIGHT, hint=step == 10)}
            for step in range(10, 61, 10)
        ],
    )
    em = {
        ("before", "bm25"): 0.3325,
        ("after", "bm25"): 0.8025,
        ("before", "simulated"): 0.41,
        ("after", "simulated"): 0.8675,
    }
    for (policy, engine), mean in em.items():
        after, noisy = policy == "after", False if engine == "simulated" else None
        evaluation = folder / f"evaluation/{policy}-{engine}"
        write_json(evaluation / "results.json", scores(mean, mean + 0.043, 2.09 if after else 1.16, engine=engine))
        rights = [rng.random() < mean for _ in range(40)]
        write_rows(
            evaluation / "trajectories.jsonl",
            [record(f"q{place}", right, [noisy] * (2 if after else 1)) for place, right in enumerate(rights)],
        )
    results = {
        "em_before": 0.3325,
        "em_after": 0.8025,
        "em_after_interval": [0.7565, 0.8475],
        "f1_after": 0.8455,
        "engine": "bm25",
        "real_engine_queries_in_training": 0,
        "train_seconds": 161.2,
        "total_seconds": 442.0,
        "generator": "transformers",
        "seed": 3,
        "steps": 60,
    }
    write_json(folder / "results.json", results)
    return folder
