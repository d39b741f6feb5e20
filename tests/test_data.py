"""Questions and passages: what the rows become, and one sentence for each thing that is wrong with a file."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonl_files import write_rows

from zerosearch import data
from zerosearch.data import (
    BENCHMARKS,
    Passage,
    choose_questions,
    data_hash,
    load_question_sets,
    load_questions,
    read_passages,
)
from zerosearch.errors import UserError

ROW = {"id": "q1", "question": "Who wrote Emma", "golden_answers": ["Jane Austen", "Austen"], "dataset": "nq"}


def jsonl(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "qa.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def test_a_row_becomes_a_question_and_what_it_lacks_comes_from_its_place_and_file(tmp_path: Path) -> None:
    bare = {"question": "Why?", "golden_answers": [" ", " x "]}  # a blank answer is dropped
    rows = [
        {**ROW, "metadata": {"x": 1}},
        bare,
        "",
        {**bare, "data_source": "hotpotqa", "id": 7},
        {**bare, "id": None},
    ]
    asked = {"question": "Why?", "golden_answers": ["x"]}
    assert load_questions(jsonl(tmp_path, *rows)).to_list() == [
        ROW,
        {"id": "qa_1", "dataset": "qa", **asked},
        {"id": "7", "dataset": "hotpotqa", **asked},
        {"id": "qa_3", "dataset": "qa", **asked},
    ]


def test_rows_after_the_limit_are_not_read(tmp_path: Path) -> None:
    assert len(load_questions(jsonl(tmp_path, ROW, "not json"), limit=1)) == 1
    with pytest.raises(UserError, match="limit is 0"):
        load_questions(jsonl(tmp_path, ROW), limit=0)


def test_golden_documents_are_kept_where_they_are_known(tmp_path: Path) -> None:
    first, second = load_questions(jsonl(tmp_path, {**ROW, "golden_documents": ["Emma is by Jane Austen."]}, ROW))
    assert (first["golden_documents"], second["golden_documents"]) == (["Emma is by Jane Austen."], None)
    with pytest.raises(UserError, match="line 1: 'golden_documents' is 'Emma', not a list of texts"):
        load_questions(jsonl(tmp_path, {**ROW, "golden_documents": "Emma"}))


def write_parquet(path: Path, **columns: Any) -> str:
    rows = {"question": ["Who wrote Emma"], "golden_answers": [["Jane Austen", "Austen"]]}
    pq.write_table(pa.table(rows | columns), path)
    return str(path)


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": [[{"role": "user", "content": "another prompt"}]], "extra_info": [{"index": 3}]},
        {"extra": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))},
        {"took": pa.array([1], pa.duration("ms")), "time": pa.array([1], pa.time64("us"))},
        {"data_source": pa.array(["a"]).dictionary_encode()},
        {"question": pa.array(["Who wrote Emma"], pa.string_view())},
        {"golden_answers": pa.array([["Jane Austen", "Austen"]], pa.list_(pa.dictionary(pa.int32(), pa.string())))},
        {"golden_answers": pa.array([["Jane Austen", "Austen"]], pa.large_list(pa.large_string()))},
    ],
)
def test_a_parquet_file_reads_like_a_jsonl_file(tmp_path: Path, columns: dict[str, Any]) -> None:
    (row,) = load_questions(write_parquet(tmp_path / "a.parquet", **columns)).to_list()
    assert row == {**ROW, "id": "a_0", "dataset": "a"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": [b"Who wrote Emma"]}, r"row 1: 'question' is b'Who wrote Emma', not a text"),
        ({"golden_answers": [["A", None]]}, r"row 1: 'golden_answers' is \['A', None\], not a list of texts"),
        ({"golden_answers": [{"target": ["A"]}]}, "row 1: 'golden_answers' is {'target'.*}, not a list of texts"),
        ({"question": pa.array([b"\xff"]).view(pa.string())}, "holds a value that cannot be read: 'utf-8' codec"),
        ({"id": pa.array([2**31 - 1], pa.int32()).cast(pa.date32())}, "holds a value that cannot be read"),
        ({"question": [None]}, "row 1 lacks 'question'"),
        ({"question": pa.array([], pa.string()), "golden_answers": []}, "holds no questions"),
    ],
)
def test_a_parquet_file_of_something_else_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_questions(write_parquet(tmp_path / "a.parquet", **columns))


def test_a_column_that_is_missing_is_named_with_those_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["Why?"], "answer": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet lacks 'golden_answers'; it has answer, question"):
        load_questions(str(tmp_path / "a.parquet"))


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([["Who?"], [["A"]], ["Why?"]], names=["question", "golden_answers", "question"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has several columns 'question'"):
        load_questions(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("kind", ["Image", "Audio"])
@pytest.mark.parametrize("column", ["picture", "question"])
@pytest.mark.parametrize("source", ["file", "Hub"])
def test_no_column_opens_an_address(
    tmp_path: Path, kind: str, column: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        media = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        features: dict[str, Any] = {
            "question": {"dtype": "string", "_type": "Value"},
            "golden_answers": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
        }
        columns = {"question": ["Who?"], "golden_answers": [["x"]]}
        table = pa.table(columns | {column: pa.array([{"bytes": None, "path": address}], media)})
        about = json.dumps({"info": {"features": features | {column: {"_type": kind}}}})
        table = table.replace_schema_metadata({"huggingface": about})
        pq.write_table(table, tmp_path / "a.parquet")
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset(table))
        try:
            assert len(load_questions(str(tmp_path / "a.parquet") if source == "file" else "org/name")) == 1
            assert column == "picture"
        except UserError as error:
            assert column == "question" and "not a text" in str(error)
        listener.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_half_characters_and_nul_are_replaced(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "Who \ud83d wrote\0it?", "golden_answers": ["caf\udce9"], "id": "a\ud83d"})
    # A parquet file may hold NUL, and no half characters.
    columns = {"question": ["Who \0 wrote\0it?"], "golden_answers": [["caf\0"]], "id": ["a\0"]}
    for source in (path, write_parquet(tmp_path / "a.parquet", **columns)):
        (row,) = load_questions(source).to_list()
        assert (row["id"], row["question"]) == ("a\ufffd", "Who \ufffd wrote\ufffdit?")
        assert row["golden_answers"] == ["caf\ufffd"]


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
    assert "prompt" not in question


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
        ("[1, 2]", "line 2 is not a JSON object"),
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
        (lambda path: bad_bytes(path / "a.parquet"), "cannot be read as a parquet file"),
        (lambda path: jsonl(path, ""), "holds no questions"),
        (lambda path: "no such dataset!", "cannot be loaded from the Hub"),
    ],
)
def test_a_bad_source_is_named(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_questions(make(tmp_path))


def test_a_dataset_on_the_hub_that_is_a_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, split: str) -> None:  # as datasets does since 4.0
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError, match=r"'a/b' .* cannot be loaded from the Hub: Dataset scripts are no longer"):
        load_questions("a/b")


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
    assert Passage("Emma", "").document == "Emma"  # no colon with nothing after it


@pytest.mark.parametrize("row", [{"id": "0", "text": "x"}, {"contents": None}, {"contents": " "}, {"contents": ["x"]}])
def test_a_bad_passage_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match='line 2 needs "contents"'):
        read_passages(jsonl(tmp_path, {"contents": "x"}, row))
    with pytest.raises(UserError, match="holds no passages"):
        read_passages(jsonl(tmp_path))


def benchmark_folder(root: Path, num_rows: int = 3) -> Path:
    """Write a folder in the layout of FlashRAG's datasets, metadata of different shapes included."""
    for name, benchmark in BENCHMARKS.items():
        rows = [
            {
                "id": f"{benchmark.split}_{number}",
                "question": f"what is number {number} of {name}",
                "golden_answers": [str(number)],
                "metadata": {"type": number} if number % 2 else {"context": {"title": ["A"]}, "type": "x"},
            }
            for number in range(num_rows)
        ]
        write_rows(root / name / f"{benchmark.split}.jsonl", rows)
    return root


