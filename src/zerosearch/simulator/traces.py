"""Search traces: what a policy asked a real engine while it answered questions, and the files that keep them.

A trace is one search, a row `{question, golden_answers, query, documents}`; collected ones also say which question of
which dataset it served, which turn it was and how the trajectory ended. Every such file is read by `read_traces`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zerosearch.data import Passage, claim_output_dir, read_jsonl
from zerosearch.errors import UserError
from zerosearch.protocol import split_title

logger = logging.getLogger(__name__)


def read_traces(path: str | Path) -> list[dict[str, Any]]:
    """Read searches, JSONL rows `{question, golden_answers, query, documents}`; every column is kept as it is.

    A document is a text or `{"title", "text"}`: see `as_passage`. A search may have found none.
    Raises `UserError` that names the line and the column.
    """
    traces = []
    for place, row in read_jsonl(path):
        for column in ("question", "query"):
            if not _is_text(row.get(column)):
                raise UserError(f"{place}: {column!r} must be a text that is not empty, and is {row.get(column)!r}")
        golden_answers = row.get("golden_answers")
        if not isinstance(golden_answers, list) or not golden_answers or not all(map(_is_text, golden_answers)):
            raise UserError(f"{place}: 'golden_answers' must be a list of texts, and is {golden_answers!r}")
        documents = row.get("documents")
        if not isinstance(documents, list):
            raise UserError(f"{place}: 'documents' must be a list, and is {documents!r}")
        for document in documents:
            if not _is_text(document.get("text") if isinstance(document, dict) else document):
                raise UserError(f"{place}: a document must be a text or {{title, text}}, and is {document!r}")
        traces.append(row)
    if not traces:
        raise UserError(f"{path} holds no searches")
    return traces


def as_passage(document: str | Mapping[str, str]) -> Passage:
    """Return a document of a trace with its title apart.

    Engines give one text, "title: text", of which `split_title` tells the two apart.
    """
    if isinstance(document, str):
        return Passage(*split_title(document))
    return Passage((document.get("title") or "").strip(), document["text"].strip())


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


class JsonlLog:
    """A JSONL file whose lines survive a kill: each `append` is on the disk when it returns.

    A last line without its end, which a kill in the middle of a write leaves behind, is dropped on opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dropped_bytes = drop_half_line(path)
        self._file = path.open("ab")

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add the rows, one a line."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def drop_half_line(path: Path) -> int:
    """Cut off what follows the last line break of a file, and return how many bytes that was."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    dropped = len(content) - whole
    if dropped:
        os.truncate(path, whole)
        logger.warning("%s ended in half a line, from a run that was killed; dropped its %d bytes", path, dropped)
    return dropped


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole JSONL file, in place of an older one; a kill leaves the older one as it was."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Hold a folder for this process alone, made first if need be; a kill lets go of it.

    Raises `UserError` if another process holds it, or it cannot be made.
    """
    claim_output_dir(directory, overwrite=True)
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {directory}; wait for it, or name another folder") from None
        yield
