"""What a simulator's server is started with: adapters, replicas, and their share of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from zerosearch.errors import UserError
from zerosearch.simulator import server as serving
from zerosearch.simulator.server import (
    ServerDied,
    SimulatorServer,
    adapter_arguments,
    base_of_adapter,
    cpu_places,
    gpu_places,
    is_adapter,
    simulator_servers,
    wait_for_end,
)


def make_adapter(directory: Path, **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_a_folder_with_an_adapter_alone_is_one(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "lora", r=8, base_model_name_or_path="some/base")
    assert is_adapter(str(adapter))
    assert base_of_adapter(str(adapter)) == "some/base"
    (adapter / "config.json").write_text("{}")  # merged: a model of its own
    assert not is_adapter(str(adapter))
    assert not is_adapter("some/base")


def test_an_adapter_that_names_no_base_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "lora", r=8)
    with pytest.raises(UserError, match="does not say which model it was tuned over"):
        base_of_adapter(str(adapter))


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


def test_replicas_get_even_shares_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    assert gpu_places(1) == [{}]  # all of them, as the environment says
    assert gpu_places(2) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in gpu_places(5)] == ["4", "5", "6", "7", "9"]
    with pytest.raises(UserError, match="6 replicas need as many GPUs, and 5 are visible"):
        gpu_places(6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpu_places(2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


def test_replicas_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert "OMP_NUM_THREADS" not in cpu_places(1, None)[0]  # vLLM's own default
    assert [place["OMP_NUM_THREADS"] for place in cpu_places(3, None)] == ["2", "2", "2"]
    assert [place["OMP_NUM_THREADS"] for place in cpu_places(2, 1)] == ["1", "1"]


def test_no_replica_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="replicas is 0"), simulator_servers(str(tmp_path), replicas=0):
        pass


def running(seconds: float, tmp_path: Path) -> SimulatorServer:
    log_path = tmp_path / f"{seconds}.log"
    with log_path.open("wb") as log:
        code = f"import time; time.sleep({seconds}); print('out of memory'); raise SystemExit(3)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=log)
    return SimulatorServer(f"http://localhost/{seconds}", process, log_path, 0.0)


def test_the_end_has_come_when_the_last_server_died(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServerDied, match=r"exit status 3(.|\n)*out of memory"):
        wait_for_end([running(3.0, tmp_path), running(0.0, tmp_path)])
    (record,) = caplog.records
    assert "out of memory" in record.getMessage() and record.getMessage().endswith("/0.0; 1 go on")


def test_prefix_caching_and_adapters_reach_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tmp_path / "lora", r=8, base_model_name_or_path="some/base")
    commands: list[list[str]] = []

    def refuse(command: list[str], **options: object) -> None:
        commands.append(command)
        raise OSError("no process today")

    monkeypatch.setattr(
        serving, "subprocess", SimpleNamespace(Popen=refuse, DEVNULL=None, TimeoutExpired=TimeoutError)
    )
    monkeypatch.setattr(serving, "model_context_tokens", lambda model: {"some/base": 2048}[model])
    for prefix_caching, flag in ((True, "--enable-prefix-caching"), (False, "--no-enable-prefix-caching")):
        with (
            pytest.raises(OSError, match="no process today"),
            simulator_servers(str(adapter), 6197, prefix_caching=prefix_caching, vllm_arguments=("--seed", "1")),
        ):
            pass
        command = commands.pop()
        assert flag in command
        assert command[command.index("--model") + 1] == "some/base"
        assert command[command.index("--lora-modules") + 1] == f"simulator={adapter}"
        assert command[command.index("--max-model-len") + 1] == "2048"
        assert command[-4:] == ["--seed", "1", "--port", "6197"]
