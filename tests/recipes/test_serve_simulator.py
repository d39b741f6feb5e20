"""A simulator brought up, asked and taken down: by a real vLLM where it counts, else by processes that misbehave."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from http_servers import free_ports
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerosearch.engines import SearchError, SearchRequest
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.protocol import split_documents
from zerosearch.simulator import server as serving
from zerosearch.simulator.server import ServerDied, SimulatorServer, simulator_server, simulator_servers

pytest_plugins = ("recipe_modules",)  # fixtures

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/serve_simulator.py"


@pytest.fixture
def free_port() -> int:
    return free_ports()


def group_is_alive(group: int) -> bool:
    """Say whether any process of the group still runs; one that ended and waits to be read does not count."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(line.split()[0]) == group and not line.split()[1].startswith("Z") for line in listed.splitlines())


def test_a_taken_port_is_refused_before_anything_starts(random_model: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"cannot serve on 127.0.0.1:{port}"),
            simulator_server(str(random_model), port),
        ):
            pass


def test_a_model_that_is_not_there_is_refused(tmp_path: Path, free_port: int) -> None:
    with pytest.raises(UserError, match="holds no model"), simulator_server(str(tmp_path), free_port):
        pass
    missing = tmp_path / "missing"
    with pytest.raises(UserError, match="is no folder here"), simulator_server(str(missing), free_port):
        pass


