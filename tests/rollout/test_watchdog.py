"""A call that never comes back ends the process, and says where it stood."""

from __future__ import annotations

import subprocess
import sys
import time

from zerosearch.rollout.watchdog import EXIT_STATUS, Watchdog

STUCK = """
import ctypes
from zerosearch.rollout.watchdog import Watchdog

def stuck_below_python():
    ctypes.CDLL(None).sleep(60)

with Watchdog(0.5, "the engine hangs; restart it") as watchdog:
    with watchdog.watching():
        pass
    with watchdog.watching():
        stuck_below_python()
"""


def test_a_call_that_never_comes_back_ends_the_process_and_says_where() -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_STATUS
    assert "error: the engine hangs; restart it" in done.stderr
    assert "in stuck_below_python" in done.stderr
    assert time.monotonic() - start < 30


def test_nothing_happens_between_calls_and_after_them() -> None:
    with Watchdog(0.1, "") as watchdog:
        for _ in range(5):
            with watchdog.watching():
                time.sleep(0.05)
        time.sleep(0.2)
    time.sleep(0.2)
