"""Time and peak memory of a training step: SearchTrainer against stock GRPOTrainer, on the same batch in the same run.

    python recipes/bench/train_step.py                                                    # minutes on a CPU
    python recipes/bench/train_step.py --shape qwen2.5-3b --num_questions 64 \\
        --micro_batch 8 --warmup_steps 1                                                  # on a GPU, random weights

Trajectories are shaped like the paper's: a prompt of about 200 tokens, 1 to 4 turns of about 60 policy tokens, five
30-word documents a search, a vocabulary of 151,936. A step is scored by policy and reference model, with a group-
normalised advantage, and updates the weights; rollouts are replayed and cost nothing. Each trainer runs in processes
of its own, turn and turn about. Memory is the process's peak within the step, weights included (on a GPU, the
allocator's). `forward_token_ratio` counts the tokens, padding included, that went through the layers.

On a CPU stock TRL projects every token to the vocabulary, prompts and padding too, which makes up most of the small
shape's arithmetic. "compact" is stock TRL told to leave those out, as it does on a GPU: `time_ratio_to_compact_stock`
is against that, and the nearer to what a GPU will show.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import datasets
import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import zerosearch.training.overlap
from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, write_json
from zerosearch.generation.loading import load_tokenizer
from zerosearch.rollout.trajectory import Trajectory
from zerosearch.training.config import SearchConfig
from zerosearch.training.micro_batches import compact_lm_head
from zerosearch.training.rewards import f1_reward
from zerosearch.training.trainer import SearchTrainer

VOCABULARY = 151_936  # Qwen2.5
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES = {
    "tiny": dict(zip(SIZES, (2000, 32, 64, 1, 2), strict=True)),
    "small": dict(zip(SIZES, (VOCABULARY, 128, 512, 6, 2), strict=True)),
    "qwen2.5-3b": dict(zip(SIZES, (VOCABULARY, 2048, 11_008, 36, 16), strict=True)),
}
GROUP = 5  # Table 8
TINYWORLD_POLICY = str(Path(__file__).resolve().parents[2] / "data/tinyworld/policy")


@dataclass
class BenchArguments:
    """What to measure, and how often."""

    shape: Literal["tiny", "small", "qwen2.5-3b"] = field(
        default="small", metadata={"help": "tiny shows in a minute that the script runs, and nothing else."}
    )
    num_questions: int = field(default=1, metadata={"min": 1, "help": "Of a step; 5 trajectories each."})
    micro_batch: int = field(default=1, metadata={"min": 1, "help": "Trajectories a micro-batch."})
    rounds: int = field(default=3, metadata={"min": 1, "help": "Processes of each trainer."})
    warmup_steps: int = field(
        default=0, metadata={"min": 0, "help": "Steps a process that are not timed; on a GPU, 1 at least."}
    )
    steps: int = field(default=1, metadata={"min": 1, "help": "Timed steps a process."})
    corrects: bool = field(
        default=False, metadata={"help": "Correct for an engine's log-probabilities, as training with vLLM does."}
    )
    output: str = "outputs/bench/train_step.json"
    child: str | None = field(default=None, metadata={"help": "Set by the script: what this process measures."})


def trajectories(num_questions: int, vocabulary: int = VOCABULARY) -> list[Trajectory]:
    """Make a step's trajectories of random ids, `GROUP` to a question; one in three answers right."""
    rng = random.Random(0)

    def ids(mean: int, spread: int) -> list[int]:
        return [rng.randrange(1000, vocabulary) for _ in range(rng.randint(mean - spread, mean + spread))]

    made = []
    for _ in range(num_questions):
        prompt = ids(200, 20)
        for _ in range(GROUP):
            trajectory = Trajectory(prompt, p_noise=0.0, outcome="answered")
            trajectory.answer = "gold" if rng.random() < 1 / 3 else "lead"
            turns = rng.randint(1, 4)
            for turn in range(turns):
                policy = ids(60, 25)
                trajectory.completion_ids += policy
                trajectory.env_mask += [1] * len(policy)
                if turn < turns - 1:
                    documents = ids(230, 30)  # 150 words, the tags and "Doc 1:" to "Doc 5:"
                    trajectory.completion_ids += documents
                    trajectory.env_mask += [0] * len(documents)
            trajectory.append_environment([0])  # end of sequence
            trajectory.logprobs = [-12.0] * len(trajectory.completion_ids)  # about -ln(VOCABULARY)
            made.append(trajectory)
    return made


