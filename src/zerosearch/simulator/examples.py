"""Search Simulation Tuning: what the simulator learns, from judged searches or published data (Section 3.3, Table 2).

A judged search is `{question, golden_answers, query, documents, useful}`; with the prompt in front it is an
example `{prompt, completion}` of chat messages. Data that others published is examples already, in one of the forms
in `EXAMPLE_FORMS`, and is used as it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerosearch.data import hub_rows, parquet_rows
from zerosearch.errors import UserError
from zerosearch.files import read_jsonl
from zerosearch.prompts import SIMULATOR_PROMPT, SimulatorTemplate, simulator_messages
from zerosearch.protocol import format_documents
from zerosearch.simulator.traces import as_passage, checked_trace
from zerosearch.text import clean_json

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("question", "golden_answers", "query", "documents", "useful")
KNOWN_COLUMNS = {
    *COLUMNS,
    *("prompt", "completion", "messages", "conversations", "instruction", "input", "output", "system"),
}
ROLES = {"human": "user", "gpt": "assistant"}  # as the "conversations" of ShareGPT call them
EXAMPLE_FORMS = (
    "{question, golden_answers, query, documents, useful}",
    "{prompt, completion}",
    "{messages}",
    "{conversations}",
    "{instruction, input, output}",
    "{input, output}",
)

Messages = list[dict[str, str]]


def simulator_example(
    search: Mapping[str, Any], template: SimulatorTemplate = SIMULATOR_PROMPT
) -> dict[str, Messages]:
    """Return what the simulator learns from a judged search: `{prompt, completion}`.

    The prompt is the one it gets in training and evaluation, the completion "Doc 1: ..." to "Doc 5: ...".
    """
    documents = [text if isinstance(text, str) else as_passage(text).document for text in search["documents"]]
    return {
        "prompt": simulator_messages(
            question=search["question"],
            golden_answers=search["golden_answers"],
            query=search["query"],
            noisy=not search["useful"],
            template=template,
        ),
        "completion": [{"role": "assistant", "content": format_documents(documents)}],
    }


def load_examples(
    source: str,
    split: str = "train",
    template: SimulatorTemplate = SIMULATOR_PROMPT,
    held_out_queries: Collection[str] = frozenset(),
) -> Dataset:
    """Return the examples of a .jsonl, .json or .parquet file, a folder of `<split>.jsonl`, or a dataset on the Hub.

    Judged searches get the prompt of `template`; rows in another of the `EXAMPLE_FORMS` keep their own. Searches for
    one of `held_out_queries`, word for word, are left out, whatever their question is.
    Raises `UserError` that names the row and its columns, or says that nothing is left.
    """
    import datasets

    rows = ((place, row) for place, row in _rows(source, split) if str(row.get("query")) not in held_out_queries)
    examples = [_example(row, place, template) for place, row in rows]
    if not examples:
        whose = " for queries that are not held out" if held_out_queries else ""
        raise UserError(f"{source} holds no examples{whose}")
    return datasets.Dataset.from_list(examples)


def _rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source)
    if path.is_dir():
        path = path / f"{split}.jsonl"
        if not path.is_file():
            raise UserError(f"the folder {source} holds no {split}.jsonl")
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".parquet":
        return parquet_rows(source, _known)
    if path.suffix == ".json":
        return _json_rows(path)
    if path.is_file():
        raise UserError(f"{source} is not a .jsonl, .json or .parquet file")
    return hub_rows(source, split, _known)


def _known(columns: Sequence[str], source: str) -> list[str]:
    """Return the columns that an example may have, or, to name them in the error, all where none is one of these."""
    return [name for name in columns if name in KNOWN_COLUMNS] or list(columns)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        rows = clean_json(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is not a list of JSON objects")
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _example(row: dict[str, Any], place: str, template: SimulatorTemplate) -> dict[str, Messages]:
    """Read a row in any of the forms. A stored prompt is used as it is; a judged search gets that of `template`."""
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = _messages(row["prompt"], "user"), _messages(row["completion"], "assistant")
    elif row.keys() >= set(COLUMNS):
        if not isinstance(row["useful"], bool):
            raise UserError(f"{place}: 'useful' must be a boolean, and is {row['useful']!r}")
        if not checked_trace(row, place)["documents"]:
            raise UserError(f"{place}: 'documents' must be a list that is not empty")
        return simulator_example(row, template)
    elif "messages" in row or "conversations" in row:
        turns = _messages(row.get("messages") or row.get("conversations"), "user")
        prompt, completion = turns[:-1], turns[-1:]
    elif "output" in row and ("instruction" in row or "input" in row):
        parts = [row.get(name) or "" for name in ("instruction", "input")]
        prompt = _messages("\n".join(part for part in parts if part), "user")
        if row.get("system"):
            prompt = _messages(row["system"], "system") + prompt
        completion = _messages(row["output"], "assistant")
    else:
        raise UserError(
            f"{place} has the columns {', '.join(sorted(row))}; an example has one of the forms "
            f"{', '.join(EXAMPLE_FORMS)}"
        )
    if not prompt or [message["role"] for message in completion] != ["assistant"]:
        raise UserError(f"{place} is not a prompt with one reply to learn: {json.dumps(row, default=str)[:200]}")
    if prompt[0]["role"] != "system":  # as in every search: see simulator_messages
        prompt = [{"role": "system", "content": ""}, *prompt]
    return {"prompt": prompt, "completion": completion}


def _messages(content: Any, role: str) -> Messages:
    """Return a text as one message, chat messages of either spelling as they are; none for anything else or blank."""
    if isinstance(content, str):
        return [{"role": role, "content": content}] if content.strip() else []
    messages = []
    for message in content if isinstance(content, list) else []:
        given = message.get("role") or message.get("from") if isinstance(message, dict) else None
        text = (message.get("content") if "content" in message else message.get("value")) if given else None
        if not isinstance(text, str):
            return []
        messages.append({"role": ROLES.get(str(given), str(given)), "content": text})
    return messages
