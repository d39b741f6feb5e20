"""One vLLM engine for policy and simulator, two adapters over one base, against an engine each with merged weights.

    python recipes/bench/one_gpu.py                                  # minutes on a CPU, of TinyWorld's small models
    python recipes/bench/one_gpu.py --model SMOLLM2 --simulator outputs/tinyworld-lora

Memory: the bytes of the weights in the engines, counted, and the processes' memory, measured. Sync: the bytes of the
policy that a step moves, and the seconds. Decoding: what an adapter beside the weights costs. Rollouts: the same rows,
keys and noise on TinyWorld, with the simulator in the policy's engine and behind a server beside it. Seconds are those
of one process, in which both ways take turns.

Without --simulator an adapter of random weights stands in for one. What is measured goes into --output; what others
have put there (overlap.py) stays.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.engines import SearchEngine, SearchRequest, SearchResult
from zerosearch.engines.colocated_simulator import ColocatedSimulator
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.evaluation.evaluate import versions
from zerosearch.files import claim_output_dir, read_json, write_json
from zerosearch.generation.adapter_weights import merged_weights
from zerosearch.generation.loading import model_config
from zerosearch.prompts import TINYWORLD
from zerosearch.rollout.in_flight import close_engine
from zerosearch.rollout.loop import run_rollouts
from zerosearch.simulator.server import simulator_server
from zerosearch.tinyworld.world import World, question_rows
from zerosearch.training.config import SearchConfig
from zerosearch.training.memory import policy_shape
from zerosearch.training.rewards import f1_reward
from zerosearch.training.trainer import SearchTrainer

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "data/tinyworld/policy")
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
QWEN_3B = Qwen2Config(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
ENGINES = ("two adapters", "merged policy", "served adapter")  # a process each
TIMED = {  # a process each, in which both ways take turns
    "sync": "seconds a sync, {name} in 32 bits",
    "decode": "seconds for 32 answers of 32 tokens, TinyWorld's policy",
    "rollout": "seconds a rollout, TinyWorld",
}


@dataclass
class BenchArguments:
    """What to measure, and how often."""

    model: str = field(default=TINY, metadata={"help": "The model of memory and sync: a folder or Hub id."})
    simulator: str | None = field(default=None, metadata={"help": "An adapter over TinyWorld's policy."})
    rounds: int = field(default=5, metadata={"min": 1, "help": "Syncs and rollouts of each kind."})
    questions: int = field(default=32, metadata={"min": 1, "help": "Of a rollout; 5 trajectories each."})
    output: str = "outputs/bench/one_gpu.json"
    child: str | None = field(default=None, metadata={"help": "Set by the script: what this process measures."})


def main_rows(arguments: BenchArguments) -> dict[str, Any]:
    """Return the ratios and the table's rows."""
    config = model_config(arguments.model)
    name = Path(arguments.model).name
    shapes = {name: policy_shape(config, LORA), "Qwen2.5-3B": policy_shape(QWEN_3B, LORA)}
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Any] = {}
    for shape_name, shape in shapes.items():  # in 16 bits, as on a GPU; the adapter is moved in 32, as it learns
        one, two = 2 * (shape.parameters + 2 * shape.trained), 2 * (2 * shape.parameters + shape.trained)
        rows.append(row(f"weights in 16 bits, {shape_name}'s shape, counted", size(one), size(two), one / two))
        ratios["memory_ratio"] = spread([one / two])
    for shape_name, shape in shapes.items():
        one, two = 4 * shape.trained, 2 * shape.parameters
        rows.append(row(f"bytes a sync, {shape_name}'s shape, counted", size(one), size(two), one / two))
        ratios["sync_bytes_ratio"] = spread([one / two])
    taken = {kind: child(arguments, kind) for kind in tqdm([*ENGINES, *TIMED], desc="processes")}
    together, *apart = (taken[kind]["bytes"] for kind in ENGINES)
    what = f"memory of the engines' processes, {name} in 32 bits"
    rows.append(row(what, size(together), size(sum(apart)), together / sum(apart)))
    for key, what in TIMED.items():
        ours, theirs = taken[key]["ours"], taken[key]["theirs"]
        compared = spread([a / b for a, b in zip(ours, theirs, strict=True)])
        rows.append(row(what.format(name=name), f"{mean(ours):.3g} s", f"{mean(theirs):.3g} s", compared))
        ratios[f"{key}_seconds_ratio"] = compared
    return {**ratios, "same_documents": taken["rollout"]["same_documents"], "rows": rows}


