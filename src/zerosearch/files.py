"""Files that are read again: written whole or not at all, read line by line, by one writer a folder.

A line ends at "\\n" alone: texts may hold U+2028, U+0085 and whatever else `str.splitlines` takes for an end.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from zerosearch.errors import UserError
from zerosearch.text import clean_json

logger = logging.getLogger(__name__)

PROGRESS_BAR_BYTES = 50_000_000  # below this a file is read in about a second, and a bar would only flicker
LOCK = "_lock"  # no Trainer pushes what begins with an underscore


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its names and values. Raises `UserError` for a name that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise UserError(f"gives {twice[:60]!r} twice in one object")
    return found


# NaN is not JSON, but common: it reads as null.
DECODER = json.JSONDecoder(parse_constant=lambda _: None, object_pairs_hook=_object)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a draft of a file, which takes the file's place when the block ends well.

    A kill leaves the old file or the new one. A symbolic link is replaced, never written through.
    Raises `UserError` if the file cannot be written.
    """
    draft = path.parent / f"{path.name}.draft"
    try:
        draft.unlink(missing_ok=True)
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file: see `replacing`."""
    with replacing(path) as file:
        file.write(_encoded(text))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON: see `replacing`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line: see `replacing`."""
    with replacing(path) as file:
        file.writelines(map(_line, rows))


class JsonlLog:
    """A JSONL file that grows: a row is on the disk when `append` returns.

    A last line without its end, which a kill in the middle of a write leaves, is dropped on opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_symlink() or not _ends_a_line(path):
            content = path.read_bytes() if path.is_file() else b""
            whole = content.rfind(b"\n") + 1
            with replacing(path) as file:
                file.write(content[:whole])
            if dropped := len(content) - whole:
                logger.warning("%s ended in half a line, which a killed run left: %d bytes", path, dropped)
        self._file = path.open("ab")

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add the rows, one a line. Raises `UserError` if they cannot be written."""
        try:
            self._file.write(b"".join(map(_line, rows)))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from error

    def close(self) -> None:
        with suppress(OSError):  # it tries again to write what `append` could not, and has told of
            self._file.close()


def read_jsonl(path: str | Path, skip_half_line: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object of a JSONL file with its place, "FILE line N"; blank lines are passed over.

    `skip_half_line` ignores what follows the last line end, where another run may be writing.
    Raises `UserError` if the file cannot be read, or a line is not a JSON object in UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        size = path.stat().st_size
        bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=size < PROGRESS_BAR_BYTES)
        with path.open("rb") as file, bar:
            for number, line in enumerate(file, start=1):
                bar.update(len(line))
                if line.strip() and not (skip_half_line and not line.endswith(b"\n")):
                    place = f"{path} line {number}"
                    yield place, json_object(line, place)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds. Raises `UserError` if it cannot be read or is something else."""
    try:
        return json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds. Raises `UserError` for a mapping that gives a name twice, of which YAML's own
    loader takes the last; and OSError, ValueError, RecursionError or YAMLError if the file cannot be read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"{path} gives {twice} twice")
            return super().construct_mapping(node, deep)

    return yaml.load(path.read_bytes(), Loader)


def json_object(content: bytes, place: str) -> dict[str, Any]:
    """Return a JSON object in UTF-8, its texts cleaned.

    Raises `UserError`, with the place, for anything else, and for an object that gives a name twice.
    """
    try:
        row = clean_json(DECODER.decode(content.decode("utf-8-sig")))
    except UserError as error:
        raise UserError(f"{place} {error}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{place} is not JSON in UTF-8: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place} is not a JSON object: {content[:60].decode(errors='replace')!r}")
    return row


def claim_output_dir(path: str | Path, overwrite: bool = False) -> Path:
    """Create the folder and return it. Raises `UserError` if it holds something and `overwrite` is not set."""
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"the output folder {path} is a file")
        path.mkdir(parents=True, exist_ok=True)
        is_empty = all(entry.name == LOCK for entry in path.iterdir())
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"the output folder {path} cannot be used: {error}") from error
    if not is_empty and not overwrite:
        raise UserError(f"the output folder {path} is not empty; name another, or pass --overwrite_output_dir")
    return path


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Hold a folder for this process alone, made first if need be; a kill releases it.

    Raises `UserError` if another process holds it, or it cannot be made.
    """
    claim_output_dir(directory, overwrite=True)
    try:
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"the output folder {directory} cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {directory}; wait for it, or name another folder") from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): see that no other run writes to it", directory, error)
        yield
    finally:
        os.close(lock)


def models_folder() -> Path:
    """Return the folder of the models that recipes/get_model.py brings, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "zerosearch")


def _ends_a_line(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _line(row: Mapping[str, Any]) -> bytes:
    return _encoded(json.dumps(row, ensure_ascii=False) + "\n")


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # half a character as its JSON escape: any text can be written
