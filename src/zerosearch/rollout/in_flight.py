"""What the rollout has under way outside its own thread: searches, and turns that a generator elsewhere samples.

All of it runs on one asyncio loop in a thread of its own, and what finishes waits in one queue, so that the rollout
wakes on whichever comes first.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Literal

from zerosearch.engines import SearchEngine, SearchError, SearchResult
from zerosearch.http import CLOSE_TIMEOUT_S, background_loop, run_in_background
from zerosearch.text import clean_text

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
    """Searches and turns under way: `limits` says how many of each kind at once, and how many seconds each may take.

    A result is had by `done` or `wait`, once each.
    """

    def __init__(self, limits: Mapping[ArrivalKind, tuple[int, float]]) -> None:
        self.slots = {kind: asyncio.Semaphore(number) for kind, (number, _) in limits.items()}
        self.timeouts_s = {kind: timeout_s for kind, (_, timeout_s) in limits.items()}
        self.finished: SimpleQueue[Arrival] = SimpleQueue()
        self.to_start: deque[Coroutine[Any, Any, None]] = deque()
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self, kind: ArrivalKind, trajectory: int, work: Callable[[], Awaitable[Any]]) -> None:
        """Queue work for a trajectory. It is under way from the next `send_off`, as soon as there is room for it.

        Work that takes longer than its time limit is given up: its outcome is a `TimedOut`.
        """
        self.to_start.append(self._work(kind, trajectory, work))

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
        return [self.finished.get_nowait() for _ in range(self.finished.qsize())]

    def wait(self) -> list[Arrival]:
        """Wait until something finishes. Raises `TimedOut` if nothing does within the longest time limit."""
        try:
            return [self.finished.get(timeout=max(self.timeouts_s.values()) + GRACE_S), *self.done()]
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

    async def _work(self, kind: ArrivalKind, trajectory: int, work: Callable[[], Awaitable[Any]]) -> None:
        async with self.slots[kind]:
            start = time.perf_counter()
            outcome: Any
            limit_s = asyncio.timeout(self.timeouts_s[kind])
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


def search_outcome(outcome: Any, engine: str, timeout_s: float) -> SearchResult | SearchError:
    """Return what came of a search, its texts clean; what an engine should not have done is a failed search."""
    if isinstance(outcome, SearchError):
        return outcome
    if isinstance(outcome, SearchResult) and _are_texts(outcome.documents) and _are_texts(outcome.titles):
        documents, titles = (tuple(map(clean_text, texts)) for texts in (outcome.documents, outcome.titles))
        return replace(outcome, documents=documents, titles=titles)
    if isinstance(outcome, TimedOut):
        return SearchError(f"the engine {engine} gave no reply within {timeout_s:g} s")
    did = f"returned {outcome!r:.80}"
    if isinstance(outcome, BaseException):
        did = f"raised {type(outcome).__name__}: {outcome}"
    return SearchError(
        f"the engine {engine} {did}; a search returns a SearchResult with texts, or raises SearchError once it has "
        "failed for good"
    )


def _are_texts(found: Any) -> bool:
    return isinstance(found, list | tuple) and all(isinstance(text, str) for text in found)


def close_engine(engine: SearchEngine) -> None:
    """Release an engine's connections, on the loop that made them."""
    run_in_background(engine.aclose(), CLOSE_TIMEOUT_S)
