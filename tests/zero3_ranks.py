"""What each rank of tests/test_zero3.py runs: `python zero3_ranks.py POLICY OUTPUT CASE...`, alone or under ZeRO-3.

One vLLM engine serves all cases of a process, and another one those with adapters: each trainer pushes its own weights
into it before its first rollout.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from generation_parts import listens_beyond_loopback
from peft import LoraConfig
from rain import RainEngine, rain_trainer
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, TrainerCallback
from trl.generation import vllm_generation

from zerosearch.generation.adapter_weights import dequantized
from zerosearch.training.trainer import SearchTrainer

RANKS, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
LORA = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
PPO = {"algorithm": "ppo", "critic_learning_rate": 1e-3, "critic_warmup_steps": 0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings, and arguments of the trainer
    "grpo": ({"algorithm": "grpo"}, {}),
    "gathered": ({"algorithm": "grpo", "use_vllm": False}, {}),  # for generation by transformers
    "ppo": (PPO, {}),
    "lora": ({**PPO, "sync_adapter": True}, LORA),
    "qlora": ({"algorithm": "reinforce"}, {**LORA, "quantization_config": NF4}),
}


class Watch(TrainerCallback):
    """Write down, after each step, what this rank holds; after the first the policy, after the second vLLM's weights.

    Those are still what the second step was rolled out with.
    """

    trainer: Any

    def __init__(self) -> None:
        self.held: list[dict[str, dict[str, int]]] = []
        self.policy: dict[str, torch.Tensor] = {}
        self.vllm: dict[str, torch.Tensor] = {}
        self.listens: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.listens = listens_beyond_loopback()
        trainer = self.trainer
        models = {"policy": trainer.model, "reference": trainer.ref_model}
        models |= {"critic": trainer.critic.model} if trainer.critic is not None else {}
        if RANKS > 1:
            self.held.append({name: held(model) for name, model in models.items() if model is not None})
        if state.global_step == 1:
            self.policy = whole_weights(trainer.model)
        elif trainer.use_vllm:
            engine = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
            weights = {name.replace(".base_layer", ""): weight for name, weight in engine.named_parameters()}
            self.vllm = {name: weight.detach().clone() for name, weight in weights.items()}


def held(model: Any) -> dict[str, int]:
    """Count the elements of a sharded model: all of them, this rank's share, and those that are whole on this rank."""
    parameters = list(model.parameters())
    return {
        "all": sum(parameter.ds_numel for parameter in parameters),
        "share": sum(parameter.ds_tensor.numel() for parameter in parameters),
        "whole": sum(parameter.numel() for parameter in parameters),
    }


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a model by name, gathered if they are sharded, and not in 4 bits."""
    gathered: Any = nullcontext()
    if RANKS > 1:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gathered:
        return {name: dequantized(parameter).detach().clone() for name, parameter in model.named_parameters()}


def make_one_engine() -> None:
    """Let TRL make a vLLM engine of each kind once, and hand it out again to every further trainer."""
    make, made = vllm_generation.LLM, {}

    def engine(**options: Any) -> Any:
        takes_adapters = "enable_lora" in options
        if takes_adapters not in made:
            made[takes_adapters] = make(**options)
        return made[takes_adapters]

    vllm_generation.LLM = engine


def shard_small_parameters() -> None:
    """Shard parameters of under 100,000 elements, too: DeepSpeed keeps them whole, and a tiny model has no others."""
    stock = DeepSpeedPlugin.__post_init__

    def with_threshold(plugin: DeepSpeedPlugin) -> None:
        stock(plugin)
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = with_threshold


def make_trainer(policy: Path, output: Path, case: str) -> tuple[SearchTrainer, Watch]:
    """Return a trainer for two steps of 16 trajectories, whatever the number of ranks."""
    settings, arguments = CASES[case]
    watch = Watch()
    trainer = rain_trainer(
        policy,
        output,
        RainEngine(),
        {"callbacks": [watch], **arguments},
        **{
            "use_vllm": True,
            "vllm_mode": "colocate",
            "per_device_train_batch_size": 8 // RANKS,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "beta": 0.1,
            "entropy_coef": 0.01,
            # AdamW moves all weights alike, however small their gradients; with this epsilon, in proportion to them.
            "adam_epsilon": 1.0,
            "learning_rate": 1.0,
            "weight_decay": 0.0,
            "save_strategy": "steps",
            "save_steps": 1,
            **settings,
        },
    )
    watch.trainer = trainer
    return trainer, watch


def models_of(trainer: SearchTrainer) -> dict[str, Any]:
    return {"policy": trainer.model, **({} if trainer.critic is None else {"critic": trainer.critic.model})}


def train(policy: Path, output: Path, case: str) -> None:
    """Make both steps, and the second once more from the first's checkpoint; write what came of them to `output`."""
    trainer, watch = make_trainer(policy, output, case)
    pushes: list[int] = []
    if trainer.use_vllm:
        push = trainer.vllm_generation.sync_weights
        trainer.vllm_generation.sync_weights = lambda: pushes.append(trainer.state.global_step) or push()
    weights = {f"start-{name}": whole_weights(model) for name, model in models_of(trainer).items()}
    trainer.train()
    trainer.save_model(str(output / "saved"))
    weights |= {f"second-{name}": whole_weights(model) for name, model in models_of(trainer).items()}
    weights |= {"first-policy": watch.policy, "vllm": watch.vllm}
    record = {
        "generator": type(trainer.generator).__name__,
        "log": trainer.state.log_history,
        "held": watch.held,
        "listens": watch.listens,
        "pushes": len(pushes),
        "trained": [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad],
    }
    (output / f"{RANK}.json").write_text(json.dumps(record))

    resumed, _ = make_trainer(policy, output, case)
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-1"))
    weights |= {f"resumed-{name}": whole_weights(model) for name, model in models_of(resumed).items()}
    for name, tensors in weights.items():
        save_file(tensors, output / f"{name}-{RANK}.safetensors")


if __name__ == "__main__":
    make_one_engine()
    shard_small_parameters()
    for name in sys.argv[3:]:
        folder = Path(sys.argv[2]) / name
        folder.mkdir(parents=True, exist_ok=True)
        train(Path(sys.argv[1]), folder, name)
