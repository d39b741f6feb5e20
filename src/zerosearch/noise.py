"""The curriculum: how likely a search returns noisy documents at each step, and the coin that decides it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from operator import index

from zerosearch.errors import UserError


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise that rises from `start` to `end`, slowly first (Eq. 1); constant when they are equal.

    `base` is the exponential base b of Eq. 1, 4 in the paper; 1 stands for its limit, a straight line.
    Raises `UserError` unless both probabilities lie in [0, 1] and the base is at least 1.
    """

    start: float
    end: float
    base: float = 4.0

    def __post_init__(self) -> None:
        for name, probability in (("start", self.start), ("end", self.end)):
            if not 0.0 <= probability <= 1.0:
                raise UserError(f"noise {name} is {probability}: a probability lies in [0, 1]")
        if not 1.0 <= self.base < float("inf"):
            raise UserError(f"noise base is {self.base}: it must be at least 1")

    def p_noise(self, step: int, total_steps: int) -> float:
        """Return the probability of noisy documents at optimizer step `step`, counted from 1 to `total_steps`."""
        if not 1 <= step <= total_steps:
            raise ValueError(f"step {step} is outside 1 to {total_steps}")
        progress = step / total_steps
        if self.base != 1.0:
            progress = (self.base**progress - 1) / (self.base - 1)
        return self.start + progress * (self.end - self.start)  # Eq. 1


def keyed_uniform(*key: int) -> float:
    """Return a number in [0, 1) that depends on the key alone: (seed, step, row, sample, turn) for a search.

    No generator is advanced, so arrival order, the number of ranks and a resume change nothing.
    """
    text = ",".join(str(index(part)) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # the 53 bits a float holds, so that 1.0 cannot come out
