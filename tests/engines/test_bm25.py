"""The BM25 engine: what it finds, how it orders it, and what it refuses."""

from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from math import log
from pathlib import Path

import pytest
from jsonl_files import rows_of, write_rows

from zerosearch.engines import SearchError, SearchRequest, bm25
from zerosearch.engines.bm25 import BM25Engine, BM25Index
from zerosearch.errors import UserError
from zerosearch.metrics import cover_exact_match

SHARED = Path(__file__).parents[3] / "shared/data"


def corpus_of(tmp_path: Path, *contents: str) -> Path:
    rows = ({"id": str(number), "contents": text} for number, text in enumerate(contents))
    return write_rows(tmp_path / "corpus.jsonl", rows)


PASSAGES = (
    '"Emma"\nEmma is a novel by Jane Austen.',
    '"Jane Austen"\nShe was born in Steventon.',
    '"Steventon"\nA village in Hampshire.',
    '"Vitamin C"\nFound in many plants.',
    '"Vitamin D"\nMade by the skin.',
)


EMMA = "Emma is a novel by Jane Austen."  # no "Emma: " in front: it starts with its title
BORN = "Jane Austen: She was born in Steventon."
VILLAGE = "Steventon: A village in Hampshire."
VITAMIN_C, VITAMIN_D = "Vitamin C: Found in many plants.", "Vitamin D: Made by the skin."


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> BM25Engine:
    return BM25Engine(corpus_of(tmp_path_factory.mktemp("bm25"), *PASSAGES))


@pytest.mark.parametrize(
    ("query", "documents"),
    [
        pytest.param("Where was Jane Austen born?", (BORN, EMMA), id="the best match first, read as a document"),
        pytest.param("skin village", (VILLAGE, VITAMIN_D), id="of words as rare, the shorter passage"),
        pytest.param("zebra", (), id="passages that share no word are no matches"),
        pytest.param(" ?! ", (), id="no word"),
        pytest.param("plant", (), id="no stemming: the corpus says plants"),
        pytest.param("PLANTS", (VITAMIN_C,), id="in any case"),
        pytest.param("vitamin c", (VITAMIN_C, VITAMIN_D), id="a word of one letter is a word"),
        pytest.param("vitamin d", (VITAMIN_D, VITAMIN_C), id="and so is another"),
        pytest.param("skin \ud83d", (VITAMIN_D,), id="half a character is not one"),
    ],
)
def test_what_a_query_finds(engine: BM25Engine, query: str, documents: tuple[str, ...]) -> None:
    assert engine.lookup(query) == documents
    before = engine.account.counts()
    result = asyncio.run(engine.search(SearchRequest(query, "Q?", ("a",), p_noise=1.0, key=(1,))))
    assert (result.documents, result.noisy, result.retries) == (documents, None, 0)
    after = engine.account.counts()
    assert (after["queries"] - before["queries"], after["sent"] - before["sent"]) == (1, 1)


def test_equal_scores_keep_the_order_of_the_corpus(tmp_path: Path) -> None:
    engine = BM25Engine(
        corpus_of(tmp_path, *(f'"T{number}"\nsame words here' for number in range(300))), num_documents=3
    )
    assert engine.lookup("same words") == ("T0: same words here", "T1: same words here", "T2: same words here")


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        BM25Engine(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="holds no words"):
        BM25Engine(corpus_of(tmp_path, "...", "?!"))
    with pytest.raises(UserError, match="num_documents is 0"):
        BM25Engine(corpus_of(tmp_path, *PASSAGES), num_documents=0)


def test_scores_are_those_of_bm25(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, "rare rare common", "common", "common words in a longer passage")
    index = BM25Index(corpus)
    rare, common = log(1 + 2.5 / 1.5), log(1 + 0.5 / 3.5)  # idf = ln(1 + (N - n + 0.5) / (n + 0.5))
    # idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / mean)), where k1 = 1.2, b = 0.75, the mean length 10 / 3
    expected = [
        rare * 4.4 / (2 + 1.2 * (0.25 + 0.75 * 0.9)) + common * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 0.9)),
        common * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 0.3)),
        common * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 1.8)),
    ]
    (found,) = index.find(["rare common"], 5)
    assert [score for _, score in found] == pytest.approx(expected, abs=1e-5)
    assert [index.row(start)["id"] for start, _ in found] == ["0", "1", "2"]
    (twice,) = index.find(["rare rare"], 5)  # a word counts as often as the query has it
    assert twice[0][1] == pytest.approx(2 * rare * 4.4 / (2 + 1.2 * (0.25 + 0.75 * 0.9)), abs=1e-5)
    assert index.find(["rare", "zebra"], 1) == [[(found[0][0], pytest.approx(twice[0][1] / 2))], []]


