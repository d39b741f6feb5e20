"""The measurement of the look-up of questions, on a few of them."""

from __future__ import annotations

import json
from pathlib import Path

from jsonl_files import write_rows
from recipe_modules import load_recipe


def test_it_counts_queries_whose_question_is_found(questions: Path, tmp_path: Path) -> None:
    asked = [("Who wrote Emma?", "Emma author"), ("Who wrote Emma?", "Jane Austen"), ("Who wrote Emma?", "zebra")]
    rows = ({"question": text, "query": query} for text, query in asked)
    searches = write_rows(tmp_path / "searches.jsonl", rows)
    flags = ["--searches", str(searches), "--questions", str(questions), "--output", str(tmp_path / "found.json")]
    load_recipe("bench/question_lookup").main(flags)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["questions"] == 3
    best, first, later, *_ = found["rows"]
    assert best == {"searches": "all", "n": 3, "margin": 1.0, "taken": 2 / 3, "right": 0.5}
    assert (first["n"], first["right"], later["n"], later["right"]) == (1, 1.0, 2, 0.0)
