"""A retriever in a thread of this process, shared by the tests of its server and its clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def health(address: str) -> dict[str, Any]:
    """Return what GET /health says."""
    return requests.get(address.replace("/retrieve", "/health"), timeout=60).json()
