"""What vLLM is given of a policy with adapters: weights that say the same, and the policy left as it was."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rain import rain_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.generation.vllm_generation import VLLMGeneration

from zerosearch.errors import UserError
from zerosearch.generation.adapter_weights import merged_weights, push_merged_copies
from zerosearch.generation.vllm_workarounds import let_quantized_policy_learn

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
IDS = torch.arange(40).view(2, 20)


def adapted(directory: Path, quantized: bool = False, **config: Any) -> Any:
    """Return the tiny policy with adapters that have learned something."""
    options = {"quantization_config": NF4} if quantized else {}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory, **options), LoraConfig(**LORA | config))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    let_quantized_policy_learn(model)  # as the trainer does
    return model.eval()


def generation_of(model: Any) -> Any:
    """Return what TRL's owner of vLLM knows of its policy, on one process."""
    return SimpleNamespace(
        model=model,
        _dist=SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext()),
        _fix_param_name_to_vllm=partial(VLLMGeneration._fix_param_name_to_vllm, None),
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], "use_rslora": True},
        {"quantized": True},
        {"quantized": True, "target_modules": ["q_proj"]},
        {"quantized": True, "use_dora": True},
    ],
    ids=["lora", "dora", "some", "qlora", "some-qlora", "qdora"],
)
def test_a_plain_model_with_these_weights_says_what_the_policy_says(
    config: dict[str, Any], tiny_policy_dir: Path
) -> None:
    model = adapted(tiny_policy_dir, **config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = {name: weight.clone() for name, weight in merged_weights(generation_of(model))}
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    assert weights.keys() == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(weights)
    with torch.no_grad():
        expected, base = model(IDS).logits, AutoModelForCausalLM.from_pretrained(tiny_policy_dir)(IDS).logits
        assert torch.allclose(plain(IDS).logits, expected, atol=2e-4)
        assert not torch.allclose(base, expected, atol=1e-2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_they_are_those_that_trl_would_push(tiny_policy_dir: Path) -> None:
    generation = generation_of(adapted(tiny_policy_dir))
    expected = {name: weight.clone() for name, weight in VLLMGeneration._iter_named_params(generation)}
    weights = dict(merged_weights(generation))
    assert list(weights) == list(expected)
    assert all(torch.allclose(weights[name], weight, atol=1e-5) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("config", "ours"),
    [({}, True), ({"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]}, False)],
)
def test_weights_that_only_trl_can_merge_are_left_to_it(
    config: dict[str, Any], ours: bool, tiny_policy_dir: Path
) -> None:
    generation = generation_of(adapted(tiny_policy_dir, **config))
    push_merged_copies(generation)
    assert hasattr(generation, "_iter_named_params") == ours


def test_adapters_on_a_quantized_base_take_small_updates(tiny_policy_dir: Path, tmp_path: Path) -> None:
    arguments = {"peft_config": LoraConfig(**LORA), "quantization_config": NF4}
    trainer = rain_trainer(tiny_policy_dir, tmp_path, None, arguments)  # type: ignore[arg-type]
    learned = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert learned and all(parameter.dtype == torch.float32 for parameter in learned)


@pytest.mark.parametrize(
    ("settings", "eight_bits", "message"),
    [
        ({"fsdp": "full_shard"}, False, "not sharded by FSDP; recipes/accelerate/zero3.yaml shards it"),
        ({"use_vllm": True}, True, "vLLM takes no policy in 8 bits; load_in_4bit true, or use_vllm false, works"),
    ],
)
def test_a_quantized_policy_that_cannot_be_trained_is_refused(
    settings: dict[str, Any], eight_bits: bool, message: str, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    quantized = BitsAndBytesConfig(load_in_8bit=True) if eight_bits else NF4
    arguments = {"peft_config": LoraConfig(**LORA), "quantization_config": quantized}
    with pytest.raises(UserError, match=message):
        rain_trainer(tiny_policy_dir, tmp_path, None, arguments, **settings)  # type: ignore[arg-type]
