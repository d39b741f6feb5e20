"""A retriever behind HTTP: Search-R1's `POST /retrieve`, or the one that the paper's code asks on port 6002.

    search-r1    {"queries": ["..."], "topk": 5, "return_scores": true}
                 -> {"result": [[{"document": {"id": "..", "contents": ".."}, "score": ..}]]}
    zerosearch   {"query": "...", "top_k": 5} -> [{"text": ".."}]

recipes/serve_retriever.py serves both.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import urljoin

from zerosearch.data import Passage, passage_of
from zerosearch.engines import SearchError, SearchRequest, SearchResult, result_of
from zerosearch.engines.ledger import Ledger
from zerosearch.errors import UserError
from zerosearch.http import CallFailed, HTTPClient, ServiceError

Protocol = Literal["search-r1", "zerosearch"]


class RetrieverEngine:
    """Ask a retriever for the `num_documents` best passages.

    `url` is the whole address, route included. The server may be ours or anybody's that speaks the protocol.
    Raises `SearchError` once the bounded retries are spent, or at once if they are of no use.
    """

    name = "retriever"
    reads_query_only = True

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000/retrieve",
        protocol: Protocol = "search-r1",
        num_documents: int = 5,
        *,
        timeout_s: float = 60.0,
        max_retries: int = 5,
        max_concurrency: int = 64,
    ) -> None:
        self.url, self.protocol, self.num_documents = url, protocol, num_documents
        self.max_concurrency = max_concurrency
        self.index: Any = None  # what is behind the address, once `check` has asked
        self.ledger = Ledger(self.name)
        self.client = HTTPClient(
            "the retriever",
            remedy="put it right (recipes/serve_retriever.py serves one) and resume the run",
            timeout_s=timeout_s,
            max_retries=max_retries,
            max_concurrency=max_concurrency,
        )

    def check(self) -> None:
        """Raise `UserError` unless the retriever answers a query in its protocol; ask what index it has.

        A retriever that has no /health as ours does is known by its address.
        """
        asyncio.run(self._check())

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the documents the retriever finds."""
        with self.ledger.search():
            try:
                result, retries = await self.client.with_retries(
                    lambda: self._call(request.query), self.url, request.key
                )
            except ServiceError as error:
                self.ledger.retries += error.retries
                raise SearchError(str(error), error.retries) from error
            self.ledger.retries += retries
            return replace(result, retries=retries)

    async def aclose(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on; `index` is `None` before `check`."""
        return {
            "engine": self.name,
            "protocol": self.protocol,
            "index": self.index,
            "num_documents": self.num_documents,
        }

    async def _call(self, query: str) -> SearchResult:
        self.ledger.sent += 1
        return await self.client.call("POST", self.url, body=self._body(query), read=self._result)

    async def _check(self) -> None:
        try:
            await self.client.call("POST", self.url, body=self._body("test"), read=self._result)
            self.index = await self._served_index()
        except CallFailed as error:
            raise UserError(
                f"no retriever answers at {self.url} in the protocol {self.protocol} ({error}); start one with: "
                "python recipes/serve_retriever.py --corpus FILE.jsonl"
            ) from error
        finally:
            await self.client.aclose()

    async def _served_index(self) -> Any:
        """Return what the server says of its index, or its address if it says nothing."""
        try:
            return await self.client.call("GET", urljoin(self.url, "health"), read=_read_index)
        except CallFailed:
            return {"url": self.url}

    def _body(self, query: str) -> dict[str, Any]:
        if self.protocol == "zerosearch":
            return {"query": query, "top_k": self.num_documents}
        # Search-R1's own server fails without scores, unless there are exactly two queries.
        return {"queries": [query], "topk": self.num_documents, "return_scores": True}

    def _result(self, reply: Any) -> SearchResult:
        try:
            if self.protocol == "zerosearch":
                return SearchResult(tuple(str(found["text"]) for found in reply)[: self.num_documents])
            (found_for_query,) = reply["result"]
            return result_of([_passage(found) for found in found_for_query][: self.num_documents])
        except (AttributeError, KeyError, TypeError, ValueError, UserError):
            shown = json.dumps(reply)
            raise CallFailed(f"its reply is not of the protocol {self.protocol}: {shown}", False, 200) from None


def _passage(found: Any) -> Passage:
    """Return a passage of Search-R1's protocol, with or without a score."""
    return passage_of(found.get("document", found), "a document")


def _read_index(reply: Any) -> Any:
    if not isinstance(reply, dict) or not reply.get("index"):
        raise CallFailed("it says nothing of an index", False, 200)
    return reply["index"]
