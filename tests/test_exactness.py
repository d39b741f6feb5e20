"""What a rollout says of its tokens is what the trainer computes of them, policy token by policy token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rain import ROWS, RainEngine, rain_trainer


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_the_rollout_are_those_of_the_trainers_forward_pass(
    temperature: float, tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 1, "max_turns": 4, "max_trajectory_tokens": 600, "temperature": temperature}
    trainer = rain_trainer(tiny_policy_dir, tmp_path, RainEngine(), **settings)
    rollouts: list[dict[str, Any]] = []
    roll_out = trainer.rollout_func
    monkeypatch.setattr(trainer, "rollout_func", lambda *args: rollouts.append(roll_out(*args)) or rollouts[-1])
    trainer.model.train()
    trainer.state.max_steps = 1
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions([dict(ROWS[place // 4]) for place in range(16)])

    (rollout,) = rollouts
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1]
        )  # (B, T)
    turns = []
    for row, (theirs, ours, own) in enumerate(zip(logps, rollout["logprobs"], rollout["env_mask"], strict=True)):
        assert batch["completion_ids"][row, : len(ours)].tolist() == rollout["completion_ids"][row]
        for place, (logprob, is_own) in enumerate(zip(ours, own, strict=True)):
            if is_own:
                assert theirs[place].item() == pytest.approx(logprob, abs=1e-4), (row, place)
            else:
                assert logprob == 0.0
        turns.append(sum(not before and after for before, after in zip([0, *own], own, strict=False)))
    assert max(turns) >= 3, "after several turns"
