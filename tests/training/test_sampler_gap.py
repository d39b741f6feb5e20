"""The correction for the engine's log-probabilities, made in the loss, is the one that TRL makes before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rain import one_batch
from transformers import set_seed

from zerosearch.training.trainer import SearchTrainer

MakeTrainer = Callable[..., SearchTrainer]
LOGGED = (
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
)


def step(trainer: SearchTrainer, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], dict[str, float], int]:
    """Return the gradients of a step of two micro-batches, what is logged of the engine, and how often it was scored.

    The engine is off by up to 0.6, and gave no log-probability for some tokens.
    """
    for holder in (trainer, trainer.args):
        holder.use_vllm = True  # what corrects is asked for this
    trainer._last_loaded_step = 0  # nothing to push
    sampling_logprobs = trainer._sampling_logprobs

    def wrong(trajectory: Any) -> list[float | None]:
        generator = torch.Generator().manual_seed(len(trajectory.completion_ids))
        off = torch.rand(len(trajectory.completion_ids), generator=generator).tolist()
        exact = sampling_logprobs(trajectory)
        return [None if by < 0.1 else p + by - 0.4 for p, by in zip(exact, off, strict=True)]

    monkeypatch.setattr(trainer, "_sampling_logprobs", wrong)
    calls: list[dict[str, Any]] = []
    trainer.model.register_forward_pre_hook(lambda _model, _args, kwargs: calls.append(kwargs), with_kwargs=True)
    set_seed(0)
    batch = one_batch(trainer)
    batch["advantages"] = torch.linspace(-1, 1, 8)
    trainer.model.zero_grad()
    for part, last in ((slice(0, 4), False), (slice(4, 8), True)):
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        trainer._compute_loss(
            trainer.model, {name: value[part] if value.ndim else value for name, value in batch.items()}
        ).backward()
    metrics = trainer._metrics["train"]
    assert all(len(metrics[name]) == 1 for name in LOGGED), "once a step"
    gradients = [weight.grad for weight in trainer.model.parameters()]
    return gradients, {name: metrics[name][0] for name in LOGGED}, sum("labels" in call for call in calls)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("token_truncate", {"vllm_importance_sampling_clip_max": 1.2}),
        ("token_truncate", {"vllm_importance_sampling_clip_max": 1.2, "loss_type": "vespo"}),
        ("token_mask", {"vllm_importance_sampling_clip_max": 1.2, "vllm_importance_sampling_clip_min": 0.8}),
        ("sequence_truncate", {"vllm_importance_sampling_clip_max": 1.2}),
        ("sequence_mask", {"vllm_importance_sampling_clip_min": 0.9, "beta": 0.1}),
    ],
)
def test_the_correction_in_the_loss_is_trls_without_its_forward_pass(
    mode: str, settings: dict[str, Any], make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "vllm_importance_sampling_mode": mode,
        "algorithm": "grpo",
        "gradient_accumulation_steps": 2,
        **settings,
    }
    ours, stock = (make_trainer(per_device_train_batch_size=4, **settings) for _ in range(2))
    assert ours._corrects_in_loss() is False, "without an inference engine there is nothing to correct"
    gradients, logged, passes = step(ours, monkeypatch)
    assert ours._corrects_in_loss()
    monkeypatch.setattr(stock, "_corrects_in_loss", lambda: False)
    expected, expected_log, more_passes = step(stock, monkeypatch)
    assert logged == pytest.approx(expected_log, rel=1e-4)
    assert logged[LOGGED[1]] > 0.3 and logged[LOGGED[2]] < 1.0
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-7)
    assert (passes, more_passes) == (2, 4), "of two micro-batches"


@pytest.mark.parametrize("settings", [{"num_iterations": 2}, {"algorithm": "ppo"}, {"steps_per_generation": 2}])
def test_where_the_weights_move_before_the_loss_or_ppo_asks_the_pass_is_made(
    settings: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(**settings)
    trainer.args.use_vllm = True
    assert not trainer._corrects_in_loss()
