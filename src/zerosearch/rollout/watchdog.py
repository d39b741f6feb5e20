"""A way out of a call that never comes back, such as a step of an inference engine whose device hangs."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2
EXIT_STATUS = 70  # "internal software error" of sysexits.h
LONGEST_LOOK_S = 5.0


class Watchdog:
    """End the process, with a message and where each thread stood, if one call takes longer than `limit_s`.

    Nothing gentler ends a call that is stuck below Python. The launcher then ends the other ranks.
    """

    def __init__(self, limit_s: float, message: str) -> None:
        self.limit_s, self.message = limit_s, message
        self.since: float | None = None  # when the call under watch began
        self.ended = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch one call."""
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def _watch(self) -> None:
        while not self.ended.wait(min(self.limit_s / 4, LONGEST_LOOK_S)):
            since = self.since
            if since is not None and time.monotonic() - since > self.limit_s:
                os.write(STDERR, f"error: {self.message}\n".encode())
                faulthandler.dump_traceback(STDERR)
                os._exit(EXIT_STATUS)
