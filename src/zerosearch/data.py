"""Questions and passages: read from files, the Hub or TinyWorld, and checked row by row before anything runs.

A question row is `{id, question, golden_answers, dataset}`, with `golden_documents` where they are known; a passage
is a row of wiki-18's format, `{"id", "contents": '"title"\\ntext'}`, which FlashRAG and Search-R1 share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerosearch.errors import UserError
from zerosearch.files import read_jsonl
from zerosearch.text import clean_json

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

ChooseColumns = Callable[[Sequence[str], str], list[str]]  # of the columns there are, and whose they are


@dataclass(frozen=True)
class Benchmark:
    """One of the paper's seven test sets: the split that is scored, and how many questions it has."""

    title: str
    split: str
    size: int

    def path(self, name: str) -> str:
        """Return the place of its rows in FlashRAG's dataset repository, or in a folder of the same layout."""
        return f"{name}/{self.split}.jsonl"


# Section 4.1, in the order of Table 3. Names, splits and sizes are those of FlashRAG.
FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
BENCHMARKS = {
    "nq": Benchmark("NQ", "test", 3_610),
    "triviaqa": Benchmark("TriviaQA", "test", 11_313),
    "popqa": Benchmark("PopQA", "test", 14_267),
    "hotpotqa": Benchmark("HotpotQA", "dev", 7_405),
    "2wikimultihopqa": Benchmark("2Wiki", "dev", 12_576),
    "musique": Benchmark("MuSiQue", "dev", 2_417),
    "bamboogle": Benchmark("Bamboogle", "test", 125),
}
ALL_BENCHMARKS = "benchmarks"  # names the seven at once

# What is read of a question's row; `golden_documents` are texts that lead to the answer, for rewards that want them.
COLUMNS = ("id", "question", "golden_answers", "dataset", "data_source", "golden_documents")


@dataclass(frozen=True)
class Passage:
    """A passage of a corpus. `title` is "" where the row has none."""

    title: str
    text: str

    @property
    def document(self) -> str:
        """Return the passage as one document: "title: text", or the text alone where it starts with its title."""
        if not self.text:
            return self.title
        if not self.title or self.text.lower().startswith(self.title.lower()):
            return self.text
        return f"{self.title}: {self.text}"


def load_questions(
    source: str,
    split: str = "train",
    limit: int | None = None,
    benchmark_source: str = FLASHRAG,
) -> Dataset:
    """Return the questions of `source` as rows `{id, question, golden_answers, dataset}`.

    `source` is a `.jsonl` or `.parquet` file, the name of one of `BENCHMARKS`, which comes from `benchmark_source` (a
    dataset on the Hub in FlashRAG's layout, or a folder), or the id of another dataset on the Hub, of which `split` is
    read; its columns `question` and `golden_answers` are needed. `dataset`, or `data_source`, or else the source's
    name says which benchmark a row is of; a row without an `id` gets one from its place. Other columns are not
    read, stored prompts included. Blank golden answers are dropped, as no answer can equal them.
    `limit` keeps the first rows.
    Raises `UserError` that names the row: column missing, question empty, no golden answer.
    """
    import datasets

    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1")
    name = Path(source).stem
    rows = islice(_rows(source, split, benchmark_source), limit)
    questions = [_question(row, place, index, name) for index, (place, row) in enumerate(rows)]
    if not questions:
        raise UserError(f"{source} holds no questions")
    return datasets.Dataset.from_list(questions)


def load_question_sets(
    sources: Sequence[str],
    split: str = "test",
    limit: int | None = None,
    num_questions: int | None = None,
    benchmark_source: str = FLASHRAG,
) -> list[dict[str, Any]]:
    """Return the questions of several sources, one after another, as `load_questions` does; all seven benchmarks for
    the source `ALL_BENCHMARKS`.

    `num_questions` keeps so many of each set (see `choose_questions`); `limit` the first rows of each source.
    """
    names = [name for source in sources for name in (BENCHMARKS if source == ALL_BENCHMARKS else [source])]
    if len(set(names)) < len(names):
        raise UserError(f"a dataset is named twice: {', '.join(names)}")
    rows: list[dict[str, Any]] = []
    for name in names:
        loaded = load_questions(name, split, limit=limit, benchmark_source=benchmark_source).to_list()
        if name in BENCHMARKS and limit is None and len(loaded) != BENCHMARKS[name].size:
            logger.warning("%s has %d questions here, and %d in FlashRAG", name, len(loaded), BENCHMARKS[name].size)
        rows += loaded
    return rows if num_questions is None else choose_questions(rows, num_questions)


def choose_questions(rows: Sequence[dict[str, Any]], num_questions: int) -> list[dict[str, Any]]:
    """Keep `num_questions` of each dataset, in their order: those whose SHA-256 of "dataset, id, question" is lowest.

    So the choice depends on the questions alone, not on their order, a seed or a library. A smaller set stays whole.
    """
    if num_questions < 1:
        raise UserError(f"num_questions is {num_questions}: it must be at least 1")

    def rank(place: int) -> bytes:
        row = rows[place]
        return hashlib.sha256("\n".join((row["dataset"], row["id"], row["question"])).encode()).digest()

    by_dataset: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        by_dataset.setdefault(row["dataset"], []).append(place)
    kept = {place for places in by_dataset.values() for place in sorted(places, key=rank)[:num_questions]}
    return [row for place, row in enumerate(rows) if place in kept]


