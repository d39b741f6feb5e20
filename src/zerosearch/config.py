"""`SearchConfig`: GRPOConfig with the paper's values as defaults, and what search adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

import torch
from trl import GRPOConfig

from zerosearch.curriculum import NoiseSchedule
from zerosearch.errors import UserError
from zerosearch.hardware import fit_to_cpu
from zerosearch.rollout import RolloutSettings

Algorithm = Literal["reinforce", "grpo"]


@dataclass
class SearchConfig(GRPOConfig):
    """Everything a training run can be told. First the fields of GRPOConfig whose default differs, then ours.

    "Our choice" marks what the paper does not say. On a machine without an accelerator it sets what that needs.
    Raises `UserError` for a noise outside [0, 1] and for budgets that cannot work.
    """

    # Learning rate 1e-6 (Appendix F), clipping 0.2, one update a batch and gradient clipping at 1.0 (released code)
    # are TRL's defaults already, and so is sampling at temperature 1.0 from the whole distribution (top_p 1.0): the
    # released code sampled with top_p 0.95 and trained on log-probabilities of the whole.
    beta: float = field(
        default=0.001, metadata={"help": "Weight of the KL to the reference model (released code; k3 estimate)."}
    )
    # 64 questions x 5 trajectories a step (Table 8), on one device: 20 x 16 = 320.
    per_device_train_batch_size: int = field(default=20, metadata={"help": "Trajectories a micro-batch and device."})
    gradient_accumulation_steps: int = field(default=16, metadata={"help": "Micro-batches a step."})
    num_generations: int | None = field(
        default=5, metadata={"help": "Trajectories a prompt (Table 8: 64 x 5 a step)."}
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

    algorithm: Algorithm = field(
        default="reinforce", metadata={"help": "reinforce (the paper's default, Table 5) or grpo."}
    )
    mask_observations: bool = field(
        default=True, metadata={"help": "Learn from the policy's tokens only; false is the ablation of Table 7."}
    )
    noise_start: float = field(default=0.0, metadata={"help": "p_s of Eq. 1: noise at the first step (Appendix F)."})
    # Appendix F has a value for each policy (0.25 for Qwen-3B, 0.75 for Qwen-7B); this is the released README's.
    noise_end: float = field(default=0.5, metadata={"help": "p_e of Eq. 1: noise at the last step."})
    noise_base: float = field(default=4.0, metadata={"help": "b of Eq. 1 (Section 3.4); 1 is a straight line."})
    max_turns: int = field(
        default=RolloutSettings.max_turns,
        metadata={"help": "Turns that may search; one last turn that may only answer follows."},
    )
    max_turn_tokens: int = field(default=RolloutSettings.max_turn_tokens, metadata={"help": "Longest turn."})
    max_observation_tokens: int = field(
        default=RolloutSettings.max_observation_tokens, metadata={"help": "Longest observation, tags included."}
    )
    max_trajectory_tokens: int = field(
        default=RolloutSettings.max_trajectory_tokens, metadata={"help": "Longest trajectory, prompt included."}
    )
    max_failed_search_share: float = field(
        default=0.1, metadata={"help": "Stop when more of a step's trajectories lost a search (our choice)."}
    )
    logged_trajectories: int = field(
        default=4, metadata={"help": "Trajectories of each step that go to <output_dir>/trajectories.jsonl."}
    )

    def __post_init__(self) -> None:
        fit_to_cpu(self)
        if not torch.accelerator.is_available():
            self.vllm_enable_sleep_mode = False  # there is no device memory to hand back
        if self.max_completion_length is None:
            self.max_completion_length = self.max_trajectory_tokens
        if self.vllm_max_model_length is None:
            self.vllm_max_model_length = self.max_trajectory_tokens
        super().__post_init__()
        if self.use_vllm:
            self._check_vllm()
        elif not self.ds3_gather_for_generation:
            # Each forward pass would be a collective, and ranks make as many as their own trajectories need.
            raise UserError("ds3_gather_for_generation false is not there yet; leave it true, or use vLLM")
        if self.algorithm not in ("reinforce", "grpo"):
            raise UserError(f"algorithm is {self.algorithm!r}: it must be reinforce or grpo")
        if not 0.0 <= self.max_failed_search_share <= 1.0:
            raise UserError(f"max_failed_search_share is {self.max_failed_search_share}: a share lies in [0, 1]")
        self.noise_schedule()  # each raises UserError for values that cannot work
        self.rollout_settings()

    def _check_vllm(self) -> None:
        if find_spec("vllm") is None:
            raise UserError("vLLM is not installed; install it (see the README), or pass --use_vllm false")
        if self.vllm_mode != "colocate":
            raise UserError(f"vllm_mode is {self.vllm_mode!r}: only colocate is there yet")
        if self.vllm_tensor_parallel_size != 1:
            raise UserError(f"vllm_tensor_parallel_size is {self.vllm_tensor_parallel_size}: only 1 is there yet")

    def noise_schedule(self) -> NoiseSchedule:
        """Return the curriculum of Eq. 1."""
        return NoiseSchedule(self.noise_start, self.noise_end, self.noise_base)

    def rollout_settings(self) -> RolloutSettings:
        """Return the budgets and the sampling of a rollout."""
        return RolloutSettings(
            max_turns=self.max_turns,
            max_turn_tokens=self.max_turn_tokens,
            max_observation_tokens=self.max_observation_tokens,
            max_trajectory_tokens=self.max_trajectory_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )
