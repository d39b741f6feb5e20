"""What a search is, whoever answers it. Each kind of engine is a file in this folder; import it from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from zerosearch.data import Passage
from zerosearch.noise import keyed_uniform


@dataclass(frozen=True)
class SearchRequest:
    """One search of one trajectory, with the question and answers of its own row.

    A real engine reads `query` alone. A simulator also reads the question, the golden answers and `p_noise`, the
    probability of noisy documents, and draws noisy or useful from an RNG keyed by `key`: (seed, step, row, sample,
    turn).
    """

    query: str
    question: str
    golden_answers: tuple[str, ...]
    p_noise: float = 0.0
    key: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.p_noise <= 1.0:
            raise ValueError(f"p_noise is {self.p_noise}: a probability lies in [0, 1]")
        if 0.0 < self.p_noise < 1.0 and not self.key:
            raise ValueError("p_noise needs a key: without one every search would draw the same")

    @property
    def is_noisy(self) -> bool:
        """Say how the coin of this search falls."""
        return keyed_uniform(*self.key) < self.p_noise


@dataclass(frozen=True)
class SearchResult:
    """The documents, best first; whether they were asked to be noisy (`None`: the engine knows no noise).

    `short_replies` counts the replies that held too few documents and were asked for again. `titles` are those of the
    documents, "" for one without; an engine that does not tell titles from texts gives an empty tuple.
    """

    documents: tuple[str, ...]
    noisy: bool | None = None
    retries: int = 0
    short_replies: int = 0
    titles: tuple[str, ...] = ()


class SearchEngine(Protocol):
    """Anything that answers a search. At most `max_concurrency` searches are in flight at once.

    An engine may have more: `identity()`, a dictionary of what its results depend on, for manifests and the cache;
    `reads_query_only`, true if they depend on the query alone; and an `account` (zerosearch.engines.account). One that
    asks several others, each with an account of its own, names them in `engines`: each one's queries are counted.

    >>> class Weather:
    ...     name, max_concurrency = "weather", 1
    ...     async def search(self, request: SearchRequest) -> SearchResult:
    ...         if "weather" not in request.query:
    ...             raise SearchError(f"the weather engine cannot look up {request.query!r}")
    ...         return SearchResult(("It rains.",))
    ...     async def aclose(self) -> None: ...
    >>> engine: SearchEngine = Weather()
    >>> asyncio.run(engine.search(SearchRequest("weather", "Is it raining?", ("yes",)))).documents
    ('It rains.',)
    """

    name: str
    max_concurrency: int

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return documents. Raise `SearchError` once the bounded retries are spent; never invent documents."""
        ...

    async def aclose(self) -> None:
        """Release connections. The engine is not used again."""
        ...


class SearchError(RuntimeError):
    """A search failed for good. The message names the engine, its address and the remedy.

    `retries`: how often it was repeated in vain.
    """

    def __init__(self, message: str, retries: int = 0) -> None:
        super().__init__(message)
        self.retries = retries


class BudgetSpent(SearchError):
    """The limit on queries or money is reached: the search was not sent, and no further one will be."""


def result_of(passages: Sequence[Passage]) -> SearchResult:
    """Return passages as what a search has found."""
    return SearchResult(
        documents=tuple(passage.document for passage in passages), titles=tuple(passage.title for passage in passages)
    )


def engine_identity(engine: SearchEngine) -> dict[str, Any]:
    """Return what an engine's results depend on, for manifests and the cache: its own `identity()`, or its name.

    A value of `None` is one that the engine does not know before it has asked its server.
    """
    identity = getattr(engine, "identity", None)
    return {"engine": engine.name} if identity is None else dict(identity())
