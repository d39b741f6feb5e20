"""Which generator a trainer's rollouts use: vLLM in this process, across ranks or behind a server, or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from trl.models import unwrap_model_for_generation

from zerosearch.engines import SearchEngine
from zerosearch.engines.colocated_simulator import colocated_simulators
from zerosearch.errors import UserError
from zerosearch.generation import Generator, RemoteGenerator
from zerosearch.generation.loading import base_of_adapter, longest_context, model_identity
from zerosearch.generation.transformers_engine import TransformersGenerator
from zerosearch.generation.vllm_adapters import adapter_options, adapter_rank, sync_policy
from zerosearch.generation.vllm_colocated import VLLMGenerator
from zerosearch.generation.vllm_server import VLLMServerGenerator, server_url, sync_to_server
from zerosearch.generation.vllm_tensor_parallel import Ranks, TensorParallelGenerator
from zerosearch.generation.vllm_two_adapters import TwoAdapterGenerator
from zerosearch.training.config import SearchConfig, is_fsdp

if TYPE_CHECKING:
    from zerosearch.training.trainer import SearchTrainer

APART = "serve the simulator apart (recipes/serve_simulator.py), with --simulator served"


def policy_generator(trainer: SearchTrainer) -> Generator | RemoteGenerator:
    """Return what samples the turns of the policy that this trainer trains, as its arguments say.

    From here on TRL's sync of a policy with adapters is ours.
    """
    args, tokenizer, limit = trainer.args, trainer._tokenizer, trainer.args.max_trajectory_tokens
    if not args.use_vllm:

        def load() -> AbstractContextManager[Any]:
            checkpointing = args.gradient_checkpointing_kwargs
            return unwrap_model_for_generation(
                trainer.model_wrapped, trainer.accelerator, gradient_checkpointing_kwargs=checkpointing
            )

        longest = longest_context(trainer.model.config, limit)
        return TransformersGenerator(load, tokenizer, trainer.eos_token_ids, longest)
    generation, is_peft = trainer.vllm_generation, is_peft_model(trainer.model)
    if args.vllm_mode == "server":
        served = sync_to_server(generation, server_url(args), args.sync_adapter) if is_peft else None
        if args.overlap_steps:  # a fast tokenizer may refuse to work in two threads at once
            tokenizer = deepcopy(tokenizer)
        return VLLMServerGenerator(server_url(args), tokenizer, limit, served, timeout_s=args.turn_timeout_s)
    adapter = sync_policy(generation) if is_peft else None
    if args.vllm_tensor_parallel_size > 1:
        ranks = Ranks(args.vllm_tensor_parallel_size, args.turn_timeout_s)
        return TensorParallelGenerator(ranks, generation, tokenizer, adapter)
    driven = (generation.llm, tokenizer, generation, adapter)
    simulators = colocated_simulators([trainer.engine, trainer.eval_engine])
    if not simulators:
        return VLLMGenerator(*driven)
    if adapter is None:
        raise UserError(f"vLLM serves no adapters over {trainer.model.name_or_path}; {APART}")
    generator = TwoAdapterGenerator(*driven, simulator=str(simulators[0].model))
    for simulator in simulators:
        simulator.reply = generator.reply
    return generator


def engine_adapters(
    args: SearchConfig,
    engines: Sequence[SearchEngine],
    model: Any,
    peft_config: Any = None,
    quantization_config: Any = None,
    **others: Any,
) -> dict[str, Any]:
    """Return the options with which a colocated engine takes the policy's adapter, and a simulator's beside it.

    None where it gets merged weights: as `sync_adapter` says, for a base in 4 bits, which is not what the engine has
    read, and for FSDP, whose shards are TRL's to gather.
    Raises `UserError` if `sync_adapter` asks for an adapter that cannot be synced, and for a colocated simulator that
    cannot work with this policy.
    """
    is_merged = not args.use_vllm or quantization_config is not None or is_fsdp(args)
    rank = None if is_merged else adapter_rank(peft_config or getattr(model, "active_peft_config", None))
    if args.sync_adapter and rank is None:
        raise UserError(
            "sync_adapter true needs a LoRA adapter that vLLM serves: use_vllm true and use_peft true, without "
            "load_in_4bit, DoRA or FSDP; leave it out to push merged weights"
        )
    if args.vllm_mode != "colocate":
        rank = None
    simulators = {one.model for one in colocated_simulators(engines)}
    if not simulators:
        wanted = torch.accelerator.is_available() if args.sync_adapter is None else args.sync_adapter
        return adapter_options([rank]) if rank and wanted else {}
    if rank is None or args.vllm_tensor_parallel_size > 1 or len(simulators) > 1:
        raise UserError(
            "one colocated simulator lives in the vLLM engine of a policy whose LoRA adapter vLLM serves: it needs "
            "use_vllm true, vllm_mode colocate, vllm_tensor_parallel_size 1 and use_peft true, without load_in_4bit, "
            f"DoRA or FSDP; {APART}"
        )
    return adapter_options([rank, simulator_rank(str(simulators.pop()), model)])


def simulator_rank(simulator: str, policy: Any) -> int:
    """Return the rank of a simulator's adapter. Raises `UserError` unless it is one over the policy's base."""
    from peft import PeftConfig

    base, policy = base_of_adapter(simulator), policy if isinstance(policy, str) else policy.name_or_path
    if base is None:
        raise UserError(f"the colocated simulator {simulator} is no adapter, but whole weights; {APART}")
    if base != policy and weights_of(base) != weights_of(policy):
        raise UserError(f"the simulator {simulator} is an adapter over {base}, and the policy over {policy}; {APART}")
    rank = adapter_rank(PeftConfig.from_pretrained(simulator))
    if rank is None:
        raise UserError(f"vLLM does not serve the simulator {simulator} as an adapter; {APART}")
    return rank


def weights_of(model: str) -> str:
    """Return what tells the weights of a model from others, whatever the model's name."""
    identity = model_identity(model)
    return identity.get("weights_fingerprint") or f"{model} {identity['revision']}"
