"""BM25 over a corpus on disk, by tantivy: a real engine that needs no network, no key and no GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tantivy
from tantivy import Document, Filter, Occur, Query, TextAnalyzerBuilder, Tokenizer

from zerosearch.engines import SearchError, SearchRequest, SearchResult, result_of
from zerosearch.engines.account import Account
from zerosearch.engines.corpus import Found, PassageIndex, read_corpus
from zerosearch.errors import UserError
from zerosearch.text import clean_text

K1, B = 1.2, 0.75  # tantivy's, which fixes them
BUILD_MEMORY_BYTES = 200_000_000
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

    >>> BM25Engine("corpus.jsonl", num_documents=1).lookup("Where does Karin Rowe hail from?")
    ('Karin Rowe hails from Port Elsford.',)
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
                return self._find(request.query)
            except UserError as error:  # the corpus or the index has changed under the engine
                raise SearchError(str(error)) from error

    async def aclose(self) -> None:
        """Do nothing: there is no connection."""

    def lookup(self, query: str) -> tuple[str, ...]:
        """Return the documents for a query."""
        return self._find(query).documents

    def identity(self) -> dict[str, Any]:
        return {"engine": self.name, **self.index.identity(), "num_documents": self.num_documents}

    def _find(self, query: str) -> SearchResult:
        (found,) = self.index.find([query], self.num_documents)
        return result_of([self.index.passage(start) for start, _ in found])


class BM25Index(PassageIndex):
    """A tantivy index of a corpus, mapped into memory. Without a folder it is kept as long as this object."""

    def __init__(self, corpus: str | Path, index_dir: str | Path | None = None) -> None:
        if index_dir is None:
            self._temporary = TemporaryDirectory(prefix="zerosearch-bm25-")  # goes when this object does
            index_dir = self._temporary.name
        super().__init__(corpus, index_dir, {"kind": "bm25", "tantivy": version("tantivy"), "k1": K1, "b": B})
        with self._damage():
            index = tantivy.Index.open(str(self.data))
            index.config_reader("manual")
            index.reload()
            self._searcher = index.searcher()
        self._frequency = lru_cache(REMEMBERED_WORDS)(lambda word: self._searcher.doc_freq("text", word))

    def find(self, queries: Sequence[str], count: int) -> list[Found]:
        """Return the `count` passages that match each query best. Raises `UserError` once a file has changed."""
        self.check()
        with self._damage():
            return [self._top(query, count) for query in queries]

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Report what tantivy raises for a damaged index as `UserError`: a `ValueError`, or a panic."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise self.damaged(error) from error

    def _top(self, text: str, count: int) -> Found:
        times = Counter(word for word in ANALYZER.analyze(clean_text(text)) if self._frequency(word))
        most = max(COMMON_PASSAGES, COMMON_SHARE * self._searcher.num_docs)
        words = [word for word in times if self._frequency(word) <= most] or list(times)
        # A repeated word as so many terms: a boosted term would be scored without block-max pruning.
        terms = [Query.term_query(SCHEMA, "text", word, "freq") for word in words for _ in range(times[word])]
        query = Query.boolean_query([(Occur.Should, term) for term in terms])
        hits = self._searcher.search(query, count, count=False).hits
        starts: Sequence[Any] = self._searcher.fast_field_values("start", [address for _, address in hits])
        return sorted(zip(starts, (score for score, _ in hits), strict=True), key=lambda one: (-one[1], one[0]))

    def build(self) -> dict[str, Any]:
        """Write the index of the corpus; rows without a text are left out."""
        index = tantivy.Index(SCHEMA, path=str(self.data))
        index.register_tokenizer("words", ANALYZER)
        try:
            writer = index.writer(BUILD_MEMORY_BYTES, num_threads=1)  # several would mix the order of the corpus
            try:
                count = self._add_passages(writer)
                writer.commit()
            finally:
                writer.wait_merging_threads()  # after an error too: until then its threads write files
        except ValueError as error:  # what tantivy raises whatever the cause; here, that it cannot write
            raise OSError(str(error)) from error
        return {"num_passages": count}

    def _add_passages(self, writer: tantivy.IndexWriter) -> int:
        count, has_words = 0, False
        for start, passage in read_corpus(self.corpus):
            if not passage.text:
                continue
            text = f"{passage.title} {passage.text}"
            document = Document()
            document.add_text("text", text)
            document.add_unsigned("start", start)
            writer.add_document(document)
            count, has_words = count + 1, has_words or bool(ANALYZER.analyze(text))
        if not has_words:
            raise UserError(f"the corpus {self.corpus} holds no words")
        return count
