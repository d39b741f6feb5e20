"""What a simulator's server is started with, and that nothing of it is left, by processes that misbehave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from http_servers import free_ports

from zerosearch.errors import UserError
from zerosearch.simulator import server as serving
from zerosearch.simulator.server import (
    ServerDied,
    SimulatorServer,
    adapter_arguments,
    cpu_environments,
    gpu_environments,
    simulator_server,
    simulator_servers,
    wait_for_end,
)

pytest_plugins = ("recipe_modules",)  # fixtures


def make_adapter(directory: Path, **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_adapters_are_served_with_room_for_the_highest_rank(tmp_path: Path) -> None:
    low, high = make_adapter(tmp_path / "low", r=4), make_adapter(tmp_path / "high", r=24)
    assert adapter_arguments({}) == ()
    assert adapter_arguments({"a": str(low)}) == (
        *("--enable-lora", "--max-lora-rank", "8"),
        *("--lora-modules", f"a={low}"),
    )
    assert adapter_arguments({"a": str(low), "b": str(high)}) == (
        *("--enable-lora", "--max-lora-rank", "32"),
        *("--lora-modules", f"a={low}", f"b={high}"),
    )


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter"):
        adapter_arguments({"a": str(tmp_path)})
    with pytest.raises(UserError, match="there is no adapter '/none'"):
        adapter_arguments({"a": "/none"})


def test_replicas_get_even_shares_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    assert gpu_environments(1) == [{}]  # all of them, as the environment says
    assert gpu_environments(2) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert [found["CUDA_VISIBLE_DEVICES"] for found in gpu_environments(5)] == ["4", "5", "6", "7", "9"]
    with pytest.raises(UserError, match="6 replicas need as many GPUs, and 5 are visible"):
        gpu_environments(6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpu_environments(2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


def test_replicas_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert "OMP_NUM_THREADS" not in cpu_environments(1, None)[0]  # vLLM's own default
    assert [found["OMP_NUM_THREADS"] for found in cpu_environments(3, None)] == ["2", "2", "2"]
    assert [found["OMP_NUM_THREADS"] for found in cpu_environments(2, 1)] == ["1", "1"]


def test_a_port_in_use_is_refused_before_anything_starts(random_model: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        message = f"cannot serve on 127.0.0.1:{port}"
        with pytest.raises(UserError, match=message), simulator_server(str(random_model), port):
            pass


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=f"there is no model '{folder}'"), simulator_server(str(folder)):
            pass


def test_the_settings_reach_vllm(tmp_path: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tmp_path / "lora", r=8, base_model_name_or_path=str(random_model), peft_type="LORA")
    commands: list[list[str]] = []

    def refuse(command: list[str], env: dict[str, str], **options: object) -> None:
        commands.append(command)
        assert env["VLLM_NO_USAGE_STATS"] == "1" and "TORCHELASTIC_RUN_ID" not in env
        raise OSError("no process today")

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # as launchers do for their ranks

    monkeypatch.setattr(serving, "subprocess", SimpleNamespace(Popen=refuse, PIPE=None))
    for prefix_caching, flag in ((True, "--enable-prefix-caching"), (False, "--no-enable-prefix-caching")):
        with (
            pytest.raises(OSError, match="no process today"),
            simulator_servers(
                str(adapter), 6197, prefix_caching=prefix_caching, max_model_len=99999, vllm_arguments=("--seed", "1")
            ),
        ):
            pass
        command = commands.pop()
        assert flag in command
        assert command[command.index("--host") + 1] == "127.0.0.1"
        assert command[command.index("--model") + 1] == str(random_model)
        assert command[command.index("--lora-modules") + 1] == f"simulator={adapter}"
        assert command[command.index("--max-model-len") + 1] == "8192"  # all that the model takes
        assert command[-4:] == ["--seed", "1", "--port", "6197"]


def running(code: str, tmp_path: Path, name: str = "server", port: int = 1) -> SimulatorServer:
    log_path = tmp_path / f"{name}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(["bash", "-c", code], stdout=log)
    return SimulatorServer(f"http://127.0.0.1:{port}/v1", process, log_path, 0.0)


def test_a_server_that_dies_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    server = running("seq 100; echo out of memory; exit 3", tmp_path)
    with pytest.raises(ServerDied, match=r"exit status 3(.|\n)*100\nout of memory$"):
        serving._wait_until_ready(server, time.monotonic() + 30)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    server = running("echo loading ...; exec sleep 60", tmp_path, port=free_ports())
    with pytest.raises(ServerDied, match=r"was not ready in time:\nloading"):
        serving._wait_until_ready(server, time.monotonic() + 1)
    server.process.kill()


def test_the_last_server_that_dies_ends_the_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    died, later = (running(f"sleep {n}; echo out of memory; exit 3", tmp_path, f"{n}", n) for n in (0, 3))
    with pytest.raises(ServerDied, match=r"exit status 3(.|\n)*out of memory"):
        wait_for_end([later, died])
    (record,) = caplog.records
    assert "out of memory" in record.getMessage() and record.getMessage().endswith(":0/v1; 1 go on")


def group_is_alive(group: int) -> bool:
    """Say whether any process of the group still runs; one that ended and waits to be read does not count."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(line.split()[0]) == group and not line.split()[1].startswith("Z") for line in listed.splitlines())


# Deaf to SIGTERM, with a child that is as deaf.
STUBBORN = "trap '' TERM; (trap '' TERM; sleep 60) & sleep 60"


def test_a_server_that_ignores_sigterm_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SHUTDOWN_S", 0.3)
    with serving._process(["bash", "-c", STUBBORN], {}, "127.0.0.1", 1) as server:
        time.sleep(0.5)
        assert group_is_alive(server.process.pid)
    assert server.process.returncode == -signal.SIGKILL
    assert not group_is_alive(server.process.pid)
    assert not server.log_path.exists()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_server_ends_with_its_owner(ending: signal.Signals) -> None:
    owner = (
        "import os, signal; from zerosearch.simulator.server import _process, exit_on_signals\n"
        f"signal.signal({ending}, signal.SIG_DFL) if {ending} != 9 else None; exit_on_signals()\n"
        "with _process(['bash', '-c', '(sleep 60) & sleep 60'], {}, '127.0.0.1', 1) as server:\n"
        f"    print(server.process.pid, flush=True); os.kill(os.getpid(), {ending}); signal.pause()"
    )
    done = subprocess.run([sys.executable, "-c", owner], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (-ending if ending == signal.SIGKILL else 128 + ending), done.stderr
    deadline = time.monotonic() + 10
    while (alive := group_is_alive(int(done.stdout))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive
