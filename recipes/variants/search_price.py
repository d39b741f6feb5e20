"""Search price: F1 less a tenth for each search, so that the policy asks only what it needs.

    python recipes/variants/search_price.py --config recipes/configs/tinyworld.yaml --output_dir outputs/price

Our own example, and the worked ablation of recipes/README.md; OTC (arXiv 2504.14870) scales the reward instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zerosearch.rollout.trajectory import Trajectory
from zerosearch.training.rewards import f1_reward

sys.path.append(str(Path(__file__).parents[1]))
import grpo

PRICE = 0.1


def search_price(trajectories: Sequence[Trajectory], **kwargs: Any) -> list[float | None]:
    """Charge for each search; a trajectory that lost one has no reward at all."""
    return [None if one.outcome == "failed_search" else -PRICE * one.searches for one in trajectories]


grpo.REWARDS = [f1_reward, search_price]  # type: ignore[list-item]

if __name__ == "__main__":
    grpo.main()
