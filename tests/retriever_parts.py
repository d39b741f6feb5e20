"""A retriever in a thread of this process, shared by the tests of its server and its clients."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import requests
from fastapi import FastAPI

from zerosearch.engines.corpus import PassageIndex
from zerosearch.engines.retriever_server import RetrieverServer, listen, web_server


@contextmanager
def serving(index: PassageIndex, topk: int = 3) -> Iterator[str]:
    """Serve an index on a free port of this machine; yield the address of /retrieve."""
    with serving_application(RetrieverServer(index, topk).application) as address:
        yield address


@contextmanager
def serving_application(application: FastAPI) -> Iterator[str]:
    """Serve on a free port of this machine; yield the address of /retrieve."""
    listener, web = listen("127.0.0.1", 0), web_server(application)
    thread = Thread(target=web.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve"
    finally:
        web.should_exit = True
        thread.join(30)


def post(address: str, body: Any, **headers: str) -> tuple[int, Any]:
    """POST a body, bytes as they are and anything else as JSON; return status and JSON of the reply."""
    content = {"data": body} if isinstance(body, bytes) else {"json": body}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = requests.post(address, **content, headers=named, timeout=60)
    return reply.status_code, reply.json()


def ask_and_end(serve: Callable[[], None], address: str, body: Any) -> tuple[int, Any]:
    """Run what serves in this thread until it has answered one request, then a SIGTERM; return what it answered."""

    def ask() -> tuple[int, Any]:
        for _ in range(400):
            with suppress(requests.ConnectionError):
                reply = post(address, body)
                os.kill(os.getpid(), signal.SIGTERM)  # which uvicorn handles: it has answered
                return reply
            time.sleep(0.05)
        raise TimeoutError(f"nothing answers at {address}")

    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(ask)
        serve()
    return reply.result()


def health(address: str) -> dict[str, Any]:
    """Return what GET /health says."""
    return requests.get(address.replace("/retrieve", "/health"), timeout=60).json()
