"""Turns sampled by vLLM's own server, and the policy's weights on their way to it: TRL's server mode.

TRL 1.16 has no server of its own: `trl vllm-serve` only starts vLLM's (see `serve_command`), which batches whatever
requests are under way, at any token. So each turn of each trajectory is a request of its own, from every rank, token
ids in and sampled ids out, and a later turn finds its beginning in the server's prefix cache.

TRL pushes weights over NCCL, for which trainer and server each need a GPU. Without one they go through a file here, so
that server mode runs, and is tested, on any machine. Of a policy with LoRA, a server that was started to load adapters
gets the base so, once, and from then on the adapter alone, through a folder: `ServedAdapter`.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import requests
import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from zerosearch.errors import UserError
from zerosearch.generation import GenerationError, SampledTurn, Sampling, TurnRequest
from zerosearch.generation.adapter_weights import push_merged_copies
from zerosearch.generation.vllm_adapters import PolicyAdapter, adapter_rank
from zerosearch.generation.vllm_colocated import TURN_OPTIONS, finish_of
from zerosearch.generation.vllm_workarounds import cpu_server_arguments
from zerosearch.http import CLOSE_TIMEOUT_S, CallFailed, HTTPClient, ServiceError, redacted_url, run_in_background

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOConfig
    from trl.generation.vllm_generation import VLLMGeneration

Content = TypeVar("Content")

CHECK_TIMEOUT_S, SESSION_TIMEOUT_S = 60.0, 900.0
HEALTH_TIMEOUT_S, CALL_TIMEOUT_S = 60.0, 1800.0  # of TRL's client
THIS_MACHINE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
# Without these the server takes some from the model's generation_config.json: Qwen's has top_k 20 and a penalty.
WHOLE_DISTRIBUTION = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class VLLMServerGenerator:
    """Sample turns on a vLLM server, a request for each, from `adapter` where the server holds the policy's apart.

    `max_context_tokens` is cut to what the server takes. `timeout_s` bounds one request; one that fails on its
    way is repeated, with the same seed, at most `max_retries` times.
    """

    max_concurrency = 1024

    def __init__(
        self,
        base_url: str,
        tokenizer: PreTrainedTokenizerBase,
        max_context_tokens: int,
        adapter: ServedAdapter | None = None,
        *,
        timeout_s: float = 1200.0,
        max_retries: int = 5,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.name = f"the vLLM server at {redacted_url(self.base_url)}"
        self.tokenizer = tokenizer
        self.max_context_tokens, self.adapter = max_context_tokens, adapter
        self.client = HTTPClient(
            "the vLLM server",
            remedy=f"see what it printed last, and start it again: {self.start_command()}",
            timeout_s=timeout_s,
            max_retries=max_retries,
            max_concurrency=self.max_concurrency,
        )

    def start_command(self) -> str:
        """Return the command that starts a server where this generator looks for one."""
        rank = self.adapter.rank if self.adapter else 0
        return serve_command(self.base_url, gpu=torch.cuda.is_available(), lora_rank=rank)

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        """See that the server is there."""
        self.sampling = sampling
        try:
            run_in_background(self._check(), SESSION_TIMEOUT_S)
            yield
        finally:
            run_in_background(self.client.aclose(), CLOSE_TIMEOUT_S)

    async def sample(self, request: TurnRequest) -> SampledTurn:
        body = {
            "model": self.adapter.name if self.adapter else self.model,
            "prompt": list(request.context_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "stop": list(self.sampling.stop_strings),
            "seed": request.seed,
            "return_token_ids": True,
            **TURN_OPTIONS,
            **WHOLE_DISTRIBUTION,
        }
        read = partial(read_turn, trajectory=request.trajectory)
        return await self._request("POST", "v1/completions", read, json=body)

    async def _check(self) -> None:
        """Read what is served. Raises `GenerationError` if these settings cannot be sampled with there."""

        def served(reply: Any) -> tuple[str, int]:
            return reply["data"][0]["id"], int(reply["data"][0]["max_model_len"])

        def logprobs_mode(reply: Any) -> str:
            return str(reply["vllm_config"]["model_config"]["logprobs_mode"])

        self.model, longest = await self._request("GET", "v1/models", served, timeout_s=CHECK_TIMEOUT_S)
        self.max_context_tokens = min(self.max_context_tokens, longest)
        if self.sampling.temperature in (0.0, 1.0) and self.sampling.top_p == 1.0:
            return
        params = {"config_format": "json"}
        mode = await self._request("GET", "server_info", logprobs_mode, params=params, timeout_s=CHECK_TIMEOUT_S)
        if mode != "processed_logprobs":
            raise GenerationError(
                f"{self.name} reports {mode}, which are not those of the distribution that is sampled from at "
                f"temperature {self.sampling.temperature:g} and top_p {self.sampling.top_p:g}; start it with: "
                f"{self.start_command()}"
            )

    async def _request(self, method: str, path: str, read: Callable[[Any], Content], **content: Any) -> Content:
        try:
            read_content, _ = await self.client.request(method, f"{self.base_url}/{path}", read=read, **content)
        except ServiceError as error:
            raise GenerationError(str(error)) from error
        return read_content


def read_turn(reply: Any, trajectory: int) -> SampledTurn:
    """Return the turn in a completion's reply. Raises `CallFailed` for a completion without one."""
    choice = reply["choices"][0]
    token_ids, logprobs, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
    if reason not in ("stop", "length") or not token_ids or len(logprobs) != len(token_ids):
        raise CallFailed(f"it gave the turn up: {len(token_ids)} tokens, finish_reason {reason!r}")
    if not all(type(token_id) is int and token_id >= 0 for token_id in token_ids) or None in logprobs:
        raise TypeError("ids and log-probabilities are numbers")
    return SampledTurn(trajectory, token_ids, logprobs, finish_of(reason, choice["stop_reason"]))


