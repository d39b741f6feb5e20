"""Work on the background loop: each result arrives once, within its limits, and nothing runs on after a cancel."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest

from zerosearch.http import background_loop, run_in_background
from zerosearch.rollout.in_flight import Arrival, InFlight, TimedOut


async def after(seconds: float, result: str, log: list[str] | None = None) -> str:
    await asyncio.sleep(seconds)
    if log is not None:
        log.append(result)
    return result


def arrived(in_flight: InFlight, count: int) -> list[Arrival]:
    arrivals: list[Arrival] = []
    while len(arrivals) < count:
        arrivals += in_flight.wait()
    assert in_flight.done() == []
    return arrivals


def test_results_arrive_once_each_in_the_order_in_which_they_end() -> None:
    in_flight, limit = InFlight(), asyncio.Semaphore(100)
    for number, seconds in enumerate([0.3, 0.1, 0.2]):
        in_flight.start("search", number, partial(after, seconds, f"result {number}"), limit, 5.0)
    in_flight.send_off()
    arrivals = arrived(in_flight, 3)
    assert [(arrival.trajectory, arrival.outcome) for arrival in arrivals] == [
        (1, "result 1"),
        (2, "result 2"),
        (0, "result 0"),
    ]
    assert [round(arrival.seconds, 1) for arrival in arrivals] == [0.1, 0.2, 0.3]


def test_five_hundred_starts_make_five_hundred_arrivals() -> None:
    in_flight, limit = InFlight(), asyncio.Semaphore(7)
    for number in range(500):
        in_flight.start("turn" if number % 2 else "search", number, partial(after, 0.0, str(number)), limit, 5.0)
        if number % 3 == 0:
            in_flight.send_off()
    in_flight.send_off()
    arrivals = arrived(in_flight, 500)
    assert sorted(arrival.trajectory for arrival in arrivals) == list(range(500))
    assert all(arrival.outcome == str(arrival.trajectory) for arrival in arrivals)
    assert all((arrival.kind == "turn") == bool(arrival.trajectory % 2) for arrival in arrivals)


def test_what_takes_too_long_or_fails_arrives_as_what_it_raised() -> None:
    async def fail() -> None:
        raise KeyError("a defect")

    in_flight, limit = InFlight(), asyncio.Semaphore(1)
    in_flight.start("search", 0, partial(after, 60.0, "late"), limit, 0.05)
    in_flight.start("search", 1, fail, limit, 5.0)
    in_flight.send_off()
    late, failed = arrived(in_flight, 2)
    assert isinstance(late.outcome, TimedOut) and late.seconds < 5
    assert isinstance(failed.outcome, KeyError), "what waits for its turn has its whole time limit then"


def test_a_cancellation_that_comes_up_inside_the_work_is_its_outcome() -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    in_flight = InFlight()
    in_flight.start("search", 0, cancelled, asyncio.Semaphore(1), 5.0)
    in_flight.send_off()
    (arrival,) = arrived(in_flight, 1)
    assert isinstance(arrival.outcome, asyncio.CancelledError)


@pytest.mark.filterwarnings("error")
def test_nothing_goes_on_after_a_cancel() -> None:
    in_flight, limit, log = InFlight(), asyncio.Semaphore(2), []
    for number in range(8):
        in_flight.start("search", number, partial(after, 0.3, str(number), log), limit, 5.0)
        if number == 5:
            in_flight.send_off()  # two are under way, four wait for the limit, and two are never sent off
    time.sleep(0.05)
    in_flight.cancel()
    run_in_background(after(0.5, "later"), 5.0)
    assert log == [] and in_flight.done() == []
    assert not [task for task in asyncio.all_tasks(background_loop()) if not task.done()]