def test_the_seven_benchmarks_come_from_flashrags_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(benchmark_folder(tmp_path))
    rows = load_question_sets(["benchmarks"], benchmark_source=folder)
    names = "nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle".split()
    splits = "test test test dev dev dev test".split()
    assert [(row["dataset"], row["id"]) for row in rows[1::3]] == [
        (name, f"{split}_1") for name, split in zip(names, splits, strict=True)
    ]
    assert len(rows) == 21 and rows[0]["question"] == "what is number 0 of nq"
    assert "nq has 3 questions here, and 3610 in FlashRAG" in caplog.text
    rows = load_question_sets([jsonl(tmp_path, ROW), "musique"], limit=2, benchmark_source=folder)
    assert [row["id"] for row in rows] == ["q1", "dev_0", "dev_1"], "benchmarks and files one after another"
    with pytest.raises(UserError, match="a dataset is named twice: nq, triviaqa"):
        load_question_sets(["benchmarks", "nq"], benchmark_source=folder)


def test_a_benchmark_comes_from_the_hub_as_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = benchmark_folder(tmp_path), []

    def download(repository: str, path: str, repo_type: str) -> str:
        asked.append((repository, path, repo_type))
        return str(folder / path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert [row["golden_answers"] for row in load_questions("nq").to_list()] == [["0"], ["1"], ["2"]]
    assert asked == [("RUC-NLPIR/FlashRAG_datasets", "nq/test.jsonl", "dataset")], "no training set with it"


def test_a_benchmark_that_the_hub_does_not_give_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^popqa/test\.jsonl of the dataset 'RUC-NLPIR/.*' cannot be loaded from the Hub"
    ):
        load_questions("popqa")  # tests are offline, and the cache is empty


