"""Serve an index over HTTP, so that clients of Search-R1's retriever, and of the paper's code, work with it.

    POST /retrieve   both protocols of zerosearch.engines.retriever, told apart by their keys
    GET /health      what index this is, and how many queries it has answered

Requests that arrive while others are searched wait, and are then searched together. Searching, reading rows and
writing replies happen in threads, so that the event loop is free to read requests.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby, islice
from queue import SimpleQueue
from threading import Lock
from typing import Annotated, Any, Self

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from zerosearch.engines.corpus import Found, PassageIndex
from zerosearch.errors import UserError
from zerosearch.text import clean_json

logger = logging.getLogger(__name__)

LARGEST_BODY_BYTES = 16 * 2**20
LARGEST_REPLY_BYTES = 64 * 2**20
LARGEST_QUERY = 10_000  # characters
LARGEST_COUNT = 1000  # documents for a query
MOST_ROWS = 50_000  # documents for a request: queries times documents for each
BATCH_QUERIES = 256
REQUEST_S = 60  # for a client to send a request, from the connection or the last reply on
BACKLOG = 64  # connections that may wait to be accepted, and that asyncio accepts before it looks at one of them
# Without a file to spare for those beyond the limit, asyncio would flood the log.
MOST_CONNECTIONS = min(800, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 3 * BACKLOG)
SHUTDOWN_S = 10

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

    @property
    def texts(self) -> list[str]:
        """Return the queries, in either protocol."""
        return self.queries if self.queries is not None else [self.query or ""]

    @property
    def count(self) -> int | None:
        """Return how many documents each query wants, in either protocol; `None` if the request does not say."""
        return self.topk if self.queries is not None else self.top_k

    @model_validator(mode="after")
    def _one_protocol(self) -> Self:
        if (self.queries is None) == (self.query is None):
            raise ValueError("the body needs either queries, a list of texts, or query, a text")
        return self

    @classmethod
    async def from_request(cls, request: Request) -> Self:
        """Read the JSON in a request. Raises what FastAPI answers with a 4xx."""
        charset = (
            request.headers.get("content-type", "").lower().partition("charset=")[2].partition(";")[0].strip(' "')
        )
        coding = request.headers.get("content-encoding", "").lower()
        if charset not in ("", "utf-8", "utf8") or coding not in ("", "identity"):
            raise HTTPException(415, "the body must be JSON in UTF-8, not compressed")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > LARGEST_BODY_BYTES:
                    raise HTTPException(413, f"the body exceeds {LARGEST_BODY_BYTES:,} bytes")
            return cls.model_validate(clean_json(json.loads(body.decode("utf-8-sig"))))
        except ValidationError as error:  # the input, which may be long or not encodable, is not sent back
            details = error.errors(include_url=False, include_context=False, include_input=False)
            raise RequestValidationError([{**detail, "loc": ("body", *detail["loc"])} for detail in details]) from None
        except (ValueError, RecursionError, ClientDisconnect) as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None


@dataclass
class Waiting:
    """A request that waits to be searched."""

    queries: list[str]
    count: int
    found: Future[list[Found]] = field(default_factory=Future)


class RetrieverServer:
    """The web application of an index. `default_count` documents answer a request that does not say how many."""

    def __init__(self, index: PassageIndex, default_count: int = 3) -> None:  # 3 as in Search-R1's server
        self.index, self.default_count = index, default_count
        self.num_queries = 0
        self._waiting: SimpleQueue[Waiting] = SimpleQueue()
        self._searching = Lock()
        self.application = FastAPI(openapi_url=None)
        self.application.post("/retrieve")(self.retrieve)
        self.application.get("/health")(self.health)

    def retrieve(self, retrieval: Annotated[Retrieval, Depends(Retrieval.from_request)]) -> Response:
        """Answer POST /retrieve; FastAPI calls it in a thread."""
        is_search_r1 = retrieval.queries is not None
        queries = retrieval.texts
        count = retrieval.count or self.default_count
        if (rows := len(queries) * count) > MOST_ROWS:
            message = f"queries times topk is {rows:,}: at most {MOST_ROWS:,} in a request; send several"
            raise HTTPException(422, message)
        try:
            found = self._found(Waiting(queries, count))
            lists, size = [], 0
            for best in found:
                lists.append([self._document(start, score, retrieval) for start, score in best])
                size += sum(map(len, lists[-1]))
                if size > LARGEST_REPLY_BYTES:
                    raise HTTPException(
                        413, f"the reply would exceed {LARGEST_REPLY_BYTES:,} bytes; ask fewer queries"
                    )
        except UserError as error:  # a file has changed
            logger.error(error)
            raise HTTPException(500, str(error)) from None
        texts = [f"[{', '.join(documents)}]" for documents in lists]
        text = f'{{"result": [{", ".join(texts)}]}}' if is_search_r1 else texts[0]
        return Response(text, media_type="application/json")

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
        }

    def _found(self, mine: Waiting) -> list[Found]:
        """Return what a request finds. The first of those that wait searches for all of them."""
        self._waiting.put(mine)
        with self._searching:
            while not mine.found.done():
                batch = [self._waiting.get()]
                while not self._waiting.empty() and sum(len(one.queries) for one in batch) < BATCH_QUERIES:
                    batch.append(self._waiting.get())
                batch.sort(key=lambda one: one.count)
                for _, alike in groupby(batch, key=lambda one: one.count):
                    self._search(list(alike))
        return mine.found.result()

    def _search(self, batch: list[Waiting]) -> None:
        """Search together for requests that want as many documents; each alone where that fails."""
        try:
            found = iter(self.index.find([query for one in batch for query in one.queries], batch[0].count))
            shares = [list(islice(found, len(one.queries))) for one in batch]
        except BaseException as error:  # whatever an index raises, panics of tantivy's included
            if len(batch) > 1:
                for one in batch:
                    self._search([one])
            elif isinstance(error, UserError):
                batch[0].found.set_exception(error)
            else:
                message = f"the index failed: {type(error).__name__}"
                logger.error(message, exc_info=error)
                batch[0].found.set_exception(HTTPException(500, message))
            return
        for one, share in zip(batch, shares, strict=True):
            one.found.set_result(share)
        self.num_queries += sum(len(one.queries) for one in batch)

    def _document(self, start: int, score: float, retrieval: Retrieval) -> str:
        """Return the JSON of one document: as objects, those of a large reply would take several times as much."""
        if retrieval.queries is None:
            return json.dumps({"text": self.index.passage(start).document})
        row = self.index.row(start)
        return json.dumps({"document": row, "score": score} if retrieval.return_scores else row)


class _Protocol(H11Protocol):
    """HTTP as uvicorn has it, with limits on connections and on the time that a client takes to send a request."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(REQUEST_S, transport.abort)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle and not self.cycle.more_body and not self.cycle.response_complete:
            self._timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._timer.cancel()
        if self.cycle.response_complete or self.cycle.more_body:  # else the next request has arrived with the last one
            self._timer = self.loop.call_later(REQUEST_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens (port 0: any that is free). Raises `UserError` if the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on {host}:{port} ({error}); choose another with --port") from error


def web_server(application: FastAPI) -> uvicorn.Server:
    """Return uvicorn with the limits above. SIGINT or SIGTERM ends it; requests under way are answered first."""
    config = uvicorn.Config(
        application,
        http=_Protocol,
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=REQUEST_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return uvicorn.Server(config)
