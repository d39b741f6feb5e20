"""The curriculum is for training: an evaluation inside a training run is free of noise."""

from __future__ import annotations

from pathlib import Path

import datasets
from rain import ROWS, RainEngine, rain_trainer


def test_an_evaluation_during_training_is_free_of_noise(tiny_policy_dir: Path, tmp_path: Path) -> None:
    engine = RainEngine()
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    arguments = {"eval_dataset": datasets.Dataset.from_list(ROWS[:2])}
    noise = {"noise_start": 0.75, "noise_end": 0.75}
    trainer = rain_trainer(tiny_policy_dir, tmp_path, engine, arguments, max_steps=1, **sizes, **noise)
    assert trainer.evaluate()["eval_search/p_noise"] == 0.0
    assert {request.p_noise for request in engine.requests} == {0.0}
