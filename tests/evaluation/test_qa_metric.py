"""The module for Hugging Face's `evaluate`, loaded by its path as a user would, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

MODULE = Path(__file__).parents[2] / "src/zerosearch/evaluation/qa_metric.py"

SCRIPT = """\
import json, sys, evaluate
metric = evaluate.load(sys.argv[1])
scores = metric.compute(
    predictions=["the Jane Austen", "Paris or London or Beijing", None, "York"],
    references=[["Jane Austen", "Austen"], ["Beijing"], ["yes"], ["New York"]],
)
metric.add(prediction="x", reference=["x"])
print(json.dumps([scores, metric.compute()]))
"""


def test_evaluate_loads_it_by_its_path_and_offline(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(MODULE)],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    scores, one = json.loads(done.stdout)
    # F1: 1, one shared word of 5 and 1, nothing, one of 1 and 2.
    assert scores == {"em": 1 / 4, "cover_em": 2 / 4, "f1": (1 + 1 / 3 + 0 + 2 / 3) / 4}
    assert one == {"em": 1.0, "cover_em": 1.0, "f1": 1.0}
