"""Questions and passages: what the rows become, and one sentence for each thing that is wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from zerosearch.data import Passage, claim_output_dir, load_questions, read_passages
from zerosearch.errors import UserError
from zerosearch.prompts import POLICY_PROMPT

ROW = {"id": "q1", "question": "Who wrote Emma", "golden_answers": ["Jane Austen", "Austen"], "dataset": "nq"}


def jsonl(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "qa.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def test_a_row_becomes_a_question_with_its_prompt(tmp_path: Path) -> None:
    questions = load_questions(jsonl(tmp_path, {**ROW, "metadata": {"x": 1}}), template="Q: {question}")
    assert questions.to_list() == [
        {
            "id": "q1",
            "prompt": [{"role": "user", "content": "Q: Who wrote Emma?"}],
            "question": "Who wrote Emma",
            "golden_answers": ["Jane Austen", "Austen"],
            "dataset": "nq",
        }
    ]
    assert questions.column_names == ["id", "prompt", "question", "golden_answers", "dataset"]


def test_the_prompt_is_the_papers_unless_another_is_given(tmp_path: Path) -> None:
    (question,) = load_questions(jsonl(tmp_path, ROW))
    assert question["prompt"][0]["content"] == POLICY_PROMPT.format(question="Who wrote Emma?")


def test_what_a_row_lacks_comes_from_its_place_and_file(tmp_path: Path) -> None:
    bare = {"question": "Why?", "golden_answers": ["x"]}
    source = jsonl(tmp_path, bare, "", {**bare, "data_source": "hotpotqa", "id": 7}, {**bare, "id": None})
    assert [(row["id"], row["dataset"]) for row in load_questions(source)] == [
        ("qa_0", "qa"),
        ("7", "hotpotqa"),
        ("qa_2", "qa"),
    ]


def test_blank_answers_are_dropped_and_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    rows = [{**ROW, "id": str(number), "golden_answers": [" ", f" a{number} "]} for number in range(5)]
    kept = load_questions(jsonl(tmp_path, *rows), limit=2)
    assert [(row["id"], row["golden_answers"]) for row in kept] == [("0", ["a0"]), ("1", ["a1"])]


def test_rows_after_the_limit_are_not_read(tmp_path: Path) -> None:
    assert len(load_questions(jsonl(tmp_path, ROW, "not json"), limit=1)) == 1


def test_a_parquet_file_reads_like_a_jsonl_file(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    stored = {**ROW, "prompt": [{"role": "user", "content": "another prompt"}], "extra_info": {"index": 3}}
    datasets.Dataset.from_list([stored]).to_parquet(str(path))
    assert load_questions(str(path)).to_list() == load_questions(jsonl(tmp_path, ROW)).to_list()


def test_a_hub_dataset_is_read_with_its_own_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {key: ROW[key] for key in ("question", "golden_answers")} | {"data_source": "nq", "prompt": "another"}
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([columns])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (question,) = load_questions("org/ZeroSearch_dataset", split="validation")
    assert asked == [("org/ZeroSearch_dataset", "validation")]
    assert (question["id"], question["dataset"]) == ("nq_0", "nq")
    assert question["prompt"][0]["content"].endswith("Question: Who wrote Emma?\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x", "question": "Why?"}, "line 2 lacks 'golden_answers'; it has id, question"),
        ({"golden_answers": ["x"]}, "line 2 lacks 'question'"),
        ({**ROW, "golden_answers": []}, "line 2: 'golden_answers' is empty"),
        ({**ROW, "golden_answers": [" "]}, "line 2: 'golden_answers' is empty"),
        ({**ROW, "golden_answers": "Austen"}, "line 2: 'golden_answers' is 'Austen', not a list of texts"),
        ({**ROW, "golden_answers": [1813]}, r"line 2: 'golden_answers' is \[1813\], not a list of texts"),
        ({**ROW, "question": " "}, "line 2: 'question' is ' ', not a text"),
        ({**ROW, "question": 5}, "line 2: 'question' is 5, not a text"),
        ('{"question": ', "line 2 is not JSON"),
        ("[1, 2]", "line 2 is no JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_questions(jsonl(tmp_path, ROW, row))


def bad_bytes(path: Path) -> str:
    path.write_bytes(b'{"question": "\xff"}\n')
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: str(path / "none.jsonl"), "there is no file"),
        (lambda path: str(path / "none.parquet"), "there is no file"),
        (lambda path: str(path), "neither a .jsonl nor a .parquet file"),
        (lambda path: bad_bytes(path / "a.jsonl"), "line 1 is not JSON"),
        (lambda path: bad_bytes(path / "a.parquet"), "is not a parquet file"),
        (lambda path: jsonl(path, ""), "holds no questions"),
        (lambda path: "no such dataset!", "cannot be loaded from the Hub"),
    ],
)
def test_a_bad_source_is_named(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_questions(make(tmp_path))


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="limit is 0"):
        load_questions(jsonl(tmp_path, ROW), limit=0)


def test_passages_are_read_in_wiki_18s_format(tmp_path: Path) -> None:
    contents = (
        '"Emma"\nA novel.\nBy Austen.',
        '""Heroes" (song)"\nBy Bowie.',
        "No title here.",
        'Bare title\n"quoted"',
    )
    corpus = jsonl(tmp_path, *({"id": "0", "contents": text} for text in contents))
    assert read_passages(corpus) == [
        Passage("Emma", "A novel.\nBy Austen."),
        Passage('"Heroes" (song)', "By Bowie."),
        Passage("", "No title here."),
        Passage("Bare title", '"quoted"'),
    ]


def test_a_document_names_its_title_once() -> None:
    assert Passage("Emma", "A novel.").document == "Emma: A novel."
    assert Passage("Emma", "Emma is a novel.").document == "Emma is a novel."
    assert Passage("Emma", "EMMA is a novel.").document == "EMMA is a novel."
    assert Passage("", "A novel.").document == "A novel."


@pytest.mark.parametrize("row", [{"id": "0", "text": "x"}, {"contents": None}, {"contents": " "}, {"contents": ["x"]}])
def test_a_bad_passage_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match='line 2 needs "contents"'):
        read_passages(jsonl(tmp_path, {"contents": "x"}, row))


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no passages"):
        read_passages(jsonl(tmp_path))


def test_an_output_folder_is_made_and_kept_from_being_overwritten(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    assert claim_output_dir(new) == new and new.is_dir()
    assert claim_output_dir(new) == new  # still empty
    (new / "results.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty; name another, or pass --overwrite_output_dir"):
        claim_output_dir(new)
    assert claim_output_dir(new, overwrite=True) == new and (new / "results.json").exists()
    with pytest.raises(UserError, match="is a file"):
        claim_output_dir(new / "results.json", overwrite=True)
    with pytest.raises(UserError, match="cannot be made"):
        claim_output_dir(new / "results.json" / "c")