@pytest.mark.parametrize(
    ("flags", "message"), [([], "FOLDER holds no model"), (["--max_model_len", "0"], "max_model_len is 0: it must be")]
)
def test_the_recipe_names_a_mistake_in_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    command = [sys.executable, str(RECIPE), "--model", str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {message.replace('FOLDER', str(tmp_path))}")
    assert "Traceback" not in done.stderr


# Deaf to SIGTERM, with a child that is as deaf.
STUBBORN = "trap '' TERM; (trap '' TERM; sleep 60) & echo started; wait"


def test_what_does_not_end_when_asked_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SHUTDOWN_S", 0.3)
    process = subprocess.Popen(["bash", "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    assert group_is_alive(process.pid)
    serving._end_group(process)
    assert process.returncode == -signal.SIGKILL
    assert not group_is_alive(process.pid)
    process.stdout.close()


def test_a_server_that_dies_is_reported_with_its_last_lines(tmp_path: Path, free_port: int) -> None:
    log_path = tmp_path / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(["bash", "-c", "seq 100; echo out of memory; exit 3"], stdout=log)
    with pytest.raises(ServerDied, match=r"exit status 3(.|\n)*100\nout of memory$"):
        serving._wait_until_ready("127.0.0.1", free_port, process, log_path, timeout_s=30)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, free_port: int) -> None:
    log_path = tmp_path / "server.log"
    log_path.write_text("loading ...\n")
    with subprocess.Popen(["sleep", "60"]) as process:
        with pytest.raises(ServerDied, match=r"not ready after 1 s:\nloading"):
            serving._wait_until_ready("127.0.0.1", free_port, process, log_path, timeout_s=1)
        process.kill()


@pytest.fixture(scope="module")
def server(random_model: Path) -> Iterator[SimulatorServer]:
    with simulator_server(
        str(random_model), free_ports(), max_model_len=1024, dtype="float32", num_threads=1
    ) as running:
        yield running


def search(engine: SimulatedEngine, *requests: SearchRequest) -> list[tuple[str, ...]]:
    async def run() -> list[tuple[str, ...]]:
        try:
            return [result.documents for result in await asyncio.gather(*map(engine.search, requests))]
        finally:
            await engine.aclose()

    return asyncio.run(run())


@pytest.mark.slow
def test_a_served_simulator_answers_many_searches_and_repeats_itself_by_key(server: SimulatorServer) -> None:
    engine = SimulatedEngine(server.base_url, max_tokens=40)
    engine.check()
    # Long enough that their prompts do not fit into one batch: with "chunked prefill" the seeds would end the server.
    requests = [
        SearchRequest(f"Emma {row} " * 90, "Who wrote Emma?", ("Jane Austen",), p_noise=0.5, key=(0, 1, row, 0, 0))
        for row in range(48)
    ]
    replies = search(engine, *requests)
    assert all(documents for documents in replies)
    assert len(set(replies)) == 48  # each key its own seed
    assert search(engine, requests[0]) == search(engine, requests[0])
    assert server.process.poll() is None


@pytest.mark.slow
def test_a_reply_that_cannot_fit_is_refused_in_words(server: SimulatorServer) -> None:
    engine = SimulatedEngine(server.base_url, max_tokens=2000)
    with pytest.raises(SearchError, match=r"attempt 1 of 6: HTTP status 400.*2000"):
        search(engine, SearchRequest("q", "Q?", ("a",), key=(1,)))


@pytest.fixture(scope="module")
def adapter(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes what the random model writes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(random_model)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False))
    directory = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(directory)
    return directory


def greedy_of_peft(adapter: Path, base: Path, prompt: str, num_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_replicas_of_an_adapter_share_the_work_and_outlive_one_of_them(adapter: Path, random_model: Path) -> None:
    options = {"max_model_len": 512, "dtype": "float32", "num_threads": 1}
    first = free_ports(2)
    with simulator_servers(str(adapter), first, replicas=2, **options) as servers:
        assert [server.base_url for server in servers] == [f"http://127.0.0.1:{first + n}/v1" for n in range(2)]
        engine = SimulatedEngine(
            [server.base_url for server in servers], template="{query}", temperature=0.0, max_tokens=12
        )
        engine.check()
        assert engine.model == "simulator"  # the adapter, which is listed after its base
        expected = split_documents(greedy_of_peft(adapter, random_model, "Emma author", 12), 5)
        requests = [SearchRequest("Emma author", "Q?", ("a",), key=(row,)) for row in range(8)]
        assert search(engine, *requests) == [expected] * 8
        assert engine.account.sent == 16  # each search was short, and asked for again

        os.killpg(servers[0].process.pid, signal.SIGKILL)
        servers[0].process.wait()
        assert search(engine, *requests) == [expected] * 8
        assert engine.account.retries >= 8  # every call that was first sent to the dead one


@pytest.mark.slow
def test_nothing_is_left_when_the_block_ends(random_model: Path, free_port: int) -> None:
    options = {"max_model_len": 512, "dtype": "float32", "num_threads": 1}
    with pytest.raises(ZeroDivisionError), simulator_server(str(random_model), free_port, **options) as running:
        children = subprocess.run(
            ["pgrep", "-g", str(running.process.pid)], capture_output=True, text=True, check=True
        )
        assert len(children.stdout.split()) >= 2  # the server and its engine
        raise ZeroDivisionError
    assert not group_is_alive(running.process.pid)
    assert not running.log_path.exists()
    serving.check_port_free("127.0.0.1", free_port)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_the_recipe_says_when_it_is_ready_and_ends_with_a_signal(
    ending: signal.Signals, random_model: Path, free_port: int
) -> None:
    command = [sys.executable, str(RECIPE), "--model", str(random_model), "--port", str(free_port)]
    command += ["--max_model_len", "512", "--dtype", "float32", "--num_threads", "1"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    # Under nohup the tests ignore SIGHUP, and so would the recipe.
    with subprocess.Popen(command, preexec_fn=lambda: signal.signal(ending, signal.SIG_DFL), **streams) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        ready = next(line for line in lines if "ready" in line)
        assert ready.startswith(f"simulator ready at http://127.0.0.1:{free_port}/v1 after ")
        SimulatedEngine(f"http://127.0.0.1:{free_port}/v1").check()
        group = int(
            subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[0]
        )
        process.send_signal(ending)
        assert process.wait(timeout=60) == 128 + ending
    assert not group_is_alive(group)


@pytest.mark.slow
def test_the_recipe_ends_with_the_servers_last_words_when_it_dies(random_model: Path, free_port: int) -> None:
    command = [sys.executable, str(RECIPE), "--model", str(random_model), "--port", str(free_port)]
    done = subprocess.run([*command, "--no-such-flag", "1"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "the simulator's server died" in done.stderr and "--no-such-flag" in done.stderr
    os.unlink(done.stderr.split("its output: ")[1].split(")")[0])
