"""A cassette: record what an engine answers, and replay it later, free and without a network."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zerosearch.engines import SearchEngine, SearchError, SearchRequest, SearchResult, engine_identity
from zerosearch.engines.ledger import Ledger
from zerosearch.errors import UserError
from zerosearch.noise import keyed_uniform

FORMAT = 1
TABLES = """
CREATE TABLE IF NOT EXISTS searches (
    key TEXT PRIMARY KEY, engine TEXT NOT NULL, request TEXT NOT NULL,
    result TEXT NOT NULL, latency_s REAL NOT NULL
) WITHOUT ROWID
"""


class CassetteEngine:
    """Answer from the SQLite file `path` what it holds; ask `engine` for the rest, and record it.

    A search is known by all that its result depends on: the engine's identity, the query, and for an engine that
    reads more of a request than the query, the question, the golden answers, the coin for noise and the key. The same
    search asked for twice at the same time is sent once. Failures are not recorded.
    With `replay_only` the engine is never asked: a search that is not on the cassette raises `SearchError`.
    Several processes may use a cassette at once.
    Raises `UserError` for a file that is missing, no cassette, or not of this engine.
    """

    def __init__(self, path: str | Path, engine: SearchEngine, replay_only: bool = False) -> None:
        self.path, self.engine, self.replay_only = Path(path), engine, replay_only
        self.name = engine.name
        self.max_concurrency = engine.max_concurrency
        self.reads_query_only = getattr(engine, "reads_query_only", False)
        self.ledger: Ledger = getattr(engine, "ledger", None) or Ledger(engine.name)
        self._lock = threading.Lock()
        self._in_flight: dict[str, asyncio.Lock] = {}
        self._database = self._open()
        self._identity = self._known_identity()

    def identity(self) -> dict[str, Any]:
        """Return what the results depend on: the same as for the engine itself."""
        return self._identity

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the recorded result, or the engine's."""
        described = self._described(request)
        key = hashlib.sha256(described.encode()).hexdigest()
        recorded = self._replayed(key)
        if recorded is not None:
            return recorded
        if self.replay_only:
            raise SearchError(
                f"the cassette {self.path} holds no answer of {self.name} to the query {request.query!r}; "
                "record it first, with the same command without --cassette_replay_only"
            )
        try:
            async with self._in_flight.setdefault(key, asyncio.Lock()):
                recorded = self._replayed(key)  # by another search that was waited for here
                return recorded or await self._record(key, described, request)
        finally:
            self._in_flight.pop(key, None)

    async def aclose(self) -> None:
        """Close the engine and the file."""
        await self.engine.aclose()
        self._database.close()

    def _described(self, request: SearchRequest) -> str:
        """Return all that matters for the result, as canonical JSON."""
        what: dict[str, Any] = {"engine": self._identity, "query": request.query}
        if not self.reads_query_only:
            what["question"] = request.question
            what["golden_answers"] = request.golden_answers
            what["key"] = request.key
            if self._identity.get("coin", "query") == "query":
                what["noisy"] = keyed_uniform(*request.key) < request.p_noise
            else:  # several coins are tossed, as the engine does it
                what["p_noise"] = request.p_noise
        return json.dumps(what, sort_keys=True, ensure_ascii=False)

    def _replayed(self, key: str) -> SearchResult | None:
        start = time.perf_counter()
        with self._lock:
            row = self._database.execute("SELECT result FROM searches WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        self.ledger.queries += 1
        self.ledger.replayed += 1
        self.ledger.latencies_s.append(time.perf_counter() - start)
        result = json.loads(row[0])
        lists = {name: tuple(value) for name, value in result.items() if isinstance(value, list)}
        return SearchResult(**{**result, **lists, "retries": 0})

    async def _record(self, key: str, described: str, request: SearchRequest) -> SearchResult:
        start = time.perf_counter()
        if getattr(self.engine, "ledger", None) is self.ledger:  # it books for itself
            result = await self.engine.search(request)
        else:
            with self.ledger.search():
                self.ledger.sent += 1
                result = await self.engine.search(request)
        recorded = json.dumps(asdict(result), ensure_ascii=False)
        identity = json.dumps(self._identity, sort_keys=True)
        row = (key, identity, described, recorded, time.perf_counter() - start)
        with self._lock, self._database:
            self._database.execute("INSERT OR REPLACE INTO searches VALUES (?, ?, ?, ?, ?)", row)
        return result

    def _open(self) -> sqlite3.Connection:
        if self.replay_only and not self.path.is_file():
            raise UserError(f"there is no cassette {self.path} to replay")
        try:
            if self.replay_only:
                return self._open_to_read()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            if database.execute("PRAGMA user_version").fetchone()[0] not in (0, FORMAT):
                raise UserError(f"the cassette {self.path} is of another version")
            database.execute("PRAGMA journal_mode = WAL")  # a recording does not wait for the disk
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(TABLES)
            database.execute(f"PRAGMA user_version = {FORMAT}")
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"the cassette {self.path} cannot be used: {error}") from error
        return database

    def _open_to_read(self) -> sqlite3.Connection:
        for mode in ("mode=ro", "immutable=1"):  # the second where not even a lock can be written
            database = sqlite3.connect(f"{self.path.resolve().as_uri()}?{mode}", uri=True, check_same_thread=False)
            try:
                database.execute("SELECT 1 FROM searches LIMIT 1")
            except sqlite3.OperationalError:
                if mode == "immutable=1":
                    raise
            else:
                break
        return database

    def _known_identity(self) -> dict[str, Any]:
        """Return the engine's identity; what it cannot know without asking its server, from the cassette."""
        identity = engine_identity(self.engine)
        unknown = sorted(name for name, value in identity.items() if value is None)
        if not unknown:
            return identity
        if not self.replay_only:
            raise ValueError(f"the engine {self.name} does not know its {', '.join(unknown)} yet: check it first")
        recorded = [json.loads(text) for (text,) in self._database.execute("SELECT DISTINCT engine FROM searches")]
        known = {name: value for name, value in identity.items() if value is not None}
        fitting = [found for found in recorded if known.items() <= found.items()]
        if len(fitting) != 1:
            choice = "; ".join(json.dumps({name: found[name] for name in unknown}) for found in fitting) or "none"
            raise UserError(f"name the {', '.join(unknown)} of {self.name} that {self.path} is of; it holds: {choice}")
        return fitting[0]
