"""What searches cost: an engine's account, a command's spending and limits, and Google's listed price (Table 8)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from zerosearch.engines import BudgetSpent, SearchEngine, SearchError
from zerosearch.errors import UserError
from zerosearch.http import CallFailed, ServiceError

# SerpAPI's list: 275 USD a month for 30,000 searches. 64,000 queries, a run of the paper's, are 586.7 USD (Table 8).
GOOGLE_USD_PER_QUERY = 275 / 30_000
COUNTS = ("queries", "sent", "replayed", "retries", "failures")
REFUSALS = frozenset({401, 402, 403, 429})  # a wrong key, an empty balance: the next search would fail as well


@dataclass
class Account:
    """What one engine was asked in this process, what it cost, and how much it may cost.

    `queries` were asked of the engine, `sent` are the calls made for them, retries included, `replayed` came from the
    cache. `usd` is the price of the calls, `usd_per_hour` that of the machine behind the engine. At most `max_queries`
    calls are made, and none that `max_usd` does not cover: such a search raises `BudgetSpent` and is no query.
    `spent` says that this happened, `refused` that the service wants another key or more money.
    """

    engine: str
    usd_per_query: float = 0.0
    max_queries: int | None = None
    max_usd: float | None = None
    usd_per_hour: float = 0.0
    queries: int = 0
    sent: int = 0
    replayed: int = 0
    retries: int = 0
    failures: int = 0
    usd: float = 0.0
    spent: str | None = None
    refused: str | None = None

    def __post_init__(self) -> None:
        self.opened = time.monotonic()
        self._sent_before = 0

    @contextmanager
    def search(self) -> Iterator[None]:
        """Book one search. A `ServiceError` becomes a `SearchError`."""
        self.queries += 1
        try:
            yield
        except BudgetSpent as error:
            self.queries -= 1
            self.spent = str(error)
            raise
        except ServiceError as error:
            self.failures += 1
            if error.status in REFUSALS:
                self.refused = str(error)
            raise SearchError(str(error), error.retries) from error
        except BaseException:  # a search that is cancelled at its time limit has failed, too
            self.failures += 1
            raise

    @asynccontextmanager
    async def call(self, retries: int) -> AsyncIterator[None]:
        """Book one call before it is made, so that calls in flight count. Raises `BudgetSpent`.

        A call that was answered, but not with documents, costs nothing: no provider charges for it.
        """
        if self.max_queries is not None and self.sent >= self.max_queries:
            raise BudgetSpent(f"the limit of {self.max_queries} queries to {self.engine} is reached")
        if self.max_usd is not None and self.usd + self.usd_per_query > self.max_usd + 1e-9:
            limit = f"the limit of {self.max_usd:g} USD for {self.engine}"
            raise BudgetSpent(f"{limit} is reached: {self.usd:.4f} spent")
        self.sent += 1
        self.retries += retries > 0
        self.usd += self.usd_per_query
        try:
            yield
        except CallFailed as error:
            if error.status is not None:
                self.usd -= self.usd_per_query
            raise

    def newly_sent(self) -> int:
        """Return how many calls were made since this was last asked."""
        newly, self._sent_before = self.sent - self._sent_before, self.sent
        return newly

    @property
    def usd_here(self) -> float:
        """Return the price of the calls and of the machine so far."""
        return self.usd_of(self.sent)

    def price_of(self, sent: int) -> float:
        """Return the price of so many calls, at the mean of those made here."""
        return self.usd / max(self.sent, 1) * sent

    def usd_of(self, sent: int) -> float:
        """Return the price of so many calls, of all ranks and of a run before its resume as well, and of the machine.

        The machine counts for the time of this process.
        """
        return self.price_of(sent) + (time.monotonic() - self.opened) / 3600 * self.usd_per_hour

    def counts(self) -> dict[str, int]:
        """Return what was asked, as JSON."""
        return {name: getattr(self, name) for name in COUNTS}


def accounts_of(engine: SearchEngine) -> list[Account]:
    """Return the accounts of an engine; of each, where it asks several that it names in `engines`."""
    parts = getattr(engine, "engines", [engine])
    return [account for one in parts if (account := getattr(one, "account", None))]


@dataclass(frozen=True)
class Limits:
    """The dollars and seconds that a command may take, `None` without end."""

    usd: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("usd", self.usd), ("seconds", self.seconds)):
            if limit is not None and not 0.0 < limit < float("inf"):
                raise UserError(f"the limit of {name} is {limit}: it must be above 0")

    def reached(self, usd: float, seconds: float) -> str | None:
        """Say which limit is reached, if one is."""
        if self.usd is not None and usd >= self.usd:
            return f"stopped at the limit of {self.usd:g} USD"
        if self.seconds is not None and seconds >= self.seconds:
            return f"stopped at the limit of {self.seconds:g} s"
        return None

    def less(self, usd: float, seconds: float) -> Limits:
        """Return what is left of the limits. Raises `LimitReached` if that is nothing."""
        if reached := self.reached(usd, seconds):
            raise LimitReached(reached)
        return Limits(self.usd and self.usd - usd, self.seconds and self.seconds - seconds)


class LimitReached(Exception):
    """Money or time ran out before anything was finished; the message says which, and how much."""


class Spending:
    """What one command has spent, of money and time, against its limits and the caps of its engine.

    Trajectories cut by a limit are retried on resume, not counted as failures.
    """

    def __init__(self, generator: Any, engine: SearchEngine, limits: Limits) -> None:
        self.generator, self.limits = generator, limits
        self.account: Account | None = getattr(engine, "account", None)  # an engine that costs nothing may have none
        if self.account:
            self.account.refused = None
        self.counts_before = self.account.counts() if self.account else {}
        self.usd_before = self._usd()
        self.started = time.perf_counter()
        self._stopped: str | None = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def usd(self) -> float:
        return self._usd() - self.usd_before

    @property
    def refused(self) -> str | None:
        """Return why the engine refuses every search, if it does."""
        return self.account.refused if self.account else None

    def _usd(self) -> float:
        return getattr(self.generator, "cost_usd", 0.0) + (self.account.usd_here if self.account else 0.0)

    def stopped(self) -> str | None:
        """Say which limit is reached, if one is. It stays reached, even if a call in flight is paid back."""
        if self._stopped is None and self.account and self.account.spent:
            self._stopped = f"stopped: {self.account.spent}"
        self._stopped = self._stopped or self.limits.reached(self.usd, self.seconds)
        return self._stopped

    def may_go_on(self) -> bool:
        """Say whether anything more may be started."""
        return self.stopped() is None and self.refused is None

    def to_record(self, num_trajectories: int) -> dict[str, Any]:
        """Return the spending as JSON, with what the engine was asked, and what that would cost at Google."""
        counts = self.account.counts() if self.account else {}
        engine = {name: number - self.counts_before[name] for name, number in counts.items()}
        usd_at_google = round(engine.get("queries", 0) * GOOGLE_USD_PER_QUERY, 6)
        usd = {"usd": round(self.usd, 6), "usd_at_google": usd_at_google}
        return {"trajectories": num_trajectories, **usd, "engine": engine or None}


def cost_table(queries: Mapping[str, int], usd: Mapping[str, float]) -> str:
    """Return a line an engine: its queries, what they would have cost at Google's listed price, and what they did.

    An engine that `usd` does not name is free.
    """
    lines = [f"{'engine':<22} {'queries':>9} {'USD at Google':>14} {'USD here':>9}"]
    for engine, count in queries.items():
        at_google = count * GOOGLE_USD_PER_QUERY
        lines.append(f"{engine:<22} {count:>9,} {at_google:>14,.2f} {usd.get(engine, 0.0):>9,.2f}")
    return "\n".join(lines)
