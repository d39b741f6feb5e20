"""Google, through SerpAPI or Serper: title and snippet of each organic result. It costs money, and says how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from zerosearch.engines.account import GOOGLE_USD_PER_QUERY
from zerosearch.engines.search_api import SearchAPI, SearchAPIEngine
from zerosearch.errors import UserError
from zerosearch.http import checked_key

GoogleProvider = Literal["serpapi", "serper"]

# Prices are those of the lists, in a plan of 50,000 queries or less; the rate is far below what either admits.
PROVIDERS: dict[GoogleProvider, SearchAPI] = {
    "serpapi": SearchAPI(
        name="serpapi",
        url="https://serpapi.com/search.json",
        params={"engine": "google", "q": "{query}", "num": "{num_documents}", "api_key": "{key}"},
        key_variables=("SERPAPI_API_KEY", "SER_API_KEY"),  # the second is what the paper's code reads
        results="organic_results",
        text="snippet",
        page="search_metadata.status",
        page_value="Success",
        error="error",
        no_results="hasn't returned any results",  # an empty page is reported as an error
        final_signs=("run out of searches",),  # status 429, as for too many at once
        remedy="check the key in SERPAPI_API_KEY and what the account has left",
        usd_per_query=GOOGLE_USD_PER_QUERY,
    ),
    "serper": SearchAPI(
        name="serper",
        url="https://google.serper.dev/search",
        body={"q": "{query}", "num": "{num_documents}"},
        headers={"X-API-KEY": "{key}"},
        key_variables=("SERPER_API_KEY",),
        results="organic",
        text="snippet",
        page="searchParameters.q",  # a page repeats the search
        final_signs=("Not enough credits",),
        credits="credits",  # two for more than ten results
        remedy="check the key in SERPER_API_KEY and what the account has left",
        usd_per_query=50 / 50_000,
    ),
}


class GoogleEngine(SearchAPIEngine):
    """Search Google through a provider; `url`, rate, price and limits replace those of its description.

    >>> GoogleEngine("KEY", "serper", max_usd=20.0).identity()
    {'engine': 'google', 'provider': 'serper', 'num_documents': 5}
    """

    def __init__(
        self,
        key: str,
        provider: GoogleProvider = "serpapi",
        num_documents: int = 5,
        *,
        url: str | None = None,
        queries_per_s: float | None = None,
        usd_per_query: float | None = None,
        max_queries: int | None = None,
        max_usd: float | None = None,
        **options: Any,
    ) -> None:
        self.provider = provider
        changes = {"url": url, "queries_per_s": queries_per_s, "usd_per_query": usd_per_query}
        changes |= {"name": "google", "max_queries": max_queries, "max_usd": max_usd}
        told = {name: value for name, value in changes.items() if value is not None}
        super().__init__(PROVIDERS[provider].model_copy(update=told), key, num_documents, **options)

    @property
    def service(self) -> str:
        """Return what messages call the service."""
        return f"Google through {self.provider}"

    def identity(self) -> dict[str, Any]:
        return {"engine": self.name, "provider": self.provider, "num_documents": self.num_documents}


def read_key(provider: GoogleProvider, key_file: str | Path | None = None) -> str:
    """Return the key of a provider, from a file or the environment. Raises `UserError` where there is none."""
    if key_file is None:
        try:
            return PROVIDERS[provider].key()
        except UserError as error:
            raise UserError(f"{error}, or pass --google_key_file") from None
    try:
        key = checked_key(Path(key_file).read_text(encoding="utf-8"), str(key_file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the key file {key_file} cannot be read: {type(error).__name__}") from None
    if not key:
        raise UserError(f"the key file {key_file} is empty")
    return key
