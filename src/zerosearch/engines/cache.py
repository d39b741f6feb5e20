"""The cache of replies: one SQLite file that processes share, for searches and for a judge's verdicts.

Nothing in it is asked for, or paid for, again; each reply is in the file once `put` returns.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from zerosearch.engines import SearchEngine, SearchError, SearchRequest, SearchResult, engine_identity
from zerosearch.engines.account import Account
from zerosearch.errors import UserError

FORMAT = 2


class Cache:
    """Replies by request; both are JSON, and a request holds all that its reply depends on.

    Raises `UserError` for a file that is missing where it is only read, not a cache, or damaged, and for a full disk.
    """

    def __init__(self, path: str | Path, read_only: bool = False) -> None:
        self.path = Path(path)
        try:
            self._database = self._opened(read_only)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"the cache {path} cannot be used: {error}") from error

    def get(self, request: Mapping[str, Any]) -> Any:
        found = self._run("SELECT reply FROM replies WHERE key = ?", _key(request))
        return json.loads(found[0][0]) if found else None

    def put(self, request: Mapping[str, Any], reply: Any) -> None:
        row = (_key(request), json.dumps(request), json.dumps(reply))
        self._run("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", *row)

    def engines(self) -> list[dict[str, Any]]:
        """Return the identity of every engine whose answers are here."""
        found = self._run("SELECT DISTINCT json_extract(request, '$.engine') FROM replies")
        return [json.loads(text) for (text,) in found if text]

    def close(self) -> None:
        self._database.close()

    def _run(self, statement: str, *values: str) -> list[Any]:
        try:
            with self._database:  # commits
                return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:  # a full disk, a damaged file
            raise UserError(f"the cache {self.path} cannot be used: {error}") from error

    def _opened(self, read_only: bool) -> sqlite3.Connection:
        if read_only and not self.path.is_file():
            raise UserError(f"there is no cache {self.path}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if os.access(self.path.parent, os.W_OK):
            mode = "mode=rwc"
        else:  # not even locks can be written, unless a writer's are there
            mode = "mode=ro" if Path(f"{self.path}-wal").exists() else "immutable=1"
        address = f"{self.path.resolve().as_uri()}?{mode}"
        database = sqlite3.connect(address, uri=True, timeout=60, check_same_thread=False)
        is_new = not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not is_new and database.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
            raise UserError(f"{self.path} is not a cache of this version: name another file")
        if not read_only:
            database.execute("PRAGMA journal_mode = WAL")  # writing does not wait for the disk
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(f"PRAGMA user_version = {FORMAT}")
            columns = "key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL"
            database.execute(f"CREATE TABLE IF NOT EXISTS replies ({columns}) WITHOUT ROWID")
        return database


class CachedEngine:
    """Answer from the cache what it holds; ask `engine` for the rest, and keep the answers. Failures are not kept.

    A search is known by the engine's identity, the query, and for an engine that reads more of a request than the
    query, the question, the golden answers, the coin for noise and the key. The same search asked for twice at the
    same time is sent once. With `cache_only` the engine is never asked, and a search that is missing fails.
    """

    def __init__(self, path: str | Path, engine: SearchEngine, cache_only: bool = False) -> None:
        self.engine, self.cache_only = engine, cache_only
        self.name, self.max_concurrency = engine.name, engine.max_concurrency
        self.reads_query_only = getattr(engine, "reads_query_only", False)
        self.account: Account = getattr(engine, "account", None) or Account(engine.name)
        self.cache = Cache(path, cache_only)
        self._identity = self._known_identity()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of searches in flight

    def identity(self) -> dict[str, Any]:
        return self._identity

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the cached result, or the engine's. Raises `SearchError`."""
        described = self._described(request)
        async with self._locks.setdefault(_key(described), asyncio.Lock()):
            found = self.cache.get(described)
            if found is None:
                return await self._ask(described, request)
        self.account.queries += 1
        self.account.replayed += 1
        kept = {field.name: found[field.name] for field in fields(SearchResult) if field.name in found}
        lists = {name: tuple(value) for name, value in kept.items() if isinstance(value, list)}
        return SearchResult(**{**kept, **lists, "retries": 0})

    async def aclose(self) -> None:
        await self.engine.aclose()
        self.cache.close()

    async def _ask(self, described: dict[str, Any], request: SearchRequest) -> SearchResult:
        if self.cache_only:
            raise SearchError(
                f"the cache {self.cache.path} holds no answer of {self.name} to the query {request.query!r}; "
                "run the same command without --search_cache_only first"
            )
        if getattr(self.engine, "account", None):  # it books for itself
            result = await self.engine.search(request)
        else:
            with self.account.search():
                self.account.sent += 1
                result = await self.engine.search(request)
        self.cache.put(described, asdict(result))
        return result

    def _described(self, request: SearchRequest) -> dict[str, Any]:
        described: dict[str, Any] = {"engine": self._identity, "query": request.query}
        if not self.reads_query_only:
            described |= {"question": request.question, "golden_answers": request.golden_answers, "key": request.key}
            described["noisy"] = request.is_noisy
        return described

    def _known_identity(self) -> dict[str, Any]:
        """Return the engine's identity; what it cannot know without asking its server, from the cache."""
        identity = engine_identity(self.engine)
        unknown = sorted(name for name, value in identity.items() if value is None)
        if not unknown:
            return identity
        if not self.cache_only:
            raise ValueError(f"the engine {self.name} does not know its {', '.join(unknown)} yet: check it first")
        known = {name: value for name, value in identity.items() if value is not None}
        fitting = [found for found in self.cache.engines() if known.items() <= found.items()]
        if len(fitting) != 1:
            choice = "; ".join(json.dumps({name: found[name] for name in unknown}) for found in fitting) or "none"
            wanted = f"the {', '.join(unknown)} of {self.name} whose answers {self.cache.path} holds"
            raise UserError(f"name {wanted}: {choice}")
        return fitting[0]


def _key(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
