"""With and without a critic, TinyWorld's base policy learns within a short run against BM25 over the training world.

RLOO and GRPO differ from REINFORCE in their advantages alone, which training/test_advantages.py holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest

from zerosearch.tinyworld.world import World, question_rows

pytest_plugins = ("recipe_modules",)  # fixtures

ROOT = Path(__file__).parent.parent
STEPS = 14


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training world: its passages and questions."""
    directory = tmp_path_factory.mktemp("world")
    world = World.draw(0, 400)
    for name, rows in {"corpus": world.passages(), "train": question_rows(world, 400, 0)}.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_training_raises_the_reward(
    algorithm: str, data: Path, load_recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    settings = {
        "config": ROOT / "recipes/configs/tinyworld.yaml",
        "model_name_or_path": ROOT / "data/tinyworld/policy",
        "dataset": data / "train.jsonl",
        "engine": "bm25",
        "corpus": data / "corpus.jsonl",
        "output_dir": tmp_path,
        "algorithm": algorithm,
        "critic_learning_rate": 1e-3,
        "noise_end": 0.0,
        "gradient_accumulation_steps": 4,  # 16 questions a step
        "max_steps": STEPS,
        "disable_tqdm": "true",
    }
    load_recipe("grpo").main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    assert len(rewards) == STEPS
    assert fmean(rewards[-4:]) > fmean(rewards[:2]) + 0.15, rewards
