"""A real HTTP server on a free port of this machine, for the time of a block: what plays the services in tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from threading import Thread
from typing import Any

from aiohttp import web

TIMEOUT_S = 30.0


@asynccontextmanager
async def running(app: web.Application, **options: Any) -> AsyncIterator[str]:
    """Serve on this event loop; yield the address. `options` are those of `AppRunner`."""
    runner = web.AppRunner(app, **options)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextmanager
def serving(app: web.Application, **options: Any) -> Iterator[str]:
    """Serve from a thread of its own, at whose end handlers that still sleep are cancelled; yield the address."""
    started: Future[tuple[str, Callable[[], Any]]] = Future()

    async def serve() -> None:
        stopped = asyncio.Event()
        async with running(app, **options) as address:
            started.set_result((address, partial(asyncio.get_running_loop().call_soon_threadsafe, stopped.set)))
            await stopped.wait()

    thread = Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    address, stop = started.result(TIMEOUT_S)
    try:
        yield address
    finally:
        stop()
        thread.join(TIMEOUT_S)
