"""PPO over two ranks under DeepSpeed ZeRO-3: policy, reference and critic sharded, the same update as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
WORDS = "Emma Jane Austen rain novel born who where".split()

pytestmark = pytest.mark.slow


def train(output: Path, policy: Path, data: Path, launcher: tuple[str, ...], **settings: Any) -> None:
    settings = {
        "model_name_or_path": policy,
        "dataset": data / "qa.jsonl",
        "engine": "bm25",
        "corpus": data / "corpus.jsonl",
        "output_dir": output,
        "algorithm": "ppo",
        "critic_learning_rate": 1e-4,
        "critic_warmup_steps": 0,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_turns": 2,
        "max_turn_tokens": 24,
        "max_observation_tokens": 128,
        "max_trajectory_tokens": 1536,
        "learning_rate": 1e-4,
        "gradient_checkpointing": "false",
        "logging_steps": 1,
        "report_to": "none",
        **settings,
    }
    pairs = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "recipes/grpo.py"), *pairs],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def log_of(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_ppo_is_sharded_and_makes_the_update_of_one_process(tiny_policy_dir: Path, tmp_path: Path) -> None:
    questions = [{"id": str(n), "question": f"Who wrote {n}?", "golden_answers": WORDS} for n in range(12)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    passages = [{"id": str(n), "contents": f'"{word}"\n{word} is in the rain.'} for n, word in enumerate(WORDS)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, tiny_policy_dir, tmp_path, (), gradient_accumulation_steps=4, max_steps=1)
    zero3 = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/zero3_cpu.yaml"))
    zero3 = (*zero3, "--main_process_port", "29517")
    train(two, tiny_policy_dir, tmp_path, zero3, gradient_accumulation_steps=2, max_steps=1)

    first, other = log_of(one)[0], log_of(two)[0]
    for name in ("reward", "search/policy_tokens", "critic/squared_error", "grad_norm"):
        assert other[name] == pytest.approx(first[name], rel=1e-3), name
    start = load_file(tiny_policy_dir / "model.safetensors")
    alone, sharded = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, weight in alone.items():
        # Adam's first step moves each weight by the learning rate; a gradient of about 0 may go either way.
        moved = (weight - start[name]).abs() > 0.5e-4
        apart = (weight - sharded[name]).abs() > 0.5e-4
        assert moved.float().mean() > 0.3, name
        assert apart.float().mean() < 0.01, name

    # Of the critic, each rank keeps half: its optimizer state holds half of the parameters, in 32 bits.
    critic = torch.load(one / "checkpoint-1/critic/critic.pt")["model"]
    size = sum(weight.numel() for weight in critic.values())
    found = sorted((two / "checkpoint-1/critic").glob("*/*optim_states.pt"))
    assert len(found) == 2
    for path in found:
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        share = sum(group.numel() for group in state["fp32_flat_groups"])
        assert size / 2 <= share < 0.55 * size

    # And the run goes on from there, the critic with it.
    train(
        two,
        tiny_policy_dir,
        tmp_path,
        zero3,
        gradient_accumulation_steps=2,
        max_steps=2,
        resume_from_checkpoint="true",
    )
    assert [entry["step"] for entry in log_of(two)[:2]] == [1, 2]
