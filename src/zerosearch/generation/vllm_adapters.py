"""The policy's LoRA adapter in a vLLM engine: the engine keeps the base, and a sync moves the adapter alone.

That of a colocated engine is here, that of a server in `vllm_server`. What vLLM cannot serve so (DoRA, trained copies
of modules, a base in 4 bits) is pushed merged: `adapter_weights`.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from zerosearch.generation.adapter_weights import merged_weights, push_merged_copies

if TYPE_CHECKING:
    from peft import PeftConfig
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm.lora.request import LoRARequest

SIMULATOR_NUMBER = 1  # vLLM's for a simulator's adapter beside the policy's, whose have the numbers from 2 on
# What PEFT can do to a LoRA and vLLM 0.31 does not read: it scales every layer by alpha / r. TRL checks the rest.
UNREAD = (
    *("rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices", "layer_replication"),
    *("use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens"),
)


def adapter_rank(peft_config: PeftConfig | None) -> int | None:
    """Return the rank for which an engine that serves this adapter makes room; None where vLLM cannot serve it."""
    if peft_config is None or any(getattr(peft_config, name, None) for name in UNREAD):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # TRL's, that this may change: the pinned version does not
        from trl.experimental.async_grpo.async_grpo_trainer import round_lora_rank, validate_lora_for_vllm_sync

    only = SimpleNamespace(active_adapters=["default"], peft_config={"default": peft_config})
    try:
        return round_lora_rank(validate_lora_for_vllm_sync(only).r)
    except ValueError:  # TRL's word on what vLLM does not serve
        return None


def adapter_options(ranks: Sequence[int]) -> dict[str, Any]:
    """Return the options of an engine that serves adapters of these ranks over its base."""
    return {"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": max(ranks)}


def sync_policy(generation: VLLMGeneration) -> ColocatedAdapter | None:
    """Have TRL sync the policy's adapter if the colocated engine takes adapters, and merged weights otherwise."""
    if generation.llm.llm_engine.vllm_config.lora_config is not None:
        return ColocatedAdapter(generation)
    push_merged_copies(generation)
    return None


class PolicyAdapter:
    """The policy's adapter, whose sync takes the place of TRL's.

    The first sync pushes the trainer's base, too: what the engine has read may differ (another revision, a base that
    PEFT has changed), an earlier run may have written to a server's, and TRL's sleep has dropped a colocated one's.
    From then on the engine's base is never written.

    Each sync loads the adapter under a new name. vLLM keys its prefix cache by that name, so no turn is served from
    keys and values of an earlier step, and those of other adapters stay.
    """

    def __init__(self, generation: VLLMGeneration) -> None:
        """Take the place of TRL's sync, on each rank, with a folder of its own."""
        self.generation = generation
        self.push: Callable[[], None] = generation.sync_weights
        self.numbers = count(SIMULATOR_NUMBER + 1)
        self.folder = TemporaryDirectory(prefix="zerosearch-adapter-")
        generation._iter_named_params = partial(merged_weights, generation, merge=False)
        generation.sync_weights = self.sync

    def sync(self) -> None:
        """Replace the adapter in the engine. Under ZeRO-3 every rank must call this."""
        raise NotImplementedError

    def save(self, number: int, accelerator: Any) -> str:
        """Save the adapter on the main process of `accelerator`, and return its folder; collective, as `sync` is."""
        from trl.experimental.async_grpo.async_grpo_trainer import save_lora_adapter

        model, path = self.generation.model, f"{self.folder.name}/policy-{number}"
        adapters = [parameter for name, parameter in model.named_parameters() if model.prefix in name]
        with self.generation._dist.gather_params(adapters):
            save_lora_adapter(model, accelerator, model.active_adapters[0], path)
        return path


class ColocatedAdapter(PolicyAdapter):
    """The policy's adapter in the engine of each rank, by `request`."""

    request: LoRARequest | None = None

    def sync(self) -> None:
        """Wake the weights if they sleep, and replace the adapter."""
        from trl.generation.vllm_generation import empty_cache
        from vllm.lora.request import LoRARequest

        generation = self.generation
        engine = generation.llm.llm_engine
        if self.request is None:
            self.push()
            engine.model_executor.driver_worker.model_runner.reset_lora_state()
        else:
            if generation.enable_sleep_mode:
                empty_cache()
                generation.llm.wake_up(tags=["weights"])
                generation._llm_weights_sleeping = False
            engine.remove_lora(self.request.lora_int_id)
        number = next(self.numbers)
        each_rank = SimpleNamespace(device=generation.accelerator.device, is_main_process=True)
        path = self.save(number, each_rank)
        self.request = LoRARequest(f"policy-{number}", number, path)
        engine.add_lora(self.request)
        shutil.rmtree(path)
