"""Which generator a trainer's rollouts use: vLLM in this process, across ranks or behind a server, or transformers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from trl.models import unwrap_model_for_generation

from zerosearch.generation import Generator, RemoteGenerator
from zerosearch.generation.loading import longest_context
from zerosearch.generation.transformers_engine import TransformersGenerator
from zerosearch.generation.vllm_colocated import VLLMGenerator
from zerosearch.generation.vllm_server import VLLMServerGenerator, server_url
from zerosearch.generation.vllm_tensor_parallel import Ranks, TensorParallelGenerator

if TYPE_CHECKING:
    from zerosearch.training.trainer import SearchTrainer


def policy_generator(trainer: SearchTrainer) -> Generator | RemoteGenerator:
    """Return what samples the turns of the policy that this trainer trains, as its arguments say."""
    args, tokenizer, limit = trainer.args, trainer._tokenizer, trainer.args.max_trajectory_tokens
    if not args.use_vllm:

        def load() -> AbstractContextManager[Any]:
            checkpointing = args.gradient_checkpointing_kwargs
            return unwrap_model_for_generation(
                trainer.model_wrapped, trainer.accelerator, gradient_checkpointing_kwargs=checkpointing
            )

        longest = longest_context(trainer.model.config, limit)
        return TransformersGenerator(load, tokenizer, trainer.eos_token_ids, longest)
    if args.vllm_mode == "server":
        if args.overlap_steps:  # a fast tokenizer may refuse to work in two threads at once
            tokenizer = deepcopy(tokenizer)
        return VLLMServerGenerator(server_url(args), tokenizer, limit, timeout_s=args.turn_timeout_s)
    if args.vllm_tensor_parallel_size > 1:
        ranks = Ranks(args.vllm_tensor_parallel_size, args.turn_timeout_s)
        return TensorParallelGenerator(ranks, trainer.vllm_generation, tokenizer)
    return VLLMGenerator(trainer.vllm_generation.llm, tokenizer, trainer.vllm_generation)
