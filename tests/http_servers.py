"""A real HTTP server on a free port of this machine, for the time of a block: what plays the services in tests."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import isawaitable
from threading import Thread
from typing import Any, Self

import pytest
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


@contextmanager
def serving(app: web.Application, **options: Any) -> Iterator[str]:
    """Serve from a thread of its own, at whose end handlers that still sleep are cancelled; yield the address.

    `options` are those of `AppRunner`.
    """
    started: Future[tuple[str, Callable[[], Any]]] = Future()

    async def serve() -> None:
        stopped = asyncio.Event()
        runner = web.AppRunner(app, access_log=None, **options)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stop = partial(asyncio.get_running_loop().call_soon_threadsafe, stopped.set)
        started.set_result((f"http://127.0.0.1:{runner.addresses[0][1]}", stop))
        await stopped.wait()
        await runner.cleanup()

    thread = Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    address, stop = started.result(TIMEOUT_S)
    try:
        yield address
    finally:
        stop()
        thread.join(TIMEOUT_S)


Answer = Callable[[int], Any]  # of the place-th request: a status and text or JSON, a response, or what is awaited


@dataclass
class Server:
    """A server that answers as a test tells it. `requests` are the bodies that came, `seen` the requests whole."""

    url: str = ""
    answer: Answer = lambda place: (200, {"place": place})
    requests: list[Any] = field(default_factory=list)
    seen: list[web.Request] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    in_flight: int = 0
    most_in_flight: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername"))
        body = await request.json() if request.can_read_body else None
        place = len(self.seen)
        self.requests.append(body)
        self.seen.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.answer(place)
            reply = await reply if isawaitable(reply) else reply
        finally:
            self.in_flight -= 1
        return reply if isinstance(reply, web.StreamResponse) else response_of(*reply)

    @contextmanager
    def running(self) -> Iterator[Self]:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self.handle)
        with serving(app, shutdown_timeout=0.1) as self.url:
            yield self


@pytest.fixture
def http_server() -> Iterator[Server]:
    with Server().running() as server:
        yield server


def response_of(status: int, content: Any = "", **headers: str) -> web.Response:
    """Return a response with a text as it is, or anything else as JSON. `Retry_After` is the header Retry-After."""
    text = content if isinstance(content, str) else json.dumps(content)
    return web.Response(status=status, text=text, headers={k.replace("_", "-"): v for k, v in headers.items()})


def in_turn(*answers: Any) -> Answer:
    """Answer the first request with the first, and so on; the last one answers all that follow.

    An answer is what `response_of` takes, its headers last, or a function that returns a response.
    """

    def answer(place: int) -> Any:
        chosen = answers[min(place, len(answers) - 1)]
        if callable(chosen):
            return chosen()
        return response_of(*chosen[:2], **(chosen[2] if len(chosen) > 2 else {}))

    return answer