def test_in_a_large_corpus_common_words_count_where_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpus_of(tmp_path, *("the sea" for _ in range(8)), "the the the", "a ship")
    engine = BM25Engine(corpus, num_documents=2)
    assert engine.lookup("the ship") == ("a ship", "the the the")
    monkeypatch.setattr(bm25, "COMMON_PASSAGES", 8)  # "the" stands in nine of the ten
    assert engine.lookup("the ship") == ("a ship",)
    assert engine.lookup("the") == ("the the the", "the sea")


def test_an_index_is_kept_and_built_again_when_the_corpus_changes(tmp_path: Path) -> None:
    corpus, folder = corpus_of(tmp_path, *PASSAGES), tmp_path / "index"
    first = BM25Engine(corpus, index_dir=folder)
    assert first.lookup("skin") == ("Vitamin D: Made by the skin.",)
    made = (folder / "zerosearch.json").stat().st_mtime_ns
    assert BM25Engine(corpus, index_dir=folder).identity() == first.identity()
    assert (folder / "zerosearch.json").stat().st_mtime_ns == made, "it was not built again"

    os.utime(corpus)  # another time, the same content
    shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copy)
    for kept in (folder, tmp_path / "copied"):
        assert BM25Engine(corpus, index_dir=kept).lookup("skin") == ("Vitamin D: Made by the skin.",)
        assert json.loads((kept / "zerosearch.json").read_text()) == first.index.manifest

    content = corpus.read_text(encoding="utf-8")
    corpus.write_text(content.replace("the skin", "the moon"), encoding="utf-8")  # as many bytes as before
    second = BM25Engine(corpus, index_dir=folder)
    assert second.lookup("moon") == ("Vitamin D: Made by the moon.",) and second.lookup("skin") == ()
    assert second.identity()["corpus_sha256"] != first.identity()["corpus_sha256"]
    assert second.identity()["corpus_sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["cut", "overwritten", "removed", "manifest cut", "killed while it was built"])
def test_a_damaged_index_is_noticed_and_built_again(damage: str, tmp_path: Path) -> None:
    corpus, folder = corpus_of(tmp_path, *PASSAGES), tmp_path / "index"
    BM25Engine(corpus, index_dir=folder)
    (path,) = (folder / "data").glob("*.idx")
    if damage == "cut":
        os.truncate(path, 10)
    elif damage == "overwritten":
        path.write_bytes(b"x" * path.stat().st_size)
    elif damage == "removed":
        path.unlink()
    elif damage == "manifest cut":
        (folder / "zerosearch.json").write_text('{"format": 2, "sett')
    else:
        (folder / "zerosearch.json").write_text('{"format": 2}')  # as it stands until an index is whole
        path = folder / "data/half.tmp"
        path.write_text("half")
    assert BM25Engine(corpus, index_dir=folder).lookup("skin") == ("Vitamin D: Made by the skin.",)
    assert not path.exists(), "files of another build have other names"


@pytest.mark.parametrize("suffix", ["idx", "term", "fast", "fieldnorm", "managed.json", "meta.json"])
def test_damage_that_keeps_size_and_time_is_one_sentence(suffix: str, tmp_path: Path) -> None:
    corpus, folder = corpus_of(tmp_path, *PASSAGES * 200), tmp_path / "index"
    BM25Engine(corpus, index_dir=folder)
    path = next(path for path in (folder / "data").iterdir() if path.name.endswith(suffix))
    status, content = path.stat(), bytearray(path.read_bytes())
    for place in range(0, len(content), 7):
        content[place] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=f"the index in {folder} is damaged .* remove the folder, and it is built"):
        BM25Engine(corpus, index_dir=folder).lookup("Where was Jane Austen born?")


@pytest.mark.parametrize("suffix", ["idx", "term", "fast", "fieldnorm", "store"])
def test_an_index_that_is_cut_while_it_is_mapped_fails_the_search_and_not_the_process(
    suffix: str, tmp_path: Path
) -> None:
    corpus, folder = corpus_of(tmp_path, *PASSAGES * 200), tmp_path / "index"
    engine = BM25Engine(corpus, index_dir=folder)
    (path,) = (folder / "data").glob(f"*.{suffix}")
    os.truncate(path, 0)
    with pytest.raises(SearchError, match=f"{path.name} has changed since it was opened; start again to index it"):
        asyncio.run(engine.search(SearchRequest("skin", "Q?", ("a",))))
    assert engine.account.failures == 1
    assert BM25Engine(corpus, index_dir=folder).lookup("skin")


