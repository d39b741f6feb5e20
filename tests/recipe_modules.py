"""Recipes as modules, and a random model made by one of them: what the tests of several recipes share."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jsonl_files import write_rows

RECIPES = Path(__file__).parent.parent / "recipes"
Refusal = Callable[[str, list[str]], str]

ROOT = RECIPES.parent
SMALL_RUN = {  # of recipes/grpo.py
    **{"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 2},
    **{"gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none"},
}
TINYWORLD_RUN = SMALL_RUN | {
    **{"model_name_or_path": ROOT / "data/tinyworld/policy", "prompt": "tinyworld", "use_vllm": False},
    **{"max_turns": 4, "max_turn_tokens": 40, "max_observation_tokens": 120, "max_trajectory_tokens": 640},
    "disable_tqdm": True,
}
WORDS = "Emma Jane Austen rain novel born who where".split()  # all that the tiny policy can say
PASSAGES = [
    ("Emma", "Emma is a novel by Jane Austen, published in 1815."),
    ("Jane Austen", "Jane Austen was born in Steventon, a village in Hampshire."),
    ("Steventon", "Steventon lies in the north of Hampshire, in England."),
    ("Hampshire", "Hampshire is a county in the south of England; its county town is Winchester."),
]
QUESTIONS = [
    {"id": "nq_0", "dataset": "nq", "question": "Who wrote Emma?", "golden_answers": ["Jane Austen", "Austen"]},
    {"id": "nq_1", "dataset": "nq", "question": "Where was Jane Austen born?", "golden_answers": ["Steventon"]},
    {"id": "m_0", "dataset": "musique", "question": "Which county is Steventon in?", "golden_answers": ["Hampshire"]},
]


def load_recipe(name: str) -> ModuleType:
    """Import recipes/<name>.py, or a script beside ("../data/split_questions"); they are in no package."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the argument parser looks up its dataclasses' annotations
    spec.loader.exec_module(module)
    return module


def run_python(*command: object, **environment: str) -> None:
    """Run Python with a command, as a user does in the project's folder; if it fails, so does the test."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """Return settings as a command line has them."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Return what runs a recipe that must refuse its arguments, and returns its one sentence."""

    def refuse(name: str, arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as caught:
            load_recipe(name).main(arguments)
        assert caught.value.code == 2
        printed = capsys.readouterr().err
        (error,) = [line for line in printed.splitlines() if "error: " in line]  # libraries may warn before
        assert printed.endswith(f"{error}\n")
        return error

    return refuse


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": str(place), "contents": f'"{title}"\n{text}'} for place, (title, text) in enumerate(PASSAGES)]
    return write_rows(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("questions") / "qa.jsonl", QUESTIONS)


@pytest.fixture
def settings(tiny_policy_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of recipes/grpo.py that works: the tiny policy on twelve questions, with BM25."""
    asked = [{"id": str(n), "question": f"Who wrote {n}?", "golden_answers": [f"gold {n}", *WORDS]} for n in range(12)]
    passages = [{"id": str(n), "contents": f'"{word}"\n{word} is in the rain.'} for n, word in enumerate(WORDS)]
    return SMALL_RUN | {
        "model_name_or_path": str(tiny_policy_dir),
        "engine": "bm25",
        "dataset": str(write_rows(tmp_path / "qa.jsonl", asked)),
        "corpus": str(write_rows(tmp_path / "corpus.jsonl", passages)),
        "output_dir": str(tmp_path / "policy"),
        "learning_rate": 1e-2,
        "max_turns": 2,
        "max_turn_tokens": 24,
        "max_observation_tokens": 128,
        "max_trajectory_tokens": 1536,  # the paper's prompt is 900 characters, most of them tokens of the tiny policy
    }


@pytest.fixture(scope="session")
def tinyworld_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small world's passages, corpus.jsonl, and questions, train.jsonl."""
    from zerosearch.tinyworld.world import World, question_rows

    folder, world = tmp_path_factory.mktemp("world"), World.draw(1, n_people=60)
    write_rows(folder / "corpus.jsonl", world.passages())
    write_rows(folder / "train.jsonl", question_rows(world, 40, 0))
    return folder


@pytest.fixture(scope="session")
def random_model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with random weights, whose turns mostly search or answer."""
    directory = tmp_path_factory.mktemp("random-model")
    load_recipe("random_model").main(["--corpus", str(corpus), "--output_dir", str(directory), "--vocab_size", "400"])
    return directory
