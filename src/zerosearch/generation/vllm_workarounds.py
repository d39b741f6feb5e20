"""The vLLM engine that TRL creates in the trainer's own process, set up so that it can be trusted there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm import LLM


@contextmanager
def colocated_engine_options(dtype: str) -> Iterator[None]:
    """Let TRL 1.16 create its colocated engine with options that its config has no field for.

    - `dtype`: by itself vLLM turns float32 checkpoints into half precision, and then its log-probabilities are not the
      trainer's.
    - Prefix caching: a later turn of a trajectory costs its new tokens only.
    - On a CPU, no chunked prefill: a request with a seed of its own dies when its prompt is read in two parts.
    - On a CPU, weights that can be replaced: see `multiply_by_weights_in_place`.
    - A context no longer than the model's, where vLLM would refuse to start.
    - Whole weights, also for a policy in 4 bits: vLLM 0.31 has no bitsandbytes. See `adapter_weights`.
    """
    from trl.generation import vllm_generation

    original = getattr(vllm_generation, "LLM", None)
    if original is None:  # vLLM is not installed
        yield
        return

    def engine(**options: Any) -> LLM:
        longest = min(options["max_model_len"], max_positions(options["model"]))
        return original(**options | engine_options(dtype, longest) | {"quantization": None})

    vllm_generation.LLM = engine
    try:
        with weights_in_place():
            yield
    finally:
        vllm_generation.LLM = original


@contextmanager
def weights_in_place() -> Iterator[None]:
    """Let `multiply_by_weights_in_place` hold for engines that are made in this block."""
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm
    multiply_by_weights_in_place()
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original


def multiply_by_weights_in_place() -> None:
    """On a CPU, make vLLM 0.31 multiply by the weights it was given instead of packed copies of them.

    It packs every linear layer once, when it loads, and drops the original: a later weight sync then fails. The head
    keeps its original, so a sync reaches that, and generation goes on with the old copy, unnoticed.
    """
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    def multiply_by_the_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = multiply_by_the_weight


def max_positions(model: str) -> int:
    """Return the longest context that a model takes."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings


def engine_options(dtype: str, max_model_len: int) -> dict[str, Any]:
    """Return the options that differ from TRL's; the reasons are in `colocated_engine_options`."""
    options: dict[str, Any] = {"dtype": dtype, "enable_prefix_caching": True, "max_model_len": max_model_len}
    if not torch.accelerator.is_available():
        # Without chunks a prompt must fit into one batch.
        options |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, max_model_len),
        }
    return options
