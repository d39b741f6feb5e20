"""TinyWorld's data on disk: searches of as many worlds as asked for, and what cannot be made is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from recipe_modules import Refusal, load_recipe


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_recipe("../data/make_tinyworld")


def searches(script: ModuleType, **changes: Any) -> list[dict[str, Any]]:
    return script.search_many_worlds(script.TinyWorldArguments(**{"n_searches": 24, **changes}))


def test_searches_are_spread_over_the_worlds_and_more_worlds_come_after_the_first(script: ModuleType) -> None:
    of_two, of_three = searches(script, n_searched_worlds=2), searches(script, n_searches=36, n_searched_worlds=3)
    assert 20 <= len(of_two) <= 24 and of_three[: len(of_two)] == of_two
    assert 8 <= len(of_three) - len(of_two) <= 12
    assert {row["useful"] for row in of_two} == {True, False}


def test_the_worlds_of_two_seeds_differ(script: ModuleType) -> None:
    first, second = searches(script, n_searched_worlds=1), searches(script, n_searched_worlds=1, seed=1)
    assert {json.dumps(row) for row in first}.isdisjoint(json.dumps(row) for row in second)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n_test 0", "n_test is 0: it must be at least 1"),
        ("--n_searched_worlds 0", "n_searched_worlds is 0: choose 1 to 1000"),
        ("--n_searched_worlds 1001 --n_searches 9000", "n_searched_worlds is 1001: choose 1 to 1000"),
        ("--n_searches many", "error: argument --n_searches/--n-searches: invalid int value: 'many'; --help lists"),
        ("--n_searched_worlds 5 --n_searches 9", "n_searches is 9: 5 worlds need two each"),
    ],
)
def test_what_cannot_be_made_gets_one_sentence(refusal: Refusal, flags: str, message: str, tmp_path: Path) -> None:
    assert message in refusal("../data/make_tinyworld", ["--output_dir", str(tmp_path / "out"), *flags.split()])
    assert not (tmp_path / "out").exists()
