"""A trainer of the tiny policy, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rain import RainEngine, rain_trainer

from zerosearch.training.trainer import SearchTrainer


@pytest.fixture
def make_trainer(tiny_policy_dir: Path, tmp_path: Path) -> Callable[..., SearchTrainer]:
    def make(
        engine: RainEngine | None = None, arguments: dict[str, Any] | None = None, **settings: Any
    ) -> SearchTrainer:
        output_dir = Path(settings.pop("output_dir", tmp_path / "policy"))
        settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, **settings}
        return rain_trainer(tiny_policy_dir, output_dir, engine or RainEngine(), arguments, **settings)

    return make
