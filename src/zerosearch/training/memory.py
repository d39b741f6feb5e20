"""How much memory a training run takes on each device, by arithmetic, before any weight is loaded.

Parameters are counted exactly, on a model without weights. Everything else follows from the settings; where a number
is an estimate, it says so. Sizes are in bytes. A "GB" of a device is 2**30 of them, as devices are sold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zerosearch.generation.transformers_engine import TransformersGenerator
from zerosearch.generation.vllm_workarounds import cpu_cache_space
from zerosearch.rollout.loop import Budgets

if TYPE_CHECKING:
    from zerosearch.training.config import SearchConfig

GIB = 2**30
# Our estimates: a CUDA context with the workspaces of its libraries, and what the allocator has but cannot use.
CUDA_RUNTIME_BYTES = int(1.5 * GIB)
# On a CPU: what libraries take once they work, besides what they took when they were imported.
CPU_WORKSPACE_BYTES = int(0.15 * GIB)
# And the gaps that glibc's heap keeps, of the activations; gradients and moments of all weights fill some.
HEAP_GAPS, HEAP_GAPS_OF_ADAPTERS = 0.5, 1.25
# What vLLM keeps of its share for a forward pass over a full batch and for CUDA graphs.
ENGINE_WORKSPACE_BYTES = 2 * GIB
# TRL 1.16 projects so many tokens onto so many words of the vocabulary at once.
HEAD_TILE = (4096, 32768)
# To draw a token, the transformers generator takes logits and log-probabilities in 32 bits and two tensors in 64.
DRAWING_BYTES = 4 + 4 + 8 + 8


@dataclass(frozen=True)
class ModelShape:
    """What the bytes of a policy depend on: numbers of parameters and of features."""

    parameters: int  # without adapters; tied ones count once
    linear: int  # of these, the weights that bitsandbytes packs into 4 bits
    trained: int  # all of them, or those of the adapters
    adapters: bool
    layers: int
    hidden: int
    intermediate: int
    query: int  # features of the queries of a layer: heads x their size
    key_value: int
    vocabulary: int


@dataclass(frozen=True)
class Launch:
    """On how many devices a run is launched, and what DeepSpeed shards over them (ZeRO stage; 0: nothing)."""

    devices: int = 1
    zero_stage: int = 0


@dataclass(frozen=True)
class Precision:
    """Number formats: bytes of a weight of the base, whether its linear layers are packed into 4 bits, and whether
    matrices are multiplied in 16 bits (autocast, or DeepSpeed).
    """

    weight_bytes: int
    packed: bool
    mixed: bool

    @property
    def multiplied_bytes(self) -> int:
        """Return the bytes of a number that goes into a matrix product."""
        return 2 if self.mixed else self.weight_bytes


@dataclass(frozen=True)
class Part:
    """What one thing takes on a device while the policy is trained, and while trajectories are rolled out."""

    name: str
    training: int
    generating: int


def policy_shape(config: Any, peft_config: Any = None, trust_remote_code: bool = False) -> ModelShape:
    """Return the shape of a policy with this configuration, and adapters if they are configured."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    with torch.device("meta"):  # parameters without storage
        policy = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = policy.get_output_embeddings()
    parameters = policy.num_parameters()
    linear = sum(
        module.weight.numel() for module in policy.modules() if isinstance(module, nn.Linear) and module is not head
    )
    trained = parameters
    if peft_config is not None:
        policy = get_peft_model(policy, peft_config)
        trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        parameters=parameters,
        linear=linear,
        trained=trained,
        adapters=peft_config is not None,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query=heads * head_size,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        vocabulary=text.vocab_size,
    )


def full_trajectory(budgets: Budgets, prompt_tokens: int) -> int:
    """Return the tokens of a trajectory with a prompt of so many, were all its turns and observations full."""
    turns = (budgets.max_turns + 1) * budgets.max_turn_tokens
    return prompt_tokens + turns + budgets.max_turns * budgets.max_observation_tokens


def longest_trajectory(budgets: Budgets, prompt_tokens: int) -> int:
    """Return how many tokens a trajectory can get to, with a prompt of so many."""
    return min(full_trajectory(budgets, prompt_tokens), budgets.max_trajectory_tokens)


def weight_bytes(shape: ModelShape, precision: Precision) -> int:
    """Return the bytes of the base's weights; in 4 bits, blocks of 64 share a scale of 32 bits (bitsandbytes)."""
    packed = shape.linear if precision.packed else 0
    return int((shape.parameters - packed) * precision.weight_bytes + packed * (0.5 + 4 / 64))


