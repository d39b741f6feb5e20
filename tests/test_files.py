"""Files are whole after a kill, lines end at the line feed alone, and a folder has one writer."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerosearch.errors import UserError
from zerosearch.files import (
    JsonlLog,
    claim_output_dir,
    json_object,
    read_json,
    read_jsonl,
    sole_writer,
    write_json,
    write_jsonl,
    write_text,
)
from zerosearch.text import clean_json

# Characters that `str.splitlines` takes for line ends, and what else JSON leaves as it is.
ODD_TEXT = "a\u2028b\u2029c\x85d\x7f\ufeff"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(path)]


def test_half_a_line_is_dropped_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonlLog(path)
    log.append({"n": 1}, {"n": ODD_TEXT})
    log.close()
    with path.open("ab") as file:
        file.write('{"n": "dré'.encode()[:-1])  # a kill in the middle of a letter
    log = JsonlLog(path)
    assert "ended in half a line, which a killed run left: 10 bytes" in caplog.text
    log.append({"n": 3})
    log.close()
    assert rows_of(path) == [{"n": 1}, {"n": ODD_TEXT}, {"n": 3}]


def test_half_a_line_of_a_run_under_way_is_skipped_if_wanted(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"n": 1}\n\n{"n"')
    assert list(read_jsonl(tmp_path / "log.jsonl", skip_half_line=True)) == [
        (f"{tmp_path}/log.jsonl line 1", {"n": 1})
    ]
    with pytest.raises(UserError, match=r"log\.jsonl line 3 is not JSON in UTF-8"):
        rows_of(tmp_path / "log.jsonl")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"n": 1}])

    def rows() -> Iterator[dict[str, int]]:
        yield {"n": 2}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_jsonl(path, rows())
    assert path.read_text() == '{"n": 1}\n' and os.listdir(tmp_path) == ["rows.jsonl"]
    (tmp_path / "rows.jsonl.draft").write_text("of a run that was killed")
    write_jsonl(path, [{"n": "é"}, {"n": ODD_TEXT}])
    assert path.read_text(encoding="utf-8").startswith('{"n": "é"}\n')
    assert rows_of(path) == [{"n": "é"}, {"n": ODD_TEXT}] and os.listdir(tmp_path) == ["rows.jsonl"]


def test_an_empty_path_is_said_to_be_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^\. cannot be written"):
        write_json(Path(""), {})
    assert os.listdir(tmp_path) == []


def test_any_text_can_be_written_and_is_read_as_characters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"model": "caf\udce9", "é": "\x00"})  # bytes of a command line that are not UTF-8
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "model": "caf\\udce9",\n  "é": "\\u0000"\n}\n'
    assert read_json(tmp_path / "a.json") == {"model": "caf\ufffd", "é": "\ufffd"}
    log = JsonlLog(tmp_path / "b.jsonl")
    log.append({"text": "half \ud83d"})
    log.close()
    assert rows_of(tmp_path / "b.jsonl") == [{"text": "half \ufffd"}]


def test_symbolic_links_are_replaced_and_never_written_through(tmp_path: Path) -> None:
    mine, out = tmp_path / "mine.jsonl", tmp_path / "out"
    mine.write_text('{"mine": 1}\n')
    out.mkdir()
    for name in ("a.json", "a.json.draft", "b.jsonl", "c.md", "_lock"):
        (out / name).symlink_to(mine)
    write_json(out / "a.json", {})
    write_text(out / "c.md", "text")
    log = JsonlLog(out / "b.jsonl")
    log.append({"n": 2})
    log.close()
    with pytest.raises(UserError, match="cannot be written"), sole_writer(out):
        pass
    assert mine.read_text() == '{"mine": 1}\n'
    assert rows_of(out / "b.jsonl") == [{"mine": 1}, {"n": 2}] and (out / "c.md").read_text() == "text"


def test_a_full_disk_is_named_once_and_closing_the_file_says_no_more() -> None:
    full = pytest.raises(UserError, match=r"^/dev/full cannot be written: .*No space left")
    with full, closing(JsonlLog(Path("/dev/full"))) as log:
        log.append({"n": 1})


def test_what_cannot_be_written_or_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"none/a\.json cannot be written"):
        write_json(tmp_path / "none/a.json", {})
    with pytest.raises(UserError, match=r"none\.json cannot be read"):
        read_json(tmp_path / "none.json")
    log = JsonlLog(tmp_path / "log.jsonl")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match=r"log\.jsonl cannot be written: .*No space left"):
        log.append({})
    with pytest.raises(UserError, match=r"a\.json cannot be written: .*No space left"):
        write_json(tmp_path / "a.json", {})
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not JSON in UTF-8"),
        (b"[1]", r"line 2 is not a JSON object: '\[1\]"),
        ('{"a": "é"}'.encode("latin-1"), "line 2 is not JSON in UTF-8: 'utf-8' codec"),
        ('{"a": "é"}'.encode("utf-16"), "line 2 is not JSON in UTF-8: 'utf-8' codec"),
        (b'{"a": "\xed\xa0\xbd"}', "line 2 is not JSON in UTF-8: 'utf-8' codec"),  # half a character as bytes
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2 is not JSON in UTF-8: maximum recursion depth"),
        (b'{"a": ' + b"[" * 700 + b'"\\u0000"' + b"]" * 700 + b"}", "line 2 is not JSON in UTF-8: maximum recursion"),
        (b'{"a": 1, "b": 2, "b": 2}', "line 2 gives 'b' twice in one object"),
        (b'{"a": [{"b": {}}, {"\\u0062": 1, "b": 2}]}', "line 2 gives 'b' twice in one object"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(
    tmp_path: Path, line: bytes, message: str, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(1000)  # Python's own, which torch doubles once it has compiled something
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        rows_of(tmp_path / "rows.jsonl")
    assert len(str(caught.value)) < 400


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n')
    assert rows_of(tmp_path / "rows.jsonl") == [{"n": 1}]


def test_an_output_folder_is_made_and_kept_from_being_overwritten(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    assert claim_output_dir(new) == new and new.is_dir()
    with sole_writer(new):
        pass
    assert claim_output_dir(new) == new  # a lock is all that it holds
    (new / "results.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty; name another, or pass --overwrite_output_dir"):
        claim_output_dir(new)
    assert claim_output_dir(new, overwrite=True) == new and (new / "results.json").exists()
    with pytest.raises(UserError, match="is a file"):
        claim_output_dir(new / "results.json", overwrite=True)
    with pytest.raises(UserError, match="cannot be used"):
        claim_output_dir(new / "results.json" / "c")
    for impossible in ("a\0b", "x" * 300):
        with pytest.raises(UserError, match="cannot be used"):
            claim_output_dir(tmp_path / impossible)


HOLD = """\
import sys
from pathlib import Path
from zerosearch.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match=r"another run is writing to .*out; wait for it, or name another folder")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with refused, sole_writer(tmp_path / "out"):
            pass
        other.kill()
    with sole_writer(tmp_path / "out"):  # a kill releases it
        pass


