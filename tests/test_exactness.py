"""What a rollout says of its tokens is what the trainer computes of them, policy token by policy token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rain import RainEngine, one_batch, rain_trainer

from zerosearch.training.micro_batches import whole


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_the_rollout_are_those_of_the_trainers_forward_pass(
    temperature: float, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    settings = {"max_turns": 4, "max_trajectory_tokens": 600, "temperature": temperature}
    trainer = rain_trainer(tiny_policy_dir, tmp_path, RainEngine(), **settings)
    batch = one_batch(trainer, num_rows=16)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, *whole(batch), width)  # (B, T)
    trajectories = [row["trajectories"] for row in trainer._handed.rows]
    for row, trajectory in enumerate(trajectories):
        assert batch["completion_ids"][row, : len(trajectory.completion_ids)].tolist() == trajectory.completion_ids
        for place, (logprob, is_own) in enumerate(zip(trajectory.logprobs, trajectory.env_mask, strict=True)):
            if is_own:
                assert logps[row, place].item() == pytest.approx(logprob, abs=1e-4), (row, place)
            else:
                assert logprob == 0.0
    assert max(len(trajectory.turns) for trajectory in trajectories) >= 3, "after several turns"
