"""A simulator served by a real vLLM: its replies, its replicas, and how the recipe ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from http_servers import free_ports
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerosearch.engines import SearchError, SearchRequest
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.protocol import split_documents
from zerosearch.simulator import server as serving
from zerosearch.simulator.server import SimulatorServer, simulator_server, simulator_servers

pytest_plugins = ("recipe_modules",)  # fixtures

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/serve_simulator.py"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Give the signals back that a recipe in this process takes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "there is no model '{folder}'"),
        (["--max_model_len", "0"], "max_model_len is 0: it must be at least 1"),
        (["--replicas", "0"], "replicas is 0: it must be at least 1"),
        (["--adapter", "google"], "--adapter is 'google': it must be name=folder"),
    ],
)
def test_a_mistake_gets_one_sentence(
    tmp_path: Path, flags: list[str], message: str, refusal: Callable[[str, list[str]], str]
) -> None:
    assert message.format(folder=tmp_path) in refusal("serve_simulator", ["--model", str(tmp_path), *flags])


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
    with (
        pytest.raises(ZeroDivisionError),
        simulator_servers(str(adapter), first, replicas=2, **options) as servers,
    ):
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
        engines = subprocess.run(["pgrep", "-g", str(servers[1].process.pid)], capture_output=True, text=True)
        assert len(engines.stdout.split()) >= 2  # the server and its engine
        raise ZeroDivisionError
    for server in servers:
        assert not group_is_alive(server.process.pid)
        serving.check_port_free("127.0.0.1", int(server.base_url.split(":")[2].split("/")[0]))
    assert not servers[1].log_path.exists()


def group_is_alive(group: int) -> bool:
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(line.split()[0]) == group and not line.split()[1].startswith("Z") for line in listed.splitlines())


@pytest.mark.slow
def test_the_recipe_says_when_it_is_ready_and_ends_with_a_signal(random_model: Path) -> None:
    port = free_ports()
    command = [sys.executable, str(RECIPE), "--model", str(random_model), "--port", str(port)]
    command += ["--max_model_len", "512", "--dtype", "float32", "--num_threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        ready = next(line for line in iter(process.stdout.readline, "") if "ready" in line)
        assert ready.startswith(f"simulator ready at http://127.0.0.1:{port}/v1 after ")
        SimulatedEngine(f"http://127.0.0.1:{port}/v1").check()
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        group = int(children.stdout.split()[0])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not group_is_alive(group)


@pytest.mark.slow
def test_the_recipe_ends_with_the_servers_last_words_when_it_dies(
    load_recipe: Callable[[str], Any], random_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_recipe("serve_simulator").main(
            ["--model", str(random_model), "--port", str(free_ports()), "--no-such-flag", "1"]
        )
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "the simulator's server died" in error and "--no-such-flag" in error
    os.unlink(error.split("its output: ")[1].split(")")[0])
