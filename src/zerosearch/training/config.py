"""`SearchConfig`: GRPOConfig with the paper's values as defaults, and what search adds to it; `RunOptions`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from trl import GRPOConfig

from zerosearch.engines.options import EngineKind
from zerosearch.errors import UserError
from zerosearch.generation.loading import fit_to_cpu
from zerosearch.noise import NoiseSchedule
from zerosearch.prompts import PromptSetName
from zerosearch.rollout.loop import RolloutSettings
from zerosearch.training.advantages import Baseline
from zerosearch.training.sentinel import OnCollapse

Algorithm = Literal["reinforce", "rloo", "grpo", "ppo"]
# Losses that clip a ratio and weight it by an advantage of any shape; TRL's others are made for GRPO's.
RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


@dataclass
class SearchConfig(RolloutSettings, GRPOConfig):
    """All settings of a training run: the rollout's, the fields of GRPOConfig whose default differs, then ours.

    "Our choice" marks what the paper does not say. Without an accelerator, the settings are fitted to a CPU.
    Raises `UserError` for values that cannot work, with the reason.

    >>> config = SearchConfig("policy", algorithm="grpo", noise_end=0.75)
    >>> config.noise_schedule().p_noise(step=200, total_steps=200)
    0.75
    """

    # Learning rate 1e-6 (Appendix F), clipping 0.2 and gradient clipping at 1.0 (released code) are TRL's defaults
    # already, and so is sampling at temperature 1.0 from the whole distribution (top_p 1.0): the released code sampled
    # with top_p 0.95 and trained on log-probabilities of the whole. Each rollout makes one update; the released code
    # makes two (64 and 16 of the 80 trajectories of a GPU).
    beta: float = field(
        default=0.001,
        metadata={"min": 0, "help": "Weight of the KL to the reference model (released code; k3 estimate)."},
    )
    # 64 questions x 5 trajectories a step (Table 8), on one device: 20 x 16 = 320.
    per_device_train_batch_size: int = field(default=20, metadata={"help": "Trajectories a micro-batch and device."})
    gradient_accumulation_steps: int = field(default=16, metadata={"help": "Micro-batches a step."})
    num_generations: int | None = field(
        default=5, metadata={"help": "Trajectories a prompt (Table 8: 64 x 5 a step)."}
    )
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Trajectories a question of an evaluation in training, which is greedy: 1."}
    )
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "Shape of the learning rate (released code); without `warmup_steps` it is constant."},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW (released code)."})
    # TRL would weight the KL by the importance ratio. The released code does not (and subtracts where it should add).
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Weight the KL by the importance ratio."})
    # With dropout (LoRA's is 0.05 in TRL's ModelConfig) the trainer's log-probabilities are not those of the sampler.
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout (our choice)."})
    # TRL's default sums log-ratios over a trajectory and drops it at 3: 1,000 tokens at a mean drift of 0.0011 nats.
    vllm_importance_sampling_mode: str = field(
        default="token_truncate", metadata={"help": "Correction for vLLM's log-probabilities: token by token."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Leave it empty: max_trajectory_tokens is the limit."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Context of the vLLM engine; by default max_trajectory_tokens."}
    )

    sync_adapter: bool | None = field(
        default=None,
        metadata={
            "help": "With LoRA and vLLM: push the adapter alone each step, not merged weights, which decode a little "
            "faster. Default: with an accelerator; beside a colocated simulator, always; vllm_mode server, where the "
            "server was started to load adapters, and on this machine."
        },
    )

    algorithm: Algorithm = field(
        default="reinforce", metadata={"help": "reinforce (the paper's default, Table 5), rloo, grpo or ppo."}
    )
    baseline: Baseline = field(
        default="none",
        metadata={
            "help": "For reinforce: what is taken off the reward, none (the paper), the mean of group or batch."
        },
    )
    # Of ppo alone. The KL (k1, weight `beta`) is in its reward, not in its loss (released code).
    gae_gamma: float = field(
        default=1.0, metadata={"min": 0, "max": 1, "help": "For ppo: discount of a policy token (the paper)."}
    )
    gae_lambda: float = field(
        default=1.0, metadata={"min": 0, "max": 1, "help": "For ppo: lambda of the advantages (the paper)."}
    )
    critic_learning_rate: float = field(
        default=1e-5, metadata={"above": 0, "help": "For ppo: of the critic (released code)."}
    )
    critic_warmup_steps: int = field(
        default=3,
        metadata={"min": 0, "help": "For ppo: steps to the critic's full rate (released code: 0.015 of 203)."},
    )
    value_clip: float = field(
        default=0.5, metadata={"above": 0, "help": "For ppo: how far a value may move (released code)."}
    )
    overlap_steps: int = field(
        default=0,
        metadata={
            "min": 0,
            "max": 1,
            "help": "1: sample the next step's trajectories while a step is trained, with weights one step old; needs "
            "vllm_mode server.",
        },
    )
    mask_observations: bool = field(
        default=True, metadata={"help": "Learn from the policy's tokens only; false is the ablation of Table 7."}
    )
    noise_start: float = field(default=0.0, metadata={"help": "p_s of Eq. 1: noise at the first step (Appendix F)."})
    # Appendix F has a value for each policy (0.25 for Qwen-3B, 0.75 for Qwen-7B); this is the released README's.
    noise_end: float = field(default=0.5, metadata={"help": "p_e of Eq. 1: noise at the last step."})
    noise_base: float = field(default=4.0, metadata={"help": "b of Eq. 1 (Section 3.4); 1 is a straight line."})
    max_failed_search_share: float = field(
        default=0.1,
        metadata={"min": 0, "max": 1, "help": "Stop when more of a step's trajectories lost a search (our choice)."},
    )
    on_collapse: OnCollapse = field(
        default="stop",
        metadata={
            "help": "When the log shows a collapse (training/sentinel.py): stop, rollback to the last healthy "
            "checkpoint at half the learning rate, or only warn (our choice)."
        },
    )
    max_rollbacks: int = field(default=3, metadata={"min": 1, "help": "How often a run may go back."})
    logged_trajectories: int = field(
        default=4, metadata={"help": "Trajectories of each step that go to <output_dir>/trajectories.jsonl."}
    )

    def __post_init__(self) -> None:
        RolloutSettings.__post_init__(self)
        fit_to_cpu(self)
        if not torch.accelerator.is_available():
            self.vllm_enable_sleep_mode = False  # there is no device memory to hand back
        if self.max_completion_length is None:
            self.max_completion_length = self.max_trajectory_tokens
        if self.vllm_max_model_length is None:
            self.vllm_max_model_length = self.max_trajectory_tokens
        try:
            GRPOConfig.__post_init__(self)
        except ValueError as error:
            step = "A step has per_device_train_batch_size x gradient_accumulation_steps x devices trajectories."
            raise UserError(f"{error} ({step})" if "batch" in str(error) else str(error)) from error
        if self.use_vllm:
            self._check_vllm()
        elif not self.ds3_gather_for_generation:
            raise UserError("ds3_gather_for_generation false needs use_vllm true: transformers generates gathered")
        self._check_algorithm()
        if self.algorithm == "ppo":
            self._check_ppo()
        if self.overlap_steps:
            self._check_overlap()
        self.noise_schedule()  # raises UserError for values that cannot work
        self._check_budgets()

    def _check_algorithm(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise UserError(f"algorithm is {self.algorithm!r}: it must be reinforce, rloo, grpo or ppo")
        if self.baseline not in get_args(Baseline):
            raise UserError(f"baseline is {self.baseline!r}: it must be none, group or batch")
        if self.baseline != "none" and self.algorithm != "reinforce":
            raise UserError(
                f"baseline is {self.baseline!r}, but {self.algorithm} has its own: baseline none, or reinforce, works"
            )
        if self.scale_rewards != "group" and self.algorithm != "grpo":
            raise UserError(
                f"scale_rewards is {self.scale_rewards!r}, but {self.algorithm} scales no rewards by their group; "
                "scale_rewards group, or algorithm grpo, works"
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise UserError(
                f"multi_objective_aggregation is {self.multi_objective_aggregation!r}: rewards are added up "
                "first, for every algorithm alike; sum_then_normalize works"
            )
        if self.num_generations_eval != 1:
            raise UserError(
                f"num_generations_eval is {self.num_generations_eval}: an evaluation in training is greedy, so "
                "further trajectories of a question would be the same; 1 works"
            )
        for name in ("epsilon", "learning_rate"):
            if getattr(self, name) < 0.0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 0")
        if self.temperature <= 0.0:
            raise UserError(
                f"temperature is {self.temperature}: greedy turns are all alike, and log-probabilities are divided by "
                "it; temperature 1.0 works"
            )
        if self.on_collapse == "rollback" and self.save_strategy == "no":
            raise UserError("on_collapse rollback goes back to a checkpoint; --save_strategy steps keeps some")
        if self.sync_ref_model and self.beta == 0.0:
            raise UserError(
                "sync_ref_model moves the reference model, and with beta 0 there is none; beta 0.001 works"
            )

    def _check_ppo(self) -> None:
        if self.loss_type not in RATIO_LOSSES:
            raise UserError(
                f"loss_type is {self.loss_type!r}: it takes one advantage a trajectory, and ppo has one a token; "
                f"{', '.join(RATIO_LOSSES)} work"
            )
        if self.importance_sampling_level != "token" or self.off_policy_mask_threshold is not None:
            raise UserError(
                "ppo weighs each token by itself; importance_sampling_level token without off_policy_mask_threshold "
                "works"
            )
        if self.fp16:
            raise UserError("the critic of ppo has no loss scaling for fp16; bf16 true, or neither, works")
        if is_fsdp(self):
            raise UserError("the critic of ppo is not sharded by FSDP; recipes/accelerate/zero3.yaml shards it")

    def _check_vllm(self) -> None:
        if find_spec("vllm") is None:
            raise UserError("vLLM is not installed; install it (see the README), or pass --use_vllm false")
        if self.vllm_mode not in ("colocate", "server"):
            raise UserError(f"vllm_mode is {self.vllm_mode!r}: it must be colocate or server")

    def _check_overlap(self) -> None:
        if not self.use_vllm or self.vllm_mode != "server":
            raise UserError(
                "overlap_steps 1 samples while the policy is trained, so its engine must stand apart from the "
                "trainer; use_vllm true with vllm_mode server works"
            )
        if not self.vllm_importance_sampling_correction or "token" not in self.vllm_importance_sampling_mode:
            raise UserError(
                "overlap_steps 1 trains on trajectories of older weights, which are corrected token by token; "
                "vllm_importance_sampling_correction true with vllm_importance_sampling_mode token_truncate works"
            )
        if self.algorithm == "ppo":
            raise UserError(
                "overlap_steps 1 corrects the policy's loss for older weights, and not the returns that the critic "
                "of ppo learns from; reinforce, rloo and grpo work"
            )
        if self.num_iterations != 1 or self.steps_per_generation != self.gradient_accumulation_steps:
            raise UserError(
                "overlap_steps 1 makes one update of each rollout, so that its weights are one step old; "
                "num_iterations 1 works, with steps_per_generation left out"
            )

    def _check_budgets(self) -> None:
        """Refuse a context in which no search could be followed by an answer."""
        turns = 2 if self.max_turns else 1
        needed = turns * self.max_turn_tokens + (turns - 1) * self.max_observation_tokens
        if needed >= self.max_trajectory_tokens:
            raise UserError(
                f"max_trajectory_tokens is {self.max_trajectory_tokens}: {turns} turns of {self.max_turn_tokens} "
                f"tokens and {turns - 1} observation of {self.max_observation_tokens} take {needed}, and the prompt "
                f"comes before them; {needed + 512} works with prompts of up to 512 tokens"
            )

    def noise_schedule(self) -> NoiseSchedule:
        """Return the curriculum of Eq. 1."""
        return NoiseSchedule(self.noise_start, self.noise_end, self.noise_base)


@dataclass
class RunOptions:
    """What to train on and to evaluate with, and with which prompts."""

    dataset: str = field(metadata={"help": "A .jsonl or .parquet file, or a dataset on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out questions, scored every --eval_steps with --eval_strategy steps."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Its split, of a dataset on the Hub."})
    eval_dataset_limit: int | None = field(default=None, metadata={"help": "Use its first rows only."})
    eval_engine: EngineKind | None = field(
        default=None, metadata={"help": "The engine of these evaluations. Default: the one trained on."}
    )
    prompt: PromptSetName = field(default="paper", metadata={"help": "The prompt set: see zerosearch.prompts."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into an output_dir that is not empty."})

    def __post_init__(self) -> None:
        if self.eval_engine and not self.eval_dataset:
            raise UserError("--eval_engine answers the searches of evaluations, which need --eval_dataset")


def is_fsdp(args: SearchConfig) -> bool:
    """Say whether torch's FSDP shards the policy, as the arguments or the launcher have it."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def check_arguments(
    args: SearchConfig,
    train_dataset: Any = None,
    reward_funcs: Any = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    **others: Any,
) -> None:
    """Raise `UserError` for a model, rewards and questions that cannot be trained together with these settings."""
    if quantization_config is not None and peft_config is None:
        raise UserError(
            "a quantized policy cannot learn: its weights are 4 or 8 bits; --use_peft true adds some (LoRA)"
        )
    if quantization_config is not None and is_fsdp(args):
        raise UserError("a quantized policy is not sharded by FSDP; recipes/accelerate/zero3.yaml shards it")
    if getattr(quantization_config, "load_in_8bit", False) and args.use_vllm:
        raise UserError("vLLM takes no policy in 8 bits; load_in_4bit true, or use_vllm false, works")
    if args.sync_ref_model and peft_config is not None:
        raise UserError("with LoRA the reference is the base model, which never moves; sync_ref_model false works")
    if args.overlap_steps and not hasattr(train_dataset, "__len__"):
        raise UserError("overlap_steps 1 asks the dataset for rows ahead, which one that is streamed cannot give")
    count = len(reward_funcs) if isinstance(reward_funcs, list) else 1
    if args.reward_weights is not None and len(args.reward_weights) != count:
        raise UserError(f"reward_weights has {len(args.reward_weights)} weights for {count} reward functions")
    needed = args.generation_batch_size // args.num_generations
    if hasattr(train_dataset, "__len__") and len(train_dataset) < needed:
        raise UserError(
            f"the dataset has {len(train_dataset)} questions, and a step takes {needed}; gradient_accumulation_steps "
            f"and per_device_train_batch_size decide how many (x devices / num_generations)"
        )
