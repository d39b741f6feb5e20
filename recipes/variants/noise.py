"""Other schedules of the noise than the curriculum (Table 6), all of its mean but the closed loop.

python recipes/variants/noise.py reversed --config recipes/configs/tinyworld.yaml --output_dir outputs/reversed
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from zerosearch.errors import UserError
from zerosearch.noise import NoiseSchedule, keyed_uniform

sys.path.append(str(Path(__file__).parents[1]))
import grpo

CURRICULUM = NoiseSchedule(0.0, 0.5)
RECENT = 5  # logged steps in the success rate

Log = Sequence[Mapping[str, Any]]


def mean_noise(total: int) -> float:
    return fmean(CURRICULUM.p_noise(step, total) for step in range(1, total + 1))


def constant(step: int, total: int, log: Log) -> float:
    return mean_noise(total)


def random(step: int, total: int, log: Log) -> float:
    """Draw the noise of each step evenly from 0 to twice the mean."""
    return 2 * mean_noise(total) * keyed_uniform(total, step)


def backwards(step: int, total: int, log: Log) -> float:
    return CURRICULUM.p_noise(total + 1 - step, total)


def closed_loop(step: int, total: int, log: Log) -> float:
    """Follow the success: half the mean reward of the last steps."""
    rewards = [entry["reward"] for entry in log if entry.get("reward") is not None][-RECENT:]
    return CURRICULUM.end * min(max(fmean(rewards), 0.0), 1.0) if rewards else CURRICULUM.start


SCHEDULES = {"constant": constant, "random": random, "reversed": backwards, "closed-loop": closed_loop}


@grpo.exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Train with the schedule that the first argument names."""
    if not argv or argv[0] not in SCHEDULES:
        raise UserError(f"name a schedule first: {', '.join(SCHEDULES)}")
    grpo.NOISE = SCHEDULES[argv[0]]
    grpo.main(list(argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
