"""BM25 over a corpus on disk: a real engine that needs no network, no key and no GPU.

The index is bm25s's, in its file format: a score for each word of each passage, by word, memory-mapped. Two things are
done here. It is built in blocks, as bm25s holds every word of the corpus in memory at once. And a search reads the
frequent words of a query only for passages that can still be among the best, which changes no result (MaxScore: Turtle
and Flood, 1995).
"""

from __future__ import annotations

import json
import logging
import mmap
import re
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from zerosearch.data import Passage
from zerosearch.engines import SearchRequest, SearchResult, result_of
from zerosearch.engines.corpus import CorpusReader, PassageFile, built_index, index_identity, mapped
from zerosearch.engines.ledger import Ledger
from zerosearch.errors import UserError
from zerosearch.generation.vllm_workarounds import hidden_module

with hidden_module("numba"):
    import bm25s

logger = logging.getLogger(__name__)

WORD = re.compile(r"\w+")
BLOCK_WORDS = 4_000_000  # words in memory at once while an index is built; some 200 MiB
PROGRESS_BAR_BLOCKS = 4
ROUNDING = 1e-3  # more than float32 sums of scores can be off by
LOOKUP_COST = 40  # to look up a candidate among the passages of a word, as a multiple of adding one passage's score
LONG_BUILD_S = 20.0
REMEMBERED_WORDS = 100_000  # queries share most of their words
SELECTION_COST = 4  # to find the best among the passages of a word: worth it if a frequent word may be spared

# k1 and b as in Anserini, which Search-R1's and FlashRAG's BM25 run; on real questions, no worse than bm25s's own.
K1, B = 0.9, 0.4


class BM25Engine:
    """Return the `num_documents` passages that match a query best, best first; ties in the order of the corpus.

    A passage that shares no word with the query is no match, so a search may return fewer documents, or none.
    Words are compared as they stand, in lower case: no stemming, no stop words (the weights take care of those).
    `corpus` is a JSONL file in wiki-18's format, which is read where it lies: leave it there. `index_dir` keeps the
    index, which is built again when the corpus changes; without one it is built for this engine alone.
    Raises `UserError` for a corpus that cannot be read.
    """

    name = "bm25"
    reads_query_only = True
    # A search is a few milliseconds of computing that hold the interpreter in any thread: more in flight gain nothing.
    max_concurrency = 1

    def __init__(self, corpus: str | Path, num_documents: int = 5, index_dir: str | Path | None = None) -> None:
        if num_documents < 1:
            raise UserError(f"num_documents is {num_documents}: it must be at least 1")
        self.num_documents = num_documents
        self.index = BM25Index(corpus, index_dir)
        self.ledger = Ledger(self.name)

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the passages that match the query; a query without a known word matches none."""
        with self.ledger.search():
            self.ledger.sent += 1
            return result_of(self.find(request.query))

    async def aclose(self) -> None:
        """Do nothing: there is no connection."""

    def lookup(self, query: str) -> tuple[str, ...]:
        """Return the documents for a query."""
        return result_of(self.find(query)).documents

    def find(self, query: str) -> list[Passage]:
        """Return the passages for a query, best first."""
        return [self.index.passages.passage(number) for number, _ in self.index.top(query, self.num_documents)]

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on."""
        return {"engine": self.name, **self.index.identity(), "num_documents": self.num_documents}


