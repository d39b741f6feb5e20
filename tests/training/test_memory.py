"""What a run takes on a device, by arithmetic: the numbers of Qwen2.5-3B, and of a run that was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from zerosearch.rollout.loop import Budgets
from zerosearch.training.config import SearchConfig
from zerosearch.training.memory import (
    GIB,
    Launch,
    ModelShape,
    Part,
    Precision,
    activation_bytes,
    block_bytes,
    device_memory,
    doubled_columns,
    engine_cache_tokens,
    engine_weight_bytes,
    full_trajectory,
    longest_trajectory,
    policy_shape,
    precision_of,
    state_bytes,
    token_bytes,
    weight_bytes,
)

QWEN_3B = Qwen2Config(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
FULL, MIXED = Precision(4, packed=False, mixed=False), Precision(4, packed=False, mixed=True)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return policy_shape(QWEN_3B)


def settings(output: Path, **changes: Any) -> SearchConfig:
    config = SearchConfig(output_dir=str(output), num_generations=2, per_device_train_batch_size=2)
    for name, value in changes.items():
        setattr(config, name, value)  # as they are on a GPU; a machine without one would change them
    return config


def test_the_parameters_of_a_policy_and_of_its_adapters_are_counted(shape: ModelShape) -> None:
    assert (shape.parameters, shape.trained, shape.adapters) == (3_085_938_688, 3_085_938_688, False)
    assert shape.linear == 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11_008)
    assert (shape.query, shape.key_value) == (2048, 256)
    adapted = policy_shape(QWEN_3B, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert adapted.trained == 36 * 16 * ((2048 + 2048) + (2048 + 256))
    assert adapted == replace(shape, trained=adapted.trained, adapters=True)


def test_weights_gradients_and_moments_of_a_policy_in_32_bits(shape: ModelShape) -> None:
    four, eight = 4 * 3_085_938_688, 8 * 3_085_938_688
    assert state_bytes(shape, MIXED, Launch()) == (four, four, eight)


def test_an_adapter_learns_in_32_bits_over_a_base_in_16_or_4(shape: ModelShape) -> None:
    adapted = replace(shape, trained=1_000_000, adapters=True)
    base = Precision(2, packed=False, mixed=True)
    assert state_bytes(adapted, base, Launch()) == (2 * 3_085_938_688 + 4_000_000, 4_000_000, 8_000_000)
    # 2,774,532,096 weights at 4.5 bits, the 311,406,592 others (embedding, norms, biases) at 16.
    assert weight_bytes(adapted, replace(base, packed=True)) == 1_560_674_304 + 622_813_184


def test_zero_divides_what_its_stage_says(shape: ModelShape) -> None:
    small = replace(shape, parameters=1000, trained=1000)
    deepspeed = Precision(2, packed=False, mixed=True)
    stages = [state_bytes(small, deepspeed, Launch(4, stage)) for stage in (1, 2, 3)]
    assert stages == [(2000, 6000, 3000), (2000, 1500, 3000), (500, 1500, 3000)]


def test_checkpointing_keeps_the_input_of_each_block_and_one_block(shape: ModelShape) -> None:
    block = 21 * 4 * 256
    small = replace(
        shape, layers=4, hidden=256, query=256, intermediate=704, parameters=10, trained=10, adapters=False
    )
    # 6 x 256 for the norms, 4 x 256 for attention, 4 x 704 for the MLP, 4 bytes each.
    assert activation_bytes(small, FULL, rows=1, tokens=1, checkpointing=False) == 4 * block
    assert activation_bytes(small, FULL, rows=2, tokens=50, checkpointing=True) == 100 * (4 * 256 * 4 + block)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(("dtype", "mixed"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_a_block_keeps_what_torch_saves_for_the_backward_pass(adapters: bool, dtype: str, mixed: bool) -> None:
    tokens, layers = 512, 4
    heads = {"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=100, hidden_size=256, intermediate_size=768, **heads)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None
    policy = LlamaForCausalLM(config).to(getattr(torch, dtype))
    body = (get_peft_model(policy, lora).get_base_model() if lora else policy).model.train()
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tokens in tensor.shape:  # no weight, nor a copy of one
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        kept = body(input_ids=torch.ones(1, tokens, dtype=torch.long)).last_hidden_state
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert kept.requires_grad
    block = block_bytes(policy_shape(config, lora), Precision(policy.dtype.itemsize, False, mixed))
    assert layers * tokens * block == pytest.approx(measured, rel=0.1)


def test_keys_and_values_of_a_token(shape: ModelShape) -> None:
    assert token_bytes(shape, 2) == 36_864
    assert doubled_columns(30, 640) == 1024


def test_a_trajectory_is_as_long_as_its_turns_and_observations_or_its_limit() -> None:
    budgets = Budgets(max_turns=2, max_turn_tokens=500, max_observation_tokens=400, max_trajectory_tokens=2000)
    assert (full_trajectory(budgets, 100), longest_trajectory(budgets, 100)) == (2400, 2000)


def test_vllm_has_its_share_while_it_generates_and_while_the_policy_learns_unless_it_sleeps(
    shape: ModelShape, tmp_path: Path
) -> None:
    gpu = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.25, "bf16": True}

    def share(**changes: Any) -> Part:
        config = settings(tmp_path, **gpu, **changes)
        parts = device_memory(shape, MIXED, config, Launch(), 100, 80 * GIB)
        return next(part for part in parts if part.name.startswith("vLLM"))

    asleep, awake = share(vllm_enable_sleep_mode=True), share(vllm_enable_sleep_mode=False)
    assert (asleep.training, asleep.generating) == (0, 20 * GIB)
    assert (awake.training, awake.generating) == (20 * GIB, 20 * GIB)
    # 20 GiB less 2 of workspace and 5.75 of weights, at 36,864 bytes a token.
    assert engine_cache_tokens(shape, settings(tmp_path, **gpu), 80 * GIB) == 356_865
    assert share(vllm_enable_sleep_mode=True, vllm_mode="server") == Part("vLLM: on devices of its own", 0, 0)


def test_a_reference_model_and_a_critic_are_there_when_the_settings_ask_for_them(
    shape: ModelShape, tmp_path: Path
) -> None:
    def names(shape: ModelShape, **changes: Any) -> set[str]:
        parts = device_memory(shape, MIXED, settings(tmp_path, **changes), Launch(), 100, 80 * GIB)
        return {part.name for part in parts if part.generating} & {"reference model", CRITIC}

    assert names(shape, beta=0.001) == {"reference model"}
    assert names(shape, beta=0.0, algorithm="ppo") == {CRITIC}
    assert names(replace(shape, adapters=True), beta=0.001) == set(), "an adapter's base is its reference"


CRITIC = "critic, with gradients and optimizer state"


def test_the_number_format_is_the_one_asked_for_the_checkpoints_or_deepspeeds(tmp_path: Path) -> None:
    config = settings(tmp_path, bf16=True)
    assert precision_of(config, Launch(), "float32", "torch.bfloat16", False) == MIXED
    assert precision_of(config, Launch(), "auto", "torch.bfloat16", False).weight_bytes == 2
    assert precision_of(config, Launch(4, 3), "float32", None, False).weight_bytes == 2


def test_a_simulator_in_the_policys_engine_takes_an_adapter_of_room(shape: ModelShape, tmp_path: Path) -> None:
    adapted = replace(shape, trained=30_000_000, adapters=True)
    on_gpu = settings(tmp_path, bf16=True, vllm_gpu_memory_utilization=0.5, vllm_tensor_parallel_size=1)
    assert engine_weight_bytes(adapted, on_gpu) == 2 * (3_085_938_688 + 30_000_000)
    assert engine_weight_bytes(adapted, on_gpu, simulators=1) == 2 * (3_085_938_688 + 60_000_000)
    assert engine_weight_bytes(shape, on_gpu) == 2 * 3_085_938_688
    alone, shared = (engine_cache_tokens(adapted, on_gpu, 24 * GIB, simulators) for simulators in (0, 1))
    assert alone - shared == pytest.approx(2 * 30_000_000 / token_bytes(shape, 2), abs=1)
