"""The pipeline of the real model: every command is one that its recipe takes, and what is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from jsonl_files import write_rows
from recipe_modules import Refusal, load_recipe
from trl import ModelConfig

from zerosearch.command_line import parse
from zerosearch.engines.options import EngineOptions
from zerosearch.generation.chat_endpoint import EndpointOptions
from zerosearch.simulator.dataset import SetOptions
from zerosearch.simulator.fidelity import FidelityOptions
from zerosearch.stages import Stages
from zerosearch.training.config import SearchConfig

STAGES = (
    *("model", "split", "cold start", "searches", "gaps", "more searches", "simulator"),
    *("fidelity tuned", "fidelity untuned", "fidelity real"),
    *("evaluation before", "training", "evaluation after"),
)


@pytest.fixture
def recipe() -> ModuleType:
    return load_recipe("smollm")


@pytest.fixture
def given(tmp_path: Path, recipe: ModuleType) -> list[str]:
    for name in recipe.DATA:
        (tmp_path / name).touch()
    return ["--data", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--models_dir", str(tmp_path / "models")]


@pytest.fixture
def commands(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Record the commands of the stages instead of running them, by title; each leaves the file it makes."""
    recorded: dict[str, list[str]] = {}

    def run(self: Stages, title: str, *command: object, makes: Path, status: Any = None) -> None:
        if not makes.exists():
            recorded[title] = [str(part) for part in command]
            makes.parent.mkdir(parents=True, exist_ok=True)
            makes.write_text("{}")

    @contextmanager
    def server(model: str, port: int, **settings: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(base_url="http://127.0.0.1:6001/v1")

    monkeypatch.setattr(Stages, "run", run)
    monkeypatch.setattr(recipe, "simulator_server", server)
    monkeypatch.setattr(recipe.Smollm, "results", lambda self: {})
    monkeypatch.setattr(recipe, "write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr(recipe, "summary_table", lambda folder: "")
    return recorded


def test_every_stage_is_a_command_that_its_recipe_takes(
    recipe: ModuleType, given: list[str], commands: dict[str, list[str]]
) -> None:
    recipe.main(
        [*given, "--rl_config", "smollm2-135m-lora", "--rl_steps", "7", "--baseline", "group", "--beta", "0.01"]
    )
    assert tuple(commands) == STAGES
    policy, simulator, rl = (load_recipe(name) for name in ("sft_policy", "sft_simulator", "grpo"))
    evaluation, fidelity = load_recipe("evaluate"), load_recipe("measure_fidelity")
    classes: dict[str, tuple[type, ...]] = {
        "recipes/get_model.py": (load_recipe("get_model").GetModelArguments,),
        "data/split_questions.py": (load_recipe("../data/split_questions").SplitArguments,),
        "data/cloze_searches.py": (load_recipe("../data/cloze_searches").ClozeArguments,),
        "recipes/sft_policy.py": (policy.RecipeArguments, policy.Budgets, policy.PolicyConfig, ModelConfig),
        "recipes/build_simulator_data.py": (load_recipe("build_simulator_data").BuildArguments, SetOptions),
        "recipes/sft_simulator.py": (simulator.RecipeArguments, simulator.SimulatorConfig, ModelConfig),
        "recipes/measure_fidelity.py": (fidelity.RecipeArguments, FidelityOptions),
        "recipes/evaluate.py": (
            *(evaluation.EvaluationArguments, evaluation.EvaluationEngines),
            *(evaluation.GreedySettings, EndpointOptions),
        ),
        "recipes/grpo.py": (rl.RunOptions, EngineOptions, SearchConfig, ModelConfig),
    }
    parsed = {title: parse(*classes[script], argv=flags) for title, (script, *flags) in commands.items()}
    run = Path(given[3])
    _, engine, training, model = parsed["training"]
    assert (training.max_steps, training.baseline, training.beta) == (7, "group", 0.01)
    assert (engine.engine, engine.simulator_url) == ("simulated", "http://127.0.0.1:6001/v1")
    assert model.use_peft  # of the configuration that was named
    assert model.model_name_or_path == str(run / "cold-start") and training.output_dir == str(run / "policy")
    for when, scored in (("before", "cold-start"), ("after", "policy")):
        asked, engines, *_ = parsed[f"evaluation {when}"]
        assert asked.model == [str(run / scored)] and asked.dataset == [str(run / "data/test.jsonl")]
        assert engines.engine == ["bm25"] and not asked.resume
    assert parsed["cold start"][0].traces == str(run / "data/cold_start.jsonl")


def test_a_gpu_takes_whole_steps_in_16_bits(
    recipe: ModuleType, given: list[str], commands: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe.torch.accelerator, "is_available", lambda: True)
    recipe.main([*given, "--rl_questions", "3"])
    for title, batch in (("cold start", "8 1"), ("simulator", "8 1"), ("training", "5 3")):
        said = dict(zip(commands[title][1::2], commands[title][2::2], strict=False))
        assert f"{said['--per_device_train_batch_size']} {said['--gradient_accumulation_steps']}" == batch
        assert said["--bf16"] == "True"


@pytest.mark.parametrize("able", [True, False])
def test_a_cpu_trains_in_16_bits_if_it_multiplies_them(
    recipe: ModuleType, given: list[str], commands: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    monkeypatch.setattr(recipe.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(recipe.torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True} if able else {})
    recipe.main(given)
    for title in ("cold start", "simulator", "training"):
        said = dict(zip(commands[title][1::2], commands[title][2::2], strict=False))
        assert said["--bf16"] == str(able)
    assert said["--vllm_importance_sampling_correction"] == str(able)


def test_a_stage_that_was_stopped_goes_on_and_a_finished_one_is_left(
    recipe: ModuleType, given: list[str], commands: dict[str, list[str]]
) -> None:
    recipe.main(given)
    run = Path(given[3])
    commands.clear()
    (run / "policy/trainer_state.json").unlink()
    (run / "policy/checkpoint-1").mkdir()
    (run / "policy/checkpoint-1/trainer_state.json").write_text("{}")
    (run / "evaluation/after-bm25/results.json").unlink()
    recipe.main(given)
    assert tuple(commands) == ("training", "evaluation after")
    resumed = " ".join(commands["training"])
    assert "--resume_from_checkpoint True" in resumed and "overwrite" not in resumed
    assert commands["evaluation after"][-2:] == ["--resume", "True"]
    commands.clear()
    recipe.main(given)
    assert not commands


def test_a_folder_of_other_settings_and_data_that_is_missing_are_refused(
    recipe: ModuleType, given: list[str], commands: dict[str, list[str]], refusal: Refusal
) -> None:
    recipe.main(given)
    assert "holds a run of other settings" in refusal("smollm", [*given, "--rl_steps", "9"])
    Path(given[given.index("--output_dir") + 1], "settings.json").unlink()  # not a folder of this recipe's
    assert "is not empty" in refusal("smollm", given)
    Path(given[1], "qa_train.jsonl").unlink()
    assert "lacks qa_train.jsonl" in refusal("smollm", given)


def test_results_hold_the_paired_difference(recipe: ModuleType, given: list[str]) -> None:
    run = Path(given[3])
    row = {
        "row": 0,
        "sample": 0,
        "step": None,
        "dataset": "hotpotqa",
        "golden_answers": ["x"],
        "outcome": "answered",
        "turns": 1,
    }
    for when, answer in (("before", "y"), ("after", "x")):
        folder = run / f"evaluation/{when}-bm25"
        folder.mkdir(parents=True)
        scored = {
            "answer": answer,
            "em": float(answer == "x"),
            "f1": float(answer == "x"),
            "searches": 1,
            "segments": [],
        }
        rows = [{**row, **scored, "id": str(n), "question": f"q {n}?"} for n in range(4)]
        write_rows(folder / "trajectories.jsonl", rows)
        score = {"mean": float(answer == "x"), "low": 0.0, "high": 1.0}
        results = {"em": score, "f1": score, "engine": "bm25", "n": 4}
        (folder / "results.json").write_text(json.dumps(results))
    log = [{"step": step, "reward": 0.5, "time/step_s": 40.0} for step in (1, 2)]
    for path, content in {
        "policy/engine_queries.json": {"simulated": 9},
        "policy/trainer_state.json": {"global_step": 2, "log_history": log},
        "fidelity/tuned.json": {"useful_answer_rate": 0.75, "useful_answer_rate_interval": [0.5, 1], "queries": 20},
        "fidelity/untuned.json": {"useful_answer_rate": 0.25, "queries": 20},
        "fidelity/real.json": {"answer_rate": 0.5},
        "../models/SmolLM2-135M-Instruct/source.json": {"from": "the Hub"},
    }.items():
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_text(json.dumps(content))
    (run / "logs").mkdir()
    (arguments,) = parse(recipe.SmollmArguments, argv=given)
    found = recipe.Smollm(arguments, [], run).results()
    assert found["f1_difference"] == {"mean": 1.0, "low": 1.0, "high": 1.0} and found["questions"] == 4
    assert (found["em_before"], found["em_after"], found["steps"]) == (0.0, 1.0, 2)
    assert (found["generator"], found["train_seconds"]) == ("vllm", 80.0)
    assert (found["simulated_queries_in_training"], found["real_engine_queries_in_training"]) == (9, 0)
    assert found["fidelity"] == {
        "tuned": {"useful_answer_rate": 0.75, "useful_answer_rate_interval": [0.5, 1]},
        "untuned": {"useful_answer_rate": 0.25},
        "real": {"answer_rate": 0.5},
    }
