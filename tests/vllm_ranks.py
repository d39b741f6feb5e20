"""What each rank of test_vllm_engine.py runs: `python vllm_ranks.py POLICY NEGATED OUTPUT`."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from generation_parts import PROMPTS, load, rain
from scripted_rollouts import ScriptedEngine
from torch import distributed

from zerosearch.generation import GenerationError
from zerosearch.generation.loading import load_model
from zerosearch.generation.vllm_tensor_parallel import Ranks, TensorParallelGenerator
from zerosearch.generation.vllm_workarounds import local_engine
from zerosearch.rollout.loop import RolloutSettings, run_rollouts
from zerosearch.rollout.trajectory import Trajectory

RANK = int(os.environ.get("RANK", 0))
ROWS = [
    {"prompt": f"{PROMPTS[n % 3]} {n}", "question": PROMPTS[n % 3], "golden_answers": ["rain"], "id": str(n)}
    for n in range(14)
]
SHARES = [ROWS[:10], ROWS[10:]]  # of different number, so that one rank is done long before the other


def rolled_out(
    generator: Any, temperature: float = 0.0, fails: bool = False, rows: list[dict[str, Any]] = SHARES[RANK]
) -> list[Trajectory]:
    settings = RolloutSettings(3, max_turn_tokens=40, max_observation_tokens=90, temperature=temperature)
    keys = [(0, 0, int(row["id"]), 0) for row in rows]

    def watch(index: int, trajectory: Trajectory, event: str) -> None:
        if fails and event == "observation":
            raise KeyError("a defect")

    delays = random.Random(RANK)  # which no other rank can know
    engine = ScriptedEngine(rain, lambda: delays.random() * 0.05)
    return run_rollouts(rows, generator, engine, settings, keys=keys, watch=watch)


def records(trajectories: list[Trajectory]) -> list[dict[str, Any]]:
    return [asdict(trajectory) for trajectory in trajectories]


def write_down_calls(engine: Any) -> list[Any]:
    """Return a list that grows by each call of a vLLM engine; a request comes with how many others are under way."""
    calls: list[Any] = []
    add_request, step = engine.add_request, engine.step

    def add(number: str, prompt: dict[str, list[int]], params: Any, **options: Any) -> None:
        under_way = engine.get_num_unfinished_requests()
        calls.append(["add", under_way, number, prompt["prompt_token_ids"], params.seed, params.max_tokens])
        add_request(number, prompt, params, **options)

    def written_step() -> list[Any]:
        calls.append(["step"])
        return step()

    engine.add_request, engine.step = add, written_step
    return calls


def main(policy: Path, negated: Path) -> dict[str, Any]:
    from vllm import LLM

    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher", "seed": 0}
    llm = local_engine(LLM, "float32", 1024, model=str(policy), **options)
    owner: Any = SimpleNamespace(llm=llm, enable_sleep_mode=False)
    tokenizer = load(policy).tokenizer
    generator = TensorParallelGenerator(Ranks(2, timeout_s=60), owner, tokenizer)
    calls = write_down_calls(llm.llm_engine)
    found: dict[str, Any] = {"greedy": records(rolled_out(generator)), "calls": list(calls), "said": []}
    found |= {name: records(rolled_out(generator, temperature=1.0)) for name in ("sampled", "again")}
    # A weight sync as TRL does it: what the engine then says must be the new model's.
    for item in load_model(str(negated)).state_dict().items():
        llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights([item])
    llm.reset_prefix_cache()
    found["synced"] = records(rolled_out(generator, temperature=1.0))
    # One rank fails; then, in a second group of ranks, one says nothing any more.
    try:
        rolled_out(generator, fails=RANK == 1)
    except (GenerationError, KeyError) as error:
        found["said"].append(f"{type(error).__name__}: {error}")
    silent = TensorParallelGenerator(Ranks(2, timeout_s=1), owner, tokenizer)
    distributed.barrier()
    start = time.monotonic()
    if RANK == 1:
        time.sleep(4)
        return found
    try:
        rolled_out(silent)
    except GenerationError as error:
        found["said"] += [str(error), time.monotonic() - start]
    return found


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    policy, negated, output = map(Path, sys.argv[1:])
    result = main(policy, negated)
    (output / f"{RANK}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()
