"""Every configuration in recipes/ is read by what reads it, and those of the paper's runs hold the paper's values."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from recipe_modules import load_recipe
from trl import ModelConfig

from zerosearch.command_line import parse
from zerosearch.engines.options import EngineOptions
from zerosearch.training.trainer import SearchConfig

RECIPES = Path(__file__).parents[2] / "recipes"

# Appendix F: noise from p_s to p_e.
PAPER_RUNS = {
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B", 0.0, 0.25),
    "qwen2.5-3b-instruct": ("Qwen/Qwen2.5-3B-Instruct", 0.0, 0.25),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", 0.0, 0.75),
    "qwen2.5-7b-instruct": ("Qwen/Qwen2.5-7B-Instruct", 0.0, 0.75),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", 0.25, 0.5),
    "llama-3.2-3b-instruct": ("meta-llama/Llama-3.2-3B-Instruct", 0.25, 0.5),
}
# Devices, ZeRO stage (0: no DeepSpeed) and machines.
LAUNCHES = {
    "cpu": (1, 0, 1),
    "single_gpu": (1, 0, 1),
    "ddp": (4, 0, 1),
    "zero2": (4, 2, 1),
    "zero3": (4, 3, 1),
    "zero3_cpu": (2, 3, 1),
    "zero3_two_nodes": (16, 3, 2),
}


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_a_run_of_the_paper(
    name: str,
) -> None:
    recipe = load_recipe("grpo")
    arguments, options, config, model = parse(
        recipe.RunOptions,
        EngineOptions,
        SearchConfig,
        ModelConfig,
        argv=["--config", str(RECIPES / f"configs/{name}.yaml")],
    )
    assert (model.model_name_or_path, config.noise_start, config.noise_end) == PAPER_RUNS[name]
    assert (arguments.prompt, options.engine, options.num_documents) == ("paper", "simulated", 5)
    assert (config.algorithm, config.learning_rate, config.beta, config.max_steps) == ("reinforce", 1e-6, 0.001, 200)
    trajectories = config.per_device_train_batch_size * config.gradient_accumulation_steps * 4
    assert (config.num_generations, trajectories) == (5, 64 * 5)
    assert config.output_dir == f"outputs/{name}"


def test_every_training_config_is_a_run_of_the_paper_or_small() -> None:
    training = {path.stem for path in RECIPES.glob("configs/*.yaml") if "num_generations:" in path.read_text()}
    small = {"tinyworld", "trl-tinyworld", "hotpotqa-smoke", "smollm2-135m", "smollm2-135m-lora"}
    assert training == {*PAPER_RUNS, "qwen2.5-3b-one-gpu", "qwen2.5-3b-one-gpu-lora", *small}


def test_the_stages_of_smollm2_share_their_budgets_and_its_adapter_is_the_same_run() -> None:
    names = ("smollm2-135m", "smollm2-135m-lora", "sft-policy-smollm2-135m", "evaluate-smollm2-135m")
    full, adapter, *others = (yaml.safe_load((RECIPES / f"configs/{name}.yaml").read_text()) for name in names)
    changed = {name for name in adapter if adapter[name] != full.get(name)}
    own = {"lora_target_modules", "lora_r", "lora_alpha", "use_peft", "learning_rate", "output_dir"}
    assert changed == own and full.keys() <= adapter.keys()
    budgets = [name for name in full if name.startswith("max_t")] + ["num_documents"]
    assert len(budgets) == 4 and all(other[name] == full[name] for name in budgets for other in others)


def test_the_run_on_one_gpu_is_the_papers_without_a_reference_model() -> None:
    names = ("qwen2.5-3b", "qwen2.5-3b-one-gpu")
    four, one = (yaml.safe_load((RECIPES / f"configs/{name}.yaml").read_text()) for name in names)
    changed = {name for name in one if one[name] != four.get(name)}
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert changed == {"beta", "output_dir", "vllm_gpu_memory_utilization", *batch} and four.keys() <= one.keys()
    assert one["per_device_train_batch_size"] * one["gradient_accumulation_steps"] == 64 * 5


def test_the_run_by_lora_on_one_gpu_is_the_papers_with_its_simulator_in_the_policys_engine() -> None:
    names = ("qwen2.5-3b", "qwen2.5-3b-one-gpu-lora")
    four, one = (yaml.safe_load((RECIPES / f"configs/{name}.yaml").read_text()) for name in names)
    changed = {name for name in one if one[name] != four.get(name)}
    adapter = {"dtype", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "learning_rate"}
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps", "vllm_gpu_memory_utilization"}
    assert changed == {"output_dir", "simulator", "simulator_model", *adapter, *batch} and four.keys() <= one.keys()
    assert one["per_device_train_batch_size"] * one["gradient_accumulation_steps"] == 64 * 5


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_configuration(name: str) -> None:
    config = load_config_from_file(str(RECIPES / f"accelerate/{name}.yaml"))  # raises for an unknown key
    stage = (config.deepspeed_config or {}).get("zero_stage", 0)
    assert (config.num_processes, stage, config.num_machines) == LAUNCHES[name]


def test_every_launch_configuration_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("accelerate/*.yaml")} == set(LAUNCHES)
