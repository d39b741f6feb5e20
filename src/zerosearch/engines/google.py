"""Google, through SerpAPI or Serper: title and snippet of each organic result. It costs money, and says how much."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from zerosearch.data import Passage
from zerosearch.engines import BudgetSpent, SearchError, SearchRequest, SearchResult, result_of
from zerosearch.engines.ledger import GOOGLE_USD_PER_QUERY, Ledger
from zerosearch.errors import UserError
from zerosearch.http import CallFailed, HTTPClient, ServiceError

ProviderName = Literal["serpapi", "serper"]


@dataclass(frozen=True)
class Provider:
    """A service that sells Google's results. `usd_per_query` is its list price in a plan of 50,000 queries or less."""

    url: str
    key_variables: tuple[str, ...]  # environment variables that may hold the key
    usd_per_query: float
    results: str  # where the reply holds the results
    final_signs: tuple[str, ...]  # what a refusal says that no waiting mends


PROVIDERS: Mapping[ProviderName, Provider] = {
    "serpapi": Provider(
        "https://serpapi.com/search.json",
        ("SERPAPI_API_KEY", "SER_API_KEY"),  # the second is what the paper's code reads
        GOOGLE_USD_PER_QUERY,
        "organic_results",
        ("run out of searches",),  # status 429, as for too many at once
    ),
    "serper": Provider(
        "https://google.serper.dev/search",
        ("SERPER_API_KEY",),
        50 / 50_000,
        "organic",
        ("Not enough credits",),
    ),
}
NO_RESULTS = "hasn't returned any results"  # SerpAPI reports an empty page as an error


class GoogleEngine:
    """Search Google, at most `queries_per_s` times a second.

    A result is one document, "title: snippet", or what it has of the two. A query without results is answered with no
    documents. `max_queries` and `max_usd` bound what this engine sends and spends (in this process, retries included);
    past them a search raises `BudgetSpent`. `key` is secret: it is in no message. `url` replaces the provider's.
    Raises `SearchError` once the bounded retries are spent, or at once if they are of no use.
    """

    name = "google"
    reads_query_only = True

    def __init__(
        self,
        key: str,
        provider: ProviderName = "serpapi",
        num_documents: int = 5,
        *,
        queries_per_s: float = 5.0,  # our choice: far below what either provider admits
        max_queries: int | None = None,
        max_usd: float | None = None,
        usd_per_query: float | None = None,
        url: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 5,
        max_concurrency: int = 16,
    ) -> None:
        self.provider_name = provider
        self.provider = PROVIDERS[provider]
        self.num_documents = num_documents
        self.max_queries, self.max_usd = max_queries, max_usd
        self.usd_per_query = self.provider.usd_per_query if usd_per_query is None else usd_per_query
        self.url = url or self.provider.url
        self.max_concurrency = max_concurrency
        self.ledger = Ledger(self.name)
        self.client = HTTPClient(
            f"Google through {provider}",
            remedy=f"check the key in {self.provider.key_variables[0]} and what the account has left",
            secrets=(key,),
            final_signs=self.provider.final_signs,
            timeout_s=timeout_s,
            max_retries=max_retries,
            max_concurrency=max_concurrency,
            trust_env=True,
        )
        self._key = key
        if provider == "serper":
            self.client.headers["X-API-KEY"] = key
        self._pause_s = 1.0 / queries_per_s
        self._next_call = 0.0  # on the monotonic clock
        self._lock = threading.Lock()

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the documents of the first page of results."""
        with self.ledger.search():
            if not request.query.strip():
                return SearchResult(())  # both services refuse it
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
        """Return what its results depend on."""
        return {"engine": self.name, "provider": self.provider_name, "num_documents": self.num_documents}

    async def _call(self, query: str) -> SearchResult:
        """Make one call, when it is its turn and there is money for it."""
        self._book()
        try:
            await asyncio.sleep(self._wait_s())
            if self.provider_name == "serper":
                body = {"q": query, "num": self.num_documents}
                return await self.client.call("POST", self.url, body=body, read=self._result)
            params: dict[str, str | int] = {"engine": "google", "q": query, "num": self.num_documents}
            params["api_key"] = self._key
            return await self.client.call("GET", self.url, params=params, read=self._result)
        except CallFailed as error:
            if error.status not in (None, 200):  # refused: neither service charges for that
                self.ledger.usd -= self.usd_per_query
            raise

    def _book(self) -> None:
        """Book the price of a call before it is made, so that calls in flight count. Raises `BudgetSpent`."""
        with self._lock:
            if self.max_queries is not None and self.ledger.sent >= self.max_queries:
                raise BudgetSpent(f"the limit of {self.max_queries} queries to Google is reached")
            if self.max_usd is not None and self.ledger.usd + self.usd_per_query > self.max_usd + 1e-9:
                raise BudgetSpent(
                    f"the limit of {self.max_usd:g} USD for Google is reached: {self.ledger.usd:.4f} spent"
                )
            self.ledger.sent += 1
            self.ledger.usd += self.usd_per_query

    def _wait_s(self) -> float:
        """Return how long to wait for the next free place in the rate."""
        with self._lock:
            now = time.monotonic()
            self._next_call = max(self._next_call + self._pause_s, now)
            return self._next_call - now

    def _result(self, reply: Any) -> SearchResult:
        """Read a reply of either service."""
        if not isinstance(reply, dict):
            raise CallFailed(f"its reply is no result page: {json.dumps(reply)}", status=200)
        error = str(reply.get("error") or "")
        results = reply.get(self.provider.results, [])
        if error and NO_RESULTS not in error:
            raise CallFailed(f"it reports: {error}", status=200)
        if not isinstance(results, list):
            raise CallFailed(f"its reply holds no list of results: {json.dumps(reply)}", status=200)
        credits = reply.get("credits", 1)  # Serper's: two for more than ten results
        if isinstance(credits, int):
            self.ledger.usd += (credits - 1) * self.usd_per_query
        passages = [_passage(result) for result in results if isinstance(result, dict)]
        return result_of([passage for passage in passages if passage.text][: self.num_documents])


def _passage(result: dict[str, Any]) -> Passage:
    title, snippet = (str(result.get(name) or "").strip() for name in ("title", "snippet"))
    return Passage(title, snippet) if snippet else Passage("", title)


def read_key(provider: ProviderName, key_file: str | Path | None = None) -> str:
    """Return the key of a provider, from a file or the environment. Raises `UserError` where there is none."""
    variables = PROVIDERS[provider].key_variables
    if key_file is not None:
        try:
            key = Path(key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the key file {key_file} cannot be read: {type(error).__name__}") from None
        if not key or len(key.split()) != 1:
            raise UserError(f"the key file {key_file} must hold the key and nothing else")
        return key
    for variable in variables:
        if os.environ.get(variable, "").strip():
            return os.environ[variable].strip()
    raise UserError(f"{provider} needs a key: set {variables[0]}, or pass --google_key_file")
