"""Say what a training run needs before it starts: memory on each device, tokens, batches, searches, time.

    python recipes/doctor.py --config recipes/configs/qwen2.5-3b.yaml --gpu_memory_gb 80 \
        --launch recipes/accelerate/zero3.yaml
    python recipes/doctor.py --config recipes/configs/tinyworld.yaml --probe true

It takes the flags and the YAML of recipes/grpo.py, and some of its own. Of the policy it loads the configuration and
the tokenizer alone, and it writes nothing; with `--probe true` it makes two steps of the run in a folder that it
throws away. It prints a table, a verdict, and a suggestion for each thing that does not fit; exit status 1 if one does
not.
"""

from __future__ import annotations

import zerosearch  # noqa: F401 (first: it sets what the libraries below read)

# isort: split
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.data import load_questions
from zerosearch.engines.account import GOOGLE_USD_PER_QUERY
from zerosearch.engines.options import TrainingEngineOptions
from zerosearch.errors import UserError
from zerosearch.files import read_json
from zerosearch.generation.loading import base_of_adapter, end_token_ids, load_tokenizer, longest_context, model_config
from zerosearch.prompts import PROMPT_SETS
from zerosearch.rollout.observations import ObservationWriter
from zerosearch.training import memory, trainer  # noqa: F401 (the trainer: its libraries take memory on a CPU)
from zerosearch.training.config import RunOptions, SearchConfig
from zerosearch.training.generators import engine_adapters
from zerosearch.training.memory import GIB, Launch, ModelShape, Part

RECIPE = Path(__file__).resolve().parent / "grpo.py"
PROBE_STEPS = 2  # the first warms up
CLOSE = 1 / 1.2  # of what there is: measured runs took up to a fifth more than the sum (recipes/README.md)

# What makes a run smaller, the cheapest first: flags of grpo.py.
SMALLER: tuple[dict[str, Any], ...] = (
    {"vllm_enable_sleep_mode": True},
    {"gradient_checkpointing": True},
    {"per_device_train_batch_size": 4},
    {"per_device_train_batch_size": 1},
    {"vllm_gpu_memory_utilization": 0.3},
    {"use_peft": True},
    {"use_peft": True, "dtype": "bfloat16"},  # of the base alone: an adapter learns in 32 bits
    {"use_peft": True, "load_in_4bit": True},
)


@dataclass
class PlannedConfig(SearchConfig):
    """The settings of the run, and what the doctor asks about the machine that will run it."""

    gpu_memory_gb: float | None = field(
        default=None, metadata={"above": 0, "help": "Memory of a device of that machine. Default: of this one's."}
    )
    launch: str | None = field(
        default=None, metadata={"help": "Its launch configuration, as in recipes/accelerate. Default: one process."}
    )
    others_gb: float = field(
        default=0.0, metadata={"min": 0, "help": "What others take of each device, such as a simulator's server."}
    )
    probe: bool = field(default=False, metadata={"help": f"Make {PROBE_STEPS} steps of the run, and time them."})

    def __post_init__(self) -> None:
        self.launched = read_launch(self.launch)
        asked = {name: getattr(self, name) for name in ("bf16", "vllm_enable_sleep_mode")}
        super().__post_init__()
        self.on_gpu = self.gpu_memory_gb is not None or torch.accelerator.is_available()
        if self.on_gpu:  # as the run has them there, not as they were fitted to a machine without one
            self.bf16 = not self.fp16 if asked["bf16"] is None else asked["bf16"]
            self.vllm_enable_sleep_mode = asked["vllm_enable_sleep_mode"]

    def _check_vllm(self) -> None:
        if self.gpu_memory_gb is None:
            super()._check_vllm()

    @property
    def world_size(self) -> int:
        return self.launched.devices

    @property
    def device_bytes(self) -> int:
        """Return the memory of a device; without an accelerator the machine's, divided among its processes."""
        if self.gpu_memory_gb is not None:
            return int(self.gpu_memory_gb * GIB)
        if self.on_gpu:
            return int(torch.accelerator.get_memory_info()[1])
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // self.world_size


def read_launch(path: str | None) -> Launch:
    """Return the devices and the ZeRO stage of a launch configuration. Raises `UserError` for a file that is none."""
    if path is None:
        return Launch()
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        launch = load_config_from_file(path)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last of a file that holds no mapping
        raise UserError(f"{path} is no launch configuration: {error}") from error
    if launch.num_processes < 1:
        raise UserError(f"{path} says num_processes: {launch.num_processes}; it must say how many")
    return Launch(launch.num_processes, (launch.deepspeed_config or {}).get("zero_stage", 0))


