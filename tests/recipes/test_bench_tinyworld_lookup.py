"""recipes/bench/tinyworld_lookup.py: what the stored policy quotes, by how many documents could mislead it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_modules import Refusal, load_recipe


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_facts", "1000000"], "n_facts is 1000000: choose 1 to "),
        (["--output", "/dev/null/bench/file.json"], "Not a directory: '/dev/null/bench'"),
    ],
)
def test_mistakes_get_one_sentence(refusal: Refusal, flags: list[str], message: str) -> None:
    assert message in refusal("bench/tinyworld_lookup", flags)


def test_the_stored_policy_quotes_the_fact_among_others(tmp_path: Path) -> None:
    output = tmp_path / "lookup.json"
    load_recipe("bench/tinyworld_lookup").main(["--n_facts", "60", "--output", str(output)])
    rows = {row["documents"]: row for row in json.loads(output.read_text())["rows"]}
    left_out = rows.pop("fact left out")
    assert left_out["n"] == 60 and 0 <= left_out["right"] <= 1
    assert 30 < sum(row["n"] for row in rows.values()) <= 60, "BM25 finds most facts"
    assert sum(row["n"] * row["right"] for row in rows.values()) > 0.5 * sum(row["n"] for row in rows.values())
