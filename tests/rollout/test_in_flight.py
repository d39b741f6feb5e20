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


def test_what_takes_too_long_or_fails_arrives_as_what_it_raised() -> None:
    async def fail() -> None:
        raise KeyError("a defect")

    in_flight = InFlight({"search": (1, 0.05)})
    in_flight.start("search", 0, partial(after, 60.0, "late"))
    in_flight.start("search", 1, fail)
    in_flight.send_off()
    late, failed = arrived(in_flight, 2)
    assert isinstance(late.outcome, TimedOut) and late.seconds < 5
    assert isinstance(failed.outcome, KeyError), "what waits for its turn has its whole time limit then"
    run_in_background(asyncio.sleep(0), 5.0)
    assert not in_flight.tasks, "a run of days keeps no task that has ended"


def test_the_longest_time_limit_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerosearch.rollout.in_flight.GRACE_S", 0.05)
    in_flight = InFlight({"search": (1, 0.05), "turn": (1, 30.0)})
    in_flight.start("turn", 0, partial(after, 0.5, "a long turn"))
    in_flight.send_off()
    assert [arrival.outcome for arrival in arrived(in_flight, 1)] == ["a long turn"]


@pytest.mark.filterwarnings("error")
def test_nothing_goes_on_after_a_cancel() -> None:
    in_flight, log = InFlight({"search": (2, 5.0)}), []
    for number in range(8):
        in_flight.start("search", number, partial(after, 0.3, str(number), log))
        if number == 5:
            in_flight.send_off()  # two are under way, four wait for the limit, and two are never sent off
            run_in_background(asyncio.sleep(0), 5.0)
    time.sleep(0.05)
    in_flight.cancel()
    run_in_background(after(0.5, "later"), 5.0)
    assert log == [] and in_flight.done() == []
    assert not [task for task in asyncio.all_tasks(background_loop()) if not task.done()]
