"""The demo's own part: its stages, ports that are taken, folders that hold more than it made, its results."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import ModuleType

import pytest
from recipe_modules import Refusal, load_recipe

from zerosearch.files import sole_writer
from zerosearch.stages import Stages, training_status


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("demo")


def test_a_stage_reports_what_status_makes_of_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    entry = "{'reward': '0.25', 'search/searches': '1.5', 'search/p_noise': '0.125', 'time/step_s': '2e+01'}"
    script.write_text(f'for _ in range(6): print("{entry}")\n')
    Stages(tmp_path / "logs", tmp_path).run("work", script, status=training_status(5))
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert len(lines) == 1 and lines[0].endswith("step   5: reward 0.25, 1.5 searches a question, noise 0.12")
    resumed = training_status(5, done=3)
    assert resumed(entry) is None and "step   5" in (resumed(entry) or "")


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


def test_what_cannot_work_is_refused_before_anything_is_computed(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert "--overwrite_output_dir" in refusal("demo", ["--output_dir", str(tmp_path / "full")])
    assert "llamacpp" in refusal("demo", ["--output_dir", str(tmp_path / "new"), "--generator", "llamacpp"])
    with sole_writer(tmp_path / "held"):
        flags = ["--output_dir", str(tmp_path / "held"), "--overwrite_output_dir", "true", "--port", "0"]
        assert f"another run is writing to {tmp_path / 'held'}" in refusal("demo", flags)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "cannot serve on 127.0.0.1" in refusal("demo", ["--output_dir", str(tmp_path / "demo"), "--port", port])
    assert not (tmp_path / "demo/data").exists()