def data_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of what is asked and accepted, row by row in their order; prompts do not count."""
    digest = hashlib.sha256()
    for row in rows:
        asked = [row["dataset"], row["id"], row["question"], list(row["golden_answers"])]
        digest.update(json.dumps(asked, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def row_number(row: Mapping[str, Any]) -> int:
    """Return a number for a question's row that its names alone decide, wherever it stands in the dataset."""
    return text_number(f"{row.get('dataset')}/{row['id']}")


def text_number(text: str) -> int:
    """Return a number below 2**48 that a text alone decides, for keys."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def read_passages(corpus: str | Path) -> list[Passage]:
    """Read a JSONL corpus in wiki-18's format.

    Raises `UserError` for a file that is missing or empty, and, with its line number, for a line that is no such row.
    """
    passages = [passage_of(row, place) for place, row in read_jsonl(corpus)]
    if not passages:
        raise UserError(f"the corpus {corpus} holds no passages")
    return passages


def passage_of(row: Mapping[str, Any], place: str) -> Passage:
    """Return the passage of a row in wiki-18's format. Raises `UserError`, with its place, for a row that is none."""
    contents = row.get("contents")
    if not isinstance(contents, str) or not contents.strip():
        raise UserError(f'{place} needs "contents", a text that is not empty, and has {sorted(row)}')
    title, newline, text = contents.partition("\n")
    # Without a line break there is no title: all of it is text.
    return Passage(_unquoted(title), text.strip()) if newline else Passage("", contents.strip())


def _rows(source: str, split: str, benchmark_source: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield every row of a source with its place."""
    if source in BENCHMARKS:
        return read_jsonl(_benchmark_file(BENCHMARKS[source].path(source), benchmark_source))
    suffix = Path(source).suffix
    if suffix == ".jsonl":
        return read_jsonl(source)
    if suffix == ".parquet":
        return parquet_rows(source, _wanted)
    if os.path.exists(source):
        raise UserError(f"{source} is neither a .jsonl nor a .parquet file")
    return hub_rows(source, split, _wanted)


def parquet_rows(source: str, choose: ChooseColumns) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a parquet file with its place; of its columns only the chosen ones are read."""
    import pyarrow
    import pyarrow.parquet

    if not Path(source).is_file():
        raise UserError(f"there is no file {source}")
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            names = file.schema_arrow.names
            columns = choose(names, source)
            if twice := [name for name in columns if names.count(name) > 1]:
                raise UserError(f"{source} has several columns {twice[0]!r}")
            yield from _numbered(file.iter_batches(columns=columns), source)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read as a parquet file: {error}") from error


def hub_rows(source: str, split: str, choose: ChooseColumns) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a dataset on the Hub with its place; of its columns only the chosen ones are read."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        dataset = datasets.load_dataset(source, split=split)
    # What the Hub client raises for a wrong name, split or permission, for a network that is not there, for files that
    # cannot be read, and for a dataset that is a program.
    except (
        *(FileNotFoundError, ConnectionError, ValueError, RuntimeError),
        *(HfHubHTTPError, HFValidationError, datasets.exceptions.DatasetsError),
    ) as error:
        message = f"the dataset {source!r} (split {split!r}) is not a file here and cannot be loaded from the Hub"
        raise UserError(f"{message}: {error}") from error
    place = f"{source} ({split})"
    # As Arrow tables: nothing is decoded, so that no column opens the address of an image.
    tables = dataset.select_columns(choose(dataset.column_names, place)).with_format("arrow").iter(1000)
    return _numbered(tables, place)


def _wanted(columns: Sequence[str], source: str) -> list[str]:
    """Return the columns to read. Raises `UserError` if one that is needed is missing."""
    for name in ("question", "golden_answers"):
        if name not in columns:
            raise UserError(f"{source} lacks {name!r}; it has {', '.join(sorted(columns))}")
    return [name for name in COLUMNS if name in columns]


def _numbered(tables: Iterable[Any], source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of Arrow tables or batches, each with its place."""
    rows = (row for table in tables for row in table.to_pylist())
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{source} row {number}", clean_json(row)
    except (OverflowError, ValueError) as error:  # a date beyond the year 9999, half a character
        raise UserError(f"{source} holds a value that cannot be read: {error}") from error


def _benchmark_file(path: str, source: str) -> Path:
    """Return a file of FlashRAG's layout, from a folder or from the Hub's cache, where it is put first if need be.

    The file and not the dataset: a config would be downloaded whole, with training sets of hundreds of megabytes.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if Path(source).is_dir():
        return Path(source, path)
    try:
        return Path(hf_hub_download(source, path, repo_type="dataset"))
    # A wrong name or permission, no such file, no network, nothing in the cache while offline.
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        message = f"{path} of the dataset {source!r} cannot be loaded from the Hub: {error}"
        raise UserError(message) from error


def _question(row: Mapping[str, Any], place: str, index: int, name: str) -> dict[str, Any]:
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
    golden = row.get("golden_documents")
    if golden is not None and not (isinstance(golden, list) and all(isinstance(text, str) for text in golden)):
        raise UserError(f"{place}: 'golden_documents' is {golden!r}, not a list of texts")
    dataset = row.get("dataset") or row.get("data_source") or name
    identifier = row.get("id")
    return {
        "id": f"{dataset}_{index}" if identifier is None else str(identifier),
        "question": question.strip(),
        "golden_answers": golden_answers,
        "dataset": str(dataset),
        **({} if golden is None else {"golden_documents": golden}),
    }


def _unquoted(title: str) -> str:
    title = title.strip()
    return title[1:-1].strip() if len(title) > 1 and title.startswith('"') and title.endswith('"') else title
