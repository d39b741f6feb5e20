"""The module for Hugging Face's `evaluate`, loaded by its path as a user would, without a network."""

from __future__ import annotations

from pathlib import Path

import evaluate
import pytest

import zerosearch.evaluation.qa_metric


def test_evaluate_loads_it_by_its_path_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    metric = evaluate.load(zerosearch.evaluation.qa_metric.__file__, cache_dir=str(tmp_path))
    scores = metric.compute(
        predictions=["the Jane Austen", "Paris or London or Beijing", None, "York"],
        references=[["Jane Austen", "Austen"], ["Beijing"], ["yes"], ["New York"]],
    )
    # F1: 1, one shared word of 5 and 1, nothing, one of 1 and 2.
    assert scores == {"em": 1 / 4, "cover_em": 2 / 4, "f1": (1 + 1 / 3 + 0 + 2 / 3) / 4}
    metric.add(prediction="x", reference=["x"])
    assert metric.compute() == {"em": 1.0, "cover_em": 1.0, "f1": 1.0}
