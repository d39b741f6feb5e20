"""The account of an engine, the limits of a command, and the paper's own bill."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from zerosearch.engines import BudgetSpent, SearchError
from zerosearch.engines.account import Account, LimitReached, Limits, Spending, cost_table
from zerosearch.errors import UserError
from zerosearch.http import CallFailed, ServiceError


def test_searches_are_booked_and_failures_as_such() -> None:
    account = Account("rain")
    with account.search():
        pass
    for failure in (OSError, asyncio.CancelledError):  # one that is cancelled at its time limit has failed, too
        with pytest.raises(failure), account.search():
            raise failure
    with pytest.raises(BudgetSpent), account.search():
        raise BudgetSpent("the limit of 3 queries is reached")
    assert account.counts() == {"queries": 3, "sent": 0, "replayed": 0, "retries": 0, "failures": 2}
    assert account.spent == "the limit of 3 queries is reached"


@pytest.mark.parametrize(("status", "refused"), [(401, "no"), (402, "no"), (403, "no"), (429, "no"), (500, None)])
def test_a_service_that_fails_for_good_is_a_failed_search(status: int, refused: str | None) -> None:
    account = Account("rain")
    with pytest.raises(SearchError, match="no") as caught, account.search():
        raise ServiceError("no", "no", status, retries=3)
    assert (caught.value.retries, account.failures, account.refused) == (3, 1, refused)


def called(account: Account, failure: Exception | None = None, retries: int = 0) -> None:
    async def call() -> None:
        async with account.call(retries):
            if failure:
                raise failure

    asyncio.run(call())


def test_a_call_costs_its_price_unless_it_was_refused() -> None:
    account = Account("rain", usd_per_query=0.5)
    called(account)
    for failure in (CallFailed("busy", 503), CallFailed("not a page", 200)):
        with pytest.raises(CallFailed):
            called(account, failure)
    assert (account.sent, account.usd) == (3, 0.5)
    with pytest.raises(CallFailed):
        called(account, CallFailed("no answer", None), retries=1)  # nobody knows whether it is charged for
    assert (account.sent, account.retries, account.usd) == (4, 1, 1.0)


def test_calls_beyond_the_caps_are_not_made() -> None:
    account = Account("rain", usd_per_query=0.5, max_usd=1.0)
    called(account)
    called(account)
    with pytest.raises(BudgetSpent, match=r"the limit of 1 USD for rain is reached: 1\.0000 spent"):
        called(account)
    account = Account("rain", max_queries=1)
    called(account)
    with pytest.raises(BudgetSpent, match="the limit of 1 queries to rain is reached"):
        called(account)
    assert account.sent == 1


def test_what_was_sent_is_told_once() -> None:
    account = Account("rain", sent=3)
    assert account.newly_sent() == 3
    account.sent += 2
    assert (account.newly_sent(), account.newly_sent()) == (2, 0)


def test_the_price_of_the_calls_and_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account("simulated", sent=10, usd=0.05, usd_per_hour=3600.0)
    account.opened = 100.0
    monkeypatch.setattr("time.monotonic", lambda: 102.0)
    assert account.usd_here == pytest.approx(2.05)
    assert account.usd_of(40) == pytest.approx(2.20), "the mean price of one rank counts for the queries of all"
    assert Account("google").usd_of(0) == 0.0


def test_the_table_sets_both_bills_side_by_side() -> None:
    # Table 8: 64,000 queries are 586.7 USD at Google, and 17.7 with one A100.
    lines = cost_table({"simulated": 64_000, "bm25": 300}, {"simulated": 17.70}).splitlines()
    assert [line.split() for line in lines] == [
        ["engine", "queries", "USD", "at", "Google", "USD", "here"],
        ["simulated", "64,000", "586.67", "17.70"],
        ["bm25", "300", "2.75", "0.00"],
    ]


def spending_of(account: Account | None, **limits: float) -> Spending:
    engine = SimpleNamespace(name="rain", max_concurrency=1, account=account)
    return Spending(None, engine, Limits(**limits))  # type: ignore[arg-type]


def test_a_limit_stays_reached_though_a_call_is_paid_back() -> None:
    account = Account("rain", sent=10)
    spending = spending_of(account, usd=1.0)
    assert spending.may_go_on()
    account.usd = 1.0
    assert not spending.may_go_on()
    account.usd = 0.9
    assert not spending.may_go_on() and spending.stopped() == "stopped at the limit of 1 USD"


def test_a_command_counts_what_it_spent_itself() -> None:
    account = Account("rain", queries=5, sent=7, usd=3.0)
    spending = spending_of(account)
    account.queries, account.sent, account.usd = 6, 9, 4.5
    assert spending.to_record(2) == {
        "trajectories": 2,
        "usd": 1.5,
        "usd_at_google": 0.009167,
        "engine": {"queries": 1, "sent": 2, "replayed": 0, "retries": 0, "failures": 0},
    }
    assert spending_of(None).to_record(0) == {"trajectories": 0, "usd": 0.0, "usd_at_google": 0.0, "engine": None}


def test_a_command_stops_where_its_engine_refuses_or_has_spent_its_budget() -> None:
    account = Account("rain", refused="wrong key in an earlier command")
    spending = spending_of(account)
    assert spending.may_go_on()
    account.refused = "wrong key"
    assert not spending.may_go_on() and spending.stopped() is None
    account = Account("rain", spent="the limit of 3 queries is reached")
    assert spending_of(account).stopped() == "stopped: the limit of 3 queries is reached"


@pytest.mark.parametrize("limits", [{"usd": 0.0}, {"seconds": -1.0}, {"usd": float("nan")}])
def test_a_limit_is_above_0(limits: dict[str, float]) -> None:
    with pytest.raises(UserError, match="must be above 0"):
        Limits(**limits)


def test_what_is_left_of_limits() -> None:
    assert Limits(10.0, None).less(4.0, 100.0) == Limits(6.0, None)
    with pytest.raises(LimitReached, match="stopped at the limit of 10 USD"):
        Limits(10.0, None).less(10.0, 1.0)
