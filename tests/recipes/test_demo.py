"""The demo's own part: its stages, ports that are taken, folders that hold more than it made, its results."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from zerosearch.checkpoints import clear
from zerosearch.files import sole_writer
from zerosearch.stages import Stages, training_status

pytest_plugins = ("recipe_modules",)  # fixtures

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("demo")


def test_a_stage_reports_what_status_makes_of_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    entry = "{'reward': '0.25', 'search/searches': '1.5', 'search/p_noise': '0.125', 'time/step_s': '2e+01'}"
    script.write_text(f'for _ in range(6): print("{entry}")\n')
    Stages(tmp_path / "logs", tmp_path).run("work", script, status=training_status(5))
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert len(lines) == 1 and lines[0].endswith("step   5: reward 0.25, 1.5 searches a question, noise 0.12")


def test_clear_removes_what_the_demo_made_and_nothing_else(recipe: ModuleType, tmp_path: Path) -> None:
    for name in recipe.MADE_BY_THE_DEMO:
        path = tmp_path / name
        if "." in name:
            path.write_text("old")
        else:
            (path / "inner").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    clear(tmp_path, recipe.MADE_BY_THE_DEMO)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_results_count_every_query_to_an_engine_that_is_not_the_simulator(recipe: ModuleType, tmp_path: Path) -> None:
    for name, em in (("before-bm25", 0.25), ("after-bm25", 0.75)):
        (tmp_path / "evaluation" / name).mkdir(parents=True)
        scores = {"em": {"mean": em, "low": em - 0.125, "high": em + 0.125}, "f1": {"mean": em}, "engine": "bm25"}
        (tmp_path / "evaluation" / name / "results.json").write_text(json.dumps(scores))
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/trainer_state.json").write_text('{"global_step": 30}')
    (tmp_path / "policy/engine_queries.json").write_text('{"simulated": 7000, "bm25": 3}')
    outcome = recipe.results(tmp_path, recipe.DemoArguments(seed=4, generator="vllm"), 61.25, 200.04)
    assert outcome == {
        "em_before": 0.25,
        "em_after": 0.75,
        "em_after_interval": [0.625, 0.875],
        "f1_after": 0.75,
        "engine": "bm25",
        "real_engine_queries_in_training": 3,
        "simulated_queries_in_training": 7000,
        "train_seconds": 61.2,
        "total_seconds": 200.0,
        "generator": "vllm",
        "seed": 4,
        "steps": 30,
    }


def run_demo(*flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "recipes/demo.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_a_folder_that_is_not_empty_and_a_generator_that_is_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused = run_demo("--output_dir", tmp_path)
    assert refused.returncode == 2 and "--overwrite_output_dir" in refused.stderr
    assert "Traceback" not in refused.stderr
    unknown = run_demo("--output_dir", tmp_path / "other", "--generator", "llamacpp")
    assert unknown.returncode == 2 and "llamacpp" in unknown.stderr and "Traceback" not in unknown.stderr


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with sole_writer(tmp_path):
        refused = run_demo("--output_dir", tmp_path, "--overwrite_output_dir", "true", "--port", 0)
    assert refused.returncode == 2
    assert f"another run is writing to {tmp_path}" in refused.stderr and "Traceback" not in refused.stderr


def test_a_port_that_is_taken_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = run_demo("--output_dir", tmp_path / "demo", "--port", taken.getsockname()[1])
    assert refused.returncode == 2
    assert "error: cannot serve on 127.0.0.1" in refused.stderr and "Traceback" not in refused.stderr
    assert not os.path.exists(tmp_path / "demo/data")
