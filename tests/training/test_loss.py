"""The loss as TRL computes it, on the policy's tokens alone, whatever is trimmed, sorted or adapted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from peft import LoraConfig
from rain import ROWS, RainEngine, one_batch
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from zerosearch.training.micro_batches import policy_mask, sort_micro_batches, whole
from zerosearch.training.rewards import f1_reward
from zerosearch.training.trainer import SearchTrainer

MakeTrainer = Callable[..., SearchTrainer]


def loss_gradient(trainer: SearchTrainer, batch: dict[str, Any], logps: torch.Tensor) -> torch.Tensor:
    """Return the gradient (B, T) of TRL's loss with respect to given policy log-probabilities (B, T)."""
    logps = logps.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, torch.zeros_like(logps), None)
    trainer._compute_loss(trainer.model, batch).backward()
    return logps.grad


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_the_loss_has_no_gradient_at_what_the_environment_wrote(algorithm: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(algorithm=algorithm, beta=0.1)
    batch = one_batch(trainer)
    batch["advantages"] = torch.ones(8)
    own = policy_mask(batch).bool()
    assert (batch["completion_mask"].bool() & ~own).sum() > 0, "there are observations in the batch"
    gradient = loss_gradient(trainer, batch, torch.full(own.shape, -1.0))
    assert (gradient[own] != 0).all()
    assert (gradient[~own] == 0).all()


def test_without_masking_observations_are_learned_too(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(mask_observations=False, beta=0.1)
    batch = one_batch(trainer)
    batch["advantages"] = torch.ones(8)
    filled = batch["completion_mask"].bool()
    gradient = loss_gradient(trainer, batch, torch.full(filled.shape, -1.0))
    assert (gradient[filled] != 0).all()
    assert (gradient[~filled] == 0).all()


def test_the_kl_term_pulls_towards_the_reference(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(beta=0.1)
    batch = one_batch(trainer)
    batch["advantages"] = torch.zeros(8)
    own = policy_mask(batch).bool()
    reference = batch["ref_per_token_logps"]
    below = loss_gradient(trainer, batch, reference - 0.5)
    above = loss_gradient(trainer, batch, reference + 0.5)
    at = loss_gradient(trainer, batch, reference)
    # Descent goes against the gradient: up where the policy is below the reference, down where it is above.
    assert (below[own] < 0).all() and (above[own] > 0).all() and (at[own] == 0).all()
    # k3: the derivative of beta (e^d - d - 1), d = reference - policy, over the number of tokens; Section 6f's sign.
    torch.testing.assert_close(
        below[own] * own.sum(), torch.full((int(own.sum()),), 0.1 * (1 - 1.6487)), rtol=1e-3, atol=0
    )


def test_the_loss_on_a_masked_batch_is_stock_trls(
    make_trainer: MakeTrainer, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(algorithm="grpo", beta=0.1, entropy_coef=0.01)
    batch = one_batch(trainer)
    batch["advantages"] = torch.linspace(-1, 1, 8)
    config = GRPOConfig(
        output_dir=str(tmp_path / "stock"),
        beta=0.1,
        entropy_coef=0.01,
        use_bias_correction_kl=False,
        num_generations=4,
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    questions = datasets.Dataset.from_list(ROWS)
    stock = GRPOTrainer(model=str(tiny_policy_dir), reward_funcs=f1_reward, args=config, train_dataset=questions)
    stock.model.train()
    stock.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the reference
        for ours, theirs in zip(trainer.model.parameters(), stock.model.parameters(), strict=True):
            ours += 0.02 * torch.randn(ours.shape, generator=generator)
            theirs.copy_(ours)
    losses = [one._compute_loss(one.model, batch) for one in (trainer, stock)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert trainer._metrics["train"]["kl"] == pytest.approx(stock._metrics["train"]["kl"], rel=1e-4)
    assert stock._metrics["train"]["kl"][-1] > 0.01
    for ours, theirs in zip(trainer.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_reinforce_weights_each_policy_token_by_the_raw_return(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(algorithm="reinforce", beta=0.0, max_turns=4, per_device_train_batch_size=32)
    batch = one_batch(trainer, num_rows=32)
    answers = [row["answer"] for row in trainer._handed.rows]
    expected = [f1_reward([answer], [ROWS[0]["golden_answers"]], ["answered"])[0] for answer in answers]
    assert batch["advantages"].tolist() == pytest.approx(expected)
    assert sum(expected) > 0, "some trajectory of the tiny policy is rewarded"
    own = policy_mask(batch).bool()
    gradient = loss_gradient(trainer, batch, torch.full(own.shape, -1.0))
    torch.testing.assert_close(gradient, -(batch["advantages"][:, None] * own) / own.sum())


def test_trimming_changes_no_log_probability(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(RainEngine(fails=lambda request: request.key[3] == 1), max_failed_search_share=1.0)
    batch = one_batch(trainer)
    ids, mask = whole(batch)
    assert len(set(mask.sum(1).tolist())) > 3, "rows of several lengths"
    arguments = (trainer.model, ids, mask, batch["completion_ids"].shape[1])
    own = policy_mask(batch).bool()
    assert not own.any(1).all(), "a row without a token to learn from"
    with torch.no_grad():
        theirs = GRPOTrainer._get_per_token_logps_and_entropies(trainer, *arguments, compute_entropy=True)
        for batch_size in (None, 3, 1):
            ours = trainer._get_per_token_logps_and_entropies(*arguments, batch_size=batch_size, compute_entropy=True)
            for our, their in zip(ours[:2], theirs[:2], strict=True):
                assert our.shape == their.shape
                torch.testing.assert_close(our[own], their[own], rtol=1e-4, atol=1e-5)
                assert (our[~own] == 0).all()


def test_the_head_projects_policy_tokens_only(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(beta=0.1)
    projected = []
    stock = trl.trainer.utils._ChunkedLogProbFunction.apply

    def spy(hidden_states: torch.Tensor, *rest: Any) -> Any:
        projected.append(len(hidden_states))
        return stock(hidden_states, *rest)

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", spy)
    batch = one_batch(trainer)
    trainer._compute_loss(trainer.model, batch)
    tokens = int(policy_mask(batch).sum())
    assert 0 < tokens < batch["completion_mask"].sum()
    assert projected == [tokens, tokens], "once for the reference, once for the policy"


@pytest.mark.parametrize("settings", [{}, {"entropy_coef": 0.1}, {"loss_type": "grpo"}])
def test_micro_batches_of_like_length_have_the_same_sum_of_gradients(
    settings: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(gradient_accumulation_steps=2, per_device_train_batch_size=4, **settings)
    batch = one_batch(trainer)
    batch["advantages"] = torch.arange(8.0)  # so that it matters which row gets which
    halves = [
        {name: value[rows] if value.ndim else value for name, value in batch.items()}
        for rows in (slice(0, 4), slice(4, 8))
    ]
    by_length = sort_micro_batches(halves)
    lengths = [(half["prompt_mask"].sum(1) + half["completion_mask"].sum(1)).tolist() for half in by_length]
    assert max(lengths[0]) <= min(lengths[1])

    def gradients(micro_batches: list[dict[str, Any]]) -> list[torch.Tensor]:
        trainer.model.zero_grad()
        for micro_batch in micro_batches:
            trainer._compute_loss(trainer.model, micro_batch).backward()
        return [parameter.grad.clone() for parameter in trainer.model.parameters()]

    for one, other in zip(gradients(halves), gradients(by_length), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_generations_used_for_several_steps_stay_in_their_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=2, steps_per_generation=4)
    trainer.model.train()
    trainer.state.max_steps = 2
    seen: list[list[int]] = []
    stock = GRPOTrainer._prepare_inputs

    def spy(self: GRPOTrainer, rows: Any) -> Any:
        inputs = stock(self, rows)
        seen.extend(one["completion_mask"].sum(1).tolist() for one in self._buffered_inputs)
        return inputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_prepare_inputs", spy)
        trainer._prepare_inputs([dict(ROWS[place // 4]) for place in range(8)])
    after = [one["completion_mask"].sum(1).tolist() for one in trainer._buffered_inputs]
    for step in (slice(0, 2), slice(2, 4)):
        assert sorted(chain(*after[step])) == sorted(chain(*seen[step]))
    assert after != seen, "rows have been sorted"


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_with_lora_the_reference_is_the_base_model(quantized: bool, make_trainer: MakeTrainer) -> None:
    arguments: dict[str, Any] = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}
    if quantized:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    trainer = make_trainer(arguments=arguments, beta=0.1, learning_rate=1e-2)
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    before = one_batch(trainer)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == ("lora" in name)
        assert torch.equal(parameter, weights[name]) or "lora" in name
    assert any(not torch.equal(p, weights[n]) for n, p in trainer.model.named_parameters() if "lora_B" in n)
    assert trainer.ref_model is None
    first, second, *_ = trainer.state.log_history
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-6

    # What the trained model says with its adapters off is what it said before.
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer._handed.scored = policy_mask(before)
    ids, mask = whole(before)
    with torch.no_grad(), model.disable_adapter():
        base, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, trainer._handed.scored.shape[1])
    torch.testing.assert_close(base, before["ref_per_token_logps"], rtol=1e-4, atol=1e-4)


def test_ppo_charges_the_kl_in_its_reward_not_in_its_loss(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(algorithm="ppo", beta=0.5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    batch = one_batch(trainer)
    own = policy_mask(batch).bool()
    # The critic starts at 0, so the last token's return is its reward: the trajectory's less beta (log p - log p_ref).
    assert (batch["values"] == 0).all()
    trainer._handed.scored = own
    ids, mask = whole(batch)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, own.shape[1])
    penalty = 0.5 * (logps - batch["ref_per_token_logps"])
    assert penalty[own].abs().max() > 0.01
    for row, trajectory in enumerate(trainer._handed.rows):
        places = own[row].nonzero().flatten()
        reward = f1_reward([trajectory["answer"]], [trajectory["golden_answers"]], [trajectory["outcome"]])[0]
        assert batch["returns"][row, places[-1]].item() == pytest.approx(reward - penalty[row, places[-1]].item())
        total = reward - penalty[row][own[row]].sum().item()
        assert batch["returns"][row, places[0]].item() == pytest.approx(total, abs=1e-4)
    assert batch["advantages"][own].mean().item() == pytest.approx(0, abs=1e-6)
    assert batch["advantages"][own].std().item() == pytest.approx(1, abs=1e-4)
    assert (batch["advantages"][~own] == 0).all()
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    assert (loss_gradient(trainer, batch, logps) == 0).all(), "no KL in the loss"
    assert trainer.beta == 0.5
