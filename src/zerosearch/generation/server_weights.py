"""The policy's weights on their way to the vLLM server of TRL's server mode.

TRL 1.16 pushes them over NCCL, for which trainer and server each need a GPU. Without one they go through a file here,
so that server mode runs, and is tested, on any machine; `server_generation.serve_command` has the server's flags.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from zerosearch.generation import GenerationError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

HEALTH_TIMEOUT_S, CALL_TIMEOUT_S = 60.0, 1800.0


class PolicyServerClient(VLLMClient):
    """TRL's client, whose waits end, and which remembers a failed push instead of raising.

    The push is a collective call under ZeRO-3: every rank must come out of it before the run can be stopped, with a
    checkpoint, by all of them.
    """

    failure: GenerationError | None = None
    directory: TemporaryDirectory[str] | None = None  # without a GPU

    def init_communicator(self, device: torch.device | str | int = 0) -> None:
        if torch.device(device).type == "cuda":
            super().init_communicator(device)
        else:
            self.get_server_info()  # says what is missing, if the server was started without its development mode
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

    def _send_by_file(self, named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        assert self.directory is not None
        path = Path(self.directory.name) / "policy.safetensors"
        save_file({name: weight.detach().cpu().clone() for name, weight in named_params}, path)
        call = {"method": "load_policy_weights", "kwargs": {"path": str(path)}}
        self._post(f"{self.base_url}/collective_rpc", json=call)
        path.unlink()

    def _remember(self, error: Exception) -> None:
        self.failure = GenerationError(
            f"the vLLM server at {self.base_url} did not take the policy's weights: {type(error).__name__} {error}; "
            "see what it printed last, start it again, and resume the run"
        )

    def _get(self, url: str, **kwargs: Any) -> dict[str, Any]:
        return super()._get(url, **{"timeout": HEALTH_TIMEOUT_S, **kwargs})

    def _post(self, url: str, **kwargs: Any) -> dict[str, Any]:
        return super()._post(url, **{"timeout": CALL_TIMEOUT_S, **kwargs})


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
