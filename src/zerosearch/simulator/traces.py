"""Search traces: what a policy asked a real engine while it answered questions, and the files that keep them.

A trace is one search, a row `{question, golden_answers, query, documents}`; collected ones also say which question of
which dataset it served, which turn it was and how the trajectory ended. Every such file is read by `read_traces`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerosearch.data import Passage
from zerosearch.errors import UserError
from zerosearch.files import read_jsonl
from zerosearch.protocol import split_title


def read_traces(path: str | Path) -> list[dict[str, Any]]:
    """Read searches, JSONL rows `{question, golden_answers, query, documents}`; every column is kept as it is.

    A document is a text or `{"title", "text"}`: see `as_passage`. A search may have found none. `answer`, `useful` and
    `verdicts` are checked where they are given.
    Raises `UserError` that names the line and the column.
    """
    traces = [checked_trace(row, place) for place, row in read_jsonl(path)]
    if not traces:
        raise UserError(f"{path} holds no searches")
    return traces


def checked_trace(row: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the row of a search as it is. Raises `UserError`, with its place, for a row that is none."""
    for column in ("question", "query"):
        if not _is_text(row.get(column)):
            raise UserError(f"{place}: {column!r} must be a text that is not empty, and is {row.get(column)!r}")
    golden_answers, documents = row.get("golden_answers"), row.get("documents")
    if not _are_texts(golden_answers):
        raise UserError(f"{place}: 'golden_answers' must be a list of texts, and is {golden_answers!r}")
    if not isinstance(documents, list):
        raise UserError(f"{place}: 'documents' must be a list, and is {documents!r}")
    for document in documents:
        parts = document if isinstance(document, dict) else {"text": document}
        if not _is_text(parts.get("text")) or not isinstance(parts.get("title"), str | None):
            raise UserError(f"{place}: a document must be a text or {{title, text}}, and is {document!r}")
    answer, useful, verdicts = row.get("answer"), row.get("useful"), row.get("verdicts", {})
    if answer is not None and not _is_text(answer) and not _are_texts(answer):
        raise UserError(f"{place}: 'answer' must be a text or a list of texts, and is {answer!r}")
    if not isinstance(useful, bool | None):
        raise UserError(f"{place}: 'useful' must be true, false or null, and is {useful!r}")
    if not isinstance(verdicts, dict) or not all(map(_are_verdicts, verdicts.values())):
        raise UserError(f"{place}: 'verdicts' must hold lists of true, false and null, and is {verdicts!r}")
    return row


def as_passage(document: str | Mapping[str, str]) -> Passage:
    """Return a document of a trace with its title apart.

    Engines give one text, "title: text", of which `split_title` tells the two apart.
    """
    if isinstance(document, str):
        return Passage(*split_title(document))
    return Passage((document.get("title") or "").strip(), document["text"].strip())


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _are_verdicts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(verdict, bool | None) for verdict in value)