def row(what: str, ours: str, theirs: str, ratio: Any) -> dict[str, Any]:
    return {"what": what, "ours": ours, "theirs": theirs, "ratio": ratio}


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count > 1e9 else f"{count / 1e6:.1f} MB"


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Return the mean of ratios, the least and the greatest."""
    found = {"mean": mean(ratios), "low": min(ratios), "high": max(ratios)}
    return {name: round(value, 4) for name, value in found.items()}


def child(arguments: BenchArguments, kind: str) -> dict[str, Any]:
    """Measure one thing in a process of its own."""
    flags = [part for name, value in vars(arguments).items() if value for part in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, __file__, *flags, "--child", kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def random_adapter(model: str, folder: Path) -> str:
    """Save an adapter of random weights over a model; return its folder."""
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LORA)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    adapted.save_pretrained(folder)
    return str(folder)


def engine_memory(model: str, kind: str, folder: Path) -> dict[str, Any]:
    """Return the bytes of a process with an engine that has answered once; the cache is as large for each kind."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from zerosearch.generation.vllm_adapters import adapter_options
    from zerosearch.generation.vllm_workarounds import local_engine

    adapters = {"two adapters": 2, "merged policy": 0, "served adapter": 1}[kind]
    path = random_adapter(model, folder)
    started = psutil.Process().memory_info().rss
    options = adapter_options([16] * adapters) if adapters else {}
    llm = local_engine(LLM, "float32", 1024, model=model, **options)
    for number in range(1, max(adapters, 1) + 1):
        request = LoRARequest(f"adapter-{number}", number, path) if adapters else None
        prompt, params = {"prompt_token_ids": [5] * 64}, SamplingParams(max_tokens=8)
        llm.generate(prompt, params, lora_request=request, use_tqdm=False)
    return {"bytes": psutil.Process().memory_info().rss - started}


