"""With and without a critic, TinyWorld's base policy learns within a short run against BM25 over the training world.

RLOO and GRPO differ from REINFORCE in their advantages alone, which training/test_advantages.py holds."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from jsonl_files import write_rows
from recipe_modules import as_flags, load_recipe

from zerosearch.tinyworld.world import World, question_rows

ROOT = Path(__file__).parent.parent
STEPS = 14


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training world: its passages and questions."""
    directory = tmp_path_factory.mktemp("world")
    world = World.draw(0, 400)
    for name, rows in {"corpus": world.passages(), "train": question_rows(world, 400, 0)}.items():
        write_rows(directory / f"{name}.jsonl", rows)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_training_raises_the_reward(algorithm: str, data: Path, tmp_path: Path) -> None:
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
    load_recipe("grpo").main(as_flags(settings))
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    assert len(rewards) == STEPS
    assert fmean(rewards[-4:]) > fmean(rewards[:2]) + 0.15, rewards
