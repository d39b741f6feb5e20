"""A corpus where it lies: passages of a JSONL file by number, read from the disk when they are asked for.

What an engine builds over a corpus is kept in a folder beside a manifest that says of which corpus, by its hash, and
is built again when the corpus is another.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from zerosearch.data import Passage, json_object, passage_of
from zerosearch.errors import UserError

MANIFEST = "zerosearch.json"
FORMAT = 1  # of the folders; another number makes them anew
PROGRESS_BAR_BYTES = 50_000_000  # below this a file is read in a few seconds
SETTLED_S = 2.0  # a file written this long before it was read cannot have changed within the same tick of its clock


class PassageFile:
    """The passages of a JSONL file in wiki-18's format by number, memory-mapped: processes share what is in memory.

    `offsets` (passages,) holds where each row starts, in bytes.
    """

    def __init__(self, path: str | Path, offsets: np.ndarray) -> None:
        self.path = Path(path)
        self.offsets = offsets
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets)

    def row(self, number: int) -> dict[str, Any]:
        """Return a row as it stands in the file."""
        start = int(self.offsets[number])
        end = self._bytes.find(b"\n", start)
        row: dict[str, Any] = json.loads(self._bytes[start : end if end >= 0 else len(self._bytes)])
        return row

    def passage(self, number: int) -> Passage:
        """Return a passage."""
        return passage_of(self.row(number), f"{self.path} passage {number}")


@dataclass
class CorpusReader:
    """Read a corpus once, from front to end, and know its hash (`sha256`, hex) at the end."""

    path: Path
    sha256: str = ""

    def passages(self) -> Iterator[tuple[int, Passage]]:
        """Yield each passage with the byte at which its row starts; blank lines are passed over.

        Raises `UserError` for a file that is missing or empty, and, with its line number, for a line that is no such
        row.
        """
        if not self.path.is_file():
            raise UserError(f"there is no file {self.path}")
        size = self.path.stat().st_size
        digest, offset, number_of_passages = hashlib.sha256(), 0, 0
        bar = tqdm(
            total=size, desc=f"reading {self.path.name}", unit="B", unit_scale=True, disable=size < PROGRESS_BAR_BYTES
        )
        with self.path.open("rb") as file, bar:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                bar.update(len(line))
                if line.strip():
                    place = f"{self.path} line {number}"
                    yield offset, passage_of(json_object(line, place), place)
                    number_of_passages += 1
                offset += len(line)
        if not number_of_passages:
            raise UserError(f"the corpus {self.path} holds no passages")
        self.sha256 = digest.hexdigest()


def built_index(
    corpus: Path, folder: Path, settings: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Return the manifest of the index of `corpus` in `folder`, built first unless it is there already.

    `settings` are what else the index depends on. `build(folder)` writes the index into an empty folder and returns
    what the manifest should say besides, `corpus_sha256` among it. Several processes may ask at once: one builds.
    Raises `UserError` for a folder that holds something else, or cannot be written.
    """
    from filelock import FileLock

    if not corpus.is_file():
        raise UserError(f"there is no file {corpus}")
    found = current_manifest(corpus, folder, settings)
    if found is not None:
        return found
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is no index of zerosearch, and not empty; name another folder for the index")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            found = current_manifest(corpus, folder, settings)
            return found or _build(corpus, folder, settings, build)
    except OSError as error:
        raise UserError(f"the index cannot be written to {folder}: {error}; name another folder for it") from error


def index_identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what the results of an index depend on: its corpus, by hash, and its settings."""
    return {name: manifest[name] for name in ("corpus_sha256", "num_passages")} | manifest["settings"]


def current_manifest(corpus: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of the index in `folder` if it is of this corpus and these settings.

    The corpus is the same if its size and time are, or else its hash.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    status = corpus.stat()
    wanted = {"format": FORMAT, "settings": settings, "corpus_bytes": status.st_size}
    if any(manifest.get(name) != value for name, value in wanted.items()):
        return None
    if manifest.get("corpus_mtime_ns") == status.st_mtime_ns:
        return manifest
    with corpus.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return manifest if manifest["corpus_sha256"] == sha256 else None


def _build(
    corpus: Path, folder: Path, settings: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Build beside the folder and move into place at the end: what is there is always whole."""
    status, started = corpus.stat(), time.time()
    draft = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed: the lock is ours
    draft.mkdir()
    try:
        settled = started - status.st_mtime > SETTLED_S
        manifest = {
            "format": FORMAT,
            "settings": settings,
            "corpus": str(corpus.resolve()),
            "corpus_bytes": status.st_size,
            "corpus_mtime_ns": status.st_mtime_ns if settled else None,
            **build(draft),
            "build_s": round(time.time() - started, 2),
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def mapped(path: Path) -> np.ndarray:
    """Return an array that stays in its file, memory-mapped. Nothing is unpickled."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
