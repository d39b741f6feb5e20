"""What the rollout has under way outside its own thread: searches, and turns that a generator elsewhere samples.

All of it runs on one asyncio loop in a thread of its own, and what finishes waits in one queue, so that the rollout
wakes on whichever comes first.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal

from zerosearch.engines import SearchEngine
from zerosearch.http import CLOSE_TIMEOUT_S, background_loop, run_in_background

GRACE_S = 60.0  # beyond the time limit of what is under way, before its loop is taken for dead

ArrivalKind = Literal["search", "turn"]


@dataclass(frozen=True)
class Arrival:
    """What came of a search or a turn: its result, or what it raised; `seconds` from when it was let through."""

    kind: ArrivalKind
    trajectory: int
    outcome: Any
    seconds: float


class TimedOut(Exception):
    """The work took longer than its time limit."""


class InFlight:
    """Searches and turns under way; a result is had by `done` or `wait`, once each."""

    def __init__(self) -> None:
        self.finished: SimpleQueue[Arrival] = SimpleQueue()
        self.to_start: deque[Coroutine[Any, Any, None]] = deque()
        self.tasks: set[asyncio.Task[None]] = set()
        self.longest_timeout_s = 0.0

    def start(
        self,
        kind: ArrivalKind,
        trajectory: int,
        work: Callable[[], Awaitable[Any]],
        limit: asyncio.Semaphore,
        timeout_s: float,
    ) -> None:
        """Queue work for a trajectory. It is under way from the next `send_off`, as soon as `limit` lets it through.

        Work that takes longer than `timeout_s` is given up: its outcome is a `TimedOut`.
        """
        self.longest_timeout_s = max(self.longest_timeout_s, timeout_s)
        self.to_start.append(self._work(kind, trajectory, work, limit, timeout_s))

    def send_off(self) -> None:
        """Start all that is queued; returns at once. To wake the loop costs more than all the rest of a start."""
        if self.to_start:
            background_loop().call_soon_threadsafe(self._start_all)

    def _start_all(self) -> None:
        while self.to_start:
            task = asyncio.get_running_loop().create_task(self.to_start.popleft())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def done(self) -> list[Arrival]:
        """Return what finished since the last call."""
        finished = []
        while True:
            try:
                finished.append(self.finished.get_nowait())
            except Empty:
                return finished

    def wait(self) -> list[Arrival]:
        """Wait until something finishes. Raises `TimedOut` if nothing does within the longest time limit."""
        try:
            return [self.finished.get(timeout=self.longest_timeout_s + GRACE_S), *self.done()]
        except Empty:
            raise TimedOut from None

    def cancel(self) -> None:
        """Stop what is still under way, when the rollout is left by an error."""
        background_loop().call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        while self.to_start:
            self.to_start.popleft().close()
        for task in list(self.tasks):
            task.cancel()

    async def _work(
        self,
        kind: ArrivalKind,
        trajectory: int,
        work: Callable[[], Awaitable[Any]],
        limit: asyncio.Semaphore,
        timeout_s: float,
    ) -> None:
        async with limit:
            start = time.perf_counter()
            outcome: Any
            limit_s = asyncio.timeout(timeout_s)
            try:
                async with limit_s:
                    outcome = await work()
            except Exception as error:
                outcome = TimedOut() if limit_s.expired() else error
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():  # the rollout was left
                    raise
                outcome = error  # came up inside the work: some client's own task was cancelled
            seconds = time.perf_counter() - start
        self.finished.put(Arrival(kind, trajectory, outcome, seconds))


def close_engine(engine: SearchEngine) -> None:
    """Release an engine's connections, on the loop that made them."""
    run_in_background(engine.aclose(), CLOSE_TIMEOUT_S)
