"""Questions and passages: read from files, the Hub or TinyWorld, and checked row by row before anything runs.

A question row is `{id, prompt, question, golden_answers, dataset}`; a passage is a row of wiki-18's format,
`{"id", "contents": '"title"\\ntext'}`, which FlashRAG and Search-R1 share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from zerosearch.errors import UserError
from zerosearch.prompts import POLICY_PROMPT, policy_prompt

if TYPE_CHECKING:
    from datasets import Dataset

PROGRESS_BAR_BYTES = 50_000_000  # below this a file is read in about a second, and a bar would only flicker


@dataclass(frozen=True)
class Passage:
    """A passage of a corpus. `title` is "" where the row has none."""

    title: str
    text: str

    @property
    def document(self) -> str:
        """Return the passage as one document: "title: text", or the text alone where it starts with its title."""
        if not self.title or self.text.lower().startswith(self.title.lower()):
            return self.text
        return f"{self.title}: {self.text}"


def load_questions(
    source: str, split: str = "train", template: str = POLICY_PROMPT, limit: int | None = None
) -> Dataset:
    """Return the questions of `source` as rows `{id, prompt, question, golden_answers, dataset}`.

    `source` is a `.jsonl` or `.parquet` file, or the id of a dataset on the Hub, of which `split` is read; its columns
    `question` and `golden_answers` are needed. `dataset`, or `data_source`, or else the source's name says which
    benchmark a row is of; a row without an `id` gets one from its place. `prompt` is one user message made from
    `template`; a column of that name is not read. Blank golden answers are dropped, as no answer can equal them.
    `limit` keeps the first rows.
    Raises `UserError` that names the row: column missing, question empty, no golden answer.
    """
    import datasets

    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1")
    name = Path(source).stem
    questions: list[dict[str, Any]] = []
    for place, row in islice(_rows(source, split), limit):
        questions.append(_question(row, place, len(questions), name, template))
    if not questions:
        raise UserError(f"{source} holds no questions")
    return datasets.Dataset.from_list(questions)


def read_passages(corpus: str | Path) -> list[Passage]:
    """Read a JSONL corpus in wiki-18's format.

    Raises `UserError` for a file that is missing or empty, and, with its line number, for a line that is no such row.
    """
    passages = []
    for place, row in read_jsonl(corpus):
        contents = row.get("contents")
        if not isinstance(contents, str) or not contents.strip():
            raise UserError(f'{place} needs "contents", a text that is not empty, and has {sorted(row)}')
        title, newline, text = contents.partition("\n")
        # Without a line break there is no title: all of it is text.
        passages.append(Passage(_unquoted(title), text.strip()) if newline else Passage("", contents.strip()))
    if not passages:
        raise UserError(f"the corpus {corpus} holds no passages")
    return passages


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object of a JSONL file with its place, "FILE line N"; blank lines are passed over.

    Raises `UserError` if the file is missing, or a line is no JSON object in UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=size < PROGRESS_BAR_BYTES) as bar,
    ):
        for number, line in enumerate(file, start=1):
            bar.update(len(line))
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError alike
                raise UserError(f"{place} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{place} is no JSON object: {line[:60].decode(errors='replace')!r}")
            yield place, row


def claim_output_dir(path: str | Path, overwrite: bool = False) -> Path:
    """Create the folder and return it. Raises `UserError` if it holds something and `overwrite` is not set."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"the output folder {path} is a file")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(f"the output folder {path} is not empty; name another, or pass --overwrite_output_dir")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output folder {path} cannot be made: {error}") from error
    return path


def _rows(source: str, split: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield every row of a source with its place."""
    suffix = Path(source).suffix
    if suffix == ".jsonl":
        return read_jsonl(source)
    if suffix == ".parquet":
        return _numbered(_parquet(Path(source)), source)
    if os.path.exists(source):
        raise UserError(f"{source} is neither a .jsonl nor a .parquet file")
    return _numbered(_hub(source, split), f"{source} ({split})")


def _numbered(dataset: Dataset, source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    wanted = [name for name in dataset.column_names if name != "prompt"]
    for number, row in enumerate(dataset.select_columns(wanted), start=1):
        yield f"{source} row {number}", row


def _parquet(path: Path) -> Dataset:
    import datasets
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        return datasets.Dataset(pyarrow.parquet.read_table(path))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file: {error}") from error


def _hub(source: str, split: str) -> Dataset:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return datasets.load_dataset(source, split=split)
    # What the Hub client raises for a wrong name, split or permission, and for a network that is not there.
    except (FileNotFoundError, ConnectionError, HfHubHTTPError, HFValidationError, ValueError) as error:
        message = (
            f"the dataset {source!r} (split {split!r}) is no file here and cannot be loaded from the Hub: {error}"
        )
        raise UserError(message) from error


def _question(row: Mapping[str, Any], place: str, index: int, name: str, template: str) -> dict[str, Any]:
    for column in ("question", "golden_answers"):
        if row.get(column) is None:
            raise UserError(f"{place} lacks {column!r}; it has {', '.join(sorted(row))}")
    question, golden_answers = row["question"], row["golden_answers"]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{place}: 'question' is {question!r}, not a text")
    if not isinstance(golden_answers, list) or not all(isinstance(answer, str) for answer in golden_answers):
        raise UserError(f"{place}: 'golden_answers' is {golden_answers!r}, not a list of texts")
    golden_answers = [answer.strip() for answer in golden_answers if answer.strip()]
    if not golden_answers:
        raise UserError(f"{place}: 'golden_answers' is empty")
    dataset = row.get("dataset") or row.get("data_source") or name
    identifier = row.get("id")
    return {
        "id": f"{dataset}_{index}" if identifier is None else str(identifier),
        "prompt": [{"role": "user", "content": policy_prompt(question, template)}],
        "question": question.strip(),
        "golden_answers": golden_answers,
        "dataset": str(dataset),
    }


def _unquoted(title: str) -> str:
    title = title.strip()
    return title[1:-1].strip() if len(title) > 1 and title.startswith('"') and title.endswith('"') else title