def test_a_build_that_breaks_leaves_no_index_and_its_folder_can_be_used_again(tmp_path: Path) -> None:
    corpus, folder = corpus_of(tmp_path, *PASSAGES), tmp_path / "index"
    BM25Engine(corpus, index_dir=folder)
    content = corpus.read_bytes()
    with corpus.open("a") as file:
        file.write("{broken")
    with pytest.raises(UserError, match="line 6 is not JSON"):
        BM25Engine(corpus, index_dir=folder)
    assert not (folder / "data").exists()
    corpus.write_bytes(content)
    assert BM25Engine(corpus, index_dir=folder).lookup("skin")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    code = """
import resource, sys
from zerosearch.engines.bm25 import BM25Index
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # no file may grow larger: writing fails as on a full disk
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from zerosearch.errors import UserError
try:
    BM25Index(sys.argv[1], sys.argv[2])
except UserError as error:
    print(error)
"""
    corpus = corpus_of(tmp_path, *(f"word{number} other{number * 7}" for number in range(2000)))
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(tmp_path / "index")], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(f"the index cannot be written to {tmp_path / 'index'}: "), done.stderr[-2000:]
    assert done.stdout.count("\n") == 1 and not (tmp_path / "index/data").exists()


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("Years of work.")
    (tmp_path / "in").mkdir()
    corpus = corpus_of(tmp_path / "in", *PASSAGES)
    for folder in (tmp_path, tmp_path / "in", tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match=f"{folder} holds something else than an index; name another folder"):
            BM25Engine(corpus, index_dir=folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["corpus.jsonl", "in", "thesis.tex"]


def test_a_build_removes_what_is_its_own_and_nothing_else(tmp_path: Path) -> None:
    """The corpus itself may lie in the folder of its index, and anything beside it."""
    corpus, folder = corpus_of(tmp_path, *PASSAGES), tmp_path / "index"
    BM25Engine(corpus, index_dir=folder)
    mine = [tmp_path / "index.building/notes", tmp_path / "index.lock", folder / "corpus.jsonl", folder / "notes.txt"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(corpus.read_bytes().replace(b"the skin", b"the moon"))
    assert BM25Engine(folder / "corpus.jsonl", index_dir=folder).lookup("moon") == ("Vitamin D: Made by the moon.",)
    assert all(b"the moon" in path.read_bytes() for path in mine)


def build_in_process(corpus: Path, folder: Path, written: Path) -> None:
    engine = BM25Engine(corpus, index_dir=folder)
    written.write_text(json.dumps([engine.lookup("Jane Austen born"), engine.index.manifest["build_s"]]))


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, *PASSAGES)
    context = multiprocessing.get_context("spawn")
    outputs = [tmp_path / f"{number}.json" for number in range(2)]
    processes = [context.Process(target=build_in_process, args=(corpus, tmp_path / "index", path)) for path in outputs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    results = [json.loads(path.read_text()) for path in outputs]
    assert results[0] == results[1], "the same documents, from the same build"


def test_the_corpus_may_be_removed_while_it_is_searched(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, *PASSAGES)
    engine = BM25Engine(corpus)
    corpus.unlink()
    assert engine.lookup("skin") == ("Vitamin D: Made by the skin.",)


def test_a_corpus_that_changes_while_it_is_searched_fails_the_search(tmp_path: Path) -> None:
    for content in (b"", b"x" * 1000):
        corpus = corpus_of(tmp_path, *PASSAGES)
        engine = BM25Engine(corpus)
        corpus.write_bytes(content)
        with pytest.raises(SearchError, match=r"corpus\.jsonl has changed since it was opened"):
            asyncio.run(engine.search(SearchRequest("skin", "Q?", ("a",))))


def test_words_of_any_script_and_odd_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [
        json.dumps({"contents": '"Töne"\nΣίσυφος schob 石'}),
        "",
        json.dumps({"contents": "half \ud83d a\0pair"}),  # a lone surrogate, a NUL
        json.dumps({"contents": '"Lisbon"\n'}),  # a title only: nothing that could be read
        json.dumps({"contents": "..."}),  # no words
        '{"id": NaN, "contents": "last, without an end"}',
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    engine = BM25Engine(path)
    assert engine.lookup("σίσυφος") == ("Töne: Σίσυφος schob 石",)
    assert engine.lookup("PAIR") == ("half \ufffd a\ufffdpair",)
    assert engine.lookup("END") == ("last, without an end",)
    assert engine.lookup("Lisbon") == () and engine.index.manifest["num_passages"] == 4


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
def test_it_finds_real_answers_among_real_passages() -> None:
    engine = BM25Engine(SHARED / "wiki_passages.jsonl")
    rows = rows_of(SHARED / "qa_multihop.jsonl")
    found = sum(cover_exact_match(" ".join(engine.lookup(row["question"])), row["golden_answers"]) for row in rows)
    assert found == pytest.approx(600, abs=5)  # of 1,000, the question as the query
