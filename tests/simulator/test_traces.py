"""Trace files: read strictly, appended line by line, whole again after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zerosearch.data import Passage
from zerosearch.errors import UserError
from zerosearch.simulator.traces import JsonlLog, as_passage, read_traces, sole_writer, write_jsonl

TRACE = {
    "question": "Who wrote Emma?",
    "golden_answers": ["Jane Austen"],
    "query": "Emma author",
    "documents": [{"title": "Emma", "text": "By Jane Austen."}, "Rain: It rains."],
    "outcome": "answered",
}
SHARED = Path(__file__).parents[3] / "shared/data"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_column_is_kept(tmp_path: Path) -> None:
    assert read_traces(write(tmp_path / "t.jsonl", TRACE)) == [TRACE]


def test_a_search_may_have_found_nothing(tmp_path: Path) -> None:
    assert read_traces(write(tmp_path / "t.jsonl", TRACE | {"documents": []}))[0]["documents"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": " "}, "t.jsonl line 2: 'query' must be a text"),
        ({"question": None}, "line 2: 'question' must be a text"),
        ({"golden_answers": "Jane"}, "line 2: 'golden_answers' must be a list of texts, and is 'Jane'"),
        ({"golden_answers": []}, "'golden_answers' must be"),
        ({"documents": None}, "'documents' must be a list"),
        ({"documents": [{"title": "Emma"}]}, r"a document must be a text or \{title, text\}, and is"),
        ({"documents": [""]}, "a document must be"),
    ],
)
def test_a_row_that_is_no_trace_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_traces(write(tmp_path / "t.jsonl", TRACE, TRACE | change))


def test_no_searches_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t\.jsonl holds no searches"):
        read_traces(write(tmp_path / "t.jsonl"))


@pytest.mark.parametrize(
    ("document", "passage"),
    [
        ({"title": " Emma ", "text": " A novel. "}, Passage("Emma", "A novel.")),
        ({"title": None, "text": "A novel."}, Passage("", "A novel.")),
        ("Emma: A novel.", Passage("Emma", "A novel.")),
        ("A novel.", Passage("", "A novel.")),
        ("Emma:", Passage("", "Emma:")),
        ("It is a novel by an author who said of it: badly.",) * 2,
    ],
)
def test_a_document_has_its_title_apart(document: object, passage: object) -> None:
    if isinstance(passage, str):
        passage = Passage("", passage)
    assert as_passage(document) == passage  # type: ignore[arg-type]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data here")
def test_real_traces_are_read() -> None:
    traces = read_traces(SHARED / "search_traces.jsonl")
    assert len(traces) == 2176
    assert all(as_passage(document).title for trace in traces for document in trace["documents"])


def test_half_a_line_is_dropped_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonlLog(path)
    log.append({"n": 1}, {"n": 2})
    log.close()
    with path.open("ab") as file:
        file.write('{"n": "dré'.encode()[:-1])  # a kill in the middle of a letter
    log = JsonlLog(path)
    assert log.dropped_bytes == 10 and "ended in half a line" in caplog.text
    log.append({"n": 3})
    log.close()
    assert [json.loads(line) for line in path.open()] == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_file_of_half_a_line_is_empty(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"n"')
    JsonlLog(tmp_path / "log.jsonl").close()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"n": 1})

    def rows() -> object:
        yield {"n": 2}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_jsonl(path, rows())  # type: ignore[arg-type]
    assert path.read_text() == '{"n": 1}\n'
    write_jsonl(path, [{"n": "é"}])
    assert path.read_text(encoding="utf-8") == '{"n": "é"}\n'


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="another run is writing")
    with sole_writer(tmp_path / "out"), refused, sole_writer(tmp_path / "out"):
        pass
    with sole_writer(tmp_path / "out"):
        pass
