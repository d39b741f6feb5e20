"""No work on tokens that teach nothing: rows of like length together, each part trimmed, only policy tokens projected.

What is left out changes no result: a token's log-probability depends on the tokens before it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer import utils as trl_utils


@dataclass(frozen=True)
class Part:
    """Rows (b,) of a batch, and the columns [start, end) of prompt and completion that they need."""

    rows: torch.Tensor
    start: int
    end: int


def sort_micro_batches(micro_batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Redistribute the rows of equal micro-batches so that each holds rows of like length; the sum of losses stays."""
    size = len(micro_batches[0]["completion_mask"])
    joined = {
        name: torch.cat([batch[name] for batch in micro_batches]) if value.ndim else value
        for name, value in micro_batches[0].items()
    }
    order = (joined["prompt_mask"].sum(1) + joined["completion_mask"].sum(1)).argsort()
    return [
        {name: value[rows] if value.ndim else value for name, value in joined.items()} for rows in order.split(size)
    ]


def trimmed_parts(attention_mask: torch.Tensor, scored: torch.Tensor, batch_size: int | None = None) -> list[Part]:
    """Split a batch (B, P + C) into parts of at most `batch_size` rows, of like length, without needless columns.

    `scored` (B, C) marks the completion tokens to score. A part ends at its last scored token; rows without one are
    left out, except that a part keeps a row: under ZeRO-3 each rank must make the same number of forward passes.
    """
    prompt_length = attention_mask.shape[1] - scored.shape[1]
    parts = []
    order = attention_mask.sum(1).argsort()
    for chunk in order.split(batch_size or len(order)):
        wanted = scored[chunk].any(1)
        rows = chunk[wanted] if wanted.any() else chunk[:1]
        start = int(attention_mask[rows].any(0).nonzero()[0])
        last = scored[rows].any(0).nonzero().flatten()
        end = prompt_length + int(last[-1]) + 1 if len(last) else start + 2  # two: one token to predict from another
        parts.append(Part(rows, start, end))
    return parts


@contextmanager
def compact_lm_head() -> Iterator[None]:
    """On a CPU, too, let TRL's fused head project the labelled positions only; by itself it does where Triton runs."""
    original = trl_utils._use_triton
    trl_utils._use_triton = lambda device: device.type == "cpu" or original(device)
    try:
        yield
    finally:
        trl_utils._use_triton = original
