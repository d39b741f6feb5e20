"""A real HTTP server on a free port of this machine, for the time of a block: what plays the services in tests."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from threading import Thread
from typing import Any

from aiohttp import web

TIMEOUT_S = 30.0


def free_ports(count: int = 1) -> int:
    """Return the first of so many ports in a row that are free."""
    while True:
        with ExitStack() as held, suppress(OSError):
            first = 0
            for place in range(count):
                listener = held.enter_context(socket.socket())
                listener.bind(("127.0.0.1", first + place if first else 0))
                first = first or listener.getsockname()[1]
            return first


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
