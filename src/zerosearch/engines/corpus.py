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
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm.auto import tqdm

from zerosearch.data import Passage, passage_of
from zerosearch.errors import UserError
from zerosearch.files import json_object, write_json

MANIFEST, LOCK, DATA = "zerosearch.json", "zerosearch.lock", "data"
FORMAT = 2  # of an index folder; an index of another format is built again
PROGRESS_BAR_BYTES = 50_000_000  # below this a file is read in a few seconds
SETTLED_S = 2.0  # a file written this long before it was read cannot have changed within the same tick of its clock

Found = list[tuple[int, float]]  # passages, best first: the byte at which each starts in the corpus, its score


class PassageFile:
    """The rows of a JSONL corpus in wiki-18's format by the byte at which each starts, read when they are asked for.

    `size` is the size in bytes that the index was built for. Reading raises `UserError` once the file has changed.
    Threads may share a reader.
    """

    def __init__(self, path: str | Path, size: int) -> None:
        self.path, self._lock = Path(path), Lock()
        self._file = self.path.open("rb")
        self._state = (size, os.fstat(self._file.fileno()).st_mtime_ns)

    def row(self, start: int) -> dict[str, Any]:
        """Return a row."""
        with self._lock:
            status = os.fstat(self._file.fileno())
            self._file.seek(start)
            line = self._file.readline()
        if (status.st_size, status.st_mtime_ns) != self._state:
            raise UserError(f"the corpus {self.path.name} has changed since it was indexed; start again to index it")
        return json_object(line, f"{self.path.name} byte {start}")

    def passage(self, start: int) -> Passage:
        """Return a passage."""
        return passage_of(self.row(start), f"{self.path} byte {start}")


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


def built_index(
    corpus: Path, folder: Path, settings: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Return the manifest of the index of `corpus` in `folder`, built first unless it is there already.

    `settings` are what else the index depends on. `build(data)` writes the index into an empty folder and returns what
    the manifest should say besides, `num_passages` among it. Of processes that ask together, one builds.
    Raises `UserError` for a folder that holds something else or cannot be written, such as on a full disk.
    """
    from filelock import FileLock

    if not corpus.is_file():
        raise UserError(f"there is no file {corpus}")
    found = current_manifest(corpus, folder, settings)
    if found is not None:
        return found
    try:
        if not _is_ours(folder):
            raise UserError(f"{folder} holds something else than an index; name another folder for the index")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK):
            return current_manifest(corpus, folder, settings) or _build(corpus, folder, settings, build)
    except OSError as error:
        raise UserError(f"the index cannot be written to {folder}: {error}; name another folder for it") from error


def _is_ours(folder: Path) -> bool:
    """Say whether a folder is to be made, empty or claimed; a claim is a manifest, with its lock and its draft."""
    if not folder.is_dir():
        return not folder.exists()
    names = [path.name for path in folder.iterdir()]
    return MANIFEST in names or all(name.startswith("zerosearch.") for name in names)


def index_identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what the results of an index depend on: its corpus, by hash, and its settings."""
    return {name: manifest[name] for name in ("corpus_sha256", "num_passages")} | manifest["settings"]


def current_manifest(corpus: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of the index in `folder` if it is whole, of this corpus and of these settings."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT or manifest["settings"] != settings:
            return None
        files = [(corpus, manifest["corpus_bytes"], manifest["corpus_mtime_ns"], manifest["corpus_sha256"])]
        files += [(folder / DATA / name, *record) for name, record in manifest["files"].items()]
        return manifest if all(_is_same(*file) for file in files) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_same(path: Path, size: int, mtime_ns: int | None, sha256: str) -> bool:
    """Compare a file with its record: by size and time or, where the time differs, by hash."""
    status = path.stat()
    return status.st_size == size and (status.st_mtime_ns == mtime_ns or _record(path)[2] == sha256)


def _record(path: Path) -> list[Any]:
    """Return a file's size, time and hash."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        return [status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]


def _build(
    corpus: Path, folder: Path, settings: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Build into `data/` and write the whole manifest last; until then a manifest without files claims the folder."""
    data, started = folder / DATA, time.time()
    write_json(folder / MANIFEST, {"format": FORMAT})
    if data.exists():
        shutil.rmtree(data)
    data.mkdir()
    try:
        size, mtime_ns, sha256 = _record(corpus)
        facts = build(data)
        if not _is_same(corpus, size, mtime_ns, sha256):
            raise UserError(f"the corpus {corpus} changed while it was indexed; start again when it is whole")
        manifest = {
            "format": FORMAT,
            "settings": settings,
            "corpus": str(corpus.resolve()),
            "corpus_bytes": size,
            "corpus_mtime_ns": mtime_ns if started - mtime_ns / 1e9 > SETTLED_S else None,
            "corpus_sha256": sha256,
            **facts,
            "build_s": round(time.time() - started, 2),
            "files": {path.name: _record(path) for path in sorted(data.iterdir()) if not path.name.startswith(".")},
        }
        write_json(folder / MANIFEST, manifest)
    except BaseException:  # an interrupt too: nothing half-built stays
        shutil.rmtree(data, ignore_errors=True)
        raise
    return manifest
