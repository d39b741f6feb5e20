"""SerpAPI as far as an evaluation needs it: every query is counted, and replies come in another order than asked."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from http_servers import Server

from zerosearch.engines.google import GoogleEngine
from zerosearch.rollout.in_flight import close_engine


@dataclass
class PaidSearch(Server):
    """`refuses(query)` is the status of the reply, `holds(number)` keeps the search of that number waiting."""

    refuses: Callable[[str], int] = lambda query: 200
    holds: Callable[[int], bool] = lambda number: False
    engines: list[GoogleEngine] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answer = self.results

    @property
    def queries(self) -> list[str]:
        return [request.query["q"] for request in self.seen]

    async def results(self, place: int) -> Any:
        query = self.queries[place]
        await asyncio.sleep(zlib.crc32(query.encode()) % 5 * 0.01)
        while self.holds(place):
            await asyncio.sleep(0.01)
        status = self.refuses(query)
        found = {"organic_results": [{"title": query, "snippet": "It rains."}]}
        return status, found if status == 200 else {"error": "refused"}

    def engine(self, **options: Any) -> GoogleEngine:
        """Return an engine that asks here, and is closed at the end of the test."""
        self.engines.append(GoogleEngine("s3cret", url=self.url, queries_per_s=10_000, **options))
        return self.engines[-1]


@pytest.fixture
def paid_search() -> Iterator[PaidSearch]:
    with PaidSearch().running() as server:
        server.url += "/search.json"
        yield server
        for engine in server.engines:
            close_engine(engine)
