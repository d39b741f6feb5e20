"""What an engine was asked, how it went, and what it cost: here, and at Google's listed price (Table 8)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

from zerosearch.engines import BudgetSpent

# SerpAPI's list: 275 USD a month for 30,000 searches. 64,000 queries, a run of the paper's, are 586.7 USD (Table 8).
GOOGLE_USD_PER_QUERY = 275 / 30_000


@dataclass
class Ledger:
    """The account of one engine in one process. An engine books every search; `usd` is what they cost.

    `queries` were asked of the engine, `sent` reached what answers, repeated ones included, `replayed` came from a
    cassette. A search that there was no budget for is no query. `usd_per_hour` is what the machine behind the engine
    costs while the account is open.
    """

    engine: str
    queries: int = 0
    sent: int = 0
    replayed: int = 0
    retries: int = 0
    failures: int = 0
    usd: float = 0.0
    usd_per_hour: float = 0.0
    latencies_s: list[float] = field(default_factory=list, repr=False)  # of searches that came back with documents
    opened: float = field(default_factory=time.monotonic, repr=False)
    _sent_before: int = field(default=0, repr=False)

    @contextmanager
    def search(self) -> Iterator[None]:
        """Book one search: its time, or its failure."""
        start = time.perf_counter()
        self.queries += 1
        try:
            yield
        except BudgetSpent:
            self.queries -= 1
            raise
        except BaseException:  # a search that is cancelled at its time limit has failed, too
            self.failures += 1
            raise
        self.latencies_s.append(time.perf_counter() - start)

    def newly_sent(self) -> int:
        """Return how many were sent since this was last asked."""
        newly, self._sent_before = self.sent - self._sent_before, self.sent
        return newly

    @property
    def hours(self) -> float:
        return (time.monotonic() - self.opened) / 3600

    @property
    def usd_here(self) -> float:
        """Return what the searches cost: the service's price, and the machine's for the time so far."""
        return self.usd + self.hours * self.usd_per_hour

    def usd_of(self, sent: int) -> float:
        """Return what so many sent queries cost, of all ranks and of a run before its resume as well.

        The mean price of those sent here counts for all of them, and the machine for the time that this process took.
        """
        return self.usd / max(self.sent, 1) * sent + self.hours * self.usd_per_hour

    def to_record(self) -> dict[str, Any]:
        """Return the account as JSON; latencies in seconds, `None` where no search came back."""
        return {
            "engine": self.engine,
            "queries": self.queries,
            "sent": self.sent,
            "replayed": self.replayed,
            "retries": self.retries,
            "failures": self.failures,
            "latency_s": self._latency_s(),
            "hours": round(self.hours, 4),
            "usd": round(self.usd_here, 6),
            "usd_at_google": round(self.queries * GOOGLE_USD_PER_QUERY, 6),
        }

    def _latency_s(self) -> dict[str, float] | None:
        if not self.latencies_s:
            return None
        latencies_s = self.latencies_s * 2 if len(self.latencies_s) == 1 else self.latencies_s  # quantiles needs two
        cuts = quantiles(latencies_s, n=100, method="inclusive")
        mean = sum(self.latencies_s) / len(self.latencies_s)
        return {"mean": mean, "p50": cuts[49], "p95": cuts[94], "max": max(self.latencies_s)}


def cost_table(queries: Mapping[str, int], usd: Mapping[str, float]) -> str:
    """Return a line an engine: its queries, what they would have cost at Google's listed price, and what they did.

    An engine that `usd` does not name is free.
    """
    lines = [f"{'engine':<16} {'queries':>9} {'USD at Google':>14} {'USD here':>9}"]
    for engine, count in queries.items():
        at_google = count * GOOGLE_USD_PER_QUERY
        lines.append(f"{engine:<16} {count:>9,} {at_google:>14,.2f} {usd.get(engine, 0.0):>9,.2f}")
    return "\n".join(lines)
