"""A killed run leaves a whole checkpoint, and goes on from it as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import get_token
from jsonl_files import rows_of
from peft import LoraConfig, get_peft_model
from recipe_modules import ROOT, as_flags
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from zerosearch.checkpoints import checkpoint_to_resume, training_run
from zerosearch.errors import UserError


def write_checkpoint(folder: Path, state: str | None) -> None:
    folder.mkdir(parents=True)
    if state is not None:
        (folder / "trainer_state.json").write_text(state)


def test_the_last_whole_checkpoint_is_resumed(tmp_path: Path) -> None:
    for name, state in {"2": "{}", "10": "{}", "12": None, "14": '{"log_', "best": "{}"}.items():
        write_checkpoint(tmp_path / f"checkpoint-{name}", state)
    assert checkpoint_to_resume("true", str(tmp_path)) == str(tmp_path / "checkpoint-10")
    named = str(tmp_path / "checkpoint-2")
    assert checkpoint_to_resume(named, str(tmp_path)) == named
    assert checkpoint_to_resume("false", str(tmp_path)) is checkpoint_to_resume(None, str(tmp_path)) is None


@pytest.mark.parametrize("asked", ["true", "/no/such/checkpoint"])
def test_no_checkpoint_is_a_mistake(asked: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-12", None)
    with pytest.raises(UserError, match="there is no checkpoint to resume from: "):
        checkpoint_to_resume(asked, str(tmp_path))


def training_arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **changes)


def test_a_fresh_start_clears_what_runs_write_and_nothing_else(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").touch()
    out = tmp_path / "out"
    write_checkpoint(out / "checkpoint-2", "{}")
    (out / "checkpoint-7").symlink_to(mine)
    names = ["model.safetensors", "adapter_config.json", "card.json", "model.safetensors.bak", "checkpoint-notes"]
    for name in names:
        (out / name).touch()
    with pytest.raises(UserError, match="is not empty"), training_run(training_arguments(out), overwrite=False):
        pass
    with training_run(training_arguments(out), overwrite=True, written=["card.json"]) as checkpoint:
        assert checkpoint is None
        assert {path.name for path in out.iterdir()} == {"_lock", "model.safetensors.bak", "checkpoint-notes"}
    assert (mine / "notes").exists()


@pytest.mark.parametrize("output_dir", ["", ".", ".."])
def test_nothing_is_removed_where_the_user_stands(
    output_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    readme = Path(output_dir, "README.md")
    readme.touch()
    refused = pytest.raises(UserError, match="holds the current folder; nothing is overwritten there")
    with refused, training_run(training_arguments(Path(output_dir)), overwrite=True):
        pass
    assert readme.exists()
    readme.unlink()
    with training_run(training_arguments(Path(output_dir)), overwrite=True) as checkpoint:
        assert checkpoint is None, "there is nothing to remove"


def test_what_trainers_write_is_cleared(tiny_policy_dir: Path, tmp_path: Path) -> None:
    config, model = training_arguments(tmp_path), AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    with training_run(config, overwrite=False):
        trainer = Trainer(model, config, processing_class=AutoTokenizer.from_pretrained(tiny_policy_dir))
        trainer.save_model()
        trainer.save_state()
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        get_peft_model(model, LoraConfig(r=1, target_modules="all-linear")).save_pretrained(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {"model.safetensors", "model.safetensors.index.json", "chat_template.jinja", *adapter} <= left
    with training_run(config, overwrite=True):
        assert [path.name for path in tmp_path.iterdir()] == ["_lock"]


def test_a_folder_has_one_run_at_a_time_and_one_of_its_ranks_holds_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-2", "{}")
    resuming = training_arguments(tmp_path, resume_from_checkpoint="true")
    with training_run(resuming, overwrite=False) as checkpoint:
        assert checkpoint == str(tmp_path / "checkpoint-2")
        with pytest.raises(UserError, match="another run is writing to"), training_run(resuming, overwrite=False):
            pass
        names = {"output_dir": str(tmp_path), "resume_from_checkpoint": "true", "hub_token": None}
        other_rank = SimpleNamespace(**names, process_index=1)
        with training_run(other_rank, overwrite=False) as seen:  # type: ignore[arg-type]
            assert seen == checkpoint


def test_no_argument_is_saved_and_the_hubs_token_is_where_its_client_looks(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    config = training_arguments(tmp_path, hub_token="hf_MARKER")
    with training_run(config, overwrite=False):
        Trainer(AutoModelForCausalLM.from_pretrained(tiny_policy_dir), config).save_model()
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "training_args.bin").exists()
    assert config.hub_token is None and get_token() == "hf_MARKER"


def outcome(output: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the weights, and log and trajectories without what the clock decides.

    That is times, and the last digits of the sampler's log-probabilities: they depend on what is decoded together.
    """
    timed = ("time/", "search/latency", "search/logprob", "step_time", "train_")
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    log = [{name: value for name, value in entry.items() if not name.startswith(timed)} for entry in log]
    records = rows_of(output / "trajectories.jsonl")
    records = [{name: value for name, value in record.items() if not name.endswith("_s")} for record in records]
    return load_file(output / "model.safetensors"), log, records


@pytest.mark.slow
def test_a_killed_run_ends_as_one_left_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    # An epoch makes three steps. A checkpoint of PPO holds what every other does, and the critic.
    changes = {"algorithm": "ppo", "critic_learning_rate": 1e-3, "learning_rate": 1e-3, "max_steps": 5}
    changes |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    straight, interrupted = (
        [sys.executable, str(ROOT / "recipes/grpo.py"), *as_flags(settings | changes | {"output_dir": folder})]
        for folder in (alone, killed)
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(straight, check=True, capture_output=True, env=environment, timeout=300)

    rng = random.Random(0)
    for flags in ((), ("--resume_from_checkpoint", "true")):  # killed twice, the second time as it had resumed
        before = {folder.name for folder in killed.glob("checkpoint-*")}
        with subprocess.Popen([*interrupted, *flags], stderr=subprocess.DEVNULL, env=environment) as process:
            deadline = time.monotonic() + 200
            while process.poll() is None and time.monotonic() < deadline:
                if {folder.name for folder in killed.glob("checkpoint-*")} - before:
                    break
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.3))  # within the writing of a checkpoint, or behind it
            process.kill()
    assert not (killed / "model.safetensors").exists(), "it was killed before its end"
    # Should it have been killed within its first checkpoint, there is none: then it starts afresh.
    whole = any((folder / "trainer_state.json").exists() for folder in killed.glob("checkpoint-*"))
    last = ["--resume_from_checkpoint", "true"] if whole else ["--overwrite_output_dir", "true"]
    subprocess.run([*interrupted, *last], check=True, capture_output=True, env=environment, timeout=300)

    weights, log, trajectories = outcome(alone)
    resumed_weights, resumed_log, resumed_trajectories = outcome(killed)
    assert weights.keys() == resumed_weights.keys()
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    assert resumed_log == log
    assert resumed_trajectories == trajectories
