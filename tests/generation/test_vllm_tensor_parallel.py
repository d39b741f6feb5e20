"""Two real processes that must make the same calls in the same order, whatever their own trajectories do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from generation_parts import load
from http_servers import free_ports
from tensor_parallel_ranks import ROWS, rolled_out

TESTS = Path(__file__).parents[1]


@pytest.fixture
def on_two_ranks(tiny_policy_dir: Path, tmp_path: Path) -> Any:
    """Run a case of tensor_parallel_ranks.py on two ranks and return what each found."""
    pytest.importorskip("vllm")

    def run(case: str, timeout_s: float = 120) -> list[dict[str, Any]]:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports())}
        command = [sys.executable, str(TESTS / "tensor_parallel_ranks.py"), case, str(tiny_policy_dir), str(tmp_path)]
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
    first, second = on_two_ranks("failure")
    assert first["said"][0] == "GenerationError: another rank gave up its rollout; its own message says why"
    assert second["said"] == ["KeyError: 'a defect'"]
    assert "another rank ended, or was not heard of for 1 s, during the rollout" in first["said"][1]
    assert first["said"][2] < 4


@pytest.mark.slow
def test_a_real_vllm_in_two_parts_samples_what_transformers_do(on_two_ranks: Any, tiny_policy_dir: Path) -> None:
    first, second = on_two_ranks("real_tensor_parallel", timeout_s=400)
    assert first["trajectories"] + second["trajectories"] == rolled_out(
        load(tiny_policy_dir), temperature=0.0, rows=ROWS
    )
