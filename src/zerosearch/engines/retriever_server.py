"""Serve an index over HTTP, so that clients of Search-R1's retriever, and of the paper's code, work with it.

    POST /retrieve   both protocols of zerosearch.engines.retriever, told apart by their keys
    GET /health      what index this is, and how many queries it has answered

Requests that arrive while others are searched wait, and are then searched together.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from aiohttp import web

from zerosearch.engines.corpus import PassageFile
from zerosearch.errors import UserError

logger = logging.getLogger(__name__)

LARGEST_BODY_BYTES = 16 * 2**20
LARGEST_COUNT = 1000  # documents for a query
BATCH_QUERIES = 256
SHUTDOWN_S = 10.0
BACKLOG = 1024  # connections that may wait to be accepted

Found = list[tuple[int, float]]


class PassageIndex(Protocol):
    """What can be served: `BM25Index`, `DenseIndex`."""

    passages: PassageFile

    def search(self, queries: Sequence[str], count: int) -> list[Found]:
        """Return numbers and scores of the `count` best passages for each query, best first."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on."""
        ...


@dataclass(frozen=True)
class Retrieval:
    """What a request asks for."""

    queries: tuple[str, ...]
    count: int
    return_scores: bool
    is_single: bool  # of the paper's code


Waiting = tuple[Retrieval, asyncio.Future[list[Found]]]


class RetrieverServer:
    """The web application of an index. `default_count` documents answer a request that does not say how many."""

    def __init__(self, index: PassageIndex, default_count: int = 3) -> None:  # 3 as in Search-R1's server
        self.index, self.default_count = index, default_count
        self.num_queries = self.num_batches = 0
        self._waiting: asyncio.Queue[Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="index")
        self.application = web.Application(client_max_size=LARGEST_BODY_BYTES, middlewares=[errors_as_json])
        self.application.add_routes([web.post("/retrieve", self.retrieve), web.get("/health", self.health)])
        self.application.cleanup_ctx.append(self._searching)

    async def retrieve(self, request: web.Request) -> web.Response:
        """Answer POST /retrieve."""
        retrieval = read_retrieval(await request.text(), self.default_count)
        done: asyncio.Future[list[Found]] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((retrieval, done))
        found = await done
        if retrieval.is_single:
            texts = [self.index.passages.passage(number).document for number, _ in found[0]]
            return web.json_response([{"text": text} for text in texts])
        rows = [[self._row(number, score, retrieval.return_scores) for number, score in best] for best in found]
        return web.json_response({"result": rows})

    async def health(self, request: web.Request) -> web.Response:
        """Answer GET /health."""
        return web.json_response(
            {
                "status": "ok",
                "index": self.index.identity(),
                "passages": len(self.index.passages),
                "queries": self.num_queries,
                "batches": self.num_batches,
            }
        )

    def _row(self, number: int, score: float, with_score: bool) -> dict[str, Any]:
        row = self.index.passages.row(number)
        return {"document": row, "score": score} if with_score else row

    async def _searching(self, application: web.Application) -> Any:
        task = asyncio.create_task(self._search_batches())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        self._thread.shutdown()

    async def _search_batches(self) -> None:
        """Search what waits, batch by batch."""
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty() and sum(len(one.queries) for one, _ in batch) < BATCH_QUERIES:
                batch.append(self._waiting.get_nowait())
            try:
                await self._search(batch)
            except Exception:  # whatever an index raises; one query may spoil a batch, but not the others' answers
                for one in batch:
                    await self._search_alone(one)

    async def _search_alone(self, one: Waiting) -> None:
        try:
            await self._search([one])
        except Exception as error:
            logger.exception("the index failed on %d queries", len(one[0].queries))
            if not one[1].done():
                one[1].set_exception(IndexFailed(f"the index failed: {type(error).__name__}"))

    async def _search(self, batch: Sequence[Waiting]) -> None:
        """Search together, in a thread, so that requests are read meanwhile, and hand each request its own."""
        queries = [query for retrieval, _ in batch for query in retrieval.queries]
        count = max(retrieval.count for retrieval, _ in batch)
        loop = asyncio.get_running_loop()
        found = iter(await loop.run_in_executor(self._thread, self.index.search, queries, count))
        for retrieval, done in batch:
            own = [best[: retrieval.count] for best in islice(found, len(retrieval.queries))]
            if not done.done():  # the client may be gone
                done.set_result(own)
        self.num_queries += len(queries)
        self.num_batches += 1


class IndexFailed(Exception):
    """The index raised something; what, stands in the log."""


class InvalidRequest(Exception):
    """A request that cannot be answered: the field that is wrong ("" for the whole body), what it is, the status."""

    def __init__(self, field: str, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.field, self.status = field, status


def read_retrieval(text: str, default_count: int) -> Retrieval:
    """Read the body of a request in either protocol. Raises `InvalidRequest`."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("", f"the body is not JSON: {error}", 400) from None
    if not isinstance(body, dict):
        raise InvalidRequest("", "the body must be a JSON object with queries (or query)")
    if "query" in body and "queries" not in body:
        if not isinstance(body["query"], str):
            raise InvalidRequest("query", f"query must be a text, and is {_shown(body['query'])}")
        return Retrieval((body["query"],), _count(body, "top_k", default_count), False, True)
    if "query" in body or "queries" not in body:
        raise InvalidRequest("queries", "the body needs either queries, a list of texts, or query, a text")
    queries = body["queries"]
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise InvalidRequest("queries", f"queries must be a list of texts, and is {_shown(queries)}")
    return_scores = body.get("return_scores", False)
    if not isinstance(return_scores, bool):
        raise InvalidRequest("return_scores", f"return_scores must be true or false, and is {_shown(return_scores)}")
    return Retrieval(tuple(queries), _count(body, "topk", default_count), return_scores, False)


def _count(body: dict[str, Any], name: str, default_count: int) -> int:
    count = body.get(name)
    if count is None:
        return default_count
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= LARGEST_COUNT:
        raise InvalidRequest(name, f"{name} must be a whole number from 1 to {LARGEST_COUNT}, and is {_shown(count)}")
    return count


def _shown(value: Any) -> str:
    return json.dumps(value)[:100]


@web.middleware
async def errors_as_json(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    """Answer every error as JSON, in the form of FastAPI, which Search-R1's server is written in."""
    try:
        response: web.StreamResponse = await handler(request)
    except InvalidRequest as error:
        place = ["body", error.field] if error.field else ["body"]
        detail = [{"loc": place, "msg": str(error), "type": "value_error"}]
        return web.json_response({"detail": detail}, status=error.status)
    except web.HTTPException as error:  # no such route, another method, a body too large
        return web.json_response({"detail": error.reason}, status=error.status, headers=_allow(error))
    except (UnicodeDecodeError, LookupError):
        return web.json_response({"detail": "the body is not in the encoding that it claims"}, status=400)
    except IndexFailed as error:
        return web.json_response({"detail": str(error)}, status=500)
    return response


def _allow(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}


async def serve(
    server: RetrieverServer, host: str, port: int, ready: Callable[[str], None], stop: asyncio.Event | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, or until `stop` is set; requests under way are answered first.

    `ready` is called with the address (port 0 is any that is free). Raises `UserError` if it cannot be had.
    """
    if stop is None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(server.application, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port, backlog=BACKLOG).start()
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot serve on {host}:{port} ({error}); choose another with --port") from error
        ready(f"http://{host}:{runner.addresses[0][1]}/retrieve")
        await stop.wait()
    finally:
        await runner.cleanup()
