"""SerpAPI as far as an evaluation needs it: every query is counted, and replies come in another order than asked."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from http_servers import serving

from zerosearch.engines.google import GoogleEngine
from zerosearch.rollout.in_flight import close_engine


class PaidSearch:
    """`refuses(query)` is the status of the reply, `holds(number)` keeps the search of that number waiting.

    `queries` are those that came, `num_held` are waiting.
    """

    def __init__(self) -> None:
        self.url = ""
        self.refuses: Callable[[str], int] = lambda query: 200
        self.holds: Callable[[int], bool] = lambda number: False
        self.num_held = 0
        self.queries: list[str] = []
        self.engines: list[GoogleEngine] = []

    async def answer(self, request: web.Request) -> web.Response:
        query = request.query["q"]
        self.queries.append(query)
        number = len(self.queries) - 1
        self.num_held += 1
        await asyncio.sleep(zlib.crc32(query.encode()) % 5 * 0.01)
        while self.holds(number):
            await asyncio.sleep(0.01)
        self.num_held -= 1
        status = self.refuses(query)
        found = {"organic_results": [{"title": query, "snippet": "It rains."}]}
        return web.json_response(found if status == 200 else {"error": "refused"}, status=status)

    def engine(self, **options: Any) -> GoogleEngine:
        """Return an engine that asks here, and is closed at the end of the test."""
        self.engines.append(GoogleEngine("s3cret", url=self.url, queries_per_s=10_000, **options))
        return self.engines[-1]


@pytest.fixture
def paid_search() -> Iterator[PaidSearch]:
    state = PaidSearch()
    app = web.Application()
    app.router.add_get("/search.json", state.answer)
    with serving(app, shutdown_timeout=0.1) as address:
        state.url = f"{address}/search.json"
        yield state
        for engine in state.engines:
            close_engine(engine)
