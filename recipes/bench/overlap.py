"""How long is a training step whose next rollout runs while it trains (`--overlap_steps 1`), against one by one?

    python recipes/bench/overlap.py                                       # about a quarter of an hour

The bench serves the counting policy of `rollout.py` by vLLM and trains it in this process, in turns with and without
overlap. A trajectory's searches take together as long as a step trains, by the last run without overlap, so that a
machine whose speed changes keeps the two alike. A step's time is the mean over a run's steps but the first, which has
nothing sampled ahead, and the last, which samples nothing ahead. Learning is switched off (rate 0), so that every step
rolls out trajectories of the same shape; weights are pushed as ever.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from rollout_parts.world import CONTEXT_TOKENS, DelayedEngine, World, cues_are_read, save_counting_policy

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.evaluation.evaluate import versions
from zerosearch.files import claim_output_dir, write_json
from zerosearch.simulator.server import exit_on_signals, simulator_server

GROUP = 4
BY_FILE = ("--worker-extension-cls", "zerosearch.generation.vllm_worker.PolicyWeights")


@dataclass
class BenchArguments:
    """What to measure."""

    rounds: int = field(default=5, metadata={"min": 1, "help": "Runs with, and as many without overlap."})
    steps: int = field(default=6, metadata={"min": 3, "help": "Steps a run."})
    trajectories: int = field(default=64, metadata={"help": "Of a step; a multiple of 8."})
    searches: int = field(default=3, metadata={"min": 1, "help": "Of a trajectory."})
    output: str = field(default="outputs/bench/overlap.json", metadata={"help": "What was measured."})


@contextmanager
def policy_server(policy: Path) -> Iterator[str]:
    """Serve a policy that takes weights from a file, and yield its address."""
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    options = ("--logprobs-mode", "processed_logprobs", "--enable-prefix-caching", *BY_FILE)
    with simulator_server(
        str(policy), 0, max_model_len=CONTEXT_TOKENS, dtype="float32", num_threads=1, vllm_arguments=options
    ) as server:
        yield server.base_url.removesuffix("/v1")


def train(policy: Path, url: str, arguments: BenchArguments, overlap_steps: int, search_s: float) -> dict[str, Any]:
    """Train one run, and return the seconds of its steps and what it logged of them."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from zerosearch.training.config import SearchConfig
    from zerosearch.training.rewards import f1_reward
    from zerosearch.training.trainer import SearchTrainer

    ends = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    config = SearchConfig(
        output_dir=str(policy / "run"),
        learning_rate=0.0,
        num_generations=GROUP,
        per_device_train_batch_size=arguments.trajectories // 2,
        gradient_accumulation_steps=2,
        max_steps=arguments.steps,
        max_turns=arguments.searches,
        max_trajectory_tokens=CONTEXT_TOKENS,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        overlap_steps=overlap_steps,
        on_collapse="warn",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    world = World("constant", 0, search_s)
    rows = [{"id": str(row), **world.row(row)} for row in range(arguments.trajectories // GROUP * 3)]
    trainer = SearchTrainer(
        model=str(policy),
        args=config,
        engine=DelayedEngine(world),
        reward_funcs=f1_reward,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Watch()],
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    step_s, rollout_s = (ends[-2] - ends[0]) / (len(ends) - 2), fmean(entry["time/rollout_s"] for entry in log[1:-1])
    return {
        "overlap_steps": overlap_steps,
        "searches_s": round(search_s * arguments.searches, 4),
        "step_s": round(step_s, 4),
        "rollout_s": round(rollout_s, 4),
        "training_s": None if overlap_steps else round(step_s - rollout_s, 4),
        "searches": fmean(entry["search/searches"] for entry in log),
        "staleness": [entry.get("sampling/staleness", 0) for entry in log],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratio of step times, run by run, and the greatest staleness; later steps' all are 1."""
    one_by_one, overlapped = ([run for run in runs if run["overlap_steps"] == overlap] for overlap in (0, 1))
    ratios = [one["step_s"] / other["step_s"] for one, other in zip(overlapped, one_by_one, strict=True)]
    assert all(set(run["staleness"][1:]) == {1} for run in overlapped)
    return {
        "overlap_step_ratio": {
            "mean": round(median(ratios), 3),
            "low": round(min(ratios), 3),
            "high": round(max(ratios), 3),
        },
        "max_staleness": max(max(run["staleness"]) for run in overlapped),
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Serve the policy, find the latency, measure by turns, write after each round, show."""
    (arguments,) = parse(BenchArguments, argv=argv)
    exit_on_signals()
    output = Path(arguments.output)
    claim_output_dir(output.parent, overwrite=True)
    runs: list[dict[str, Any]] = []
    with TemporaryDirectory() as directory, cues_are_read():
        policy = Path(directory)
        save_counting_policy(policy)
        with policy_server(policy) as url:
            train(policy, url, replace(arguments, steps=3), 0, 0.0)  # first calls are slow
            one_by_one = train(policy, url, arguments, 0, 0.0)
            for place in range(arguments.rounds):
                search_s = one_by_one["training_s"] / arguments.searches
                for overlap_steps in (0, 1) if place % 2 == 0 else (1, 0):
                    runs.append(train(policy, url, arguments, overlap_steps, search_s))
                one_by_one = next(run for run in reversed(runs) if not run["overlap_steps"])
                write_json(output, {**summary(runs), "versions": versions(), "runs": runs})
    print(json.dumps(summary(runs)))


if __name__ == "__main__":
    main()
