"""LLDS (Deng et al. 2025, arXiv 2512.04220): an update may not make good actions less likely than they were.

    python recipes/variants/llds.py --config recipes/configs/tinyworld.yaml --algorithm grpo --num_iterations 2 \\
        --output_dir outputs/llds

GRPO lowers the likelihood of good actions along with that of bad ones ("lazy likelihood displacement"), and at last
collapses. So an action whose advantage is not negative, and which has become less likely than when it was sampled,
adds LAMBDA times what each of its tokens has lost to the loss: the action gate of the authors' code. The first update
after a rollout has lost nothing yet, hence num_iterations; theirs splits a rollout into several updates.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from zerosearch.errors import UserError
from zerosearch.training.micro_batches import policy_mask
from zerosearch.training.trainer import SearchTrainer

sys.path.append(str(Path(__file__).parents[1]))
import grpo

LAMBDA = 0.2  # train_grpo_nqhot.sh of the authors' code


def lost_likelihood(
    old: torch.Tensor, new: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return what each token of a good action that became less likely has lost, in nats; all are (B, C)."""
    lost = (old - new) * mask * (advantages >= 0)
    actions = (mask.diff(dim=1, prepend=torch.zeros_like(mask[:, :1])) > 0).cumsum(1)  # an action is a run of ones
    of_action = lost.new_zeros(len(lost), lost.shape[1] + 1).scatter_add(1, actions, lost).gather(1, actions)
    return lost.clamp(min=0) * (of_action > 0)


class KeepsLikelihood(SearchTrainer):
    """Add the penalty to the loss, as the mean over the tokens of a micro-batch."""

    def __init__(self, **kwargs: Any) -> None:
        if kwargs["args"].num_iterations < 2:
            raise UserError("LLDS acts from the second update on a rollout: it needs --num_iterations 2 or more")
        super().__init__(**kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.logps = found[0]
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        if not self.model.training:
            return loss
        advantages, mask = inputs["advantages"], policy_mask(inputs)
        advantages = advantages if advantages.ndim == 2 else advantages[:, None]
        lost = lost_likelihood(inputs["old_per_token_logps"], self.logps, advantages, mask)
        penalty = LAMBDA * lost.sum() / mask.sum().clamp(min=1)
        self._metrics["train"]["llds"].append(penalty.item())
        return loss + penalty / self.current_gradient_accumulation_steps


grpo.SearchTrainer = KeepsLikelihood  # type: ignore[misc]

if __name__ == "__main__":
    grpo.main()
