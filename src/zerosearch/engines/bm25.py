"""BM25 over a corpus on disk, by tantivy: a real engine that needs no network, no key and no GPU."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tantivy
from tantivy import Document, Filter, Occur, Query, TextAnalyzerBuilder, Tokenizer

from zerosearch.data import Passage
from zerosearch.engines import SearchError, SearchRequest, SearchResult, result_of
from zerosearch.engines.account import Account
from zerosearch.engines.corpus import DATA, Found, PassageFile, built_index, index_identity, read_corpus
from zerosearch.errors import UserError
from zerosearch.text import clean_text

logger = logging.getLogger(__name__)

K1, B = 1.2, 0.75  # tantivy's, which fixes them
BUILD_MEMORY_BYTES = 200_000_000
LONG_BUILD_S = 20.0
REMEMBERED_WORDS = 100_000  # queries share most of their words
# Words in more passages than both of these, such as "the", decide little and cost most of the time of a search.
COMMON_PASSAGES, COMMON_SHARE = 100_000, 0.1

SCHEMA = (
    tantivy.SchemaBuilder()
    .add_text_field("text", tokenizer_name="words", index_option="freq")
    .add_unsigned_field("start", fast=True)
    .build()
)
ANALYZER = TextAnalyzerBuilder(Tokenizer.simple()).filter(Filter.lowercase()).build()


class BM25Engine:
    """Return the `num_documents` passages that match a query best, best first; ties in the order of the corpus.

    A passage that shares no word with the query is no match, so a search may return fewer documents, or none.
    Words are letters and digits of any script, in lower case: no stemming, no stop words. In a corpus of more than
    `COMMON_PASSAGES`, words that stand in more than a tenth of the passages count only in a query that has no others.
    `corpus` is a JSONL file in wiki-18's format, which is read where it lies: leave it there. `index_dir` keeps the
    index, which is built again when the corpus changes; without one it is built for this engine alone.
    Raises `UserError` for a corpus that cannot be read.
    """

    name = "bm25"
    reads_query_only = True
    max_concurrency = 1  # a search takes a few milliseconds, without waiting for anything

    def __init__(self, corpus: str | Path, num_documents: int = 5, index_dir: str | Path | None = None) -> None:
        if num_documents < 1:
            raise UserError(f"num_documents is {num_documents}: it must be at least 1")
        self.num_documents = num_documents
        self.index = BM25Index(corpus, index_dir)
        self.account = Account(self.name)

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the passages that match the query; a query without a known word matches none."""
        with self.account.search():
            self.account.sent += 1
            try:
                return result_of(self.find(request.query))
            except UserError as error:  # the corpus has changed under the engine
                raise SearchError(str(error)) from error

    async def aclose(self) -> None:
        """Do nothing: there is no connection."""

    def lookup(self, query: str) -> tuple[str, ...]:
        """Return the documents for a query."""
        return result_of(self.find(query)).documents

    def find(self, query: str) -> list[Passage]:
        """Return the passages for a query, best first."""
        return [self.index.passages.passage(start) for start, _ in self.index.top(query, self.num_documents)]

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on."""
        return {"engine": self.name, **self.index.identity(), "num_documents": self.num_documents}


class BM25Index:
    """A tantivy index of a corpus, on disk. `manifest` says what it was built from."""

    def __init__(self, corpus: str | Path, index_dir: str | Path | None = None) -> None:
        self._temporary: TemporaryDirectory[str] | None = None
        if index_dir is None:
            self._temporary = TemporaryDirectory(prefix="zerosearch-bm25-")  # goes when this object does
            index_dir = self._temporary.name
        corpus, folder = Path(corpus), Path(index_dir)
        settings = {"kind": "bm25", "tantivy": version("tantivy"), "k1": K1, "b": B}
        self.manifest = built_index(corpus, folder, settings, lambda data: _build(corpus, data))
        if self._temporary and self.manifest["build_s"] > LONG_BUILD_S:
            logger.warning("the index of %s took %.0f s; an index_dir would keep it", corpus, self.manifest["build_s"])
        self.passages = PassageFile(corpus, self.manifest["corpus_bytes"])
        index = tantivy.Index.open(str(folder / DATA))
        index.config_reader("manual")
        index.reload()
        self._searcher = index.searcher()
        self._frequency = lru_cache(REMEMBERED_WORDS)(lambda word: self._searcher.doc_freq("text", word))

    def identity(self) -> dict[str, Any]:
        """Return what it was built from."""
        return index_identity(self.manifest)

    def search(self, queries: Sequence[str], count: int) -> list[Found]:
        """Return `top` of each query."""
        return [self.top(query, count) for query in queries]

    def top(self, text: str, count: int) -> Found:
        """Return the `count` passages that match best: where each starts in the corpus, and its score."""
        times = Counter(word for word in ANALYZER.analyze(clean_text(text)) if self._frequency(word))
        most = max(COMMON_PASSAGES, COMMON_SHARE * self._searcher.num_docs)
        words = [word for word in times if self._frequency(word) <= most] or list(times)
        # A repeated word as so many terms: a boosted term would be scored without block-max pruning.
        terms = [Query.term_query(SCHEMA, "text", word, "freq") for word in words for _ in range(times[word])]
        query = Query.boolean_query([(Occur.Should, term) for term in terms])
        hits = self._searcher.search(query, count, count=False).hits
        starts: Sequence[Any] = self._searcher.fast_field_values("start", [address for _, address in hits])
        return sorted(zip(starts, (score for score, _ in hits), strict=True), key=lambda one: (-one[1], one[0]))


def _build(corpus: Path, folder: Path) -> dict[str, Any]:
    """Write the index of a corpus and return what its manifest says."""
    index = tantivy.Index(SCHEMA, path=str(folder))
    index.register_tokenizer("words", ANALYZER)
    try:
        writer = index.writer(BUILD_MEMORY_BYTES, num_threads=1)  # several would mix the order of the corpus
        try:
            count = _add_passages(corpus, writer)
            writer.commit()
        finally:
            writer.wait_merging_threads()  # after an error too: until then its threads write files
    except ValueError as error:  # what tantivy raises whatever the cause; here, that it cannot write
        raise OSError(str(error)) from error
    return {"num_passages": count}


def _add_passages(corpus: Path, writer: tantivy.IndexWriter) -> int:
    """Add the passages that have a text and return their number."""
    count, has_words = 0, False
    for start, passage in read_corpus(corpus):
        if not passage.text:
            continue
        text = f"{passage.title} {passage.text}"
        document = Document()
        document.add_text("text", text)
        document.add_unsigned("start", start)
        writer.add_document(document)
        count, has_words = count + 1, has_words or bool(ANALYZER.analyze(text))
    if not has_words:
        raise UserError(f"the corpus {corpus} holds no words")
    return count
