"""The arms of the rollout bench, all on the engine that TRL's trainer makes in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rollout_parts.world import CONTEXT_TOKENS, Cell, DelayedEngine, World
from zerosearch.generation.tokenization import prompt_token_ids
from zerosearch.generation.vllm_colocated import VLLMGenerator
from zerosearch.protocol import STOP_STRINGS, format_documents, format_observation, parse_action
from zerosearch.rollout.loop import RolloutSettings, run_rollouts
from zerosearch.rollout.trajectory import RolloutClock

ARMS = ("lockstep10", "lockstep", "trl_tools", "ours")


@dataclass(frozen=True)
class Measurement:
    """One rollout by one arm: wall time, time inside the engine and its steps, and the ids of each completion."""

    seconds: float
    generating_s: float
    engine_steps: int
    completions: list[list[int]]


class Arms:
    """The arms on one engine: the one that TRL's trainer makes in its own process."""

    def __init__(self, directory: Path, max_in_flight: int) -> None:
        import torch
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        from zerosearch.generation.vllm_workarounds import colocated_engine_options

        def search(query: str) -> str:
            """Stand for the tools of the rollouts, which are set before each.

            Args:
                query: What to look up.
            """
            raise AssertionError(query)

        def no_reward(prompts: list[Any], **kwargs: Any) -> list[float]:
            return [0.0] * len(prompts)

        on_cpu = not torch.accelerator.is_available()
        config = GRPOConfig(
            output_dir=str(directory / "trainer"),
            per_device_train_batch_size=max_in_flight + max_in_flight % 2,  # TRL's engine takes that many at once
            gradient_accumulation_steps=1,
            num_generations=2,
            max_completion_length=CONTEXT_TOKENS,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=CONTEXT_TOKENS,
            generation_kwargs={"stop": list(STOP_STRINGS), "include_stop_str_in_output": True},
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=on_cpu,
            report_to="none",
        )
        with colocated_engine_options("float32"):
            self.trainer = GRPOTrainer(
                model=str(directory),
                reward_funcs=no_reward,
                args=config,
                train_dataset=Dataset.from_list([World("none", 0).row(0)]),
                tools=[search],
            )
        self.llm = self.trainer.vllm_generation.llm
        self.tokenizer = self.trainer.processing_class
        self.generator = VLLMGenerator(self.trainer.vllm_generation.llm, self.tokenizer, self.trainer.vllm_generation)
        self.engine_steps = 0
        step = self.llm.llm_engine.step

        def counted_step() -> list[Any]:
            self.engine_steps += 1
            return step()

        self.llm.llm_engine.step = counted_step

    def measure(self, arm: str, cell: Cell, run: int) -> Measurement:
        """Roll out one cell by one arm, with an empty prefix cache."""
        self.llm.llm_engine.reset_prefix_cache()
        world = World(cell.latency, run)
        steps_before = self.engine_steps
        start = time.perf_counter()
        if arm == "ours":
            generating_s, completions = self._ours(cell, world)
        elif arm == "trl_tools":
            generating_s, completions = self._trl_tools(cell, world)
        else:
            generating_s, completions = self._lockstep(cell, world, in_threads if arm == "lockstep10" else at_once)
        seconds = time.perf_counter() - start
        return Measurement(seconds, generating_s, self.engine_steps - steps_before, completions)

    def _ours(self, cell: Cell, world: World) -> tuple[float, list[list[int]]]:
        """Roll out by the loop of training; temperature 1 and a seed for each turn, as there."""
        rows, clock = [world.row(row) for row in range(cell.trajectories)], RolloutClock()
        settings = RolloutSettings(max_turns=cell.turns, max_trajectory_tokens=CONTEXT_TOKENS)
        keys = [(0, world.run, row, 0) for row in range(cell.trajectories)]
        trajectories = run_rollouts(rows, self.generator, DelayedEngine(world), settings, keys=keys, clock=clock)
        return clock.generating_s, [trajectory.completion_ids for trajectory in trajectories]

    def _lockstep(
        self, cell: Cell, world: World, wait_for_all: Callable[[list[float]], None]
    ) -> tuple[float, list[list[int]]]:
        """Let all generate, then all search, `turns` times; decode, read and encode as little as a loop must."""
        from vllm import SamplingParams

        rows = range(cell.trajectories)
        params = [
            SamplingParams(
                seed=row,  # as ours, so that the engine's work is the same
                max_tokens=RolloutSettings.max_turn_tokens,
                stop=list(STOP_STRINGS),
                include_stop_str_in_output=True,
                logprobs=0,
            )
            for row in rows
        ]
        prompts = [prompt_token_ids(self.tokenizer, world.row(row)["prompt"]) for row in rows]
        completions: list[list[int]] = [[] for _ in rows]
        clock = RolloutClock()
        for turn in range(cell.turns + 1):
            contexts: list[Any] = [
                {"prompt_token_ids": prompt + ids} for prompt, ids in zip(prompts, completions, strict=True)
            ]
            with clock.timing("generating_s"):
                outputs = [output.outputs[0] for output in self.llm.generate(contexts, params, use_tqdm=False)]
            for ids, output in zip(completions, outputs, strict=True):
                ids += output.token_ids
            if turn < cell.turns:
                assert all(parse_action(output.text).kind == "search" for output in outputs)
                wait_for_all([world.latency_s(row, turn) for row in rows])
                texts = [format_observation(world.documents(row, turn)) for row in rows]
                for ids, observation in zip(completions, self.tokenizer(texts)["input_ids"], strict=True):
                    ids += observation
        return clock.generating_s, completions

    def _trl_tools(self, cell: Cell, world: World) -> tuple[float, list[list[int]]]:
        """Call what `GRPOTrainer._generate_and_score_completions` calls first, with a tool for each trajectory."""

        def tool(row: int) -> Callable[[str], str]:
            turns = count()

            def search(query: str) -> str:
                turn = next(turns)
                time.sleep(world.latency_s(row, turn))
                return format_documents(world.documents(row, turn))

            return search

        rows = range(cell.trajectories)
        self.trainer._sync_tool_dicts = [{"search": tool(row)} for row in rows]
        self.trainer._async_tool_dicts = [{} for _ in rows]
        self.trainer.max_tool_calling_iterations = cell.turns
        with self._timed_generate() as clock:
            _, completions, *_ = self.trainer._generate([world.row(row)["prompt"] for row in rows])
        return clock.generating_s, completions

    @contextmanager
    def _timed_generate(self) -> Iterator[RolloutClock]:
        """Add up the time that TRL's loop spends generating."""
        clock, engine = RolloutClock(), self.trainer.vllm_generation
        generate = engine.generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            with clock.timing("generating_s"):
                return generate(*args, **kwargs)

        engine.generate = timed
        try:
            yield clock
        finally:
            engine.generate = generate


def in_threads(seconds: list[float]) -> None:
    """Wait as long as searches in 10 threads take."""
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(time.sleep, seconds))


def at_once(seconds: list[float]) -> None:
    """Wait as long as searches take that all begin at once."""

    async def wait() -> None:
        await asyncio.gather(*map(asyncio.sleep, seconds))

    asyncio.run(wait())
