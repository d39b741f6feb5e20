"""Several servers that do the same work: a call goes to the least busy one, and none goes to one that is down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from zerosearch.http import CallFailed

logger = logging.getLogger(__name__)

PROBE_EVERY_S = 5.0


@dataclass
class Replica:
    """One server. `is_down` from the call that failed to the health probe that is answered."""

    url: str
    in_flight: int = 0
    calls: int = 0
    failures: int = 0
    last_failure: str = ""
    is_down: bool = False
    next_probe_s: float = 0.0  # on time.monotonic's clock


class Replicas:
    """Spread calls over servers and keep those that fail out of rotation until they answer `probe` again.

    `probe(url)` raises `CallFailed` for a server that is not well.
    """

    def __init__(self, urls: Sequence[str], probe: Callable[[str], Awaitable[object]]) -> None:
        assert urls
        self.replicas = [Replica(url) for url in urls]
        self.probe = probe
        self._probes: set[asyncio.Task[None]] = set()

    @property
    def down(self) -> list[str]:
        """Return the servers that are out of rotation."""
        return [replica.url for replica in self.replicas if replica.is_down]

    async def pick(self) -> Replica:
        """Return the server in rotation with the fewest calls in flight; probe those whose turn has come.

        With none in rotation, all are probed at once. Raises `CallFailed` if none answers.
        """
        up = [replica for replica in self.replicas if not replica.is_down]
        if not up:
            await asyncio.gather(*(self._probe(replica) for replica in self.replicas))
            up = [replica for replica in self.replicas if not replica.is_down]
            if not up:
                raise CallFailed(f"no answer to a health probe either, after: {self.replicas[0].last_failure}")
        for replica in self.replicas:
            if replica.is_down and time.monotonic() >= replica.next_probe_s:
                replica.next_probe_s = time.monotonic() + PROBE_EVERY_S
                task = asyncio.create_task(self._probe(replica))  # meanwhile the others work
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)
        return min(up, key=lambda replica: (replica.in_flight, replica.calls))

    @contextmanager
    def calling(self, replica: Replica) -> Iterator[None]:
        """Count a call to `replica` as in flight; a failure that shows it to be down takes it out of rotation."""
        replica.in_flight += 1
        replica.calls += 1
        try:
            yield
        except CallFailed as failure:
            if failure.may_pass and failure.status != 429:  # 429: it is well, and busy
                self._take_out(replica, failure)
            raise
        finally:
            replica.in_flight -= 1

    def _take_out(self, replica: Replica, failure: CallFailed) -> None:
        replica.failures += 1
        replica.last_failure = str(failure)
        replica.next_probe_s = time.monotonic() + PROBE_EVERY_S
        if not replica.is_down:
            replica.is_down = True
            logger.warning("%s is taken out of rotation: %s", replica.url, failure)

    async def aclose(self) -> None:
        """Stop the probes under way."""
        for task in list(self._probes):
            if task.get_loop() is asyncio.get_running_loop():
                task.cancel()

    async def _probe(self, replica: Replica) -> None:
        try:
            await self.probe(replica.url)
        except CallFailed:
            replica.next_probe_s = time.monotonic() + PROBE_EVERY_S
            return
        if replica.is_down:
            replica.is_down = False
            logger.warning("%s answers again", replica.url)
