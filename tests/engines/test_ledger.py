"""The ledger: what is booked, and the paper's own bill."""

from __future__ import annotations

import asyncio
import time

import pytest

from zerosearch.engines import BudgetSpent
from zerosearch.engines.ledger import GOOGLE_USD_PER_QUERY, Ledger, cost_table


def test_the_paper_s_run_costs_what_the_paper_says() -> None:
    assert round(64_000 * GOOGLE_USD_PER_QUERY, 1) == 586.7  # Table 8


def test_a_search_is_booked_with_its_time_and_a_failure_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger("rain")
    clock = iter([0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 5.0])  # two searches of half a second, one of two seconds
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for _ in range(3):
        with ledger.search():
            pass
    with pytest.raises(OSError), ledger.search():
        raise OSError
    record = ledger.to_record()
    assert (record["queries"], record["failures"]) == (4, 1)
    assert (record["latency_s"]["mean"], record["latency_s"]["p50"], record["latency_s"]["max"]) == (1.0, 0.5, 2.0)
    assert len(ledger.latencies_s) == 3, "a failure has no latency"


def test_a_search_that_is_cancelled_has_failed() -> None:
    ledger = Ledger("rain")

    async def search() -> None:
        with ledger.search():
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(search(), 0.01))
    assert (ledger.queries, ledger.failures) == (1, 1)


def test_a_search_that_there_is_no_budget_for_is_neither_a_query_nor_a_failure() -> None:
    ledger = Ledger("rain")
    with pytest.raises(BudgetSpent), ledger.search():
        raise BudgetSpent("the limit of 3 queries is reached")
    assert (ledger.queries, ledger.failures, ledger.latencies_s) == (0, 0, [])


def test_what_was_sent_is_told_once() -> None:
    ledger = Ledger("rain", sent=3)
    assert ledger.newly_sent() == 3
    ledger.sent += 2
    assert (ledger.newly_sent(), ledger.newly_sent()) == (2, 0)


def test_nothing_booked_is_nothing_spent() -> None:
    record = Ledger("rain").to_record()
    assert (record["latency_s"], record["usd"], record["usd_at_google"]) == (None, 0.0, 0.0)


def test_a_machine_costs_by_the_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger("simulated", usd=0.5, usd_per_hour=3600.0, opened=100.0)
    monkeypatch.setattr("time.monotonic", lambda: 102.0)
    assert ledger.usd_here == pytest.approx(2.5)


def test_the_table_sets_both_bills_side_by_side() -> None:
    twelve_hours_ago = time.monotonic() - 12 * 3600
    ledger = Ledger("simulated", usd_per_hour=17.7 / 12, opened=twelve_hours_ago)  # Table 8, one A100
    lines = cost_table({"simulated": 64_000, "bm25": 300}, {"simulated": ledger.usd_here}).splitlines()
    assert [line.split() for line in lines] == [
        ["engine", "queries", "USD", "at", "Google", "USD", "here"],
        ["simulated", "64,000", "586.67", "17.70"],
        ["bm25", "300", "2.75", "0.00"],
    ]


def test_the_mean_price_of_one_rank_counts_for_the_queries_of_all() -> None:
    assert Ledger("google", sent=10, usd=0.05).usd_of(40) == pytest.approx(0.20)
    assert Ledger("google").usd_of(0) == 0.0
