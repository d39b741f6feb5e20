"""What corrects for an inference engine whose probabilities are not the trainer's, from the loss's own forward pass.

TRL forwards every batch once more for it, before its first update. Where a batch makes one update only, the pass of
the loss finds the same log-probabilities: without the other a step has a quarter less to compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from zerosearch.training.config import SearchConfig


def importance_ratio(gap: torch.Tensor, args: SearchConfig) -> torch.Tensor:
    """Return TRL's weights, (B, C), or (B, 1) of whole trajectories, from trainer's less engine's log-probabilities.

    `gap` (B, C) is 0 where nothing is corrected.
    """
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    level, _, kind = args.vllm_importance_sampling_mode.partition("_")
    ratio = (gap.sum(1, keepdim=True) if level == "sequence" else gap).exp()
    if kind == "truncate":
        return ratio.clamp(low, high)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


class SamplerGap:
    """Weights the micro-batches of a step, and sums up what TRL logs about the engine's log-probabilities."""

    def __init__(self, args: SearchConfig, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.gaps: list[torch.Tensor] = []
        self.ratios: list[torch.Tensor] = []

    def ratio(self, logps: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the weights of a micro-batch from both log-probabilities (B, C); NaN is one the engine did not give.

        `mask` (B, C) marks the tokens that are learned from.
        """
        known = mask.bool() & ~sampled.isnan()
        gap = (logps.detach() - sampled).masked_fill(~known, 0.0)
        ratio = importance_ratio(gap, self.args)
        self.gaps.append(gap[known].abs())
        self.ratios.append(ratio[mask.bool()] if ratio.shape == mask.shape else ratio.flatten())
        return ratio

    def log(self, metrics: Mapping[str, list[Any]]) -> None:
        """Add to TRL's metrics, once all micro-batches of a step went through `ratio`; forget them."""
        gap, ratio = (torch.cat(parts) for parts in (self.gaps, self.ratios))
        self.gaps, self.ratios = [], []
        nothing = gap.new_zeros(1)
        gap, ratio = gap if len(gap) else nothing, ratio if len(ratio) else nothing
        found = torch.stack([gap.mean(), gap.max(), ratio.min(), ratio.mean(), ratio.max()])
        of_ranks = self.accelerator.gather(found).view(-1, 5)
        metrics["sampling/sampling_logp_difference/mean"].append(of_ranks[:, 0].mean().item())
        metrics["sampling/sampling_logp_difference/max"].append(of_ranks[:, 1].max().item())
        metrics["sampling/importance_sampling_ratio/min"].append(of_ranks[:, 2].min().item())
        metrics["sampling/importance_sampling_ratio/mean"].append(of_ranks[:, 3].mean().item())
        metrics["sampling/importance_sampling_ratio/max"].append(of_ranks[:, 4].max().item())
