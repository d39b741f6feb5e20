"""Searches of an engine all at once, and what a test waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from zerosearch.engines import SearchEngine, SearchRequest


def searched(engine: SearchEngine, *requests: SearchRequest, keep_errors: bool = False) -> list[Any]:
    """Search, close the engine, and return the results; with `keep_errors` an error in place of one."""

    async def search() -> list[Any]:
        try:
            return await asyncio.gather(*map(engine.search, requests), return_exceptions=keep_errors)
        finally:
            await engine.aclose()

    return asyncio.run(search())


def wait_until(holds: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
