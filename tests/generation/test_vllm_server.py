"""Turns of a vLLM server: what is asked, what is read, what fails, and that a real one samples what the others do."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import isawaitable
from pathlib import Path
from typing import Any

import pytest
import requests
from aiohttp import web
from generation_parts import (
    largest_difference,
    listens_beyond_loopback,
    load,
    move_adapter,
    roll_out,
    sample_remotely,
    turn_difference,
)
from http_servers import Server, free_ports, response_of
from peft import LoraConfig
from rain import RainEngine, rain_trainer
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from zerosearch.generation import GenerationError, RemoteGenerator, SampledTurn, Sampling, TurnRequest
from zerosearch.generation.vllm_server import VLLMServerGenerator, read_turn, serve_arguments, serve_command


@dataclass
class CompletionServer(Server):
    """As much of vLLM's server as a generator talks to; `reply(body)` is what a completion request gets."""

    reply: Callable[[dict[str, Any]], Any] = lambda body: completion([5])
    logprobs_mode: str = "raw_logprobs"

    def __post_init__(self) -> None:
        self.answer = self.completions

    async def completions(self, place: int) -> Any:
        reply = self.reply(self.requests[place])
        reply = await reply if isawaitable(reply) else reply
        return reply if isinstance(reply, tuple) else (200, reply)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return response_of(200, {"object": "list", "data": [{"id": "policy", "max_model_len": 512}]})
        if request.path == "/server_info":
            assert request.query["config_format"] == "json"
            return response_of(200, {"vllm_config": {"model_config": {"logprobs_mode": self.logprobs_mode}}})
        return await super().handle(request)


def completion(ids: list[int], reason: str = "stop", stop_reason: Any = "</answer>") -> dict[str, Any]:
    logprobs = {"token_logprobs": [-0.25 * place for place in range(len(ids))]}
    choice = {"token_ids": ids, "logprobs": logprobs, "finish_reason": reason, "stop_reason": stop_reason}
    return {"choices": [choice]}


