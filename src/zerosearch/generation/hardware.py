"""What a training run has to know of the machine: on one without an accelerator it sets itself up."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments


def fit_to_cpu(config: TrainingArguments) -> None:
    """Set what a machine without an accelerator needs, so that no user has to know it; elsewhere change nothing.

    Call it before TrainingArguments' own `__post_init__`, which picks the device.
    """
    import torch

    if torch.accelerator.is_available():
        return
    config.bf16 = False
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's default takes half the machine
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        config.ddp_backend = "gloo"  # without it accelerate sees one process; with use_cpu it drops DeepSpeed
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        config.use_cpu = True