class BM25Index:
    """BM25 scores of every word in every passage of a corpus, on disk. `manifest` says what it was built from."""

    def __init__(self, corpus: str | Path, index_dir: str | Path | None = None) -> None:
        self._temporary: TemporaryDirectory[str] | None = None
        if index_dir is None:
            self._temporary = TemporaryDirectory(prefix="zerosearch-bm25-")  # goes when this object does
            index_dir = Path(self._temporary.name) / "index"
        corpus, folder = Path(corpus), Path(index_dir)
        settings = {"kind": "bm25", "k1": K1, "b": B}
        self.manifest = built_index(corpus, folder, settings, lambda draft: _IndexBuilder(corpus, draft).build())
        if self._temporary and self.manifest["build_s"] > LONG_BUILD_S:
            logger.warning("the index of %s took %.0f s; an index_dir would keep it", corpus, self.manifest["build_s"])
        self.passages = PassageFile(corpus, mapped(folder / "offsets.npy"))
        self.vocabulary = Vocabulary(folder)
        self.bounds = mapped(folder / "bounds.npy")  # (words,), no passage scores more for a word
        scores = bm25s.BM25.load(folder, mmap=True, load_vocab=False).scores
        # Plain arrays over the same mapped memory: the class that says so makes each access slower.
        self._scores, self._numbers, self._starts = (
            np.asarray(scores[name]) for name in ("data", "indices", "indptr")
        )

    def identity(self) -> dict[str, Any]:
        """Return what it was built from."""
        return index_identity(self.manifest)

    def search(self, queries: Sequence[str], count: int) -> list[list[tuple[int, float]]]:
        """Return `top` of each query."""
        return [self.top(query, count) for query in queries]

    def top(self, query: str, count: int) -> list[tuple[int, float]]:
        """Return the numbers and scores of the `count` passages that match best; ties by number."""
        times = Counter(number for word in _words(query) if (number := self.vocabulary.find(word)) is not None)
        # Rare words first: they decide who can be among the best, the frequent ones only how those are ordered.
        words = sorted(times, key=self._frequency)
        rests = [*accumulate((times[word] * float(self.bounds[word]) for word in reversed(words)), initial=0.0)][::-1]
        total = np.zeros(len(self.passages), dtype=np.float32)  # (passages,); a page that stays 0 takes no memory
        candidates: np.ndarray | None = None  # who can still be among the best; `None`: anyone
        minimum = 0.0  # at least `count` passages have this score already
        seen: list[np.ndarray] = []
        for word, rest, rest_after in zip(words, rests, rests[1:], strict=False):
            if candidates is None and minimum > rest + ROUNDING:  # who has no word so far is out
                candidates = _with_score(minimum - rest - ROUNDING, seen, total)
            numbers, scores = self._postings(word)
            if candidates is None or len(candidates) * LOOKUP_COST > len(numbers):
                np.add.at(total, numbers, times[word] * scores)
                seen.append(numbers)
            else:
                places = np.minimum(np.searchsorted(numbers, candidates), len(numbers) - 1)
                has_word = numbers[places] == candidates
                total[candidates[has_word]] += times[word] * scores[places[has_word]]
            if candidates is not None:
                minimum = max(minimum, _score_at(count, total[candidates]))
                candidates = candidates[total[candidates] >= minimum - rest_after - ROUNDING]
            elif len(numbers) * SELECTION_COST < self._frequency(words[-1]):
                minimum = max(minimum, _score_at(count, total[numbers]))
        return _best(_with_score(minimum, seen, total) if candidates is None else candidates, total, count)

    def _postings(self, word: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the passages that have the word, in order, and their scores for it."""
        start, end = int(self._starts[word]), int(self._starts[word + 1])
        return self._numbers[start:end], self._scores[start:end]

    def _frequency(self, word: int) -> int:
        return int(self._starts[word + 1] - self._starts[word])


class Vocabulary:
    """The words of an index, sorted and memory-mapped. A word's number is its place."""

    def __init__(self, folder: Path) -> None:
        with (folder / "words.txt").open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts = mapped(folder / "words.npy")  # (words + 1,), where each starts
        self.find = lru_cache(REMEMBERED_WORDS)(self._find)

    @staticmethod
    def save(folder: Path, words: Sequence[bytes]) -> None:
        """Write sorted words."""
        (folder / "words.txt").write_bytes(b"".join(words))
        np.save(folder / "words.npy", np.cumsum([0, *map(len, words)], dtype=np.int64))

    def _find(self, word: str) -> int | None:
        """Return the number of a word, or `None`."""
        wanted = word.encode(errors="surrogatepass")
        size = len(self._starts) - 1
        place = bisect_left(range(size), wanted, key=self._word)
        return place if place < size and self._word(place) == wanted else None

    def _word(self, place: int) -> bytes:
        return self._bytes[self._starts[place] : self._starts[place + 1]]


class _IndexBuilder:
    """Builds an index in two passes: over the corpus, counting words; over the counts, which are on disk, scoring."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.reader, self.folder = CorpusReader(corpus), folder
        self.vocabulary: defaultdict[str, int] = defaultdict()
        self.vocabulary.default_factory = self.vocabulary.__len__  # a new word gets the next number
        self.offsets, self.lengths = array("q"), array("i")  # by passage: where it starts; its words
        self.distinct = array("i")  # by passage: its different words
        self.frequency = np.zeros(0, dtype=np.int64)  # by word: the passages that have it
        self.blocks: list[int] = []  # pairs of passage and word in each block on disk

    def build(self) -> dict[str, Any]:
        """Write the index and return what its manifest says."""
        self._count_words()
        if not self.vocabulary:
            raise UserError(f"the corpus {self.reader.path} holds no words")
        self._write_scores()
        np.save(self.folder / "offsets.npy", np.frombuffer(self.offsets, dtype=np.int64))
        return {"corpus_sha256": self.reader.sha256, "num_passages": len(self.offsets)}

    def _count_words(self) -> None:
        words = array("i")  # of the passages of a block, one after the other
        with (self.folder / "pairs.tmp").open("wb") as file:
            for offset, passage in self.reader.passages():
                before = len(words)
                words.extend(map(self.vocabulary.__getitem__, _words(f"{passage.title} {passage.text}")))
                self.offsets.append(offset)
                self.lengths.append(len(words) - before)
                if len(words) >= BLOCK_WORDS:
                    self._write_pairs(words, file)
                    words = array("i")
            self._write_pairs(words, file)

    def _write_pairs(self, words: array[int], file: Any) -> None:
        """Append (word, times) for each word of each passage of a block, passage by passage."""
        lengths = np.frombuffer(self.lengths, dtype=np.int32)[len(self.distinct) :].copy()  # (passages of the block,)
        passages = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
        pairs, times = np.unique(passages << 32 | np.frombuffer(words, dtype=np.int32), return_counts=True)
        self.distinct.extend(np.bincount(pairs >> 32, minlength=len(lengths)).astype(np.int32).tolist())
        numbers = (pairs & 0xFFFFFFFF).astype(np.int32)
        counted = np.bincount(numbers, minlength=len(self.vocabulary))
        counted[: len(self.frequency)] += self.frequency
        self.frequency = counted
        numbers.tofile(file)
        times.astype(np.int32).tofile(file)
        self.blocks.append(len(pairs))

    def _write_scores(self) -> None:
        """Sort the pairs by word, block by block, into the files of bm25s, as scores."""
        in_order = sorted(self.vocabulary, key=lambda word: word.encode(errors="surrogatepass"))
        Vocabulary.save(self.folder, [word.encode(errors="surrogatepass") for word in in_order])
        old_numbers = np.array([self.vocabulary[word] for word in in_order])
        new_numbers = np.empty_like(old_numbers)
        new_numbers[old_numbers] = np.arange(len(old_numbers))
        frequency = self.frequency[old_numbers]  # (words,)
        starts = np.concatenate([[0], np.cumsum(frequency)])
        np.save(self.folder / "indptr.csc.index.npy", starts)

        size, num_passages = int(starts[-1]), len(self.offsets)
        scores = np.lib.format.open_memmap(self.folder / "data.csc.index.npy", "w+", np.float32, (size,))
        numbers = np.lib.format.open_memmap(self.folder / "indices.csc.index.npy", "w+", np.int32, (size,))
        bounds = np.zeros(len(frequency), dtype=np.float32)
        lengths = np.frombuffer(self.lengths, dtype=np.int32)
        weights = K1 * (1 - B + B * lengths / lengths.mean())  # (passages,)
        idf = np.log(1 + (num_passages - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)  # (words,)

        passages = np.repeat(np.arange(num_passages, dtype=np.int32), np.frombuffer(self.distinct, dtype=np.int32))
        next_place, first = starts[:-1].copy(), 0
        blocks = tqdm(self.blocks, desc="writing the index", disable=len(self.blocks) < PROGRESS_BAR_BLOCKS)
        with (self.folder / "pairs.tmp").open("rb") as file:
            for pairs in blocks:
                words = new_numbers[np.fromfile(file, dtype=np.int32, count=pairs)]
                times = np.fromfile(file, dtype=np.int32, count=pairs).astype(np.float32)
                owners = passages[first : first + pairs]
                block_scores = idf[words] * (times / (weights[owners].astype(np.float32) + times))
                by_word = np.argsort(words, kind="stable")
                words = words[by_word]
                different, places, repeats = np.unique(words, return_index=True, return_counts=True)
                targets = next_place[words] + np.arange(pairs) - np.repeat(places, repeats)
                scores[targets], numbers[targets] = block_scores[by_word], owners[by_word]
                next_place[different] += repeats
                bounds[different] = np.maximum(
                    bounds[different], np.maximum.reduceat(block_scores[by_word], places) if pairs else 0
                )
                first += pairs
        (self.folder / "pairs.tmp").unlink()
        np.save(self.folder / "bounds.npy", bounds)
        scores.flush()
        numbers.flush()
        parameters = {"k1": K1, "b": B, "delta": 0.5, "method": "lucene", "idf_method": "lucene", "dtype": "float32"}
        parameters |= {
            "int_dtype": "int32",
            "num_docs": num_passages,
            "version": bm25s.__version__,
            "backend": "numpy",
        }
        (self.folder / "params.index.json").write_text(json.dumps(parameters, indent=4), encoding="utf-8")


def _with_score(minimum: float, seen: Sequence[np.ndarray], total: np.ndarray) -> np.ndarray:
    """Return the passages, in order, whose total is above 0 and at least the minimum; only those in `seen` can be."""
    if sum(map(len, seen)) > len(total) / 16:  # to look at all is quicker than to sort many
        return np.flatnonzero(total >= minimum) if minimum > 0 else np.flatnonzero(total)
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int32), *(some[total[some] >= minimum] for some in seen)]))


def _score_at(count: int, scores: np.ndarray) -> float:
    """Return the score that is in the place `count` from above; 0 if there are fewer."""
    return float(np.partition(scores, -count)[-count]) if len(scores) >= count else 0.0


def _best(candidates: np.ndarray, total: np.ndarray, count: int) -> list[tuple[int, float]]:
    """Return the best of the candidates, which are in the order of the corpus, with their totals; ties stay."""
    scores = total[candidates]
    if len(candidates) > count:
        is_good = scores >= np.partition(scores, -count)[-count]
        candidates, scores = candidates[is_good], scores[is_good]
    best_first = np.argsort(-scores, kind="stable")[:count]
    return [(int(candidates[place]), float(scores[place])) for place in best_first]


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())