def peak_bytes() -> int:
    """Return the most memory this program has held. On Linux `ru_maxrss` starts at the peak of what launched it."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


class Doctor:
    """Checks a run, one thing after another, and keeps the table and what does not fit."""

    def __init__(
        self, run: RunOptions, options: TrainingEngineOptions, config: PlannedConfig, model: ModelConfig
    ) -> None:
        self.options, self.config, self.model = options, config, model
        name, revision = model.model_name_or_path, model.model_revision
        engine_adapters(config, [], name, get_peft_config(model), get_quantization_config(model))  # or a refusal
        self.policy = model_config(name, revision, config.trust_remote_code)
        self.tokenizer = load_tokenizer(name, revision, config.trust_remote_code)
        questions = load_questions(run.dataset, run.dataset_split, run.dataset_limit)
        agent, kwargs = PROMPT_SETS[run.prompt].policy, config.chat_template_kwargs
        assert not isinstance(kwargs, str), "read from JSON when the settings were made"
        writer = ObservationWriter(self.tokenizer, agent, config.max_observation_tokens, kwargs)
        self.prompt_tokens = [len(writer.prompt_ids(row)) for row in tqdm(questions, desc="prompts")]
        self.runtime_bytes = None if config.on_gpu else peak_bytes()
        self.is_colocated = options.engine == "simulated" and options.simulator == "colocated"
        self.shapes: dict[bool, ModelShape] = {}  # with adapters, and without
        self.rows: list[tuple[str, str]] = []
        self.misfits: list[tuple[str, str]] = []

    def add(self, name: str, value: str = "") -> None:
        """Add a row to the table; one without a value is a heading."""
        self.rows.append((name, value))

    def parts(self, config: PlannedConfig, model: ModelConfig) -> list[Part]:
        """Return what a run takes on each device, with settings that may be changed ones."""
        adapts = bool(model.use_peft)
        if adapts not in self.shapes:
            self.shapes[adapts] = memory.policy_shape(self.policy, get_peft_config(model), config.trust_remote_code)
        precision = memory.precision_of(config, config.launched, model.dtype, self.policy.dtype, model.load_in_4bit)
        longest, there = max(self.prompt_tokens), config.device_bytes
        shape, runtime = self.shapes[adapts], self.runtime_bytes
        asked = (config.launched, longest, there, runtime, int(self.is_colocated))
        parts = memory.device_memory(shape, precision, config, *asked)
        others = int(config.others_gb * GIB)
        return [*parts, Part("others (--others_gb)", others, others)]

    def check_memory(self) -> None:
        """Set what each part takes against what a device has."""
        config, there = self.config, self.config.device_bytes
        parts = self.parts(config, self.model)
        shape = self.shapes[bool(self.model.use_peft)]
        self.add(f"memory on each of {config.world_size} device(s), GiB", "training  generating")
        for part in parts:
            if part.training or part.generating:
                self.add(part.name, f"{part.training / GIB:8.2f}  {part.generating / GIB:10.2f}")
        sums = [sum(part.training for part in parts), sum(part.generating for part in parts)]
        self.add("sum, and what there is", f"{sums[0] / GIB:8.2f}  {sums[1] / GIB:10.2f} of {there / GIB:.1f}")
        self.add("parameters, trained of them", f"{shape.parameters:,}, {shape.trained:,}")
        self.is_close = there >= max(sums) > CLOSE * there
        if max(sums) > there:
            problem = f"memory: {max(sums) / GIB:.1f} GiB are needed, and {there / GIB:.1f} are there"
            self.misfits.append((problem, self.smaller_run()))
        if config.use_vllm and config.vllm_mode == "colocate" and config.on_gpu:
            simulators, longest = int(self.is_colocated), int(config.vllm_max_model_length or 0)
            tokens = memory.engine_cache_tokens(shape, config, there, simulators)
            by_adapter = shape.adapters and (config.sync_adapter is not False or self.is_colocated)
            if config.vllm_enable_sleep_mode and by_adapter:  # no sync brings the base back
                asleep = memory.engine_weight_bytes(shape, config, simulators)
                self.add("vLLM's base in the host's memory, asleep", f"{asleep / GIB:8.2f}")
            self.add(
                "keys and values in vLLM", f"{tokens:,} tokens, {tokens / longest:.1f} trajectories of {longest:,}"
            )
            if tokens < longest:
                missing = (longest - tokens) * memory.token_bytes(shape, 2 if config.bf16 or config.fp16 else 4)
                share = ceil(20 * (config.vllm_gpu_memory_utilization + missing / there)) / 20
                problem = f"vLLM's share of the device has no room for a trajectory of {longest:,} tokens"
                self.misfits.append((problem, f"--vllm_gpu_memory_utilization {share:.2f}"))

    def smaller_run(self) -> str:
        """Return flags with which the run fits, no more of `SMALLER` than it takes, or what else would help."""

        def fits(changes: Sequence[Mapping[str, Any]]) -> bool:
            parts = self.parts(*changed(self.config, self.model, changes))
            needed = max(sum(part.training for part in parts), sum(part.generating for part in parts))
            return needed <= self.config.device_bytes

        enough = next((n for n in range(1, len(SMALLER) + 1) if fits(SMALLER[:n])), None)
        if enough is None:
            return "more devices, with --launch recipes/accelerate/zero3.yaml, or a smaller policy"
        chosen = list(SMALLER[:enough])
        for change in SMALLER[:enough]:
            others = [one for one in chosen if one is not change]
            chosen = others if fits(others) else chosen
        config, model = changed(self.config, self.model, chosen)
        names = dict.fromkeys(name for change in chosen for name in change)
        if "per_device_train_batch_size" in names:
            names["gradient_accumulation_steps"] = None
        values = {name: getattr(config if hasattr(config, name) else model, name) for name in names}
        return " ".join(f"--{name} {str(value).lower()}" for name, value in values.items())

    def check_tokens(self) -> None:
        """Set prompts, turns and observations against the longest trajectory."""
        config, ordered = self.config, sorted(self.prompt_tokens)
        limit = longest_context(self.policy, config.max_trajectory_tokens)
        full = memory.full_trajectory(config, ordered[-1])
        search_and_answer = min(2, config.max_turns + 1) * config.max_turn_tokens
        search_and_answer += min(1, config.max_turns) * config.max_observation_tokens
        cut = sum(tokens + search_and_answer > limit for tokens in ordered)
        self.add("tokens")
        self.add("prompts: median, longest", f"{median(ordered):,.0f}, {ordered[-1]:,}")
        self.add("turns: most, longest", f"{config.max_turns} + 1, {config.max_turn_tokens:,}")
        self.add("observations: most, longest", f"{config.max_turns}, {config.max_observation_tokens:,}")
        self.add("trajectory: all of it full, its limit", f"{full:,}, {limit:,}")
        self.add("questions cut before an answer", f"{cut:,} of {len(ordered):,}, with full turns")
        if cut:
            problem = f"{cut:,} questions leave no room for a search and an answer within {limit:,} tokens"
            fitting = f"--max_trajectory_tokens {ordered[-1] + search_and_answer}"
            if limit < config.max_trajectory_tokens:
                fitting = f"shorter turns and observations: the policy takes {limit:,} tokens"
            self.misfits.append((problem, fitting))

    def check_tokenizer(self) -> None:
        """Say which tokens are special, and whether the end of a turn in the chat template ends a sequence."""
        tokenizer, name, revision = self.tokenizer, str(self.model.model_name_or_path), self.model.model_revision
        try:
            generation = GenerationConfig.from_pretrained(base_of_adapter(name, revision) or name, revision=revision)
        except OSError:  # a model may leave it to its configuration
            generation = GenerationConfig.from_model_config(self.policy)
        ends = tokenizer.convert_ids_to_tokens(end_token_ids(generation, tokenizer))
        rows = self.policy.get_text_config().vocab_size
        self.add("tokenizer")
        self.add("tokens, rows of the embedding", f"{len(tokenizer):,}, {rows:,}")
        self.add("special tokens", " ".join(tokenizer.all_special_tokens) or "none")
        self.add("end of a sequence", " ".join(ends) or "none")
        if len(tokenizer) > rows:
            problem = f"the tokenizer has {len(tokenizer):,} tokens, and the policy's embedding {rows:,} rows"
            self.misfits.append((problem, "take the tokenizer that the weights were trained with"))
        template = "none: the prompt is plain text"
        if tokenizer.chat_template is not None:
            end = end_of_turn(tokenizer)
            missed = "" if end is None or end in ends else ", which ends no sequence: only a tag or the limit does"
            template = f"ends a turn with {end}{missed}"
        self.add("chat template", template)

    def check_batches(self) -> int:
        """Do the arithmetic of steps, epochs and searches; return the number of steps."""
        config, questions = self.config, len(self.prompt_tokens)
        rows, accumulated = config.per_device_train_batch_size, config.gradient_accumulation_steps
        trajectories, group = rows * accumulated * config.world_size, int(config.num_generations or 1)
        asked = trajectories // group
        steps = config.max_steps if config.max_steps > 0 else ceil(config.num_train_epochs * questions / asked)
        searches = trajectories * config.max_turns * steps
        self.add("batches")
        self.add("trajectories a step", f"{rows} x {accumulated} x {config.world_size} = {trajectories:,}")
        self.add("questions a step, steps, epochs", f"{asked:,}, {steps:,}, {steps * asked / questions:.2f}")
        where = ", in the policy's engine" if self.is_colocated else ""
        self.add("searches, at most", f"{searches:,} by {self.options.engine}{where}")
        self.add("the same at Google", f"{searches * GOOGLE_USD_PER_QUERY:,.2f} USD")
        if questions < asked:
            fitting = max(questions * accumulated // asked, 1)
            problem = f"a step takes {asked:,} questions, and there are {questions:,}"
            self.misfits.append((problem, f"--gradient_accumulation_steps {fitting}"))
        return steps

    def probe(self, flags: Sequence[str], steps: int) -> None:
        """Make a few steps of the run, and say what they took."""
        log, used = probed(self.config, flags)
        self.add(f"measured in {PROBE_STEPS} steps")
        self.add("seconds a step, hours in all", f"{log['step_time']:.1f}, {log['step_time'] * steps / 3600:.1f}")
        for name in ("policy_tokens", "observation_tokens", "searches", "cut_turns", "cut_observations"):
            self.add(f"{name.replace('_', ' ')} of a trajectory", f"{log[f'search/{name}']:.2f}")
        if not self.config.on_gpu:
            self.add("largest process, GiB", f"{used / GIB:.2f}")

    def report(self) -> str:
        """Return the table, the verdict and the suggestions."""
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name:<{width}}  {value}" if value else f"\n{name}" for name, value in self.rows]
        verdict = "fits closely: the run may take a fifth more memory than the sum" if self.is_close else "fits"
        verdict = f"does not fit, for {len(self.misfits)} reason(s):" if self.misfits else verdict
        found = [f"- {problem}. Suggestion: {suggestion}" for problem, suggestion in self.misfits]
        return "\n".join([*lines, f"\nverdict: {verdict}", *found])


def changed(
    config: PlannedConfig, model: ModelConfig, changes: Sequence[Mapping[str, Any]]
) -> tuple[PlannedConfig, ModelConfig]:
    """Return copies of the settings with some changed; a smaller micro-batch leaves a step's trajectories as many."""
    config, model = copy(config), copy(model)
    for name, value in [item for change in changes for item in change.items()]:
        if name == "per_device_train_batch_size":
            rows = config.per_device_train_batch_size
            value = next(size for size in range(min(value, rows), 0, -1) if rows % size == 0)
            config.gradient_accumulation_steps *= rows // value
            config.steps_per_generation *= rows // value
        elif name == "vllm_gpu_memory_utilization":
            value = min(value, config.vllm_gpu_memory_utilization)
        setattr(config if hasattr(config, name) else model, name, value)
    return config, model


