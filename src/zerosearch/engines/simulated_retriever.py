"""A simulator behind Search-R1's protocol: clients that know a retriever train against it as they are.

    POST /retrieve   what zerosearch.engines.retriever_server answers, in both protocols; a request may also bring
                     "questions" and "golden_answers", one for each query, "keys", and the noise: "p_noise", or
                     "step" and "total_steps"
    GET /schedule    how noisy searches are; POST /schedule changes what its body names
    GET /health      what simulator this is, what it has answered, and how well

A simulator writes by the question and its answers. They come from the request, or else from the registered questions:
the one that fits the query best (BM25) and stands out. For any other query the simulator gets the query alone, in the
words for one that is not tuned: the tuned prompt names an answer, and no simulator has seen it with an empty one.

Searches are keyed by "keys", or by seed, question and query: whatever the order of arrival, the same search gets the
same documents, unless the noise that has risen meanwhile makes it noisy.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field, model_validator

from zerosearch.data import text_number
from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.bm25 import BM25Index
from zerosearch.engines.corpus import Found
from zerosearch.engines.retriever_server import QueryText, Retrieval
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.http import ServiceError
from zerosearch.metrics import holds_answer
from zerosearch.noise import NoiseSchedule
from zerosearch.prompts import SimulatorTemplate
from zerosearch.protocol import split_title

logger = logging.getLogger(__name__)

# A question that fits no better than this is mostly the wrong one, and the query alone does better. Of 2,176 real
# searches 82 % keep their question, and 95 % of these the right one (recipes/bench/question_lookup.py).
MARGIN = 1.2

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Row = Mapping[str, Any]  # {question, golden_answers}
Source = Literal["request", "lookup", "query"]  # of the question and the golden answers; "query": they are not known


class SimulatedRetrieval(Retrieval):
    """What a request asks for, and what it tells of each query. A field that is unknown is refused."""

    model_config = ConfigDict(extra="forbid")

    questions: list[QueryText] | None = None
    golden_answers: list[list[QueryText]] | None = None
    keys: list[Annotated[list[int], Field(min_length=1)]] | None = None
    p_noise: Probability | None = None
    step: Positive | None = None
    total_steps: Positive | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> SimulatedRetrieval:
        for name in ("questions", "golden_answers", "keys"):
            if (told := getattr(self, name)) is not None and len(told) != len(self.texts):
                raise ValueError(f"{name} has {len(told)} entries for {len(self.texts)} queries")
        if (self.questions is None) != (self.golden_answers is None):
            raise ValueError("questions and golden_answers belong together")
        if (self.step is None) != (self.total_steps is None) or (self.step or 0) > (self.total_steps or 0):
            raise ValueError("step and total_steps belong together, and step is at most total_steps")
        if self.step is not None and self.p_noise is not None:
            raise ValueError("the noise comes from p_noise, or from step and total_steps")
        return self


class Schedule(BaseModel):
    """A change of the schedule; what it leaves out stays as it is."""

    model_config = ConfigDict(strict=True, extra="forbid")

    start: float | None = None
    end: float | None = None
    base: float | None = None
    total_queries: Positive | None = None
    queries: Annotated[int, Field(ge=0)] | None = None


@dataclass
class QueryNoise:
    """Noise by the number of queries answered so far, of `total_queries`; past them it stays at the schedule's end."""

    schedule: NoiseSchedule
    total_queries: int
    queries: int = 0

    def p_noise(self) -> float:
        """Return the probability of noisy documents for the next query."""
        return self.schedule.p_noise(min(self.queries + 1, self.total_queries), self.total_queries)

    def to_json(self) -> dict[str, Any]:
        counts = {"total_queries": self.total_queries, "queries": self.queries}
        return {**asdict(self.schedule), **counts, "p_noise": self.p_noise()}


