"""Google, through SerpAPI or Serper: title and snippet of each organic result. It costs money, and says how much."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from zerosearch.data import Passage
from zerosearch.engines import SearchRequest, SearchResult, result_of
from zerosearch.engines.account import GOOGLE_USD_PER_QUERY, Account
from zerosearch.errors import UserError
from zerosearch.http import CallFailed, HTTPClient, checked_key

GoogleProvider = Literal["serpapi", "serper"]


@dataclass(frozen=True)
class Provider:
    """A service that sells Google's results. `usd_per_query` is its list price in a plan of 50,000 queries or less."""

    url: str
    key_variables: tuple[str, ...]  # environment variables that may hold the key
    usd_per_query: float
    results: str  # where the reply holds the results
    final_signs: tuple[str, ...]  # what a refusal says that no waiting mends


PROVIDERS: dict[GoogleProvider, Provider] = {
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


@dataclass(eq=False)
class GoogleEngine:
    """Search Google, at most `queries_per_s` times a second.

    A result is one document, "title: snippet", or what it has of the two. A query without results is answered with no
    documents. `max_queries` and `max_usd` bound what this engine sends and spends (in this process, retries included);
    past them a search raises `BudgetSpent`. `key` is secret: it is in no message. `url` replaces the provider's.
    """

    name = "google"
    reads_query_only = True

    key: str = field(repr=False)
    provider: GoogleProvider = "serpapi"
    num_documents: int = 5
    queries_per_s: float = 5.0  # our choice: far below what either provider admits
    max_queries: int | None = None
    max_usd: float | None = None
    usd_per_query: float | None = None
    url: str | None = None
    timeout_s: float = 60.0
    max_retries: int = 5
    max_concurrency: int = 16

    def __post_init__(self) -> None:
        self.service = PROVIDERS[self.provider]
        self.key = checked_key(self.key, self.provider)
        price = self.service.usd_per_query if self.usd_per_query is None else self.usd_per_query
        self.account = Account(self.name, price, self.max_queries, self.max_usd)
        self.client = HTTPClient(
            f"Google through {self.provider}",
            remedy=f"check the key in {self.service.key_variables[0]} and what the account has left",
            headers={"X-API-KEY": self.key} if self.provider == "serper" else {},
            secrets=(self.key,),
            final_signs=self.service.final_signs,
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
            max_concurrency=self.max_concurrency,
            trust_env=True,
        )
        self._next_call = 0.0  # on the monotonic clock

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the documents of the first page of results. Raises `SearchError`."""
        asked: dict[str, Any] = {"q": request.query, "num": self.num_documents}
        content: dict[str, Any] = {"json": asked}
        if self.provider == "serpapi":
            content = {"params": {"engine": "google", **asked, "api_key": self.key}}
        with self.account.search():
            if not request.query.strip():
                return SearchResult(())  # both services refuse it
            result, retries = await self.client.request(
                "GET" if self.provider == "serpapi" else "POST",
                self.url or self.service.url,
                read=self._result,
                around=self._paced_call,
                **content,
            )
            return replace(result, retries=retries)

    async def aclose(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on."""
        return {"engine": self.name, "provider": self.provider, "num_documents": self.num_documents}

    @asynccontextmanager
    async def _paced_call(self, retries: int) -> AsyncIterator[None]:
        async with self.account.call(retries):
            now = time.monotonic()
            self._next_call = max(self._next_call + 1.0 / self.queries_per_s, now)
            await asyncio.sleep(self._next_call - now)
            yield

    def _result(self, reply: Any) -> SearchResult:
        """Read a page of either service. One without documents must show that it is a page: SerpAPI's says
        "Success", Serper's repeats the search."""
        error = reply.get("error") or ""
        if error and NO_RESULTS not in error:
            raise CallFailed(f"it reports: {error}")
        results = reply.get(self.service.results, [])
        if not isinstance(results, list):
            raise CallFailed(f"its reply holds no list of results: {reply}")
        passages = [_passage(result) for result in results if isinstance(result, dict)]
        found = result_of([passage for passage in passages if passage.text][: self.num_documents])
        if self.provider == "serper":
            is_page = reply.get("searchParameters", {}).get("q") is not None
        else:
            is_page = reply.get("search_metadata", {}).get("status") == "Success"
        if not found.documents and not is_page:
            raise CallFailed(f"its reply is not a page of results: {reply}")
        credits = reply.get("credits")  # Serper's: two for more than ten results
        if type(credits) is int and credits > 1:
            self.account.usd += (credits - 1) * self.account.usd_per_query
        return found


def _passage(result: dict[str, Any]) -> Passage:
    found = (result.get(name) for name in ("title", "snippet"))
    title, snippet = (text.strip() if isinstance(text, str) else "" for text in found)
    return Passage(title, snippet) if snippet else Passage("", title)


def read_key(provider: GoogleProvider, key_file: str | Path | None = None) -> str:
    """Return the key of a provider, from a file or the environment. Raises `UserError` where there is none."""
    if key_file is not None:
        try:
            key = checked_key(Path(key_file).read_text(encoding="utf-8"), str(key_file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the key file {key_file} cannot be read: {type(error).__name__}") from None
        if not key:
            raise UserError(f"the key file {key_file} is empty")
        return key
    variables = PROVIDERS[provider].key_variables
    for variable in variables:
        if key := checked_key(os.environ.get(variable), variable):
            return key
    raise UserError(f"{provider} needs a key: set {variables[0]}, or pass --google_key_file")
