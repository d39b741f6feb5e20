"""A real vLLM engine in two parts, a process each: it samples what transformers do, and its ranks keep in step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_parts import largest_difference, load
from http_servers import free_ports
from transformers import AutoModelForCausalLM
from vllm_ranks import ROWS, rolled_out

from zerosearch.rollout.trajectory import Trajectory, Turn

SCRIPT = Path(__file__).parents[1] / "vllm_ranks.py"
pytestmark = pytest.mark.slow

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def negated_dir(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy with every weight negated."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    model.save_pretrained(directory := tmp_path_factory.mktemp("negated"))
    return directory


@pytest.fixture(scope="module")
def ranks(tiny_policy_dir: Path, negated_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Run vllm_ranks.py on two ranks and return what each found."""
    pytest.importorskip("vllm")
    output = tmp_path_factory.mktemp("ranks")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tiny_policy_dir), str(negated_dir), str(output)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in printed)
    return [json.loads((output / f"{rank}.json").read_text()) | {"printed": printed[rank]} for rank in range(2)]


def trajectories(ranks: Found, name: str) -> list[Trajectory]:
    records = [record for found in ranks for record in found[name]]
    return [Trajectory(**record | {"turns": [Turn(**turn) for turn in record["turns"]]}) for record in records]


def test_greedy_trajectories_are_those_of_transformers(ranks: Found, tiny_policy_dir: Path) -> None:
    assert [len(found["greedy"]) for found in ranks] == [10, 4], "each rank has what its own rows led to"
    expected = rolled_out(load(tiny_policy_dir), rows=ROWS)
    for ours, theirs in zip(trajectories(ranks, "greedy"), expected, strict=True):
        assert (ours.prompt_ids, ours.completion_ids) == (theirs.prompt_ids, theirs.completion_ids)
        assert (ours.env_mask, ours.outcome, ours.answer) == (theirs.env_mask, theirs.outcome, theirs.answer)


def test_log_probabilities_are_those_of_a_forward_pass_and_samples_those_of_their_keys(
    ranks: Found, tiny_policy_dir: Path
) -> None:
    sampled = trajectories(ranks, "sampled")
    assert sum(trajectory.searches for trajectory in sampled) > 10
    assert {turn.kind for trajectory in sampled for turn in trajectory.turns} == {"search", "answer", "invalid"}
    assert largest_difference(tiny_policy_dir, sampled) < 1e-4
    assert len({tuple(trajectory.completion_ids) for trajectory in sampled}) > len(sampled) // 2
    again = trajectories(ranks, "again")
    assert [one.completion_ids for one in sampled] == [one.completion_ids for one in again]


def test_a_weight_sync_reaches_every_weight_that_vllm_uses(
    ranks: Found, tiny_policy_dir: Path, negated_dir: Path
) -> None:
    synced = trajectories(ranks, "synced")
    assert largest_difference(negated_dir, synced) < 1e-4
    assert largest_difference(tiny_policy_dir, synced) > 0.1


def test_ranks_make_the_same_calls_of_the_engine_in_the_same_order(ranks: Found) -> None:
    calls = ranks[0]["calls"]
    assert calls == ranks[1]["calls"]
    added = [call for call in calls if call[0] == "add"]
    assert len(added) > 2 * len(ROWS) and calls.count(["step"]) > 10
    later = [call for call in calls[calls.index(["step"]) :] if call[0] == "add"]
    assert any(under_way > 2 for _, under_way, *_ in later), "no lockstep: turns begin while others are decoded"


def test_the_engine_starts_without_a_screen_of_its_own(ranks: Found) -> None:
    assert not [line for found in ranks for line in found["printed"].splitlines() if "INFO" in line]


def test_a_failure_on_one_rank_ends_the_rollout_on_all_and_silence_does_too(ranks: Found) -> None:
    first, second = (found["said"] for found in ranks)
    assert first[0] == "GenerationError: another rank gave up its rollout; its own message says why"
    assert second == ["KeyError: 'a defect'"]
    assert "another rank ended, or was not heard of for 1 s, during the rollout" in first[1]
    assert first[2] < 4