def state_bytes(shape: ModelShape, precision: Precision, launch: Launch) -> tuple[int, int, int]:
    """Return the bytes of weights, of gradients and of optimizer state on each device.

    Without DeepSpeed everything that is trained has a gradient and AdamW's two moments in its own format, which is 32
    bits for adapters (peft, and `let_quantized_policy_learn`). With DeepSpeed in 16 bits a parameter takes 2 bytes,
    its gradient 2 and 4, its copy in 32 bits and the moments 12 (deepspeed's `estimate_zero2_model_states_mem_needs`),
    each divided among the devices from ZeRO stage 3, 2 and 1 on.
    """
    trained = shape.trained
    number = 4 if shape.adapters and not launch.zero_stage else precision.weight_bytes
    weights = weight_bytes(shape, precision) + number * trained * shape.adapters
    gradient, optimizer = (6, 12) if launch.zero_stage and precision.mixed else (number, 2 * number)
    share = {stage: launch.devices if launch.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    return weights // share[3], gradient * trained // share[2], optimizer * trained // share[1]


def block_bytes(shape: ModelShape, precision: Precision) -> int:
    """Return the bytes a token leaves in one block for the backward pass.

    Two norms keep what comes in, in 32 bits, and the normalised if their weights are trained; what goes out is kept
    once, or, where it is cast, once for each of the five matrices that take it. Attention keeps its queries, keys,
    values and outputs (about 4 x query); the MLP four tensors of its inner size.
    """
    number = precision.multiplied_bytes
    is_cast = precision.mixed and (shape.adapters or precision.weight_bytes == 4)
    normalised = 0 if shape.adapters else 2 * precision.weight_bytes
    norms = (2 * 4 + normalised + (5 if is_cast else 2) * number) * shape.hidden
    return norms + 4 * number * shape.query + 4 * number * shape.intermediate


def activation_bytes(shape: ModelShape, precision: Precision, rows: int, tokens: int, checkpointing: bool) -> int:
    """Return what a micro-batch of so many rows of so many tokens keeps for the backward pass.

    With gradient checkpointing it is the input of every block, and one block's own (or, while everything is trained
    from 32 bits, 16-bit copies of all weights, which autocast keeps for the forward pass).
    """
    block = block_bytes(shape, precision) * rows * tokens
    copies = 2 * shape.parameters if precision.mixed and precision.weight_bytes == 4 else 0
    if not checkpointing:
        return shape.layers * block + copies
    inputs = shape.layers * rows * tokens * shape.hidden * precision.weight_bytes
    return inputs + max(block, 0 if shape.adapters else copies)


def head_bytes(shape: ModelShape, precision: Precision, rows: int, tokens: int, on_cpu: bool) -> int:
    """Return what projecting the policy's tokens onto the vocabulary takes: tiles of logits, and the head's gradient.

    On a GPU a kernel works in one tile; without it TRL 1.16 holds about eight, in 32 bits.
    """
    logits = min(rows * tokens, HEAD_TILE[0]) * min(shape.vocabulary, HEAD_TILE[1])
    tiles = logits * (8 * 4 if on_cpu else precision.multiplied_bytes)
    return tiles + (0 if shape.adapters else 4 * shape.vocabulary * shape.hidden)


def token_bytes(shape: ModelShape, number_bytes: int) -> int:
    """Return the bytes of the keys and values of one token in the cache."""
    return 2 * shape.layers * shape.key_value * number_bytes


def doubled_columns(first: int, longest: int) -> int:
    """Return the columns of the transformers generator's cache, which double until the longest trajectory fits."""
    columns = max(first, 128)
    while columns < longest:
        columns *= 2
    return columns


def precision_of(config: SearchConfig, launch: Launch, dtype: str | None, model_dtype: Any, packed: bool) -> Precision:
    """Return the number formats of a run, for the policy's `dtype` and that of its checkpoint ("auto").

    DeepSpeed casts the weights that it multiplies by.
    """
    name = str(model_dtype if dtype in (None, "auto") else dtype).removeprefix("torch.")
    mixed = bool(config.bf16 or config.fp16)
    in_16_bits = name in ("bfloat16", "float16") or (mixed and launch.zero_stage > 0)
    return Precision(2 if in_16_bits else 4, packed, mixed)


def device_memory(
    shape: ModelShape,
    precision: Precision,
    config: SearchConfig,
    launch: Launch,
    prompt_tokens: int,
    device_bytes: int,
    cpu_runtime_bytes: int | None = None,
    simulators: int = 0,
) -> list[Part]:
    """Return what a run takes on each device, part by part, at its worst: every trajectory as long as it can get.

    `simulators` is 1 where one shares the policy's engine.

    `device_bytes` is the memory of a device, of which vLLM takes a share. `cpu_runtime_bytes` is the memory of this
    program and its libraries, where the device is the machine itself; None on a GPU.
    """
    on_cpu = cpu_runtime_bytes is not None
    rows, tokens = config.per_device_train_batch_size, longest_trajectory(config, prompt_tokens)
    policy_tokens = min(tokens, (config.max_turns + 1) * config.max_turn_tokens)
    weights, gradients, optimizer = state_bytes(shape, precision, launch)
    parts = [
        Part("weights of the policy", weights, weights),
        Part("gradients", gradients, 0),
        Part("optimizer state (AdamW)", optimizer, optimizer),
    ]
    if config.beta and not shape.adapters:
        parts.append(Part("reference model", weights, weights))
    if config.algorithm == "ppo":
        whole = replace(shape, trained=shape.parameters, adapters=False)
        critic = state_bytes(whole, replace(precision, packed=False), launch)
        parts.append(Part("critic, with gradients and optimizer state", sum(critic), critic[0] + critic[2]))
    activations = activation_bytes(shape, precision, rows, tokens, config.gradient_checkpointing)
    parts.append(Part(f"activations of {rows} x {tokens:,} tokens", activations, 0))
    parts.append(Part("logits of the policy's tokens", head_bytes(shape, precision, rows, policy_tokens, on_cpu), 0))
    if on_cpu:
        gaps = int((HEAP_GAPS_OF_ADAPTERS if shape.adapters else HEAP_GAPS) * activations)
        parts.append(Part("fragments of the heap (estimate)", gaps, 0))
    parts.append(_generation_part(shape, precision, config, launch, prompt_tokens, device_bytes, on_cpu, simulators))
    runtime = CUDA_RUNTIME_BYTES if cpu_runtime_bytes is None else cpu_runtime_bytes + CPU_WORKSPACE_BYTES
    name = "Python and its libraries" if on_cpu else "CUDA, workspaces, fragments (estimate)"
    return [*parts, Part(name, runtime, runtime)]


def _generation_part(
    shape: ModelShape,
    precision: Precision,
    config: SearchConfig,
    launch: Launch,
    prompt_tokens: int,
    device_bytes: int,
    on_cpu: bool,
    simulators: int,
) -> Part:
    if not config.use_vllm:
        trajectories = config.per_device_train_batch_size * config.steps_per_generation
        columns = doubled_columns(prompt_tokens, longest_trajectory(config, prompt_tokens))
        held = trajectories * columns * token_bytes(shape, precision.weight_bytes)
        held += trajectories * shape.vocabulary * DRAWING_BYTES
        held += min(trajectories * prompt_tokens, TransformersGenerator.PREFILL_TOKENS) * block_bytes(shape, precision)
        held += weight_bytes(shape, precision) if launch.zero_stage == 3 else 0
        return Part(f"keys and values of {trajectories} x {columns:,} tokens", 0, held)
    if config.vllm_mode == "server":
        return Part("vLLM: on devices of its own", 0, 0)
    if on_cpu:
        cache = int(cpu_cache_space()["VLLM_CPU_KVCACHE_SPACE"]) * GIB
        held = engine_weight_bytes(shape, config, simulators) + cache
        return Part("vLLM: weights, keys and values", held, held)
    share = int(config.vllm_gpu_memory_utilization * device_bytes)
    return Part("vLLM: its share of the device", 0 if config.vllm_enable_sleep_mode else share, share)


def engine_weight_bytes(shape: ModelShape, config: SearchConfig, simulators: int = 0) -> int:
    """Return the bytes of the weights in the colocated vLLM engine, whose format is that of the training.

    With LoRA it holds the policy's adapter beside the base, and room of that size for each simulator.
    """
    number = 2 if config.bf16 or config.fp16 else 4
    adapters = (1 + simulators) * shape.trained * shape.adapters
    return number * (shape.parameters + adapters) // config.vllm_tensor_parallel_size


def engine_cache_tokens(shape: ModelShape, config: SearchConfig, device_bytes: int, simulators: int = 0) -> int:
    """Return for how many tokens a colocated engine on a GPU has room, keys and values; less than 0: for none."""
    number = 2 if config.bf16 or config.fp16 else 4
    room = int(config.vllm_gpu_memory_utilization * device_bytes) - ENGINE_WORKSPACE_BYTES
    room -= engine_weight_bytes(shape, config, simulators)
    return room // (token_bytes(shape, number) // config.vllm_tensor_parallel_size)