def question(dataset: str, number: int) -> dict[str, Any]:
    return {"dataset": dataset, "id": str(number), "question": f"{number}?", "golden_answers": [str(number)]}


def test_the_chosen_questions_depend_on_the_questions_alone() -> None:
    rows = [question("nq", number) for number in range(40)] + [question("bamboogle", number) for number in range(3)]
    chosen = choose_questions(rows, 5)
    assert [row["id"] for row in chosen if row["dataset"] == "bamboogle"] == ["0", "1", "2"]  # a small set stays whole
    # Written down: another choice would be another benchmark.
    assert [row["id"] for row in chosen if row["dataset"] == "nq"] == NQ_CHOSEN
    mixed = choose_questions(rows[::-1], 5)
    assert mixed == chosen[::-1]
    assert [row for row in choose_questions(rows, 6) if row in chosen] == chosen  # more questions: these among them
    with pytest.raises(UserError, match="num_questions is 0"):
        choose_questions(rows, 0)


NQ_CHOSEN = ["2", "18", "19", "23", "39"]


def test_the_data_hash_knows_questions_answers_and_order_and_no_prompts() -> None:
    rows = [question("nq", 1), question("nq", 2)]
    assert data_hash(rows) == data_hash([{**row, "prompt": "x"} for row in rows])
    others = [rows[::-1], rows[:1], [rows[0], {**rows[1], "golden_answers": ["3"]}], [rows[0], question("popqa", 2)]]
    assert len({data_hash(rows), *map(data_hash, others)}) == 5


def test_flashrags_sizes_are_those_the_paper_scores() -> None:
    assert sum(benchmark.size for benchmark in BENCHMARKS.values()) == 51_713  # Search-R1 scores the full sets, too
    assert sum(min(benchmark.size, 500) for benchmark in BENCHMARKS.values()) == 3_125


ANY_VALUE = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(max_size=4)
    | st.lists(st.text(max_size=4) | st.none(), max_size=3)
)


@given(st.dictionaries(st.sampled_from([*data.COLUMNS, "extra"]), ANY_VALUE), st.sampled_from(["jsonl", "parquet"]))
def test_a_row_is_a_question_or_named_in_one_sentence(row: dict[str, Any], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"qa.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table({name: pa.array([value]) for name, value in row.items()}), path)
        else:
            path.write_text(json.dumps(row) + "\n")
        try:
            (found,) = load_questions(str(path)).to_list()
        except UserError as error:
            assert "qa." in str(error) and "\n" not in str(error)
        else:
            assert found["question"].strip() == found["question"] != ""
            assert found["golden_answers"] and all(
                answer.strip() == answer != "" for answer in found["golden_answers"]
            )
            assert isinstance(found["id"], str) and isinstance(found["dataset"], str)
            assert found.keys() - {"golden_documents"} == {"id", "question", "golden_answers", "dataset"}
