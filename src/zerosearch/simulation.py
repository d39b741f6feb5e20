"""Search Simulation Tuning: from judged searches to what the simulator learns (paper, Section 3.3 and Table 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerosearch.data import read_jsonl
from zerosearch.errors import UserError
from zerosearch.prompts import SIMULATOR_PROMPT, simulator_messages
from zerosearch.protocol import format_documents

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = {"question": str, "golden_answers": list, "query": str, "documents": list, "useful": bool}


def read_searches(path: str | Path) -> list[dict[str, Any]]:
    """Read judged searches, JSONL rows `{question, golden_answers, query, documents, useful}`.

    Raises `UserError` that names the line and the column.
    """
    searches = []
    for place, row in read_jsonl(path):
        for column, kind in COLUMNS.items():
            if not isinstance(row.get(column), kind) or row[column] in ("", []):
                raise UserError(
                    f"{place}: {column!r} must be a {kind.__name__} and not empty, and is {row.get(column)!r}"
                )
        searches.append(row)
    if not searches:
        raise UserError(f"{path} holds no searches")
    return searches


def simulator_examples(searches: Iterable[Mapping[str, Any]], template: str = SIMULATOR_PROMPT) -> Dataset:
    """Return what the simulator learns: rows `{prompt, completion}` of chat messages.

    The prompt is the one it gets in training and evaluation, the completion "Doc 1: ..." to "Doc 5: ...".
    """
    import datasets

    return datasets.Dataset.from_list(
        [
            {
                "prompt": simulator_messages(
                    question=search["question"],
                    golden_answers=search["golden_answers"],
                    query=search["query"],
                    noisy=not search["useful"],
                    template=template,
                ),
                "completion": [{"role": "assistant", "content": format_documents(search["documents"])}],
            }
            for search in searches
        ]
    )
