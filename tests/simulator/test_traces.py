"""Trace files are read strictly, titles apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonl_files import write_rows

from zerosearch.data import Passage
from zerosearch.errors import UserError
from zerosearch.simulator.traces import as_passage, read_traces

TRACE = {
    "question": "Who wrote Emma?",
    "golden_answers": ["Jane Austen"],
    "query": "Emma author",
    "documents": [{"title": "Emma", "text": "By Jane Austen."}, "Rain: It rains."],
    "outcome": "answered",
}
SHARED = Path(__file__).parents[3] / "shared/data"


def test_every_column_is_kept(tmp_path: Path) -> None:
    assert read_traces(write_rows(tmp_path / "t.jsonl", [TRACE])) == [TRACE]


def test_a_search_may_have_found_nothing(tmp_path: Path) -> None:
    assert read_traces(write_rows(tmp_path / "t.jsonl", [TRACE | {"documents": []}]))[0]["documents"] == []


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
        ({"documents": [{"title": 5, "text": "A novel."}]}, "a document must be"),
        ({"answer": ["Jane", None]}, r"'answer' must be a text or a list of texts, and is \['Jane', None\]"),
        ({"answer": 5}, "'answer' must be"),
        ({"useful": "false"}, "'useful' must be true, false or null, and is 'false'"),
        ({"verdicts": ["rule"]}, "'verdicts' must hold lists of true, false and null, and is"),
        ({"verdicts": {"rule": ["true", None]}}, "'verdicts' must hold"),
    ],
)
def test_a_row_that_is_no_trace_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_traces(write_rows(tmp_path / "t.jsonl", [TRACE, TRACE | change]))


def test_no_searches_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t\.jsonl holds no searches"):
        read_traces(write_rows(tmp_path / "t.jsonl", []))


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
