"""What SearchTrainer overrides or reads of TRL beyond its public interface.

When a pin moves and one of these fails, read the method again in the new TRL before changing the test.
"""

from __future__ import annotations

import inspect

import pytest
import trl
from trl import GRPOTrainer


def test_trl_is_the_version_this_was_built_on() -> None:
    assert trl.__version__.startswith("1.16."), "read the overrides of trainer.py against the new TRL, then move this"


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("log", ["self", "logs", "start_time"]),
    ],
)
def test_overridden_methods_have_the_parameters_they_had(method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(GRPOTrainer, method)).parameters) == parameters


def test_log_probabilities_are_asked_for_as_they_were() -> None:
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert parameters[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]


def test_trl_uses_rollout_func_and_its_mask_as_it_did() -> None:
    source = inspect.getsource(GRPOTrainer._generate)
    assert "output = self.rollout_func(prompts, self)" in source
    assert 'tool_mask = extra_fields.pop("env_mask", None)' in source
    assert source.index("self.vllm_generation.sync_weights()") < source.index("self.rollout_func(prompts, self)")


def test_trl_creates_its_vllm_engine_as_it_did() -> None:
    pytest.importorskip("vllm")
    from trl.generation.vllm_generation import VLLMGeneration

    source = inspect.getsource(VLLMGeneration)
    assert "self.llm = LLM(" in source and "max_model_len=self.max_model_length" in source
    assert "self._llm_weights_sleeping = True" in source and 'self.llm.wake_up(tags=["kv_cache"])' in source