def end_of_turn(tokenizer: Any) -> str | None:
    """Return the special token that the chat template puts behind what an assistant says."""
    said = "a word"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(said)[2]
    found = {tail.find(token): token for token in tokenizer.all_special_tokens if token in tail}
    return found[min(found)] if found else None


def probed(config: PlannedConfig, flags: Sequence[str]) -> tuple[dict[str, float], int]:
    """Make a few steps of the run; return the log of the last, and the most memory that a process took, in bytes."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config.launch] if config.launch else []
    with TemporaryDirectory() as folder:
        changes = {"output_dir": folder, "max_steps": PROBE_STEPS, "logging_steps": 1, "save_strategy": "no"}
        changes |= {"report_to": "none", "load_best_model_at_end": "false", "push_to_hub": "false"}
        changes |= {} if config.eval_strategy == "no" else {"eval_strategy": "steps", "eval_steps": 10**6}
        ours = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, *launcher, str(RECIPE), *without_own(flags), *ours]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2]  # nothing, where the kernel killed it for its memory
            raise UserError(f"the probe failed with exit status {done.returncode}: {said}")
        log = read_json(Path(folder, "trainer_state.json"))["log_history"]
    used = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return [entry for entry in log if "step_time" in entry][-1], used


def without_own(flags: Sequence[str]) -> list[str]:
    """Return the flags that are grpo.py's, too."""
    own = {f"--{one.name}" for one in fields(PlannedConfig)} - {f"--{one.name}" for one in fields(SearchConfig)}
    kept, is_own = [], False
    for part in flags:
        if part.startswith("--"):  # the values of a flag follow it, and --probe needs none
            is_own = part.partition("=")[0] in own
        if not is_own:
            kept.append(part)
    return kept


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check one thing after another, and print what was found."""
    flags = list(sys.argv[1:] if argv is None else argv)
    usage = "doctor.py --config FILE.yaml [--flag VALUE ...]   (--help lists all flags)"
    doctor = Doctor(*parse(RunOptions, TrainingEngineOptions, PlannedConfig, ModelConfig, argv=flags, usage=usage))
    doctor.check_memory()
    doctor.check_tokens()
    doctor.check_tokenizer()
    steps = doctor.check_batches()
    if doctor.config.probe:
        doctor.probe(flags, steps)
    say(doctor.report())
    if doctor.misfits:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
