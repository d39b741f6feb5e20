"""The tables of the documents are those of recipes/results, and each result says how it was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from recipe_modules import load_recipe

RESULTS = Path(__file__).parents[2] / "recipes" / "results"
render = load_recipe("results/render")
WORDS = re.compile(r">([^<]+)</text>")  # where it puts them depends on matplotlib's version


def test_the_tables_of_the_documents_are_rendered_from_the_results() -> None:
    shown = set()
    for name in render.DOCUMENTS:
        text = (render.ROOT / name).read_text(encoding="utf-8")
        assert render.rendered(text) == text, f"{name} differs from recipes/results: run `make tables`"
        assert text.count("<!-- results/") == text.count("<!-- end -->") == len(render.MARKED.findall(text))
        shown |= {found[1] for found in render.MARKED.findall(text)}
    assert shown == {path.stem for path in RESULTS.glob("*.json")}
    for name, picture in render.pictures().items():
        drawn = (render.ROOT / "recipes/pictures" / name).read_text(encoding="utf-8")
        assert WORDS.findall(drawn) == WORDS.findall(picture) != [], (
            f"{name} differs from recipes/results: run `make tables`"
        )


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_says_how_it_was_measured(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    assert {"what", "command", "machine", "versions", "seed", "columns", "rows"} <= results.keys()
    script = results["command"].split()[1]
    assert results["command"].startswith("make ") or (render.ROOT / script).is_file()


def test_a_table_is_rendered_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [{"title": "what", "key": "name"}, {"title": "EM", "key": "em", "digits": 2}, {"title": "n", "key": "n"}]
    rows = [{"name": "a", "em": {"mean": 0.5, "low": 0.25, "high": 1}, "n": 1200}, {"name": "b", "em": None, "n": 1.5}]
    made = {"command": "make demo", "machine": "two cores", "columns": columns, "rows": rows}
    (tmp_path / "one.json").write_text(json.dumps(made))
    monkeypatch.setattr(render, "FOLDER", tmp_path)
    assert render.rendered("before\n<!-- results/one.json -->\nold\n<!-- end -->\nafter") == (
        "before\n<!-- results/one.json -->\n"
        "| what | EM | n |\n|---|---:|---:|\n| a | 0.50 [0.25, 1.00] | 1,200 |\n| b | - | 1.500 |\n\n"
        "Machine: two cores. Command:\n\n```bash\nmake demo\n```\n<!-- end -->\nafter"
    )


def test_some_of_the_tables_of_a_file_can_stand_alone() -> None:
    rows = render.rendered("<!-- results/tables.json: 5 7 -->\n<!-- end -->").splitlines()[3:]
    assert {row.split("|")[1].strip() for row in rows if row.startswith("|")} == {"5", "7"}