def make_trainer(
    model: str, engine: SearchEngine, folder: str, rows: Dataset, sync_adapter: bool = False
) -> SearchTrainer:
    """Return a trainer of adapters with a colocated engine; it takes no step."""
    config = SearchConfig(
        output_dir=folder,
        num_generations=5,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=1,
        max_turns=4,
        max_turn_tokens=40,
        max_observation_tokens=120,
        max_trajectory_tokens=640,
        use_vllm=True,
        vllm_mode="colocate",
        sync_adapter=sync_adapter,
        beta=0.0,
        report_to="none",
    )
    return SearchTrainer(
        model=model,
        args=config,
        engine=engine,
        agent=TINYWORLD.policy,
        reward_funcs=f1_reward,
        train_dataset=rows,
        peft_config=LORA,
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def decode_seconds(model: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Time 32 answers of 32 tokens to prompts of 64: by an adapter, and by an engine of merged weights."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from zerosearch.generation.vllm_adapters import adapter_options
    from zerosearch.generation.vllm_workarounds import local_engine

    request = LoRARequest("adapter", 1, random_adapter(model, folder))
    prompts = [{"prompt_token_ids": [5 + number] * 64} for number in range(32)]
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    engines = {"ours": (adapter_options([16, 16]), request), "theirs": ({}, None)}
    ways = {}
    for name, (options, adapter) in engines.items():
        llm = local_engine(LLM, "float32", 1024, model=model, **options)
        ways[name] = partial(generate, llm, prompts, params, lora_request=adapter)
    return timed(ways, rounds)


def generate(llm: Any, prompts: Any, params: Any, **options: Any) -> None:
    llm.reset_prefix_cache()
    llm.generate(prompts, params, use_tqdm=False, **options)


def sync_seconds(arguments: BenchArguments, rows: Dataset, folder: str) -> dict[str, Any]:
    """Time both kinds of sync into the same engine: the adapter, and weights merged one by one."""
    trainer = make_trainer(arguments.model, NoEngine(), folder, rows, sync_adapter=True)
    generation = trainer.vllm_generation
    model = generation.llm.llm_engine.model_executor.driver_worker.model_runner.model

    def push_merged() -> None:
        for name, weight in merged_weights(generation):
            model.load_weights([(name, weight)])
        generation.llm.reset_prefix_cache()

    generation.sync_weights()  # pushes the base, too
    ways = {"ours": generation.sync_weights, "theirs": push_merged}
    return timed(ways, arguments.rounds)


def timed(ways: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Return the seconds of each way, round by round, the order turned about; a first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in sorted(ways, reverse=bool(number % 2)):
            started = time.perf_counter()
            ways[name]()
            taken[name].append(time.perf_counter() - started)
    return {name: seconds[1:] for name, seconds in taken.items()}


class NoEngine:
    """Answers nothing: no search is made."""

    name, max_concurrency = "none", 1

    async def search(self, request: SearchRequest) -> SearchResult:
        raise NotImplementedError

    async def aclose(self) -> None:
        pass


def rollout_seconds(arguments: BenchArguments, rows: Dataset, folder: str) -> dict[str, Any]:
    """Time the same rollouts with the simulator in the policy's engine and behind a server; compare documents."""
    simulator = arguments.simulator or random_adapter(TINY, Path(folder, "simulator"))
    asked: dict[str, Any] = {"template": TINYWORLD.simulator, "max_tokens": 120}
    colocated = ColocatedSimulator(model=simulator, **asked)
    trainers = {"ours": make_trainer(TINY, colocated, folder, rows)}
    found: dict[str, list[Any]] = {"ours": [], "theirs": []}
    with simulator_server(simulator, 0, max_model_len=1024, dtype="float32", num_threads=1) as server:
        served = SimulatedEngine(server.base_url, **asked)
        served.check()
        trainers["theirs"] = make_trainer(TINY, served, folder, rows)  # merged weights: no simulator beside them
        for trainer in trainers.values():
            trainer.vllm_generation.sync_weights()

        def roll_out(name: str) -> None:
            trainer, number = trainers[name], len(found[name])
            start = number * arguments.questions % len(rows)
            chosen = [rows[(start + place) % len(rows)] for place in range(arguments.questions)]
            groups = [row for row in chosen for _ in range(5)]
            keys = [(0, number, place // 5, place % 5) for place in range(len(groups))]
            trainer.vllm_generation.llm.reset_prefix_cache()
            options: dict[str, Any] = {"p_noise": 0.5, "keys": keys, "agent": TINYWORLD.policy}
            found[name].append(run_rollouts(groups, trainer.generator, trainer.engine, trainer.args, **options))

        taken = timed({name: partial(roll_out, name) for name in trainers}, arguments.rounds)
        close_engine(served)
    pairs = [pair for ours, theirs in zip(*found.values(), strict=True) for pair in zip(ours, theirs, strict=True)]
    # Turn by turn as long as the policy's own texts are the same: what follows a flipped token is another search.
    same, all_searches = 0, 0
    for ours, theirs in pairs:
        for mine, other in zip(ours.turns, theirs.turns, strict=False):
            if mine.text != other.text:
                break
            if mine.kind == "search" and mine.documents:
                all_searches += 1
                same += mine.documents == other.documents
            if mine.observation != other.observation:
                break
    return taken | {"same_documents": {"share": round(same / max(all_searches, 1), 4), "searches": all_searches}}


def measure(arguments: BenchArguments) -> dict[str, Any]:
    """Return what a child process finds."""
    kind = str(arguments.child)
    with TemporaryDirectory() as folder:
        if kind in ENGINES:
            return engine_memory(arguments.model, kind, Path(folder))
        if kind == "decode":
            return decode_seconds(TINY, Path(folder), arguments.rounds)
        rows = Dataset.from_list(question_rows(World.draw(0), max(arguments.questions, 64), seed=0))
        seconds = sync_seconds if kind == "sync" else rollout_seconds
        return seconds(arguments, rows, folder)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Measure each thing in a process of its own; write and show."""
    (arguments,) = parse(BenchArguments, argv=argv)
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    output = Path(arguments.output)
    claim_output_dir(output.parent, overwrite=True)
    kept = read_json(output) if output.exists() else {}
    result = main_rows(arguments)
    write_json(output, {**kept, "versions": versions(), **result})
    for one in result["rows"]:
        print(f"{one['what']:<60}{one['ours']:>12}{one['theirs']:>12}  {one['ratio']}")
    print(output)


if __name__ == "__main__":
    main()
