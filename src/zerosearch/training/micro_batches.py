"""Length-sorted micro-batches, trimmed padding, LM head on policy tokens only.

None of it changes a result: a token's log-probability depends on the tokens before it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from trl.trainer import utils as trl_utils


@dataclass(frozen=True)
class Part:
    """Rows (b,) of a batch, and the columns [start, end) of prompt and completion that they need."""

    rows: torch.Tensor
    start: int
    end: int


def policy_mask(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return which completion tokens are learned from, (B, C)."""
    mask: torch.Tensor = batch["completion_mask"] * batch["tool_mask"]
    return mask


def whole(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask of prompt and completion together, (B, P + C)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)


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


def scored_logps(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    scored: torch.Tensor,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return log-probabilities and entropies of the tokens under `scored`, and the auxiliary loss of a MoE model.

    Takes ids and mask (B, P + C) and `scored` (B, C), and returns (B, C), 0 at every other token.
    """
    width = scored.shape[1]
    prompt_length = input_ids.shape[1] - width
    logps = torch.zeros(scored.shape, device=input_ids.device)
    entropies = torch.zeros_like(logps) if compute_entropy else None
    aux_losses = []
    for part in trimmed_parts(attention_mask, scored, batch_size):
        columns = slice(part.start, part.end)
        ids = input_ids[part.rows, columns]
        marks = pad(scored[part.rows], (prompt_length, 0))[:, columns]
        outputs = model(
            input_ids=ids,
            attention_mask=attention_mask[part.rows, columns],
            labels=ids.masked_fill(~marks, -100),
            fused_lm_head=True,
            **({"output_router_logits": True} if compute_aux_loss else {}),
        )
        first = prompt_length - part.start - 1  # a column holds what the token after it is predicted with
        missing = (0, width - outputs.log_probs[:, first:].shape[1])
        logps = logps.index_put((part.rows,), pad(outputs.log_probs[:, first:], missing))
        if entropies is not None:
            entropies = entropies.index_put((part.rows,), pad(outputs.entropy[:, first:], missing))
        aux_losses.append(outputs.aux_loss)
    return logps, entropies, torch.stack(aux_losses).mean() if compute_aux_loss else None


@contextmanager
def compact_lm_head() -> Iterator[None]:
    """Let TRL's fused head project the labelled positions only on a CPU, too; by itself it does where Triton runs."""
    original = trl_utils._use_triton
    trl_utils._use_triton = lambda device: device.type == "cpu" or original(device)
    try:
        yield
    finally:
        trl_utils._use_triton = original
