"""recipes/bench/one_gpu.py: what is counted, what is kept of others, and the same documents from both engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_modules import load_recipe

bench = load_recipe("bench/one_gpu")
MEASURED = {
    **dict(zip(bench.ENGINES, ({"bytes": 600}, {"bytes": 500}, {"bytes": 700}), strict=True)),
    "sync": {"ours": [1.0, 1.0], "theirs": [4.0, 2.0]},
    "decode": {"ours": [3.0], "theirs": [2.0]},
    "rollout": {"ours": [3.0, 1.0], "theirs": [2.0, 2.0], "same_documents": {"share": 1.0, "searches": 9}},
}


def test_bytes_are_counted_at_qwens_shape_and_what_others_measured_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "one_gpu.json"
    output.write_text('{"overlap_step_ratio": {"mean": 0.6}, "sync_bytes_ratio": 2}')
    monkeypatch.setattr(bench, "child", lambda arguments, kind: MEASURED[kind])
    bench.main(["--output", str(output)])
    result = json.loads(output.read_text())
    base, adapter = 3_085_938_688, 29_933_568
    assert result["memory_ratio"]["mean"] == round((base + 2 * adapter) / (2 * base + adapter), 4)
    assert result["sync_bytes_ratio"]["high"] == round(4 * adapter / (2 * base), 4) < 0.05
    assert result["overlap_step_ratio"] == {"mean": 0.6}
    assert result["sync_seconds_ratio"] == {"mean": 0.375, "low": 0.25, "high": 0.5}
    decoded = {"mean": 1.5, "low": 1.5, "high": 1.5}
    rollouts = {"mean": 1.0, "low": 0.5, "high": 1.5}
    assert [row["ratio"] for row in result["rows"]][4:] == [0.5, result["sync_seconds_ratio"], decoded, rollouts]


@pytest.mark.slow
def test_both_engines_write_the_same_documents(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    found: dict[str, Any] = bench.measure(bench.BenchArguments(rounds=1, questions=4, child="rollout"))
    assert found["same_documents"]["searches"] > 20 and found["same_documents"]["share"] > 0.9
    assert len(found["ours"]) == len(found["theirs"]) == 1
