"""What a simulator's server is started with, and that nothing of it is left, by processes that misbehave."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from searching import wait_until

from zerosearch import stages
from zerosearch.errors import UserError
from zerosearch.simulator import server as serving
from zerosearch.simulator.server import SimulatorServer, cpu_environment, model_arguments, simulator_server


def make_adapter(directory: Path, **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    return directory


@pytest.mark.parametrize(("rank", "room"), [(4, "8"), (24, "32"), (600, "600")])
def test_an_adapter_is_served_over_its_base_with_room_for_its_rank(tmp_path: Path, rank: int, room: str) -> None:
    adapter = make_adapter(tmp_path / "a", r=rank, base_model_name_or_path="someone/base")
    assert model_arguments(str(adapter)) == [
        *("--model", "someone/base", "--enable-lora", "--max-lora-rank", room),
        *("--lora-modules", f"simulator={adapter}"),
    ]
    with pytest.raises(UserError, match=r"--lora-modules would replace the adapter .*serve its base, someone/base"):
        model_arguments(str(adapter), ["--lora-modules", "google=elsewhere"])


def test_a_server_on_a_cpu_uses_as_many_threads_as_it_is_given_and_no_core_to_wait() -> None:
    environment = cpu_environment(2)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_what_cannot_be_served_is_refused_before_anything_starts(random_model: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=f"there is no model '{folder}'"), simulator_server(str(folder)):
            pass
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        message = f"cannot serve on 127.0.0.1:{port}"
        with pytest.raises(UserError, match=message), simulator_server(str(random_model), port):
            pass


def test_the_settings_reach_vllm(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def refuse(command: list[str], env: dict[str, str], **options: object) -> None:
        commands.append(command)
        assert env["DO_NOT_TRACK"] == "1" and "TORCHELASTIC_RUN_ID" not in env
        raise OSError("no process today")

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # as launchers do for their ranks
    monkeypatch.setattr(serving, "subprocess", SimpleNamespace(Popen=refuse, PIPE=None))
    settings = {"max_model_len": 99999, "dtype": "float32", "vllm_arguments": ("--seed", "1")}
    with pytest.raises(OSError, match="no process today"), simulator_server(str(random_model), 0, **settings):
        pass
    (command,) = commands
    given = {name: command[command.index(name) + 1] for name in ("--host", "--model", "--dtype", "--max-model-len")}
    # The longest that the model takes.
    assert list(given.values()) == ["127.0.0.1", str(random_model), "float32", "8192"]
    assert int(command[command.index("--port") + 1]) > 0
    assert command[-2:] == ["--seed", "1"] and "--enable-tokenizer-info-endpoint" in command


def running(code: str, tmp_path: Path) -> SimulatorServer:
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(["bash", "-c", code], stdout=log)
    return SimulatorServer("http://127.0.0.1:1/v1", process, tmp_path / "server.log")


def test_a_server_that_dies_shows_its_last_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = running("seq 100; printf 'out of \\033[2Jmemory'; exit 3", tmp_path)
    with pytest.raises(UserError, match=rf"server died \(exit status 3\); its whole output is in {server.log_path}"):
        serving._wait_until_ready(server, time.monotonic() + 30)
    shown = caplog.text.split()
    assert "87" in shown and "86" not in shown and "\\x1b[2Jmemory" in shown


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = running("echo loading ...; exec sleep 60", tmp_path)
    with pytest.raises(UserError, match="was not ready in time"):
        serving._wait_until_ready(server, time.monotonic() + 0.5)
    assert "loading ..." in caplog.text
    server.process.kill()


def group_is_alive(group: int) -> bool:
    """Say whether any process of the group still runs; one that ended and waits to be read does not count."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(line.split()[0]) == group and not line.split()[1].startswith("Z") for line in listed.splitlines())


# Deaf to SIGTERM, with a child that is as deaf.
STUBBORN = "trap '' TERM; (trap '' TERM; sleep 60) & sleep 60"


def test_a_server_that_ignores_sigterm_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SHUTDOWN_S", 0.3)
    with serving._process(["bash", "-c", STUBBORN], {}, "http://127.0.0.1:1/v1") as server:
        time.sleep(0.5)
        assert group_is_alive(server.process.pid)
    assert server.process.returncode == -signal.SIGKILL
    wait_until(lambda: not group_is_alive(server.process.pid), 10)  # on a busy machine a kill takes a moment
    assert not server.log_path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_server_ends_with_its_owner(ending: signal.Signals) -> None:
    owner = (
        "import os, signal, threading; from zerosearch.simulator.server import _process, exit_on_signals\n"
        f"signal.signal({ending}, signal.SIG_DFL) if {ending} != 9 else None; exit_on_signals()\n"
        "with _process(['bash', '-c', '(sleep 60) & sleep 60'], {}, 'http://127.0.0.1:1/v1') as server:\n"
        "    print(server.process.pid, flush=True)\n"
        f"    threading.Timer(0.2, os.kill, (os.getpid(), {ending})).start(); server.wait()"
    )
    done = subprocess.run([sys.executable, "-c", owner], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (-ending if ending == signal.SIGKILL else 128 + ending), done.stderr
    wait_until(lambda: not group_is_alive(int(done.stdout)), 10)
