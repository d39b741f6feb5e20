"""What each rank of test_vllm_tensor_parallel.py runs: `python tensor_parallel_ranks.py CASE POLICY OUTPUT`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from generation_parts import PROMPTS, load
from torch import distributed

from zerosearch.engines import SearchRequest, SearchResult
from zerosearch.generation import GenerationError
from zerosearch.generation.tokenization import text_token_ids
from zerosearch.generation.vllm_tensor_parallel import Ranks, TensorParallelGenerator
from zerosearch.rollout.loop import RolloutSettings, Trajectory, run_rollouts

RANK = int(os.environ.get("RANK", 0))
ROWS = [
    {"prompt": f"{PROMPTS[n % 3]} {n}", "question": PROMPTS[n % 3], "golden_answers": ["rain"], "id": str(n)}
    for n in range(14)
]
SHARES = [ROWS[:10], ROWS[10:]]  # of different number, so that one rank is done long before the other


class UnevenEngine:
    """Rain after a time that no other rank can know."""

    name, max_concurrency = "rain", 16

    def __init__(self) -> None:
        self.delays = random.Random(RANK)

    async def search(self, request: SearchRequest) -> SearchResult:
        await asyncio.sleep(self.delays.random() * 0.05)
        return SearchResult(tuple(f"It rains {request.query[:place]}." for place in range(1, 6)))

    async def aclose(self) -> None:
        pass


class WrittenDownEngine:
    """In place of vLLM's engine, on one rank: writes down its calls; every step ends some of its requests."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.model_config = SimpleNamespace(max_model_len=2048)
        self.calls: list[Any] = []
        self.running: dict[str, list[int]] = {}

    def add_request(self, number: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.calls.append(["add", number, prompt["prompt_token_ids"], params.seed, params.max_tokens])
        self.running[number] = prompt["prompt_token_ids"]

    def abort_request(self, numbers: list[str]) -> None:
        self.calls.append(["abort", numbers])
        self.running.clear()

    def step(self) -> list[Any]:
        self.calls.append(["step", sorted(self.running)])
        ended = [number for number in self.running if random.Random(f"{number} {len(self.calls)}").random() < 0.3]
        return [self.output(number, self.running.pop(number)) for number in ended]

    def output(self, number: str, context_ids: list[int]) -> Any:
        draw = random.Random(str(context_ids)).random()
        search = f"<search> {len(context_ids)} </search>"
        turn = "Hm." if draw < 0.2 else search if draw < 0.7 else "<answer> x </answer>"
        ids = text_token_ids(self.tokenizer, turn)
        logprobs = [{token_id: SimpleNamespace(logprob=-0.5)} for token_id in ids]
        completion = SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason="stop", stop_reason="</answer>")
        return SimpleNamespace(request_id=number, finished=True, outputs=[completion])


def rolled_out(
    generator: Any, temperature: float = 1.0, fails: bool = False, rows: list[dict[str, Any]] = SHARES[RANK]
) -> list[dict[str, Any]]:
    settings = RolloutSettings(3, max_turn_tokens=40, max_observation_tokens=90, temperature=temperature)
    keys = [(0, 0, int(row["id"]), 0) for row in rows]

    def watch(index: int, trajectory: Trajectory, event: str) -> None:
        if fails and event == "observation":
            raise KeyError("a defect")

    trajectories = run_rollouts(rows, generator, UnevenEngine(), settings, keys=keys, watch=watch)
    return [{"ids": one.completion_ids, "mask": one.env_mask, "outcome": one.outcome} for one in trajectories]


def tensor_parallel(policy: Path, llm: Any, timeout_s: float = 60) -> TensorParallelGenerator:
    owner = SimpleNamespace(llm=llm, enable_sleep_mode=False)
    return TensorParallelGenerator(Ranks(2, timeout_s), owner, load(policy).tokenizer)  # type: ignore[arg-type]


def same_calls(policy: Path) -> dict[str, Any]:
    engine = WrittenDownEngine(load(policy).tokenizer)
    generator = tensor_parallel(policy, SimpleNamespace(llm_engine=engine))
    return {"trajectories": rolled_out(generator), "again": rolled_out(generator), "calls": engine.calls}


def failure(policy: Path) -> dict[str, Any]:
    """One rank fails; then, in a second group of ranks, one says nothing any more."""
    said = []
    engine = WrittenDownEngine(load(policy).tokenizer)
    generator = tensor_parallel(policy, SimpleNamespace(llm_engine=engine))
    try:
        rolled_out(generator, fails=RANK == 1)
    except (GenerationError, KeyError) as error:
        said.append(f"{type(error).__name__}: {error}")
    silent = tensor_parallel(policy, SimpleNamespace(llm_engine=engine), timeout_s=1)
    distributed.barrier()
    start = time.monotonic()
    if RANK == 0:
        try:
            rolled_out(silent)
        except GenerationError as error:
            said.append(str(error))
        said.append(time.monotonic() - start)
    else:
        time.sleep(4)
    return {"said": said}


def real_tensor_parallel(policy: Path) -> dict[str, Any]:
    from vllm import LLM

    from zerosearch.generation.vllm_workarounds import engine_options, weights_in_place

    with weights_in_place():
        llm = LLM(
            str(policy),
            tensor_parallel_size=2,
            distributed_executor_backend="external_launcher",
            seed=0,
            **engine_options("float32", 1024),
        )
    return {"trajectories": rolled_out(tensor_parallel(policy, llm), temperature=0.0)}


if __name__ == "__main__":
    case, policy, output = sys.argv[1:]
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    result = globals()[case](Path(policy))
    Path(output, f"{RANK}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()
