"""Two real processes that must make the same calls in the same order, whatever their own trajectories do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from collective_ranks import ROWS, rolled_out
from test_generation import load

TESTS = Path(__file__).parents[1]


@pytest.fixture
def on_two_ranks(tiny_policy_dir: Path, tmp_path: Path) -> Any:
    """Run a case of collective_ranks.py on two ranks and return what each found."""

    def run(case: str, timeout_s: float = 120) -> list[dict[str, Any]]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(TESTS / "collective_ranks.py"), case, str(tiny_policy_dir), str(tmp_path)]
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            printed = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-3000:] for text in printed)
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    return run


def test_ranks_make_the_same_calls_of_the_engine_in_the_same_order(on_two_ranks: Any) -> None:
    pytest.importorskip("vllm")
    first, second = on_two_ranks("same_calls")
    assert first["calls"] == second["calls"]
    kinds = [call[0] for call in first["calls"]]
    turns = sum(kind == "add" for kind in kinds)
    assert turns > 2 * 14 and kinds.count("step") > 10
    # No lockstep: some turn was added while others were being sampled.
    running_at_add = [
        later[1]
        for call, later in zip(first["calls"], first["calls"][1:], strict=False)
        if call[0] == "add" and later[0] == "step"
    ]
    assert any(len(running) > 2 for running in running_at_add[2:])
    # Each rank got what its own rows led to; a second rollout of the same generator leads to the same.
    assert [len(result["trajectories"]) for result in (first, second)] == [10, 4]
    for result in (first, second):
        assert result["trajectories"] == result["again"]
        assert all(one["outcome"] in ("answered", "turns_exhausted") for one in result["trajectories"])


def test_a_failure_on_one_rank_ends_the_rollout_on_all_and_silence_does_too(on_two_ranks: Any) -> None:
    pytest.importorskip("vllm")
    first, second = on_two_ranks("failure")
    assert first["said"][0] == "GenerationError: another rank gave up its rollout; its own message says why"
    assert second["said"] == ["KeyError: 'a defect of the engine'"]
    assert "another rank ended, or was not heard of for 1 s, during the rollout" in first["said"][1]
    assert first["said"][2] < 4


def test_ranks_make_the_same_number_of_forward_passes(on_two_ranks: Any, tiny_policy_dir: Path) -> None:
    first, second = on_two_ranks("same_passes")
    assert first["passes"] == second["passes"] > 40
    assert first["trajectories"] + second["trajectories"] == rolled_out(load(tiny_policy_dir), rows=ROWS)


@pytest.mark.slow
def test_a_real_vllm_in_two_parts_samples_what_transformers_do(on_two_ranks: Any, tiny_policy_dir: Path) -> None:
    pytest.importorskip("vllm")
    first, second = on_two_ranks("real_tensor_parallel", timeout_s=400)
    assert first["trajectories"] + second["trajectories"] == rolled_out(
        load(tiny_policy_dir), temperature=0.0, rows=ROWS
    )


ZERO3_SCRIPT = """
import sys
sys.path[:0] = ["tests", "tests/generation"]
from collective_ranks import UnevenEngine
from rain import rain_trainer

policy, output, gathered = sys.argv[1:]
trainer = rain_trainer(
    policy, output, UnevenEngine(), ds3_gather_for_generation=gathered == "gathered", learning_rate=1e-3,
    per_device_train_batch_size=4, gradient_accumulation_steps=2, logged_trajectories=8,
)
print(type(trainer.generator).__name__)
trainer.train()
trainer.save_state()
"""


@pytest.mark.slow
def test_training_under_zero3_without_gathering_the_model_samples_what_it_samples_with(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/zero3_cpu.yaml"]
    script = tmp_path / "train.py"
    script.write_text(ZERO3_SCRIPT)
    runs = {}
    for name, generator in (("sharded", "ShardedTransformersGenerator"), ("gathered", "TransformersGenerator")):
        done = subprocess.run(
            [sys.executable, *launcher, str(script), str(tiny_policy_dir), str(tmp_path / name), name],
            cwd=TESTS.parent,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
            capture_output=True,
            text=True,
            timeout=580,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split().count(generator) == 2
        lines = (tmp_path / name / "trajectories.jsonl").read_text().splitlines()
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        texts = [[part["text"] for part in json.loads(line)["segments"]] for line in lines]
        runs[name] = texts, [(log["kl"], log["search/policy_tokens"]) for log in state["log_history"] if "kl" in log]
    (texts, logs), (expected_texts, expected_logs) = runs["sharded"], runs["gathered"]
    assert len(texts) == 16 and texts == expected_texts
    assert [value for log in logs for value in log] == pytest.approx(
        [v for log in expected_logs for v in log], rel=1e-4
    )
