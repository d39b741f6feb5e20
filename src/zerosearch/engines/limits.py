"""Where a command stops with what it has: limits of money and time, the engine's own budget, and what has been taken.

What a limit stops stays unfinished, so that it is asked again when the command goes on; it has not failed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from zerosearch.engines import BudgetSpent, SearchEngine, SearchError, SearchRequest, SearchResult
from zerosearch.engines.ledger import GOOGLE_USD_PER_QUERY
from zerosearch.errors import UserError
from zerosearch.http import ServiceError

LEDGER_COUNTS = ("queries", "sent", "replayed", "retries", "failures")
REFUSALS = frozenset({401, 402, 403, 429})  # a wrong key, an empty balance: the next search would fail as well


@dataclass(frozen=True)
class Limits:
    """The dollars and seconds a command may take, `None` without end."""

    usd: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("usd", self.usd), ("seconds", self.seconds)):
            if limit is not None and not 0.0 < limit < float("inf"):
                raise UserError(f"the limit of {name} is {limit}: it must be above 0")

    def less(self, usd: float, seconds: float) -> Limits:
        """Return what is left of the limits. Raises `LimitReached` if that is nothing."""
        for limit, spent, unit in ((self.usd, usd, "USD"), (self.seconds, seconds, "s")):
            if limit is not None and spent >= limit:
                raise LimitReached(f"stopped: the limit of {limit:g} {unit} is used up")
        return Limits(
            None if self.usd is None else self.usd - usd, None if self.seconds is None else self.seconds - seconds
        )


class LimitReached(Exception):
    """Money or time has run out before anything was finished; the message says which, and how much."""


class WatchedEngine:
    """Pass searches on, and notice where none can succeed any more: `spent` says why, or `refused` does."""

    def __init__(self, engine: SearchEngine) -> None:
        self.engine = engine
        self.name, self.max_concurrency = engine.name, engine.max_concurrency
        self.spent: str | None = None
        self.refused: str | None = None

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the engine's documents. Raises `SearchError`."""
        try:
            return await self.engine.search(request)
        except BudgetSpent as error:
            self.spent = self.spent or f"stopped: {error}"
            raise
        except SearchError as error:
            if isinstance(error.__cause__, ServiceError) and error.__cause__.status in REFUSALS:
                self.refused = str(error)
            raise

    async def aclose(self) -> None:
        """Close the engine."""
        await self.engine.aclose()


class Account:
    """What one command has taken so far, of money and time, against its limits and the budget of its engine.

    A rollout searches with `engine`, and asks `may_go_on`.
    """

    def __init__(self, generator: Any, engine: SearchEngine, limits: Limits) -> None:
        self.generator, self.limits = generator, limits
        self.engine = WatchedEngine(engine)
        self.ledger = getattr(engine, "ledger", None)  # an engine that costs nothing may keep none
        self.started = time.perf_counter()
        self.usd_before = self._usd()
        self.counts_before = self._counts()
        self._reached: str | None = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def usd(self) -> float:
        return self._usd() - self.usd_before

    def _usd(self) -> float:
        return getattr(self.generator, "cost_usd", 0.0) + (self.ledger.usd_here if self.ledger else 0.0)

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self.ledger, name) for name in LEDGER_COUNTS} if self.ledger else {}

    def stopped(self) -> str | None:
        """Say which limit is reached, if one is. It stays reached, though a refused search be paid back."""
        if self._reached is None:
            self._reached = self.engine.spent or self._limit()
        return self._reached

    def may_go_on(self) -> bool:
        """Say whether anything more may be started."""
        return self.stopped() is None and self.engine.refused is None

    def _limit(self) -> str | None:
        if self.limits.usd is not None and self.usd >= self.limits.usd:
            return f"stopped at the limit of {self.limits.usd:g} USD"
        if self.limits.seconds is not None and self.seconds >= self.limits.seconds:
            return f"stopped at the limit of {self.limits.seconds:g} s"
        return None

    def to_record(self, num_trajectories: int) -> dict[str, Any]:
        """Return the account as JSON, with what the engine was asked, and what that would cost at Google."""
        engine = {name: count - self.counts_before[name] for name, count in self._counts().items()}
        usd_at_google = round(engine.get("queries", 0) * GOOGLE_USD_PER_QUERY, 6)
        usd = {"usd": round(self.usd, 6), "usd_at_google": usd_at_google}
        return {"trajectories": num_trajectories, **usd, "engine": engine or None}
