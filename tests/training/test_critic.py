"""The value model: which state a value belongs to, what it learns from, and what a checkpoint keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, GPTNeoXJapaneseConfig

from zerosearch.errors import UserError
from zerosearch.training.config import SearchConfig
from zerosearch.training.critic import Critic, value_loss, value_model
from zerosearch.training.micro_batches import policy_mask, whole

MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])


@pytest.fixture
def critic(tiny_policy_dir: Path, tmp_path: Path) -> Critic:
    return make_critic(tiny_policy_dir, tmp_path)


def make_critic(directory: Path, output_dir: Path, **settings: Any) -> Critic:
    config = SearchConfig(
        **{
            "output_dir": str(output_dir),
            "algorithm": "ppo",
            "critic_learning_rate": 1e-2,
            "critic_warmup_steps": 0,
            "gradient_checkpointing": False,
            "report_to": "none",
            **settings,
        }
    )
    return Critic(str(directory), {"dtype": torch.float32}, config, Accelerator(cpu=True))


def one_batch() -> dict[str, torch.Tensor]:
    """Two trajectories with prompts of 3 and 2 tokens, and an observation in the first."""
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_ids": torch.randint(3, 300, (2, 3), generator=generator),
        "prompt_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
        "completion_ids": torch.randint(3, 300, (2, 4), generator=generator),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]),
        "tool_mask": MASK,
        "values": torch.zeros(2, 4),
        "returns": torch.tensor([[0.2, 0.4, 0.0, 0.6], [1.0, 0.0, 0.0, 0.0]]),
    }


def values_of(critic: Critic, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return critic.values(*whole(batch), policy_mask(batch))


def test_the_value_loss_by_hand() -> None:
    values, old = torch.tensor([[1.0, 0.2, 5.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    returns, mask = torch.tensor([[2.0, 1.0, 9.0]]), torch.tensor([[1, 1, 0]])
    # Clipped to 0.5 of the old value: max(1, 1.5^2) = 2.25 and max(0.8^2, 0.8^2) = 0.64; the observation is left out.
    assert value_loss(values, old, returns, mask, clip=0.5).item() == pytest.approx((2.25 + 0.64) / 2)


def test_it_starts_from_the_policy_at_value_0(critic: Critic, tiny_policy_dir: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float32)
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, critic.model.model.get_parameter(name)), name
    assert (values_of(critic, one_batch()) == 0).all()


def test_a_value_is_that_of_the_state_before_its_token(critic: Critic) -> None:
    batch = one_batch()
    torch.nn.init.normal_(critic.model.score.weight, generator=torch.Generator().manual_seed(0))
    values = values_of(critic, batch)
    for row, tokens in enumerate(([0, 1, 3], [0])):
        kept = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        for token in tokens:
            before = torch.cat([kept, batch["completion_ids"][row, :token]])[None]
            with torch.no_grad():
                expected = critic.model(input_ids=before).logits[0, -1, 0]
            torch.testing.assert_close(values[row, token], expected, rtol=1e-4, atol=1e-5)
    assert (values[~MASK.bool()] == 0).all()


def test_it_learns_the_returns_it_is_shown(tiny_policy_dir: Path, tmp_path: Path) -> None:
    critic = make_critic(tiny_policy_dir, tmp_path, value_clip=5.0, critic_learning_rate=2e-3)
    batch = one_batch()
    losses = [critic.learn([batch], torch.tensor(4)) for _ in range(40)]
    assert losses[0] == pytest.approx((0.2**2 + 0.4**2 + 0.6**2 + 1) / 2 / 4)
    assert values_of(critic, batch)[MASK.bool()].tolist() == pytest.approx([0.2, 0.4, 0.6, 1.0], abs=0.15)


def test_a_value_that_has_moved_by_the_clip_is_pulled_no_further() -> None:
    values = torch.tensor([[0.4, 0.6, -0.6]], requires_grad=True)
    value_loss(values, torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3), clip=0.5).backward()
    assert values.grad[0].tolist() == pytest.approx([-0.6, 0.0, -1.6])


def test_the_rate_rises_over_the_warm_up(tiny_policy_dir: Path, tmp_path: Path) -> None:
    critic = make_critic(tiny_policy_dir, tmp_path, critic_learning_rate=1e-2, critic_warmup_steps=4)
    rates = []
    for _ in range(5):
        critic.learn([one_batch()], torch.tensor(4))
        rates.append(critic.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_two_micro_batches_make_the_update_of_one(tiny_policy_dir: Path, tmp_path: Path) -> None:
    batch = one_batch()
    halves = [{name: value[row : row + 1] for name, value in batch.items()} for row in (0, 1)]
    whole, parts = (make_critic(tiny_policy_dir, tmp_path) for _ in range(2))
    losses = whole.learn([batch], torch.tensor(4)), parts.learn(halves, torch.tensor(4))
    assert losses[0] == pytest.approx(losses[1])
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_keeps_weights_optimizer_and_warm_up(
    critic: Critic, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    critic.learn([one_batch()], torch.tensor(4))
    critic.save(tmp_path / "critic")
    other = make_critic(tiny_policy_dir, tmp_path)
    other.load(tmp_path / "critic")
    assert other.updates == 1
    for one in (critic, other):
        one.learn([one_batch()], torch.tensor(4))
    assert all(torch.equal(*pair) for pair in zip(critic.model.parameters(), other.model.parameters(), strict=True))


def test_a_model_without_a_value_head_is_refused(tmp_path: Path) -> None:
    GPTNeoXJapaneseConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"transformers has no value head for .*; algorithm reinforce, rloo or grpo"):
        value_model(str(tmp_path), {})
