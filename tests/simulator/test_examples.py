"""What the simulator learns: judged searches under any prompt, and the forms in which others publish such data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonl_files import write_rows

from zerosearch.errors import UserError
from zerosearch.simulator.examples import load_examples, simulator_example

SEARCH = {
    "question": "Who wrote Emma?",
    "golden_answers": ["Jane Austen", "Austen"],
    "query": "Emma author",
    "documents": ["Emma is by\nJane Austen.", "It is a novel."],
    "useful": True,
}
DOCUMENTS = "Doc 1: Emma is by Jane Austen.\nDoc 2: It is a novel."
PROMPT = "Emma author? useful / Useful / Jane Austen"
EXAMPLE = {
    "prompt": [{"role": "system", "content": ""}, {"role": "user", "content": PROMPT}],
    "completion": [{"role": "assistant", "content": DOCUMENTS}],
}
TEMPLATE = "{query}? {quality} / {Quality} / {golden_answer}"


def write(path: Path, *rows: object) -> str:
    return str(write_rows(path, rows))


def test_a_search_becomes_prompt_and_documents() -> None:
    assert simulator_example(SEARCH, TEMPLATE) == EXAMPLE


TEXTS = {"user": PROMPT, "assistant": DOCUMENTS}


@pytest.mark.parametrize(
    "row",
    [
        SEARCH,
        {**SEARCH, "documents": [{"title": "", "text": "Emma is by Jane Austen."}, "It is a novel."]},
        {**SEARCH, "useful": False, "prompt": PROMPT, "completion": DOCUMENTS},  # a stored prompt is used as stored
        {"prompt": PROMPT, "completion": DOCUMENTS},
        {"prompt": EXAMPLE["prompt"], "completion": EXAMPLE["completion"], "id": 1},
        {"prompt": EXAMPLE["prompt"][1:], "completion": DOCUMENTS},
        {"messages": [{"role": role, "content": text} for role, text in TEXTS.items()]},
        {"conversations": [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": DOCUMENTS}]},
        {"instruction": PROMPT, "input": "", "output": DOCUMENTS, "history": []},
        {"instruction": "", "input": PROMPT, "output": DOCUMENTS},
        {"input": PROMPT, "output": DOCUMENTS},
    ],
)
def test_every_form_becomes_the_same_example(tmp_path: Path, row: dict[str, Any]) -> None:
    assert load_examples(write(tmp_path / "s.jsonl", row), template=TEMPLATE).to_list() == [EXAMPLE]


def test_instruction_and_input_are_joined_and_a_system_message_is_kept(tmp_path: Path) -> None:
    row = {"instruction": "Be an engine.", "input": "Query: Emma", "output": "Doc 1: x", "system": "You search."}
    (example,) = load_examples(write(tmp_path / "s.jsonl", row)).to_list()
    assert [message["content"] for message in example["prompt"]] == ["You search.", "Be an engine.\nQuery: Emma"]


def test_searches_for_held_out_queries_are_left_out_whatever_their_question(tmp_path: Path) -> None:
    others = [SEARCH | {"question": "Who is behind Emma?"}, SEARCH | {"query": "Emma's author"}]
    published = {"prompt": PROMPT, "completion": DOCUMENTS}  # names no query
    path = write(tmp_path / "s.jsonl", SEARCH, *others, published)
    examples = load_examples(path, "train", TEMPLATE, {"Emma author"}).to_list()
    prompts = [example["prompt"][1]["content"] for example in examples]
    assert prompts == ["Emma's author? useful / Useful / Jane Austen", PROMPT]
    with pytest.raises(UserError, match="holds no examples for queries that are not held out"):
        load_examples(write(tmp_path / "t.jsonl", SEARCH), held_out_queries={"Emma author"})


@pytest.mark.parametrize("suffix", ["json", "parquet", "folder"])
def test_files_of_every_kind(tmp_path: Path, suffix: str) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [SEARCH, SEARCH | {"useful": False}]
    source = tmp_path / f"data.{suffix}"
    if suffix == "json":
        source.write_text(json.dumps(rows))
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    else:
        source.mkdir()
        write(source / "train.jsonl", *rows)
    examples = load_examples(str(source), template=TEMPLATE).to_list()
    assert [example["prompt"][1]["content"] for example in examples] == [
        PROMPT,
        "Emma author? noisy / Noisy / Jane Austen",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "s.jsonl",
            '{"question": "Q?", "text": "t"}',
            r"line 1 has the columns question, text; .* \{prompt, completion\}",
        ),
        ("s.jsonl", json.dumps(SEARCH | {"useful": None}), "line 1: 'useful' must be a boolean"),
        ("s.jsonl", json.dumps(SEARCH | {"documents": []}), "line 1: 'documents' must be a list that is not empty"),
        ("s.jsonl", json.dumps(SEARCH | {"query": None}), "line 1: 'query' must be a text"),
        ("s.jsonl", '{"prompt": "p", "completion": ""}', "line 1 is not a prompt with one reply"),
        ("s.jsonl", '{"messages": [{"role": "user", "content": "p"}]}', "is not a prompt with one reply"),
        ("s.jsonl", '{"messages": 5}', "is not a prompt with one reply"),
        ("s.jsonl", "", "s.jsonl holds no examples"),
        ("s.json", '{"a": 1}', "s.json is not a list of JSON objects"),
        ("s.json", "[", "s.json is not JSON"),
        ("s.json", "[" * 100_000, "s.json is not JSON"),
        ("s.parquet", "hello", "s.parquet.*cannot be"),
        ("s.csv", "a,b", "s.csv is not a .jsonl, .json or .parquet file"),
        ("folder/other.jsonl", "{}", r"folder holds no train\.jsonl"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_examples(str(path.parent if "/" in name else path))


@pytest.mark.parametrize("source", ["none.jsonl", "none.json", "none.parquet", "someone/nothing"])
def test_a_source_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(UserError, match=f"there is no file {source}|'{source}' .* cannot be loaded from the Hub"):
        load_examples(source)
