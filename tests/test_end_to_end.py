"""The main job as a user runs it: a simulator served by vLLM, training with a colocated vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from jsonl_files import rows_of
from recipe_modules import run_python

from zerosearch.simulator.server import SimulatorServer, simulator_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tinyworld(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tinyworld")
    run_python(
        "data/make_tinyworld.py", "--output_dir", directory, "--n_test", 40, "--n_train", 64, "--n_searches", 640
    )
    return directory


@pytest.fixture(scope="module")
def simulator(tinyworld: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatorServer]:
    """A simulator tuned for a few steps by the recipe, with LoRA, and served by a vLLM of its own."""
    directory = tmp_path_factory.mktemp("simulator")
    config = ("--config", "recipes/configs/sft-tinyworld.yaml", "--searches", tinyworld / "searches.jsonl")
    lora = ("--tuning", "lora", "--merge", "true", "--max_steps", 20, "--overwrite_output_dir", "true")
    run_python("recipes/sft_simulator.py", *config, "--output_dir", directory, *lora)
    with simulator_server(str(directory), 6177, max_model_len=1024, dtype="float32", num_threads=1) as server:
        yield server


def test_training_with_vllm_for_policy_and_simulator(
    tinyworld: Path, simulator: SimulatorServer, tmp_path: Path
) -> None:
    output = tmp_path / "policy"
    run_python(
        *("-m", "accelerate.commands.launch", "recipes/grpo.py", "--config", "recipes/configs/tinyworld.yaml"),
        *("--dataset", tinyworld / "train.jsonl", "--simulator_url", simulator.base_url, "--output_dir", output),
        *("--use_vllm", "true", "--max_steps", 2, "--per_device_train_batch_size", 20, "--algorithm", "grpo"),
    )
    state = json.loads((output / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "reward" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(entry["search/searches"] > 0 and entry["search/failed_search"] == 0 for entry in steps)
    assert [entry["search/p_noise"] for entry in steps] == pytest.approx(
        [1 / 6, 0.5]
    )  # Eq. 1 from 0 to 0.5 in two steps
    queries = json.loads((output / "engine_queries.json").read_text())
    assert set(queries) == {"simulated"} and queries["simulated"] >= 20
    records = rows_of(output / "trajectories.jsonl")
    assert any(segment["source"] == "documents" for record in records for segment in record["segments"])
