"""Searches made of gaps in passages: they find the answer again, and nothing that a test question would."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonl_files import rows_of, write_rows
from recipe_modules import Refusal, load_recipe

from zerosearch.metrics import holds_answer

PASSAGES = [
    '"Aldora"\nAldora is a mountain. It was climbed by Maren Stahl in a winter storm.',
    '"Silent Harbor"\nThe novel was written by Oscar Colby near the coast.',
    '"Calvania"\nIts parliament first met in 1848 with a lake on its seal.',
    '"Nothing"\nhere is no name and no number to look for.',
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "corpus.jsonl", [{"id": n, "contents": text} for n, text in enumerate(PASSAGES)])


def test_a_passage_loses_a_name_or_a_number_that_its_search_finds_again(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "cloze.jsonl"
    load_recipe("../data/cloze_searches").main(["--corpus", str(corpus), "--output", str(output)])
    rows = {row["golden_answers"][0]: row for row in rows_of(output)}
    assert rows.keys() == {"Maren Stahl", "Oscar Colby", "1848"}
    for answer, row in rows.items():
        assert "___" in row["question"] and not holds_answer(row["question"] + row["query"], [answer])
        assert holds_answer(row["documents"][0]["text"], [answer])
    assert rows["1848"]["query"] == "Calvania parliament first with lake"


def test_what_is_found_for_a_question_to_leave_out_is_in_no_search(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "cloze.jsonl"
    test = write_rows(tmp_path / "test.jsonl", [{"question": "Silent Harbor?", "golden_answers": ["Oscar Colby"]}])
    given = ["--corpus", str(corpus), "--output", str(output), "--leave_out", str(test)]
    load_recipe("../data/cloze_searches").main(given)
    rows = rows_of(output)
    assert {row["golden_answers"][0] for row in rows} == {"Maren Stahl", "1848"}
    assert "Silent Harbor" not in {document["title"] for row in rows for document in row["documents"]}


def test_a_corpus_without_anything_to_look_for_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"id": "0", "contents": PASSAGES[3]}])
    said = refusal("../data/cloze_searches", ["--corpus", str(corpus), "--output", str(tmp_path / "out.jsonl")])
    assert "no passage left with a title and a name or a number" in said
