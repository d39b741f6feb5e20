"""Abort when an engine step hangs, which nothing gentler ends once it is stuck below Python.

`faulthandler.dump_traceback_later` has no room for a message, and a process has one such timer, which pytest uses. A
`threading.Timer` a step costs 0.17 ms of it.
"""

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

    The launcher then ends the other ranks.
    """

    def __init__(self, limit_s: float, message: str) -> None:
        self.limit_s, self.message = limit_s, message
        self.deadline = float("inf")
        self.ended = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch one call."""
        self.deadline = time.monotonic() + self.limit_s
        try:
            yield
        finally:
            self.deadline = float("inf")

    def _watch(self) -> None:
        while not self.ended.wait(min(self.limit_s / 4, LONGEST_LOOK_S)):
            if time.monotonic() > self.deadline:
                os.write(STDERR, f"error: {self.message}\n".encode())
                faulthandler.dump_traceback(STDERR)
                os._exit(EXIT_STATUS)