def replay(prompts: list[Any], trainer: GRPOTrainer, vocabulary: int) -> dict[str, list[Any]]:
    """Be stock TRL's `rollout_func`: the same trajectories, with their mask."""
    made = trajectories(len(prompts) // GROUP, vocabulary)
    return {
        "prompt_ids": [trajectory.prompt_ids for trajectory in made],
        "completion_ids": [trajectory.completion_ids for trajectory in made],
        "logprobs": [trajectory.logprobs for trajectory in made],
        "env_mask": [trajectory.env_mask for trajectory in made],
        "answer": [trajectory.answer for trajectory in made],
        "outcome": [trajectory.outcome for trajectory in made],
    }


def make_trainer(arguments: BenchArguments, model: str, output_dir: str) -> GRPOTrainer:
    """Return the trainer that this process measures, all with the same settings."""
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": arguments.micro_batch,
        "gradient_accumulation_steps": arguments.num_questions * GROUP // arguments.micro_batch,
        "num_generations": GROUP,
        "max_steps": arguments.warmup_steps + arguments.steps,
        "learning_rate": 1e-6,
        "beta": 0.001,
        "use_bias_correction_kl": False,
        "vllm_importance_sampling_mode": "token_truncate",
        "max_completion_length": 4096,
        "gradient_checkpointing": arguments.shape == "qwen2.5-3b",
        "bf16": torch.accelerator.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    rows = [
        {"id": str(n), "dataset": "bench", "prompt": "?", "question": "?", "golden_answers": ["gold"]}
        for n in range(arguments.num_questions)
    ]
    common: dict[str, Any] = {
        "model": model,
        "reward_funcs": f1_reward,
        "train_dataset": datasets.Dataset.from_list(rows),
        "processing_class": load_tokenizer(TINYWORLD_POLICY),  # any: no text is made of the ids
    }
    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    if arguments.child != "ours":
        return GRPOTrainer(args=GRPOConfig(**settings), rollout_func=partial(replay, vocabulary=vocabulary), **common)
    run = partial(replayed, vocabulary=vocabulary)
    zerosearch.training.overlap.run_rollouts = run  # type: ignore[assignment]
    config = SearchConfig(algorithm="grpo", logged_trajectories=0, **settings)
    return SearchTrainer(engine=NoEngine(), args=config, **common)  # type: ignore[arg-type]


def replayed(rows: list[Any], *others: Any, vocabulary: int, **named: Any) -> list[Trajectory]:
    """Stand in for `run_rollouts`."""
    return trajectories(len(rows) // GROUP, vocabulary)


class NoEngine:
    """Stands where a search engine would; replayed rollouts ask nothing."""

    name, max_concurrency = "none", 1


class Watch(TrainerCallback):
    """Time the steps, keep their peak memory, and write down the first step's gradient."""

    def __init__(self, model: torch.nn.Module, gradients: Path) -> None:
        self.model, self.gradients = model, gradients
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        reset_peak()
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and not self.gradients.exists():
            found = {name: parameter.grad for name, parameter in self.model.named_parameters()}
            torch.save({name: grad.float().cpu() for name, grad in found.items() if grad is not None}, self.gradients)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.peak_bytes = max(self.peak_bytes, peak_bytes())


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak resident set starts over


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def count_forward_tokens(model: torch.nn.Module, counted: list[int]) -> None:
    """Count the tokens, padding included, that go through the first layer of a model."""
    model.model.layers[0].register_forward_pre_hook(  # type: ignore[union-attr, index, operator]
        lambda module, args, kwargs: counted.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel()),
        with_kwargs=True,
    )


def measure(arguments: BenchArguments) -> dict[str, Any]:
    """Run one trainer and return what it took."""
    folder = Path(arguments.output)
    counted: list[int] = []
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(arguments, str(folder / "model"), output_dir)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # away from the reference, or the KL would have no gradient
            for parameter in trainer.model.parameters():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator).to(parameter)
        if arguments.corrects:  # as if the trajectories were of a vLLM, to which weights are pushed
            trainer.use_vllm = trainer.args.use_vllm = True
            trainer.vllm_generation, trainer._last_loaded_step = Mock(), -1
        watch = Watch(trainer.model, folder / f"{arguments.child}.pt")
        trainer.add_callback(watch)
        for model in (trainer.model, trainer.ref_model):
            count_forward_tokens(model, counted)
        with compact_lm_head() if arguments.child == "compact" else nullcontext():
            trainer.train()
    timed = watch.seconds[arguments.warmup_steps :]
    tokens = sum(counted) // len(watch.seconds)
    return {"seconds": timed, "peak_bytes": watch.peak_bytes, "forward_tokens": tokens}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest ||g - g'|| / ||g'|| over the parameters."""
    return max(((ours[name] - grad).norm() / grad.norm().clamp(min=1e-12)).item() for name, grad in theirs.items())


def run_child(arguments: BenchArguments, child: str, folder: str) -> dict[str, Any]:
    """Measure one trainer in a process of its own."""
    flags = [f"--{name}={value}" for name, value in vars(arguments).items() if name not in ("output", "child")]
    command = [sys.executable, __file__, *flags, f"--output={folder}", f"--child={child}"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    values = [one / other for one, other in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(arguments: BenchArguments) -> dict[str, Any]:
    """Run the trainers turn and turn about, and compare ours with the others."""
    runs: dict[str, list[dict[str, Any]]] = {"stock": [], "compact": [], "ours": []}
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        shape: dict[str, Any] = SHAPES[arguments.shape]
        config = Qwen2Config(num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, **shape)
        Qwen2ForCausalLM(config).save_pretrained(Path(directory) / "model")
        for child in tqdm([*runs] * arguments.rounds, desc="processes"):
            runs[child].append(run_child(arguments, child, directory))
        gradients = [torch.load(Path(directory) / f"{child}.pt") for child in ("ours", "stock")]
    seconds = {child: [statistics.median(one["seconds"]) for one in done] for child, done in runs.items()}
    peaks = {child: [float(one["peak_bytes"]) for one in done] for child, done in runs.items()}
    made = trajectories(arguments.num_questions, shape["vocab_size"])
    return {
        "time_ratio": ratios(seconds["ours"], seconds["stock"]),
        "time_ratio_to_compact_stock": ratios(seconds["ours"], seconds["compact"]),
        "memory_ratio": ratios(peaks["ours"], peaks["stock"]),
        "max_relative_gradient_difference": largest_difference(*gradients),
        "forward_token_ratio": runs["ours"][0]["forward_tokens"] / runs["stock"][0]["forward_tokens"],
        "seconds_a_step": {child: statistics.median(values) for child, values in seconds.items()},
        "peak_GiB": {child: statistics.median(values) / 2**30 for child, values in peaks.items()},
        "batch": {
            "trajectories": len(made),
            "micro_batch": arguments.micro_batch,
            "tokens": sum(len(one.prompt_ids) + len(one.completion_ids) for one in made),
            "policy_tokens": sum(sum(one.env_mask) for one in made),
            "longest": max(len(one.prompt_ids) + len(one.completion_ids) for one in made),
        },
        "shape": arguments.shape,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Compare the trainers, write, print; or, where `child` is set, measure one."""
    (arguments,) = parse(BenchArguments, argv=argv)
    if arguments.num_questions * GROUP % arguments.micro_batch:
        total = arguments.num_questions * GROUP
        raise UserError(f"micro_batch is {arguments.micro_batch}: it must divide a step's {total} trajectories")
    output = Path(arguments.output)
    claim_output_dir(output.parent, overwrite=True)
    if arguments.child is not None:
        print(json.dumps(measure(arguments)))
        return
    result = compare(arguments)
    write_json(output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
