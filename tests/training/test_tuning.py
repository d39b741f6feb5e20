"""Tuning by TRL's SFTTrainer; its recipes have tests of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import ModelConfig
from trl.trainer import utils as trl_utils

from zerosearch.training.tuning import TuningConfig, tune


def test_the_head_projects_labelled_positions_only(
    tiny_policy_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = []
    project = trl_utils._ChunkedLogProbFunction.apply

    def counted(hidden_states: Any, *others: Any) -> Any:
        positions.append(len(hidden_states))
        return project(hidden_states, *others)

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", counted)
    examples = Dataset.from_list([{"input_ids": list(range(1, 11)), "labels": [-100] * 7 + [8, 9, 10]}])
    training = TuningConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1)
    tune(ModelConfig(model_name_or_path=str(tiny_policy_dir)), training, tiny_tokenizer, examples)
    assert positions == [3]
