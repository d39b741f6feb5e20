"""Serve an index over HTTP, so that clients of Search-R1's retriever, and of the paper's code, work with it.

    POST /retrieve   both protocols of zerosearch.engines.retriever, told apart by their keys
    GET /health      what index this is, and how many queries it has answered

Requests that arrive while others are searched wait, and are then searched together. Searching, reading rows and
writing replies happen in one thread, so that the event loop is free to read requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import resource
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import groupby, islice
from queue import SimpleQueue
from threading import Thread
from typing import Annotated, Any, Protocol

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from zerosearch.engines.corpus import Found, PassageFile
from zerosearch.errors import UserError
from zerosearch.text import clean_json

logger = logging.getLogger(__name__)

LARGEST_BODY_BYTES = 16 * 2**20
LARGEST_REPLY_BYTES = 256 * 2**20
LARGEST_QUERY = 10_000  # characters
LARGEST_COUNT = 1000  # documents for a query
MOST_ROWS = 50_000  # documents for a request: queries times documents for each
BATCH_QUERIES = 256
HEAD_S, BODY_S = 30.0, 60.0  # for a client to send the head of a request, its body
MOST_CONNECTIONS = 800
BACKLOG = 64  # connections that may wait to be accepted, and that asyncio accepts before it looks at one of them
SPARE_FILES = 3 * BACKLOG  # for what is accepted beyond the limit, and for the index
SHUTDOWN_S = 10


class PassageIndex(Protocol):
    """What can be served: `BM25Index`, `DenseIndex`."""

    passages: PassageFile
    manifest: dict[str, Any]

    def search(self, queries: Sequence[str], count: int) -> list[Found]:
        """Return the `count` best passages for each query, best first."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on."""
        ...


QueryText = Annotated[str, Field(max_length=LARGEST_QUERY)]
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]


class Retrieval(BaseModel):
    """What a request asks for: `queries` in Search-R1's protocol, `query` in that of the paper's code."""

    model_config = ConfigDict(strict=True)

    queries: list[QueryText] | None = Field(None, max_length=MOST_ROWS, fail_fast=True)
    topk: Count | None = None
    return_scores: bool = False
    query: QueryText | None = None
    top_k: Count | None = None

    @model_validator(mode="after")
    def _one_protocol(self) -> Retrieval:
        if (self.queries is None) == (self.query is None):
            raise ValueError("the body needs either queries, a list of texts, or query, a text")
        return self

    def texts(self) -> list[str]:
        """Return the queries."""
        return [self.query or ""] if self.queries is None else self.queries

    def count(self, default: int) -> int:
        """Return how many documents each query wants."""
        return (self.top_k if self.queries is None else self.topk) or default


Waiting = tuple[Retrieval, Future[bytes]]


