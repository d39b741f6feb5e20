"""The BM25 measurement as a user runs it, on a corpus that grows a little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_modules import Refusal

RECIPE = Path(__file__).parents[2] / "recipes/bench/bm25.py"


@pytest.mark.slow
def test_it_measures_tinyworld_and_a_larger_corpus(tmp_path: Path) -> None:
    output = tmp_path / "bench/bm25.json"
    flags = ("--sizes", "0", "4000", "--output", str(output))
    done = subprocess.run([sys.executable, str(RECIPE), *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.read_text())
    own, grown = results["sizes"]
    assert own["passages"] < grown["passages"] == 4000
    assert own.keys() >= {"queries_per_s", "build_s", "peak_mib"}
    assert own["questions"] == 300 and results["corpus"] == "TinyWorld"
    # Half of the questions need a second search; passages of random words change little.
    assert 0.4 < own["answer_in_top5"] < 0.7
    assert grown["answer_in_top5"] == pytest.approx(own["answer_in_top5"], abs=0.05)
    assert 0 < own["index_mib"] < grown["index_mib"]


def test_files_come_in_pairs(refusal: Refusal, tmp_path: Path) -> None:
    flags = ["--corpus", "x.jsonl", "--output", str(tmp_path / "bm25.json")]
    assert refusal("bench/bm25", flags).startswith("error: --corpus and --questions go together")
