"""A retriever behind HTTP: Search-R1's `POST /retrieve`, or the one that the paper's code asks on port 6002.

    search-r1    {"queries": ["..."], "topk": 5, "return_scores": true}
                 -> {"result": [[{"document": {"id": "..", "contents": ".."}, "score": ..}]]}
    zerosearch   {"query": "...", "top_k": 5} -> [{"text": ".."}]

recipes/serve_retriever.py serves both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urljoin

from zerosearch.data import passage_of
from zerosearch.engines import SearchRequest, SearchResult, result_of
from zerosearch.engines.account import Account
from zerosearch.errors import UserError
from zerosearch.http import HTTPClient, ServiceError, redacted_url, run_in_background

Protocol = Literal["search-r1", "zerosearch"]


@dataclass(eq=False, repr=False)
class RetrieverEngine:
    """Ask a retriever for the `num_documents` best passages.

    `url` is the whole address, route included. The server may be ours or anybody's that speaks the protocol.
    """

    name = "retriever"
    reads_query_only = True

    url: str = "http://127.0.0.1:8000/retrieve"
    protocol: Protocol = "search-r1"
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
        """Return the documents the retriever finds. Raises `SearchError`."""
        with self.account.search():
            body = self._body(request.query)
            result, retries = await self.client.request(
                "POST", self.url, json=body, read=self._result, around=self.account.call
            )
            self.account.retries += retries
            return replace(result, retries=retries)

    async def aclose(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on; `index` is `None` before `check`."""
        named = {name: getattr(self, name) for name in ("protocol", "index", "num_documents")}
        return {"engine": self.name, **named}

    async def _check(self) -> None:
        client, url = self.client, self.url
        try:
            await client.request("POST", url, json=self._body("test"), read=self._result, max_retries=0)
            try:
                self.index, _ = await client.request("GET", urljoin(url, "health"), read=_read_index, max_retries=0)
            except ServiceError:
                self.index = {"url": redacted_url(url)}
        except ServiceError as error:
            raise UserError(
                f"no retriever answers at {redacted_url(url)} in the protocol {self.protocol} ({error.reason}); "
                "start one with: python recipes/serve_retriever.py --corpus FILE.jsonl"
            ) from None
        finally:
            await client.aclose()

    def _body(self, query: str) -> dict[str, Any]:
        if self.protocol == "zerosearch":
            return {"query": query, "top_k": self.num_documents}
        # Search-R1's own server fails without scores, unless there are exactly two queries.
        return {"queries": [query], "topk": self.num_documents, "return_scores": True}

    def _result(self, reply: Any) -> SearchResult:
        if self.protocol == "zerosearch":
            texts = [found["text"] for found in reply[: self.num_documents]]
            return SearchResult(tuple(text.strip() for text in texts))
        (found,) = reply["result"]
        return result_of([passage_of(one.get("document", one), "a document") for one in found[: self.num_documents]])


def _read_index(reply: Any) -> Any:
    if not reply["index"]:
        raise ValueError("the server names no index")
    return reply["index"]
