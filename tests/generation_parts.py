"""A generator of the tiny policy, rollouts with it, and the log-probabilities that they should have."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from scripted_rollouts import ScriptedEngine
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerosearch.engines import SearchRequest
from zerosearch.generation import Generator, RemoteGenerator, SampledTurn, Sampling, TurnRequest
from zerosearch.generation.loading import load_model
from zerosearch.generation.transformers_engine import TransformersGenerator
from zerosearch.http import run_in_background
from zerosearch.rollout.loop import RolloutSettings, run_rollouts
from zerosearch.rollout.trajectory import Trajectory

PROMPTS = ["Who wrote Emma?", "Where was Jane Austen born, and when?", "x"]


def rain(request: SearchRequest) -> list[str]:
    """Always the same weather, in a length that depends on the query."""
    return [f"It rains {request.query[:place]}." for place in range(1, 6)]


def listens_beyond_loopback(pid: int | None = None) -> list[str]:
    """Return the addresses other than loopback that a process, or one of its children, listens on."""
    process = psutil.Process(pid)
    connections = [one for part in (process, *process.children(recursive=True)) for one in part.net_connections()]
    listening = {f"{one.laddr.ip}:{one.laddr.port}" for one in connections if one.status == psutil.CONN_LISTEN}
    return sorted(address for address in listening if not address.startswith(("127.", "::1:")))


def load(directory: Path) -> TransformersGenerator:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return TransformersGenerator(lambda: nullcontext(model), tokenizer, [tokenizer.eos_token_id], 2048)


def save_adapter(directory: Path, output: Path) -> Path:
    """Save a LoRA adapter of a model that has learned something, as the trainer saves it."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(directory).save_pretrained(output)
    return output


def sample(generator: Generator, requests: list[TurnRequest], temperature: float = 1.0) -> dict[int, SampledTurn]:
    """Sample turns, all submitted at once, and return them by trajectory."""
    turns: dict[int, SampledTurn] = {}
    with generator.session(Sampling(temperature)):
        for request in requests:
            generator.submit(request)
        while len(turns) < len(requests):
            turns |= {turn.trajectory: turn for turn in generator.step()}
    return turns


def sample_remotely(
    generator: RemoteGenerator, requests: list[TurnRequest], sampling: Sampling | None = None
) -> dict[int, SampledTurn]:
    """Sample turns elsewhere, all at once, and return them by trajectory."""

    async def all_at_once() -> list[SampledTurn]:
        return await asyncio.gather(*(generator.sample(request) for request in requests))

    with generator.session(sampling or Sampling()):
        return {turn.trajectory: turn for turn in run_in_background(all_at_once(), 60)}


def turn_difference(model: Any, context: list[int], turn: SampledTurn) -> float:
    """Return by how much a turn's log-probabilities differ from the model's at most."""
    ids = torch.tensor([context + turn.token_ids])
    with torch.no_grad():
        logprobs = model.eval()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return (logprobs[len(context) - 1 :] - torch.tensor(turn.logprobs)).abs().max().item()


def move_adapter(model: Any) -> None:
    """Add noise to an adapter, so that it says something else."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn_like(parameter)


def roll_out(
    generator: Generator | RemoteGenerator, count: int = 24, temperature: float = 1.0, max_live: int | None = None
) -> list[Trajectory]:
    rows = [
        {"prompt": PROMPTS[n % 3], "question": PROMPTS[n % 3], "golden_answers": ["rain"], "id": str(n)}
        for n in range(count)
    ]
    settings = RolloutSettings(3, max_turn_tokens=40, max_observation_tokens=90, temperature=temperature)
    return run_rollouts(rows, generator, ScriptedEngine(rain), settings, max_live=max_live)


def recomputed_logprobs(directory: Path, trajectory: Trajectory) -> torch.Tensor:
    """Return what a plain forward pass over the whole trajectory gives each completion id, (T,)."""
    model = load_model(str(directory))
    ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return logprobs[len(trajectory.prompt_ids) - 1 :]


def largest_difference(directory: Path, trajectories: list[Trajectory]) -> float:
    """Return by how much a policy token's log-probability differs from the recomputed one at most."""
    differences = []
    for trajectory in trajectories:
        own = torch.tensor(trajectory.env_mask, dtype=torch.bool)
        difference = torch.tensor(trajectory.logprobs) - recomputed_logprobs(directory, trajectory)
        differences.append(difference[own].abs().max().item())
    return max(differences)