def server_url(config: GRPOConfig) -> str:
    """Return the address of the server in TRL's server mode."""
    return config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"


def serve_command(base_url: str, model: str = "POLICY", gpu: bool = True, lora_rank: int = 0) -> str:
    """Return the command that starts a server which the trainer can push weights to.

    With a GPU they come over NCCL, and the server needs one of its own; without, they come by a file. The server's
    log-probabilities must be those of the distribution sampled from ("processed"), and in the trainer's number format:
    by itself vLLM turns float32 into bfloat16. It listens on loopback alone: whoever reaches a server in vLLM's
    development mode can call any method of its workers, without a password. With `lora_rank` it loads adapters of up
    to that rank while it runs.
    """
    port = str(urlsplit(base_url).port or 8000)
    variables = "VLLM_SERVER_DEV_MODE=1" + (" VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if lora_rank else "")
    return f"{variables} python {shlex.join(serve_arguments(model, port, gpu, lora_rank))}"


def serve_arguments(model: str, port: str, gpu: bool, lora_rank: int = 0) -> list[str]:
    """Return the arguments of that command, for Python."""
    shared = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1", "--port", port]
    shared += ["--logprobs-mode", "processed_logprobs", "--enable-prefix-caching"]
    if lora_rank:
        shared += ["--enable-lora", "--max-lora-rank", str(lora_rank)]
    if gpu:
        return [*shared, "--weight-transfer-config", '{"backend": "nccl"}']
    by_file = ["--worker-extension-cls", "zerosearch.generation.vllm_worker.PolicyWeights", "--dtype", "float32"]
    return [*shared, *by_file, *cpu_server_arguments(4096), "--max-model-len", "4096"]


class PolicyServerClient(VLLMClient):
    """TRL's client with time limits, which remembers a failed push instead of raising.

    Under ZeRO-3 the push is a collective call: every rank must return from it before all of them can stop the run,
    with a checkpoint.
    """

    failure: GenerationError | None = None
    directory: TemporaryDirectory[str] | None = None  # without a GPU

    def init_communicator(self, device: torch.device | str | int = 0) -> None:
        if torch.device(device).type == "cuda":
            super().init_communicator(device)
        else:
            self.get_server_info()  # fails, with the reason, on a server without its development mode
            self.directory = TemporaryDirectory(prefix="zerosearch-weights-")

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        self.failure = None
        try:
            # With no server at the other end, the broadcast would wait for ever.
            self.session.get(f"{self.base_url}/health", timeout=HEALTH_TIMEOUT_S).raise_for_status()
            if self.directory is None:
                super().update_named_params(metadata, named_params)
            else:
                self._send_by_file(named_params)
        except Exception as error:  # as broad as what TRL raises
            self._remember(error)
            for _ in named_params:  # the other ranks gather these, too
                pass

    def reset_prefix_cache(self) -> None:
        if self.failure is None:
            try:
                super().reset_prefix_cache()
            except Exception as error:  # as broad as what TRL raises
                self._remember(error)

    def loads_adapters(self, rank: int) -> bool:
        """Say whether the server was started to load adapters of this rank while it runs."""
        info = self._get(f"{self.base_url}/server_info", params={"config_format": "json"})
        lora = info["vllm_config"]["lora_config"]
        room = lora["max_lora_rank"] if lora and info["vllm_env"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] else 0
        return room >= rank

    def reads_files(self) -> bool:
        """Say whether the server surely reads the files of this process."""
        return self.directory is not None or urlsplit(self.base_url).hostname in THIS_MACHINE

    def replace_adapter(self, save: Callable[[], str], previous: str | None) -> str | None:
        """Load the adapter that `save` saves under the name of its folder; return that, or None if it failed.

        A server that does not know the previous one was started again, and its base is not the trainer's: that fails.
        """
        try:
            path = save()
            if self.failure is None:  # it took the base
                self._adapter("load", lora_name=path, lora_path=path)
                if previous is not None:
                    self._adapter("unload", lora_name=previous)
                    shutil.rmtree(previous)
                return path
        except Exception as error:  # as broad as what TRL raises
            self._remember(error)
        return None

    def _adapter(self, action: str, **content: str) -> None:
        url = f"{self.base_url}/v1/{action}_lora_adapter"
        response = requests.post(url, json=content, timeout=CALL_TIMEOUT_S)  # the session's retries lose the reason
        if response.status_code != 200:
            raise RuntimeError(f"HTTP status {response.status_code}: {response.text}")

    def _send_by_file(self, named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        assert self.directory is not None
        path = Path(self.directory.name) / "policy.safetensors"
        save_file({name: weight.detach().cpu().clone() for name, weight in named_params}, path)
        call = {"method": "load_policy_weights", "kwargs": {"path": str(path)}}
        self._post(f"{self.base_url}/collective_rpc", json=call)
        path.unlink()

    def _remember(self, error: Exception) -> None:
        self.failure = GenerationError(
            f"the vLLM server at {redacted_url(self.base_url)} did not take the policy's weights: "
            f"{type(error).__name__} {redacted_url(str(error))}; see what it printed last, start it again, and resume "
            "the run"
        )

    def _get(self, url: str, **kwargs: Any) -> dict[str, Any]:
        return super()._get(url, **{"timeout": HEALTH_TIMEOUT_S, **kwargs})

    def _post(self, url: str, **kwargs: Any) -> dict[str, Any]:
        return super()._post(url, **{"timeout": CALL_TIMEOUT_S, **kwargs})


class ServedAdapter(PolicyAdapter):
    """The policy's adapter on a vLLM server, by `name`: that of its folder, which no other run has.

    vLLM may read the folder again for any turn, so it stays until the next sync.
    """

    name: str | None = None

    def __init__(self, generation: VLLMGeneration, rank: int) -> None:
        super().__init__(generation)
        self.rank = rank

    def sync(self) -> None:
        """Replace the adapter on the server; as after a failed push, the main process remembers a failure."""
        generation = self.generation
        if self.name is None:
            self.push()
        save = partial(self.save, next(self.numbers), generation.accelerator)
        if generation.accelerator.is_main_process:
            self.name = generation.vllm_client.replace_adapter(save, self.name)
        else:
            save()
        [self.name] = broadcast_object_list([self.name])


def sync_to_server(generation: VLLMGeneration, url: str, sync_adapter: bool | None) -> ServedAdapter | None:
    """Have TRL sync the policy's adapter if the server loads adapters, and merged weights otherwise; on every rank.

    Raises `UserError` if `sync_adapter` asks for the adapter, and the server was not started to load it.
    """
    model = generation.model
    is_plain = not generation._dist.is_fsdp and not getattr(model, "is_quantized", False)
    rank = adapter_rank(model.peft_config[model.active_adapters[0]]) if is_plain else None
    if rank and sync_adapter is not False:
        loads = False
        if generation.accelerator.is_main_process:
            client = generation.vllm_client
            loads = (sync_adapter or client.reads_files()) and client.loads_adapters(rank)
        [loads] = broadcast_object_list([loads])
        if loads:
            return ServedAdapter(generation, rank)
        if sync_adapter:
            raise UserError(
                f"sync_adapter true needs a vLLM server that loads adapters of rank {rank}; start it with: "
                f"{serve_command(url, gpu=torch.cuda.is_available(), lora_rank=rank)}"
            )
    push_merged_copies(generation)
    return None


@contextmanager
def policy_server_client() -> Iterator[None]:
    """Let TRL 1.16 push weights by our client."""
    original = vllm_generation.VLLMClient
    vllm_generation.VLLMClient = PolicyServerClient
    try:
        yield
    finally:
        vllm_generation.VLLMClient = original


def wait_for_weights(accelerator: Accelerator, generation: VLLMGeneration) -> None:
    """Wait until the main process has pushed the weights; there, raise `GenerationError` if it could not."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and generation.vllm_client.failure is not None:
        raise generation.vllm_client.failure
