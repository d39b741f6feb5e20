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

    A document is a text or `{"title", "text"}`: see `as_passage`. A search may have found none.
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
    if not isinstance(golden_answers, list) or not golden_answers or not all(map(_is_text, golden_answers)):
        raise UserError(f"{place}: 'golden_answers' must be a list of texts, and is {golden_answers!r}")
    if not isinstance(documents, list):
        raise UserError(f"{place}: 'documents' must be a list, and is {documents!r}")
    for document in documents:
        if not _is_text(document.get("text") if isinstance(document, dict) else document):
            raise UserError(f"{place}: a document must be a text or {{title, text}}, and is {document!r}")
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
