"""What a search is, whoever answers it. Each kind of engine is a file in this folder; import it from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SearchRequest:
    """One search of one trajectory, with the question and answers of its own row.

    A real engine reads `query` alone. A simulator also reads the question, the golden answers and `p_noise`, the
    probability of noisy documents, and tosses the coin by `key`: (seed, step, row, sample, turn).
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
            raise ValueError("p_noise needs a key: without one every search would toss the same coin")


@dataclass(frozen=True)
class SearchResult:
    """The documents, best first; whether they were asked to be noisy (`None`: the engine has no such notion)."""

    documents: tuple[str, ...]
    noisy: bool | None = None
    retries: int = 0


class SearchEngine(Protocol):
    """Anything that answers a search. At most `max_concurrency` searches are in flight at once."""

    name: str
    max_concurrency: int

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return documents. Raise `SearchError` once the bounded retries are spent; never invent documents."""
        ...

    async def aclose(self) -> None:
        """Release connections. The engine is not used again."""
        ...


class SearchError(RuntimeError):
    """A search failed for good. The message names the engine, its address and the remedy."""