class QuestionLookup:
    """Find the question that a query was written for, among registered ones, by BM25.

    A query that fits its best question less than `margin` times as well as the next has none.
    """

    def __init__(self, rows: Sequence[Row], margin: float = 1.0) -> None:
        self.rows, self.margin = list({row["question"]: row for row in rows}.values()), margin
        self._folder = TemporaryDirectory(prefix="zerosearch-questions-")  # goes when this object does
        corpus = Path(self._folder.name, "questions.jsonl")
        lines = (json.dumps({"id": place, "contents": row["question"]}) for place, row in enumerate(self.rows))
        corpus.write_text("\n".join(lines) + "\n")
        self.index = BM25Index(corpus)
        self._searching = Lock()

    def find(self, queries: Sequence[str]) -> list[Row | None]:
        """Return for each query the row of its question, `None` if none shares a word with it or stands out."""
        with self._searching:
            found = self.index.find(queries, 2)
        return [self._row(best) if best else None for best in found]

    def _row(self, best: Found) -> Row | None:
        (start, score), *others = best
        stands_out = all(score >= self.margin * other for _, other in others)
        return self.rows[self.index.row(start)["id"]] if stands_out else None


class SimulatedRetriever:
    """The web application of a simulator.

    `from_query` is the prompt for a query of which nothing else is known. Without one such a query finds nothing among
    registered questions, as an index finds nothing for words that it does not hold; where none are registered it is
    refused.
    `default_count` documents at most answer a request that does not say how many: a simulator writes no more than
    `engine.num_documents`.
    """

    def __init__(
        self,
        engine: SimulatedEngine,
        noise: QueryNoise,
        questions: Sequence[Row] = (),
        from_query: SimulatorTemplate | None = None,
        seed: int = 0,
        default_count: int = 3,  # as in Search-R1's server
    ) -> None:
        self.engine, self.noise, self.seed, self.default_count = engine, noise, seed, default_count
        self.lookup = QuestionLookup(questions, MARGIN if from_query else 1.0) if questions else None
        self.engine_from_query = replace(engine, template=from_query) if from_query else None
        self.engines = [one for one in (engine, self.engine_from_query) if one]
        self.sources: Counter[Source] = Counter()
        self.outcomes: Counter[tuple[bool, bool | None]] = Counter()  # noisy, holds an answer (None: none is known)
        self.num_without_documents = self.num_failures = 0
        self.application = FastAPI(openapi_url=None, lifespan=self._lifespan)
        self.application.post("/retrieve")(self.retrieve)
        self.application.get("/schedule")(self.schedule)
        self.application.post("/schedule")(self.change_schedule)
        self.application.get("/health")(self.health)

    @asynccontextmanager
    async def _lifespan(self, application: FastAPI) -> AsyncIterator[None]:
        yield
        for engine in self.engines:
            await engine.aclose()

    async def retrieve(
        self, retrieval: Annotated[SimulatedRetrieval, Depends(SimulatedRetrieval.from_request)]
    ) -> Any:
        """Answer POST /retrieve. A query whose reply holds no documents gets none; a simulator that fails, 503."""
        rows = await asyncio.to_thread(self.lookup.find, retrieval.texts) if self.lookup else []
        requests = self._requests(retrieval, rows)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._search(request)) for request in requests]
        except ExceptionGroup as errors:
            raise HTTPException(503, str(errors.exceptions[0])) from None
        found = [task.result().documents[: retrieval.count or self.default_count] for task in tasks]
        if retrieval.queries is None:
            return [{"text": document} for document in found[0]]
        # A simulator knows no score: one over the rank stands for it.
        return {
            "result": [
                [
                    {"document": _row(document), "score": 1 / rank} if retrieval.return_scores else _row(document)
                    for rank, document in enumerate(documents, start=1)
                ]
                for documents in found
            ]
        }

    async def schedule(self) -> dict[str, Any]:
        return self.noise.to_json()

    async def change_schedule(self, change: Schedule) -> dict[str, Any]:
        named = change.model_dump(exclude_none=True)
        counts = {name: named.pop(name) for name in ("total_queries", "queries") if name in named}
        try:
            self.noise = replace(self.noise, schedule=replace(self.noise.schedule, **named), **counts)
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        return self.noise.to_json()

    async def health(self) -> dict[str, Any]:
        """Answer GET /health. The rates are those of a fidelity card, over the searches whose answers were known."""
        counts = [engine.counts for engine in self.engines]
        replies = sum(count.replies for count in counts)
        return {
            "status": "ok",
            "index": self.engine.identity(),
            "queries": self.sources.total(),
            "questions_from": dict(self.sources),
            "noisy": sum(count for (noisy, _), count in self.outcomes.items() if noisy),
            "without_documents": self.num_without_documents,
            "failures": self.num_failures,
            "useful_answer_rate": self._answer_rate(noisy=False),
            "noisy_leak_rate": self._answer_rate(noisy=True),
            "valid_format_rate": _share(sum(count.well_formed_replies for count in counts), replies),
            "short_reply_rate": _share(sum(count.short_replies for count in counts), replies),
        }

    def _answer_rate(self, noisy: bool) -> float | None:
        """Return the share of searches of a quality whose documents hold a golden answer."""
        holding, others = self.outcomes[noisy, True], self.outcomes[noisy, False]
        return _share(holding, holding + others)

    def _requests(self, retrieval: SimulatedRetrieval, rows: Sequence[Row | None]) -> list[SearchRequest]:
        """Return the searches of a request, all with the same probability of noise; `rows` is what was looked up."""
        p_noise = retrieval.p_noise
        if retrieval.step is not None and retrieval.total_steps is not None:
            p_noise = self.noise.schedule.p_noise(retrieval.step, retrieval.total_steps)
        elif p_noise is None:
            p_noise = self.noise.p_noise()
        questions, answers = retrieval.questions or [], retrieval.golden_answers or []
        requests, sources = [], Counter[Source]()
        for query, question, golden, row, key in zip_longest(
            retrieval.texts, questions, answers, rows, retrieval.keys or []
        ):
            golden_answers = tuple(answer for answer in golden or () if answer.strip())
            source: Source = "request" if golden_answers else "lookup" if row else "query"
            if source == "lookup" and row:
                question, golden_answers = row["question"], tuple(row["golden_answers"])
            if source == "query" and self.engine_from_query is None and self.lookup is None:
                message = f"nothing tells the question and the golden answers of the query {query[:200]!r}"
                raise HTTPException(422, f"{message}; send questions and golden_answers, or register questions")
            key = key or (self.seed, text_number(f"{question or ''}\n{query}"))
            requests.append(SearchRequest(query, question or "", golden_answers, p_noise, tuple(key)))
            sources[source] += 1
        self.sources += sources
        self.noise.queries += len(requests)
        return requests

    async def _search(self, request: SearchRequest) -> SearchResult:
        engine = self.engine if request.golden_answers else self.engine_from_query
        if engine is None:
            self.num_without_documents += 1
            return SearchResult(())
        try:
            result = await engine.search(request)
        except SearchError as error:
            logger.warning(error)
            if isinstance(error.__cause__, ServiceError):
                self.num_failures += 1
                raise
            self.num_without_documents += 1
            return SearchResult(())
        holds = any(holds_answer(document, request.golden_answers) for document in result.documents)
        self.outcomes[bool(result.noisy), holds if request.golden_answers else None] += 1
        return result


def _row(document: str) -> dict[str, str]:
    """Return a document as a row of wiki-18's format."""
    title, text = split_title(document)
    contents = f'"{title}"\n{text}'
    return {"id": blake2b(contents.encode(), digest_size=8).hexdigest(), "contents": contents}


def _share(count: int, total: int) -> float | None:
    return count / total if total else None
