"""A colocated vLLM engine that gets the policy's LoRA adapter alone: it says what the policy says, step after step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generation_parts import move_adapter, sample, turn_difference
from peft import IA3Config, LoraConfig
from rain import RainEngine, rain_trainer

from zerosearch.generation import TurnRequest
from zerosearch.generation.vllm_adapters import adapter_rank
from zerosearch.training.trainer import SearchTrainer

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ({}, 8),
        ({"r": 20, "use_rslora": True}, 32),
        ({"use_dora": True}, None),
        ({"modules_to_save": ["lm_head"]}, None),
        ({"rank_pattern": {"q_proj": 8}}, None),
        ({"alpha_pattern": {"q_proj": 8}}, None),
        ({"lora_bias": True}, None),
        ({"r": 1000}, None),
    ],
)
def test_an_engine_takes_an_adapter_that_vllm_reads_whole(config: dict[str, Any], rank: int | None) -> None:
    assert adapter_rank(LoraConfig(**LORA | config)) == rank


def test_an_engine_takes_no_other_adapters() -> None:
    assert adapter_rank(IA3Config(target_modules=["q_proj"], feedforward_modules=[])) is None
    assert adapter_rank(None) is None


@pytest.fixture(scope="module")
def trainer(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchTrainer:
    """A trainer of adapters, after two steps."""
    pytest.importorskip("vllm")
    output = tmp_path_factory.mktemp("policy")
    arguments = {"peft_config": LoraConfig(**LORA)}
    settings: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "sync_adapter": True}
    settings |= {"learning_rate": 0.05, "max_steps": 3}
    trained = rain_trainer(tiny_policy_dir, output, RainEngine(), arguments, **settings)
    trained.train()
    return trained


def engine_weights(trainer: SearchTrainer) -> dict[str, torch.Tensor]:
    model = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def difference(trainer: SearchTrainer, context: list[int], seed: int) -> float:
    """Sample a turn; return by how much its log-probabilities differ from the trainer's at most."""
    turn = sample(trainer.generator, [TurnRequest(0, context, 24, seed)])[0]  # type: ignore[arg-type]
    return turn_difference(trainer.model, context, turn)


@pytest.mark.slow
def test_a_trained_adapter_samples_what_the_trainer_scores(trainer: SearchTrainer) -> None:
    logged = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logged[-1]["kl"] > 1e-3, "the policy has left its base"
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in logged) < 1e-3


@pytest.mark.slow
def test_a_sync_leaves_the_base_and_no_turn_reads_keys_and_values_of_an_earlier_step(trainer: SearchTrainer) -> None:
    trainer.vllm_generation.sync_weights()
    before, context = engine_weights(trainer), [5 + place % 90 for place in range(200)]
    assert difference(trainer, context, seed=1) < 1e-4
    assert difference(trainer, context, seed=2) < 1e-4, "from the prefix cache"
    move_adapter(trainer.model)
    assert difference(trainer, context, seed=3) > 1e-2, "the engine still has the step before"
    trainer.vllm_generation.sync_weights()
    assert difference(trainer, context, seed=3) < 1e-4
    assert trainer.vllm_generation.llm.llm_engine.list_loras() == {trainer.generator.adapter.request.lora_int_id}
    for name, weight in engine_weights(trainer).items():
        assert torch.equal(weight, before[name]), name
