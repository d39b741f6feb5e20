"""A corpus on disk, read where it lies, and the folder that keeps an index of it.

An index folder holds `zerosearch.json`, the manifest, and `data/`, which belongs to zerosearch alone: it is emptied
before an index is built. The manifest records the size, time and SHA-256 of the corpus and of every file of the index,
so that a changed corpus and a damaged index are noticed, and the index is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm.auto import tqdm

from zerosearch.data import Passage, passage_of
from zerosearch.errors import UserError
from zerosearch.files import PROGRESS_BAR_BYTES, json_object, write_json

MANIFEST, LOCK, DATA = "zerosearch.json", "zerosearch.lock", "data"
FORMAT = 2  # of an index folder; an index of another format is built again
SETTLED_S = 2.0  # a file written this long before it was read cannot have changed within the same tick of its clock

Found = list[tuple[int, float]]  # passages, best first: the byte at which each starts in the corpus, its score


class PassageIndex:
    """An index of a JSONL corpus in wiki-18's format, built in `folder` first unless it is there already.

    A kind of index writes itself in `build` and searches in `find`; threads take turns to search, and may read rows
    together. `settings` are what the index depends on besides the corpus; `manifest` says what it was built from.
    Of processes that start together, one builds.
    Raises `UserError` for a corpus that cannot be read, and for a folder that holds something else than an index or
    cannot be written, such as on a full disk.
    """

    def __init__(self, corpus: str | Path, folder: str | Path, settings: dict[str, Any]) -> None:
        from filelock import FileLock

        self.corpus, self.folder, self.settings = Path(corpus), Path(folder), settings
        self.data = self.folder / DATA
        if not self.corpus.is_file():
            raise UserError(f"there is no file {corpus}")
        try:
            manifest = self._current_manifest()
            if manifest is None:
                if not _is_ours(self.folder):
                    raise UserError(f"{folder} holds something else than an index; name another folder for the index")
                self.folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self.folder / LOCK):
                    manifest = self._current_manifest() or self._built()
            self.manifest = manifest
            self._corpus_file = UnchangedFile(self.corpus)
            self._index_files = [UnchangedFile(self.data / name) for name in manifest["files"]]
        except OSError as error:
            raise UserError(f"the index cannot be written to {folder}: {error}; name another folder for it") from error

    def build(self) -> dict[str, Any]:
        """Write the index into `data`, an empty folder, and return what the manifest should say of it."""
        raise NotImplementedError

    def find(self, queries: Sequence[str], count: int) -> list[Found]:
        """Return the `count` best passages for each query, best first."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise `UserError` if a file of the index has changed: reading a mapped file that was cut kills a process."""
        for file in self._index_files:
            file.check()

    def damaged(self, error: BaseException) -> UserError:
        """Return the error for an index that cannot be read, though its files look as they were written."""
        return UserError(f"the index in {self.folder} is damaged ({error}); remove the folder, and it is built again")

    def identity(self) -> dict[str, Any]:
        """Return what the results depend on: the corpus, by hash, and the settings."""
        return {name: self.manifest[name] for name in ("corpus_sha256", "num_passages")} | self.manifest["settings"]

    def row(self, start: int) -> dict[str, Any]:
        """Return the row that starts at a byte of the corpus. Raises `UserError` once the corpus has changed."""
        self._corpus_file.check()
        return json_object(self._corpus_file.line(start), f"{self.corpus.name} byte {start}")

    def passage(self, start: int) -> Passage:
        """Return the passage that starts at a byte of the corpus."""
        return passage_of(self.row(start), f"{self.corpus} byte {start}")

    def _current_manifest(self) -> dict[str, Any] | None:
        """Return the manifest in the folder if its index is whole, of this corpus and of these settings."""
        try:
            manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_bytes())
            if manifest["format"] != FORMAT or manifest["settings"] != self.settings:
                return None
            files = [(self.corpus, [manifest[f"corpus_{name}"] for name in ("bytes", "mtime_ns", "sha256")])]
            files += [(self.data / name, record) for name, record in manifest["files"].items()]
            return manifest if all(_is_same(path, record) for path, record in files) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _built(self) -> dict[str, Any]:
        """Build into `data`, and write the manifest last; until then one without files claims the folder."""
        started = time.time()
        write_json(self.folder / MANIFEST, {"format": FORMAT})
        if self.data.exists():
            shutil.rmtree(self.data)
        self.data.mkdir()
        try:
            size, mtime_ns, sha256 = _record(self.corpus)
            facts = self.build()
            if not _is_same(self.corpus, [size, mtime_ns, sha256]):
                raise UserError(f"the corpus {self.corpus} changed while it was indexed; start again when it is whole")
            files = [path for path in sorted(self.data.iterdir()) if path.suffix != ".lock"]
            manifest = {
                "format": FORMAT,
                "settings": self.settings,
                "corpus": str(self.corpus.resolve()),
                "corpus_bytes": size,
                "corpus_mtime_ns": mtime_ns if started - mtime_ns / 1e9 > SETTLED_S else None,
                "corpus_sha256": sha256,
                **facts,
                "build_s": round(time.time() - started, 2),
                "files": {path.name: _record(path) for path in files},
            }
            write_json(self.folder / MANIFEST, manifest)
        except BaseException:  # an interrupt too: nothing half-built stays
            shutil.rmtree(self.data, ignore_errors=True)
            raise
        return manifest


class UnchangedFile:
    """A file open for reading that must stay as it was opened. It may be replaced or removed: the open one stays."""

    def __init__(self, path: Path) -> None:
        self.path, self._file, self._lock = path, path.open("rb"), Lock()
        self._state = self._status()

    def check(self) -> None:
        """Raise `UserError` if it was written to."""
        if self._status() != self._state:
            raise UserError(f"{self.path.name} has changed since it was opened; start again to index it anew")

    def line(self, start: int) -> bytes:
        """Return the line that starts at this byte."""
        with self._lock:
            self._file.seek(start)
            return self._file.readline()

    def _status(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


def read_corpus(path: Path) -> Iterator[tuple[int, Passage]]:
    """Yield each passage of a JSONL corpus with the byte at which its row starts; blank lines are passed over.

    Raises `UserError` for an empty file, and, with its line number, for a line that holds no passage.
    """
    size, start, found = path.stat().st_size, 0, False
    bar = tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, disable=size < PROGRESS_BAR_BYTES)
    with path.open("rb") as file, bar:
        for number, line in enumerate(file, start=1):
            bar.update(len(line))
            if line.strip():
                place, found = f"{path} line {number}", True
                yield start, passage_of(json_object(line, place), place)
            start += len(line)
    if not found:
        raise UserError(f"the corpus {path} holds no passages")


def _is_ours(folder: Path) -> bool:
    """Say whether a folder is to be made, empty or claimed; a claim is a manifest, with its lock and its draft."""
    if not folder.is_dir():
        return not folder.exists()
    names = [path.name for path in folder.iterdir()]
    return MANIFEST in names or all(name.startswith("zerosearch.") for name in names)


def _record(path: Path) -> list[Any]:
    """Return a file's size, time and hash."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        return [status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]


def _is_same(path: Path, record: list[Any]) -> bool:
    """Compare a file with its record: by size and time or, where the time differs, by hash."""
    size, mtime_ns, sha256 = record
    status = path.stat()
    return status.st_size == size and (status.st_mtime_ns == mtime_ns or _record(path)[2] == sha256)
