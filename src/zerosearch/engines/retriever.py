"""A retriever behind HTTP: Search-R1's `POST /retrieve`, or the one that the paper's code asks on port 6002.

    search-r1    {"queries": ["..."], "topk": 5, "return_scores": true}
                 -> {"result": [[{"document": {"id": "..", "contents": ".."}, "score": ..}]]}
    zerosearch   {"query": "...", "top_k": 5} -> [{"text": ".."}]

recipes/serve_retriever.py serves both.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urljoin

from zerosearch.data import passage_of
from zerosearch.engines import SearchRequest, SearchResult, result_of
from zerosearch.engines.account import Account
from zerosearch.errors import UserError
from zerosearch.http import HTTPClient, ServiceError, redacted_url, run_in_background

RetrieverProtocol = Literal["search-r1", "zerosearch"]


@dataclass(eq=False, repr=False)
class RetrieverEngine:
    """Ask a retriever for the `num_documents` best passages.

    `url` is the whole address, route included. The server may be ours or anybody's that speaks the protocol.

    >>> engine = RetrieverEngine(retriever_url)
    >>> engine.check()  # that it answers
    >>> engine.identity()["index"]["kind"]
    'bm25'
    """

    name = "retriever"
    reads_query_only = True

    url: str = "http://127.0.0.1:8000/retrieve"
    protocol: RetrieverProtocol = "search-r1"
    num_documents: int = 5
    timeout_s: float = 60.0
    max_retries: int = 5
    max_concurrency: int = 64

    def __post_init__(self) -> None:
        self.index: Any = None  # what is behind the address, once `check` has asked
        self.account = Account(self.name)
        self.client = HTTPClient(
            "the retriever",
            remedy="put it right (recipes/serve_retriever.py serves one) and resume the run",
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
            max_concurrency=self.max_concurrency,
        )

    def check(self) -> None:
        """Raise `UserError` unless the retriever answers a query in its protocol; ask what index it has.

        A retriever without our server's /health is known by its address.
        """
        run_in_background(self._check())

    async def search(self, request: SearchRequest) -> SearchResult:
        with self.account.search():
            result, retries = await self._ask(request.query, around=self.account.call)
            return replace(result, retries=retries)

    async def aclose(self) -> None:
        await self.client.aclose()

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on; `index` is `None` before `check`."""
        named = {name: getattr(self, name) for name in ("protocol", "index", "num_documents")}
        return {"engine": self.name, **named}

    async def _check(self) -> None:
        address = redacted_url(self.url)
        try:
            await self._ask("test", max_retries=0)
            index, health = None, urljoin(self.url, "health")
            with suppress(ServiceError):
                index, _ = await self.client.request("GET", health, read=lambda reply: reply["index"], max_retries=0)
            self.index = index or {"url": address}
        except ServiceError as error:
            raise UserError(
                f"no retriever answers at {address} in the protocol {self.protocol} ({error.reason}); "
                "start one with: python recipes/serve_retriever.py --corpus FILE.jsonl"
            ) from None
        finally:
            await self.client.aclose()

    async def _ask(self, query: str, **options: Any) -> tuple[SearchResult, int]:
        """Return what a query finds, and how often the call was retried. `options` are `HTTPClient.request`'s."""
        body = {"query": query, "top_k": self.num_documents}
        if self.protocol == "search-r1":  # whose own server fails without scores, unless there are exactly two queries
            body = {"queries": [query], "topk": self.num_documents, "return_scores": True}
        return await self.client.request("POST", self.url, json=body, read=self._result, **options)

    def _result(self, reply: Any) -> SearchResult:
        if self.protocol == "zerosearch":
            texts = [found["text"].strip() for found in reply[: self.num_documents]]
            return SearchResult(tuple(filter(None, texts)))
        (found,) = reply["result"]
        return result_of([passage_of(one.get("document", one), "a document") for one in found[: self.num_documents]])
