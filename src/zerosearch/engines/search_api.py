"""Any search service that answers in JSON, by a description: what it is sent, and where its reply holds the results.

`recipes/engines/` describes SearXNG, Brave, Tavily and Elasticsearch, `zerosearch.engines.google` Google's two
sellers. One of your own is a YAML file with the fields of `SearchAPI`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zerosearch.data import Passage
from zerosearch.engines import SearchRequest, SearchResult, result_of
from zerosearch.engines.account import Account
from zerosearch.errors import UserError
from zerosearch.files import read_yaml
from zerosearch.http import CallFailed, HTTPClient, checked_key

PLACE = re.compile(r"\{(query|num_documents|key)\}")


class SearchAPI(BaseModel):
    """A search service.

    "{query}", "{num_documents}" and "{key}" are filled in wherever they stand in what is sent, but for a query in a
    header. With a `body` a search is a POST of it as JSON, else a GET. Where something stands in a reply is a path:
    names with dots between them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    url: str
    params: dict[str, str] = {}
    body: dict[str, Any] | None = None
    headers: dict[str, str] = {}
    key_variables: tuple[str, ...] = ()  # environment variables that may hold the key: the first that is set
    results: str  # where a reply holds the list of results
    title: str = "title"  # and each of them its title and its text
    text: str
    page: str | None = None  # what any page of results holds, one without results too. None: the list
    page_value: str | None = None  # and the value there. None: any
    error: str | None = None  # where a reply without documents says what went wrong
    no_results: str | None = None  # what it says there if it is only that nothing was found
    final_signs: tuple[str, ...] = ()  # what a refusal says that no waiting mends
    credits: str | None = None  # where a reply says as how many queries it is charged
    remedy: str = "put it right and resume"  # for messages
    usd_per_query: float = Field(default=0.0, ge=0)
    queries_per_s: float = Field(default=5.0, gt=0)
    max_queries: int | None = Field(default=None, ge=0)
    max_usd: float | None = Field(default=None, ge=0)

    def key(self) -> str:
        """Return the key from the environment, "" for a service without one. Raises `UserError` if it is missing."""
        for variable in self.key_variables:
            if key := checked_key(os.environ.get(variable), variable):
                return key
        if self.key_variables:
            raise UserError(f"{self.name} needs a key: set {self.key_variables[0]}")
        return ""


def read_api(path: str | Path) -> SearchAPI:
    """Read a description from a YAML file. Raises `UserError` for a file that is none."""
    try:
        return SearchAPI.model_validate(read_yaml(Path(path)))
    except ValidationError as error:
        wrong = error.errors()[0]
        said = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = f"{type(error).__name__}: {error}"
    raise UserError(f"{path} does not describe a search service: {' '.join(said.split())}")


@dataclass(eq=False)
class SearchAPIEngine:
    """Search with the service that `api` describes, at most `api.queries_per_s` times a second.

    A result is one document, "title: text", or what it has of the two. A query without results is answered with no
    documents; a reply that is no page of results has failed. `api.max_queries` and `api.max_usd` bound what this
    engine sends and spends (in this process, retries included); past them a search raises `BudgetSpent`. `key` is
    secret: it is in no message.
    """

    reads_query_only = True

    api: SearchAPI
    key: str = field(repr=False)
    num_documents: int = 5
    timeout_s: float = 60.0
    max_retries: int = 5
    max_concurrency: int = 16

    def __post_init__(self) -> None:
        self.name = self.api.name
        self.key = checked_key(self.key, self.api.name)
        self.account = Account(self.name, self.api.usd_per_query, self.api.max_queries, self.api.max_usd)
        self.client = HTTPClient(
            self.service,
            remedy=self.api.remedy,
            headers={name: str(value) for name, value in self._filled(self.api.headers).items()},
            secrets=(self.key,),
            final_signs=self.api.final_signs,
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
            max_concurrency=self.max_concurrency,
            trust_env=True,
        )
        self._next_call = 0.0  # on the monotonic clock

    @property
    def service(self) -> str:
        """Return what messages call the service."""
        return f"the search service {self.api.name}"

    async def search(self, request: SearchRequest) -> SearchResult:
        content = {"params": self._filled(self.api.params, request.query)}
        if self.api.body is not None:
            content["json"] = self._filled(self.api.body, request.query)
        with self.account.search():
            if not request.query.strip():
                return SearchResult(())  # services refuse it
            result, retries = await self.client.request(
                "GET" if self.api.body is None else "POST",
                self._filled(self.api.url, quote(request.query, safe="")),
                read=self._result,
                around=self._paced_call,
                **content,
            )
            return replace(result, retries=retries)

    async def aclose(self) -> None:
        await self.client.aclose()

    def identity(self) -> dict[str, Any]:
        asked = {"url", "params", "body", "results", "title", "text"}
        description = self.api.model_dump_json(include=asked)
        sha256 = hashlib.sha256(description.encode()).hexdigest()
        return {"engine": self.name, "description_sha256": sha256, "num_documents": self.num_documents}

    def _filled(self, template: Any, query: str = "") -> Any:
        """Return a part of what is sent, filled in. A text that is "{num_documents}" alone becomes the number."""
        if isinstance(template, Mapping):
            return {name: self._filled(value, query) for name, value in template.items()}
        if isinstance(template, list):
            return [self._filled(value, query) for value in template]
        if template == "{num_documents}":
            return self.num_documents
        if isinstance(template, str):
            values = {"query": query, "num_documents": str(self.num_documents), "key": self.key}
            return PLACE.sub(lambda place: values[place[1]], template)
        return template

    @asynccontextmanager
    async def _paced_call(self, retries: int) -> AsyncIterator[None]:
        async with self.account.call(retries):
            now = time.monotonic()
            self._next_call = max(self._next_call + 1.0 / self.api.queries_per_s, now)
            await asyncio.sleep(self._next_call - now)
            yield

    def _result(self, reply: Any) -> SearchResult:
        """Read a page of results; one without documents must show that it is a page."""
        api, results = self.api, self._found(reply, self.api.results, missing=[])
        if not isinstance(results, list):
            raise CallFailed(f"its reply holds no list of results: {reply}")
        passages = [self._passage(result) for result in results]
        found = result_of([passage for passage in passages if passage.text][: self.num_documents])
        if not found.documents:
            error = api.error and self._found(reply, api.error)
            if error and not (api.no_results and api.no_results in error):
                raise CallFailed(f"it reports: {error}")
            sign = self._found(reply, api.page or api.results)
            if sign is None or api.page_value not in (None, sign):
                raise CallFailed(f"its reply is not a page of results: {reply}")
        credits = api.credits and self._found(reply, api.credits)
        if type(credits) is int and credits > 1:
            self.account.usd += (credits - 1) * self.account.usd_per_query
        return found

    def _passage(self, result: Any) -> Passage:
        found = (self._found(result, path) for path in (self.api.title, self.api.text))
        title, text = (text.strip() if isinstance(text, str) else "" for text in found)
        return Passage(title, text) if text else Passage("", title)

    @staticmethod
    def _found(reply: Any, path: str, missing: Any = None) -> Any:
        """Return what stands at a path, `missing` where nothing does."""
        for name in path.split("."):
            if not isinstance(reply, dict) or name not in reply:
                return missing
            reply = reply[name]
        return reply
