"""One training step of a small random model of each family, by the paper's tags or by calls of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, family_tokenizer, save_small_model
from rain import RainEngine, rain_trainer

from zerosearch.generation.tokenization import decoded_text
from zerosearch.prompts import PAPER
from zerosearch.rollout.trajectory import Trajectory

TRIED = [(name, agent) for name, family in FAMILIES.items() for agent in family.agents]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "agent"), TRIED)
def test_one_step(family: str, agent: str, tmp_path: Path) -> None:
    tokenizer = family_tokenizer(family)
    save_small_model(FAMILIES[family].model_type, tokenizer, tmp_path / "model")
    rolled_out: list[Trajectory] = []

    def length_reward(trajectories: Sequence[Trajectory], **kwargs: Any) -> list[float]:
        rolled_out.extend(trajectories)
        return [float(sum(trajectory.completion_ids) % 7) for trajectory in trajectories]

    arguments = {"processing_class": tokenizer, "agent": PAPER.agents[agent], "reward_funcs": length_reward}
    settings: dict[str, Any] = {"max_steps": 1, "max_trajectory_tokens": 3000, "max_observation_tokens": 200}
    settings |= {"per_device_train_batch_size": 4, "max_turns": 1, "learning_rate": 1e-3, "logged_trajectories": 0}
    without_thinking = (family, agent) == ("qwen3", "tools")
    if without_thinking:
        settings["chat_template_kwargs"] = {"enable_thinking": False}
    trainer = rain_trainer(tmp_path / "model", tmp_path / "policy", RainEngine(), arguments, **settings)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())
    assert len(rolled_out) == 4
    for trajectory in rolled_out:
        assert {len(trajectory.env_mask), len(trajectory.logprobs)} == {len(trajectory.completion_ids)}
        assert tokenizer.bos_token_id is None or trajectory.prompt_ids.count(tokenizer.bos_token_id) <= 1
        thinks_not = decoded_text(tokenizer, trajectory.prompt_ids).endswith("<think>\n\n</think>\n\n")
        assert thinks_not == without_thinking
