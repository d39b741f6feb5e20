"""TRL's ways to follow a run: its table of completions, and the trackers that are installed, each for real."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from rain import ROWS

from zerosearch.training.trainer import SearchTrainer

MakeTrainer = Callable[..., SearchTrainer]

COLUMNS = {"step", "prompt", "completion", "f1_reward", "advantage", "answer", "outcome", "searches"}


def test_the_table_of_completions_holds_whole_trajectories(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    trainer = make_trainer(log_completions=True, num_completions_to_print=1, max_steps=2)
    trainer.train()
    table = pandas.read_parquet(tmp_path / "policy/completions/completions_00002.parquet")
    assert set(table.columns) >= COLUMNS and len(table) == 8 and set(table["step"]) == {2}
    assert set(table["outcome"]) <= {"answered", "turns_exhausted", "truncated"}
    searched = table[table["searches"] > 0]
    assert len(searched) and all("<information>" in text for text in map(str, searched["completion"]))
    answered = table[table["outcome"] == "answered"]
    assert all(row.answer in str(row.completion) for row in answered.itertuples())
    assert {row["question"] for row in ROWS} >= {prompt[0]["content"] for prompt in table["prompt"]}


def test_tensorboard_has_what_the_log_has(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitored = make_trainer(report_to="tensorboard", max_steps=2)
    monitored.train()
    (folder,) = {path.parent for path in (tmp_path / "policy").rglob("events.out.tfevents.*")}
    found = events.EventAccumulator(str(folder)).Reload()
    logged = [entry for entry in monitored.state.log_history if "reward" in entry]
    for name in ("reward", "search/searches", "search/logprob", "time/rollout_s"):
        values = [(event.step, event.value) for event in found.Scalars(f"train/{name}")]
        assert values == [(entry["step"], pytest.approx(entry[name])) for entry in logged]


def test_wandb_offline_gets_the_log_and_the_trajectories(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    make_trainer(report_to="wandb", log_completions=True, max_steps=1).train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/search/searches"] > 0 and "train/reward" in summary
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("media/table/completions*.table.json")]
    assert tables, "one a log, the summary at the end included"
    assert all(set(table["columns"]) >= COLUMNS and len(table["data"]) == 8 for table in tables)
    assert list(tmp_path.rglob("run-*.wandb")), "what `wandb sync` takes up later"


TRAIN = """
import sys
from pathlib import Path
from rain import RainEngine, rain_trainer
settings = {"report_to": "trackio", "project": "rain", "log_completions": True, "per_device_train_batch_size": 8}
trainer = rain_trainer(Path(sys.argv[1]), Path(sys.argv[2]), RainEngine(), **settings)
trainer.train()
trainer.save_state()
"""


@pytest.mark.slow
def test_trackio_keeps_the_log_and_the_trajectories_here(tiny_policy_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    # A process of its own: trackio decides on import where it writes.
    command = [sys.executable, "-c", TRAIN, str(tiny_policy_dir), str(tmp_path / "policy")]
    where = {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, env=os.environ | where, check=True, timeout=300, cwd=tmp_path)
    with closing(sqlite3.connect(tmp_path / "trackio/rain.db")) as database:
        logs = [json.loads(text) for (text,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    history = json.loads((tmp_path / "policy/trainer_state.json").read_text())["log_history"]
    rewards = [one["train/reward"] for one in logs if "train/reward" in one]
    assert rewards == pytest.approx([one["reward"] for one in history if "reward" in one])
    tables = [one["completions"] for one in logs if "completions" in one]
    assert tables and all(set(table["_value"][0]) >= COLUMNS for table in tables)
