"""Settings that cannot work get one sentence, and the defaults are the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zerosearch.errors import UserError
from zerosearch.training.config import SearchConfig
from zerosearch.training.tuning import TuningConfig

OVERLAP = {"overlap_steps": 1, "use_vllm": True, "vllm_mode": "server"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_end": 1.5}, "noise end is 1.5: a probability lies in"),
        ({"noise_start": -0.1}, "noise start is -0.1: a probability lies in"),
        ({"noise_base": 0.5}, "noise base is 0.5: it must be at least 1"),
        ({"algorithm": "dpo"}, "algorithm is 'dpo': it must be reinforce, rloo, grpo or ppo"),
        ({"baseline": "best"}, "baseline is 'best': it must be none, group or batch"),
        ({"baseline": "group", "algorithm": "grpo"}, "grpo has its own: baseline none, or reinforce, works"),
        ({"scale_rewards": "none"}, "reinforce scales no rewards by their group; scale_rewards group"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "rewards are added up first"),
        ({"chat_template_kwargs": '{"enable'}, "chat_template_kwargs"),
        ({"beta": -0.1}, "beta is -0.1: it must be at least 0"),
        ({"epsilon": -0.1}, "epsilon is -0.1: it must be at least 0"),
        ({"temperature": 0.0}, "temperature is 0.0: greedy turns are all alike.*temperature 1.0 works"),
        ({"sync_ref_model": True, "beta": 0.0}, "with beta 0 there is none; beta 0.001 works"),
        ({"algorithm": "ppo", "gae_lambda": 1.5}, "gae_lambda is 1.5: it must be at most 1"),
        ({"algorithm": "ppo", "critic_learning_rate": 0.0}, "critic_learning_rate is 0.0: it must be above 0"),
        ({"algorithm": "ppo", "value_clip": 0.0}, "value_clip is 0.0: it must be above 0"),
        ({"algorithm": "ppo", "critic_warmup_steps": -1}, "critic_warmup_steps is -1: it must be at least 0"),
        ({"algorithm": "ppo", "loss_type": "vespo"}, "loss_type is 'vespo': .* grpo, bnpo, dr_grpo, dapo work"),
        ({"algorithm": "ppo", "importance_sampling_level": "sequence"}, "importance_sampling_level token"),
        ({"algorithm": "ppo", "fsdp": "full_shard"}, "not sharded by FSDP; recipes/accelerate/zero3.yaml"),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"num_generations": 6}, r"divisible by num_generations \(6\).*A step has per_device_train_batch_size x"),
        ({"max_trajectory_tokens": 1500}, "2 turns of 500 tokens and 1 observation of 500 take 1500.*; 2012 works"),
        ({"max_turn_tokens": 0}, "max_turn_tokens is 0: it must be at least 1"),
        ({"max_failed_search_share": 2.0}, "max_failed_search_share is 2.0: it must be at most 1"),
        ({"overlap_steps": 2}, "overlap_steps is 2: it must be at most 1"),
        ({"overlap_steps": 1}, "its engine must stand apart from the trainer; use_vllm true with vllm_mode server"),
        ({**OVERLAP, "vllm_mode": "colocate"}, "its engine must stand apart from the trainer"),
        ({**OVERLAP, "vllm_importance_sampling_correction": False}, "corrected token by token"),
        ({**OVERLAP, "vllm_importance_sampling_mode": "sequence_mask"}, "corrected token by token"),
        ({**OVERLAP, "algorithm": "ppo"}, "not the returns that the critic of ppo learns from"),
        ({**OVERLAP, "num_iterations": 2}, "one update of each rollout.*num_iterations 1 works"),
        ({**OVERLAP, "steps_per_generation": 32}, "one update of each rollout.*steps_per_generation left out"),
        (
            {"use_vllm": True, "vllm_mode": "cloud"},
            "vllm_mode is 'cloud': it must be colocate or server|not installed",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        SearchConfig(output_dir=str(tmp_path), **settings)


def test_sixteen_bits_on_a_cpu_are_for_who_asks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (SearchConfig, TuningConfig):
        assert not kind(output_dir=str(tmp_path)).bf16
        assert kind(output_dir=str(tmp_path), bf16=True).bf16
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"bf16 true with DeepSpeed needs an accelerator; .*, bf16 false"):
        SearchConfig(output_dir=str(tmp_path), bf16=True)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = SearchConfig(output_dir=str(tmp_path))
    assert config.generation_batch_size == 64 * 5
    assert (config.algorithm, config.beta, config.learning_rate, config.num_generations) == (
        "reinforce",
        0.001,
        1e-6,
        5,
    )
    assert (config.epsilon, config.max_grad_norm, config.num_iterations) == (0.2, 1.0, 1)
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (1.0, 1.0, 0, None)
    assert (config.mask_observations, config.noise_base) == (True, 4.0)
    assert config.vllm_importance_sampling_mode == "token_truncate"
    assert (config.max_completion_length, config.vllm_max_model_length) == (4096, 4096)
