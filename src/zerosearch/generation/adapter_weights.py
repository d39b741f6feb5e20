"""Push the weights of a policy with LoRA adapters to vLLM as merged copies, in the dtype of the base.

TRL 1.16 merges the adapters into the policy itself, reads its weights, and unmerges them. That rounds the base twice a
push, so that base and reference drift from the checkpoint, and quantizes a 4-bit base anew each time, whose packed
bytes vLLM 0.31 cannot read. Under ZeRO-3 it gathers the whole policy at once. Here each weight is gathered and merged
by itself, in a copy. A plain LoRA needs none of this in a colocated engine: `vllm_adapters`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration


def push_merged_copies(generation: VLLMGeneration) -> None:
    """Have TRL push what `merged_weights` yields.

    TRL's own way stays under FSDP, and for adapters of biases, of bare parameters (experts) or of other kinds.
    """
    from peft import LoraConfig

    configs = generation.model.peft_config.values()
    known = all(isinstance(one, LoraConfig) and not one.lora_bias and not one.target_parameters for one in configs)
    if known and not generation._dist.is_fsdp:
        generation._iter_named_params = partial(merged_weights, generation)


def merged_weights(generation: VLLMGeneration, merge: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight of the policy under vLLM's name; of its base alone, without `merge`.

    Under ZeRO-3 every rank must go through all of them.
    """
    model = generation.model
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if model.prefix in name or "original_module" in name:  # of an adapter, or replaced by a trained copy
            continue
        owner, adapted, kind = name.rpartition(".base_layer.")
        layer = modules[owner] if adapted else None
        adapters = [weight for part, weight in layer.named_parameters() if model.prefix in part] if layer else []
        with generation._dist.gather_params([parameter, *adapters]), torch.no_grad():
            weight = dequantized(parameter)
            if merge and kind == "weight" and adapters:
                weight = merged(layer, weight)
            bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield generation._fix_param_name_to_vllm(bare, ["modules_to_save.default."]), weight


def dequantized(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a weight in the dtype that it had before bitsandbytes packed it into 4 bits, if it did."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.data
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(parameter.data, state)


def merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight of a LoRA layer with its active adapters added, rounded once."""
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant:  # such as DoRA
            weight = layer.lora_variant[adapter].merge_safe(layer, adapter, weight)
        else:
            weight = (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)
    return weight
