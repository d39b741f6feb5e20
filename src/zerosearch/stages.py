"""Run programs as stages of one command: a log and a line for each, an error with its last lines, none left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from zerosearch.errors import UserError
from zerosearch.text import printable

LAST_LINES = 15
SHUTDOWN_S = 15.0  # vLLM closes within a second or two; what then remains is killed


class Stages:
    """Run Python scripts from the folder `root`; their output goes to the folder `logs`.

    Leaving the `with` block ends the stages that other threads still run, with everything they started.
    """

    def __init__(self, logs: Path, root: Path) -> None:
        self.logs, self.root = logs, root
        self.logs.mkdir(exist_ok=True)
        self.started = time.monotonic()
        self.running: set[subprocess.Popen[str]] = set()

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in list(self.running):
            end_group(process)

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", flush=True)

    def run(
        self,
        title: str,
        *command: object,
        status: Callable[[str], str | None] | None = None,
        makes: Path | None = None,
    ) -> float:
        """Run a script and return its seconds; what `status` makes of a line of its output is printed.

        Where the file it writes last, `makes`, is there already, it is passed over.
        Raises `UserError` if it fails, after printing its last lines.
        """
        if makes is not None and makes.exists():
            self.say(f"{title} (done before)")
            return 0.0
        log_path = self.logs / f"{title.replace(' ', '-')}.log"
        started = time.monotonic()
        with (
            log_path.open("w", encoding="utf-8") as log,
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=self.root,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # a group of its own: what it starts is ended with it
            ) as process,
        ):
            self.running.add(process)
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    progress = status(line) if status else None
                    if progress:
                        self.say(f"  {progress}")
            except BaseException:  # a signal, say: leaving the block would wait for the script's own end
                end_group(process)
                raise
            finally:
                self.running.discard(process)
        if process.returncode:
            last_lines = log_path.read_text(encoding="utf-8").rstrip("\n").split("\n")[-LAST_LINES:]
            print("\n".join(map(printable, last_lines)), file=sys.stderr)
            raise UserError(f"{title} failed with exit status {process.returncode}; its whole output is in {log_path}")
        seconds = time.monotonic() - started
        self.say(f"{title} ({seconds:.0f} s)")
        return seconds


def training_status(every: int, done: int = 0) -> Callable[[str], str | None]:
    """Return what turns a step in the trainer's log, one in `every`, into a line of ours.

    `done`: the steps of the checkpoint that a run goes on from.
    """
    steps = count(done + 1)

    def status(line: str) -> str | None:
        values = {name: float(value) for name, value in re.findall(r"'([\w/]+)': '?(-?[\d.]+(?:e-?\d+)?)", line)}
        if "reward" not in values or (step := next(steps)) % every:
            return None
        searches, noise = values["search/searches"], values["search/p_noise"]
        return f"step {step:>3}: reward {values['reward']:.2f}, {searches:.1f} searches a question, noise {noise:.2f}"

    return status


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ask a process group to end, and kill what is left of it after a while."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SHUTDOWN_S)
    finally:  # also where a second signal ends the wait
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