def make(url: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> VLLMServerGenerator:
    return VLLMServerGenerator(url, tokenizer, 4096, **{"max_retries": 1, **options})


def test_a_turn_is_asked_for_by_its_ids_and_read_as_sampled(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with CompletionServer(reply=lambda body: completion([5, 6, 7])).running() as server:
        generator = make(server.url + "/", tiny_tokenizer)
        assert isinstance(generator, RemoteGenerator)
        server.logprobs_mode = "processed_logprobs"
        turns = sample_remotely(generator, [TurnRequest(3, (1, 2), 40, seed=2**53 - 1)], Sampling(0.7, 0.9))
        assert generator.max_context_tokens == 512, "what the server takes"
    assert turns == {3: SampledTurn(3, [5, 6, 7], [-0.0, -0.25, -0.5], "stop")}
    assert server.requests == [
        {
            "model": "policy",
            "prompt": [1, 2],
            "max_tokens": 40,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 2**53 - 1,
            "stop": ["</search>", "</answer>"],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
    ]


@pytest.mark.parametrize(
    ("reason", "stop_reason", "finish"),
    [("stop", "</search>", "stop"), ("stop", None, "eos"), ("stop", 7, "eos"), ("length", None, "length")],
)
def test_how_a_turn_ended(reason: str, stop_reason: Any, finish: str) -> None:
    assert read_turn(completion([1], reason, stop_reason), 0).finish == finish


@pytest.mark.parametrize("ids", [[-1], ["a"], [1.5], [None], [True]])
def test_a_turn_of_anything_but_ids_is_none(ids: list[Any]) -> None:
    with pytest.raises(TypeError):  # which the client takes for a reply of another form
        read_turn(completion(ids), 0)
    reply = completion([1])
    reply["choices"][0]["logprobs"]["token_logprobs"] = [None]
    with pytest.raises(TypeError):
        read_turn(reply, 0)


def test_turns_of_all_trajectories_are_under_way_at_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    forty = asyncio.Barrier(40)

    async def reply(body: dict[str, Any]) -> Any:
        await asyncio.wait_for(forty.wait(), 30)
        return completion([5])

    with CompletionServer(reply=reply).running() as server:
        requests = [TurnRequest(number, (1,), 4, seed=number) for number in range(40)]
        turns = sample_remotely(make(server.url, tiny_tokenizer), requests)
    assert sorted(turns) == list(range(40))


def test_a_turn_that_fails_on_its_way_is_asked_for_again(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    replies = [(503, "overloaded"), completion([5])]
    with CompletionServer(reply=lambda body: replies.pop(0)).running() as server:
        turns = sample_remotely(make(server.url, tiny_tokenizer), [TurnRequest(0, (1,), 4, seed=11)])
    assert turns[0].token_ids == [5]
    assert [body["seed"] for body in server.requests] == [11, 11]


@pytest.mark.parametrize(
    ("reply", "message", "attempts"),
    [
        (lambda body: (400, "no memory left"), "HTTP status 400: no memory left", 1),  # final
        (lambda body: (500, "no memory left"), "HTTP status 500: no memory left", 2),
        (lambda body: {"choices": [{"text": "no ids"}]}, "its reply is not of the form expected", 2),
        (lambda body: completion([1, 2], "abort", None), "it gave the turn up: 2 tokens, finish_reason 'abort'", 2),
        (lambda body: completion([], "stop", None), "it gave the turn up: 0 tokens", 2),
    ],
)
def test_a_server_that_fails_for_good_is_named_with_its_remedy(
    reply: Callable[[Any], Any], message: str, attempts: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with (
        CompletionServer(reply=reply).running() as server,
        pytest.raises(GenerationError, match=rf"the vLLM server at {server.url}.*{message}") as caught,
    ):
        sample_remotely(make(server.url, tiny_tokenizer), [TurnRequest(0, (1,), 4, seed=0)])
    assert len(server.requests) == attempts
    assert serve_command(server.url, gpu=False) in str(caught.value)


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.0, 0.9)])
def test_log_probabilities_of_another_distribution_are_refused(
    sampling: Sampling, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with (
        CompletionServer().running() as server,
        pytest.raises(GenerationError, match=r"reports raw_logprobs, .*--logprobs-mode processed_logprobs"),
    ):
        sample_remotely(make(server.url, tiny_tokenizer), [TurnRequest(0, (1,), 4, seed=0)], sampling)
    assert server.requests == []


def test_no_server_at_all_is_said_before_the_rollout(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    generator = make("http://127.0.0.1:9", tiny_tokenizer, max_retries=0)
    with pytest.raises(GenerationError, match=r"the vLLM server at http://127.0.0.1:9.*failed.*start it again"):
        roll_out(generator, count=1)


TRAINING_SCRIPT = """
import sys
from pathlib import Path
from rain import RainEngine, rain_trainer

policy, output, url = sys.argv[1:]
class Engine(RainEngine):
    async def search(self, request):
        Path(output, f"step-{request.key[1]}").touch()
        return await super().search(request)

rain_trainer(
    policy, output, Engine(), use_vllm=True, vllm_mode="server", vllm_server_base_url=url, max_steps=10_000,
    per_device_train_batch_size=8, learning_rate=1e-3,
).train()
"""


@contextmanager
def policy_server(policy: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server of policies with and without LoRA as the messages say to; yield its address once it answers."""
    url = f"http://127.0.0.1:{free_ports()}"
    arguments = serve_arguments(str(policy), url.rpartition(":")[2], gpu=False, lora_rank=8)
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as output:
        command = [sys.executable, *arguments, "--max-model-len", "1024"]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(0.5)
        yield url, process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.fixture(scope="module")
def real_server(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("vllm")
    with policy_server(tiny_policy_dir, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.mark.slow
def test_a_real_server_samples_what_transformers_do(real_server: Any, tiny_policy_dir: Path) -> None:
    here = load(tiny_policy_dir)
    there = VLLMServerGenerator(real_server[0], here.tokenizer, 2048)
    expected = roll_out(here, temperature=0.0)
    for ours, theirs in zip(roll_out(there, temperature=0.0), expected, strict=True):
        assert (ours.prompt_ids, ours.completion_ids) == (theirs.prompt_ids, theirs.completion_ids)
        assert (ours.env_mask, ours.outcome, ours.answer) == (theirs.env_mask, theirs.outcome, theirs.answer)
    first, second = roll_out(there), roll_out(there)
    assert [one.completion_ids for one in first] == [one.completion_ids for one in second], "by the key of each turn"
    assert {turn.kind for trajectory in first for turn in trajectory.turns} == {"search", "answer", "invalid"}
    assert largest_difference(tiny_policy_dir, first) < 1e-4


@pytest.mark.slow
def test_a_real_server_is_reached_from_this_machine_alone(real_server: Any) -> None:
    assert listens_beyond_loopback(real_server[1].pid) == []


@pytest.mark.slow
def test_a_real_server_samples_one_step_ahead_with_older_weights(
    real_server: Any, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": real_server[0]}
    trainer = rain_trainer(
        tiny_policy_dir, tmp_path, RainEngine(), **server, overlap_steps=1, max_steps=4, learning_rate=1e-3
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["sampling/staleness"] for entry in log] == [0, 1, 1, 1]
    first, *others = (entry["sampling/sampling_logp_difference/max"] for entry in log)
    assert first < 1e-3 and min(others) > 1e-2, "one step at this learning rate moves them so far"
    assert all(0.5 < entry["sampling/importance_sampling_ratio/mean"] < 2 for entry in log)


@pytest.mark.slow
def test_a_real_server_gets_a_base_once_and_an_adapter_each_step(
    real_server: Any, tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}
    settings: dict[str, Any] = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": real_server[0]}
    settings |= {"overlap_steps": 1, "max_steps": 4, "learning_rate": 0.05}
    trainer = rain_trainer(tiny_policy_dir, tmp_path, RainEngine(), lora, **settings)
    model, generator, sync = trainer.model, trainer.generator, trainer.vllm_generation.sync_weights
    assert isinstance(generator, VLLMServerGenerator) and generator.adapter is not None
    posted, request = [], requests.Session.request

    def recorded(session: requests.Session, method: str, url: str, **content: Any) -> requests.Response:
        if method.upper() == "POST":
            posted.append(url.rpartition("/")[2])
        return request(session, method, url, **content)

    monkeypatch.setattr(requests.Session, "request", recorded)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["sampling/staleness"] for entry in log] == [0, 1, 1, 1]
    first, *others = (entry["sampling/sampling_logp_difference/max"] for entry in log)
    assert first < 1e-3 and min(others) > 1e-2, "one step at this learning rate moves it so far"
    later = ["load_lora_adapter", "unload_lora_adapter"]
    assert posted == ["collective_rpc", "reset_prefix_cache", "load_lora_adapter", *later * 3]

    def difference(seed: int) -> float:
        context = [5 + place % 90 for place in range(200)]
        turn = sample_remotely(generator, [TurnRequest(0, tuple(context), 24, seed)])[0]
        return turn_difference(model, context, turn)

    sync()
    assert difference(seed=1) < 1e-4
    assert difference(seed=2) < 1e-4, "from the prefix cache"
    move_adapter(model)
    assert difference(seed=3) > 1e-2, "the server still has the step before"
    sync()
    assert difference(seed=3) < 1e-4
    folder = Path(generator.adapter.name or "")
    assert list(folder.parent.iterdir()) == [folder], "vLLM may read it again"
    sent = sum(weight.numel() for weight in load_file(folder / "adapter_model.safetensors").values())
    assert sent == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with urllib.request.urlopen(f"{real_server[0]}/v1/models") as reply:
        assert [one["id"] for one in json.load(reply)["data"]] == [str(tiny_policy_dir), str(folder)]
    generator.adapter = None
    with model.disable_adapter():
        assert difference(seed=4) < 1e-4, "the base is the trainer's, whatever runs have pushed before"


@pytest.mark.slow
def test_training_in_server_mode_pushes_the_weights_and_stops_with_a_checkpoint_when_the_server_ends(
    real_server: Any, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    url, server = real_server
    output = tmp_path / "policy"
    command = [sys.executable, "-c", TRAINING_SCRIPT, str(tiny_policy_dir), str(output), url]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    training = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not any(int(path.name.removeprefix("step-")) >= 4 for path in output.glob("step-*")):
        assert training.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(server.pid, signal.SIGKILL)
    printed, _ = training.communicate(timeout=240)
    assert training.returncode == 1
    assert re.search(rf"GenerationError: step \d+ could not be rolled out: the vLLM server at {url}", printed)
    assert "start it again" in printed
    (checkpoint,) = output.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] >= 3
    logs = [entry for entry in state["log_history"] if "sampling/sampling_logp_difference/max" in entry]
    # Each step sampled with its own weights: those of the step before are further away at this learning rate.
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in logs[:3]) < 1e-3
    assert logs[2]["kl"] > 1e-5, "the weights did move"


@pytest.mark.parametrize("gpu", [True, False])
def test_the_command_for_a_server_binds_loopback_alone(gpu: bool) -> None:
    """Whoever reaches a server in vLLM's development mode can call its workers without a password."""
    command = serve_command("http://policy.example:8000", gpu=gpu)
    assert "VLLM_SERVER_DEV_MODE=1" in command and " --host 127.0.0.1 --port 8000 " in command
    assert "LORA" not in command and "lora" not in command


def test_the_command_for_a_server_that_loads_adapters() -> None:
    command = serve_command("http://localhost:8000", lora_rank=16)
    assert command.startswith("VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 python -m vllm.")
    assert " --enable-lora --max-lora-rank 16 " in command
