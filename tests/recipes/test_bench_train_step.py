"""recipes/bench/train_step.py: the same step by both trainers, which teaches the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipe_modules import Refusal, load_recipe

from zerosearch.training import overlap


@pytest.mark.slow
def test_both_trainers_take_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, output = load_recipe("bench/train_step"), tmp_path / "bench/train_step.json"
    monkeypatch.setattr(overlap, "run_rollouts", overlap.run_rollouts)  # the bench replaces it

    def in_this_process(arguments: Any, child: str, folder: str) -> dict[str, Any]:
        return bench.measure(replace(arguments, child=child, output=folder))

    monkeypatch.setattr(bench, "run_child", in_this_process)
    bench.main(["--shape", "tiny", "--rounds", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["max_relative_gradient_difference"] < 1e-4
    # Stock pads every trajectory to the longest; ours only within a micro-batch, which holds one here.
    batch = result["batch"]
    padded = batch["trajectories"] * batch["longest"]
    assert result["forward_token_ratio"] == pytest.approx(batch["tokens"] / padded, rel=0.01)
    assert 0 < batch["policy_tokens"] < batch["tokens"] < padded
    for name in ("time_ratio", "time_ratio_to_compact_stock", "memory_ratio"):
        assert result[name]["min"] == result[name]["median"] > 0, "of one round"


def test_a_micro_batch_that_does_not_divide_a_step_is_refused(refusal: Refusal) -> None:
    said = refusal("bench/train_step", ["--micro_batch", "3"])
    assert "micro_batch is 3: it must divide a step's 5 trajectories" in said