ANY_TEXT = st.text(st.characters(categories=None) | st.sampled_from("\0\n\r\x85\u2028\ud83d"), max_size=8)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(ANY_TEXT, ANY_JSON, max_size=3), max_size=4), st.integers(1, 20))
def test_what_is_written_is_read_and_half_a_line_costs_that_line_alone(rows: list[dict[str, Any]], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_jsonl(path, rows)
        assert rows_of(path) == clean_json(rows)
        log = JsonlLog(path)
        log.append(*rows)
        log.close()
        assert rows_of(path) == clean_json(rows) * 2
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        kept = whole[:-cut].count(b"\n")
        assert [row for _, row in read_jsonl(path, skip_half_line=True)] == (clean_json(rows) * 2)[:kept]
        JsonlLog(path).close()
        assert rows_of(path) == (clean_json(rows) * 2)[:kept]


@given(st.binary(max_size=30) | st.text(st.sampled_from('{}[]":,0aé\\u d8\n'), max_size=20).map(str.encode))
def test_a_line_is_an_object_or_one_sentence_of_refusal(line: bytes) -> None:
    try:
        row = json_object(line, "rows.jsonl line 1")
    except UserError as error:
        assert str(error).startswith(("rows.jsonl line 1 is not ", "rows.jsonl line 1 gives "))
        assert "\n" not in str(error)
    else:
        assert isinstance(row, dict) and json.dumps(row).encode() and repr(row).encode()