class RetrieverServer:
    """The web application of an index. `default_count` documents answer a request that does not say how many."""

    def __init__(self, index: PassageIndex, default_count: int = 3) -> None:  # 3 as in Search-R1's server
        self.index, self.default_count = index, default_count
        self.num_queries = self.num_batches = 0
        self._waiting: SimpleQueue[Waiting] = SimpleQueue()
        self.application = FastAPI(openapi_url=None)
        self.application.post("/retrieve")(self.retrieve)
        self.application.get("/health")(self.health)
        Thread(target=self._work, name="index", daemon=True).start()

    async def retrieve(self, request: Request) -> Response:
        """Answer POST /retrieve."""
        try:
            retrieval = await read_retrieval(request, self.default_count)
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads
        reply: Future[bytes] = Future()
        self._waiting.put((retrieval, reply))
        return Response(await asyncio.wrap_future(reply), media_type="application/json")

    async def health(self) -> dict[str, Any]:
        """Answer GET /health. Where files lie on this machine is not told."""
        identity = {
            name: os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
            for name, value in self.index.identity().items()
        }
        return {
            "status": "ok",
            "index": identity,
            "passages": self.index.manifest["num_passages"],
            "queries": self.num_queries,
            "batches": self.num_batches,
        }

    def _work(self) -> None:
        """Answer what waits, batch by batch."""
        while True:
            batch = [self._waiting.get()]
            while not self._waiting.empty() and sum(len(one.texts()) for one, _ in batch) < BATCH_QUERIES:
                batch.append(self._waiting.get_nowait())
            batch = [(one, reply) for one, reply in batch if reply.set_running_or_notify_cancel()]
            batch.sort(key=self._count)  # those that want as many documents are searched together, and no others
            for _, group in groupby(batch, key=self._count):
                self._answer_group(list(group))

    def _count(self, one: Waiting) -> int:
        return one[0].count(self.default_count)

    def _answer_group(self, group: Sequence[Waiting]) -> None:
        try:
            self._answer(group)
        except Exception:  # whatever an index raises; one query may spoil a batch, but not the others' answers
            for one in group:
                if not one[1].done():
                    self._answer_alone(one)

    def _answer_alone(self, one: Waiting) -> None:
        try:
            self._answer([one])
        except HTTPException as error:
            one[1].set_exception(error)
        except Exception as error:
            expected = isinstance(error, UserError)  # the corpus has changed
            detail = str(error) if expected else f"the index failed: {type(error).__name__}"
            logger.error(detail, exc_info=not expected)
            one[1].set_exception(HTTPException(500, detail))

    def _answer(self, group: Sequence[Waiting]) -> None:
        """Search together, for as many documents, and reply to each its own."""
        queries = [query for retrieval, _ in group for query in retrieval.texts()]
        found = iter(self.index.search(queries, self._count(group[0])))
        for retrieval, reply in group:
            reply.set_result(self._reply(retrieval, list(islice(found, len(retrieval.texts())))))
        self.num_queries += len(queries)
        self.num_batches += 1

    def _reply(self, retrieval: Retrieval, found: Sequence[Found]) -> bytes:
        """Return the JSON of a reply, written row by row: as objects, a large one would take several times as much."""
        lists, size = [], 0
        for best in found:
            rows = [self._row(retrieval, start, score) for start, score in best]
            size += sum(map(len, rows))
            if size > LARGEST_REPLY_BYTES:
                raise HTTPException(413, f"the reply would exceed {LARGEST_REPLY_BYTES:,} bytes; ask fewer queries")
            lists.append(f"[{', '.join(rows)}]")
        text = lists[0] if retrieval.queries is None else f'{{"result": [{", ".join(lists)}]}}'
        return text.encode()

    def _row(self, retrieval: Retrieval, start: int, score: float) -> str:
        if retrieval.queries is None:
            return json.dumps({"text": self.index.passages.passage(start).document})
        row = self.index.passages.row(start)
        return json.dumps({"document": row, "score": score} if retrieval.return_scores else row)


async def read_retrieval(request: Request, default_count: int) -> Retrieval:
    """Read the body of a request in either protocol. Raises what FastAPI answers with a 4xx."""
    content_type, coding = (request.headers.get(name, "") for name in ("content-type", "content-encoding"))
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]*)", content_type, re.IGNORECASE)
    if coding.lower() not in ("", "identity") or (charset and charset[1].lower() not in ("utf-8", "utf8")):
        raise HTTPException(415, "the body must be JSON in UTF-8, not compressed")
    try:
        async with asyncio.timeout(BODY_S):
            body = await _read_body(request)
    except TimeoutError:
        raise HTTPException(408, f"the body took longer than {BODY_S:.0f} s") from None
    try:
        retrieval = Retrieval.model_validate(clean_json(json.loads(body.decode("utf-8-sig"))))
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**detail, "loc": ("body", *detail["loc"])} for detail in details]) from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    rows = len(retrieval.texts()) * retrieval.count(default_count)
    if rows > MOST_ROWS:
        raise HTTPException(422, f"queries times topk is {rows:,}: at most {MOST_ROWS:,} in a request; send several")
    return retrieval


async def _read_body(request: Request) -> bytearray:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY_BYTES:
            raise HTTPException(413, f"the body exceeds {LARGEST_BODY_BYTES:,} bytes")
    return body


class _Protocol(H11Protocol):
    """HTTP as uvicorn has it, with limits on connections and on the time between requests, until the head is there."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, transport.abort)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # without a spare one, asyncio would flood the log
        if len(self.connections) > min(MOST_CONNECTIONS, files - SPARE_FILES):
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head_timer.cancel()
        if self.cycle.response_complete:  # otherwise the next request has arrived with the last one
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens (port 0: any that is free). Raises `UserError` if the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on {host}:{port} ({error}); choose another with --port") from error


def web_server(server: RetrieverServer) -> uvicorn.Server:
    """Return uvicorn with the limits above. SIGINT or SIGTERM ends it; requests under way are answered first."""
    config = uvicorn.Config(
        server.application,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=int(HEAD_S),
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return uvicorn.Server(config)
