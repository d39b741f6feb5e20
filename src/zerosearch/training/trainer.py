"""`SearchTrainer`: TRL's GRPOTrainer with search rollouts, keyed noise and the paper's algorithms.

It uses TRL 1.16's `rollout_func` and `env_mask`. Beyond TRL's public interface it overrides or reads the following;
read them again when the pin of TRL moves:

1. `_generate_and_score_completions` sees the dataset rows, which `rollout_func` is not given, and returns the batch,
   whose advantages are replaced;
2. `_calculate_rewards` returns the rewards of all ranks, from which the advantages are made;
3. `_prepare_inputs`, `_get_per_token_logps_and_entropies` and `vllm_importance_sampling_correction`, false during a
   rollout, skip work that changes no result: see `micro_batches` and `sampler_gap`;
4. `_compute_loss` is TRL's on the policy's tokens, without the KL for PPO, whose reward holds it;
5. `_save_checkpoint` and `_load_optimizer_and_scheduler` save and load the critic and what was sampled ahead, too;
6. `_metrics`, `_logs` and `_log_completion_extra` are what TRL logs and shows, `_step` and `_buffered_inputs` the
   place within an optimizer step, `_last_loaded_step` that of the weights in vLLM, `_current_train_step_time` what the
   step took so far.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from zerosearch.checkpoints import FinishedRuns, whole_checkpoints
from zerosearch.data import row_number
from zerosearch.engines import SearchEngine
from zerosearch.errors import UserError
from zerosearch.generation.vllm_server import policy_server_client
from zerosearch.generation.vllm_workarounds import colocated_engine_options, let_quantized_policy_learn
from zerosearch.prompts import PAPER, Agent
from zerosearch.rollout.trajectory import Trajectory
from zerosearch.training.advantages import (
    AdvantageFunction,
    custom_advantages,
    group_normalized,
    leave_one_out,
    raw_return,
)
from zerosearch.training.config import SearchConfig, check_arguments
from zerosearch.training.critic import Critic
from zerosearch.training.generators import engine_adapters, policy_generator
from zerosearch.training.likelihoods import log_likelihoods
from zerosearch.training.micro_batches import compact_lm_head, policy_mask, scored_logps, sort_micro_batches, whole
from zerosearch.training.overlap import Rollouts
from zerosearch.training.policy_card import describe_policy
from zerosearch.training.runs import forget_later_steps, log_rollout
from zerosearch.training.sampler_gap import SamplerGap
from zerosearch.training.sentinel import CollapseSentinel

# From the step, counted from 1, the number of steps, and what was logged so far (TRL's `log_history`) to p_noise.
NoiseFunction = Callable[[int, int, Sequence[Mapping[str, Any]]], float]


@dataclass
class Handed:
    """What one of TRL's calls passes to a later one of the same batch, where TRL has no argument for it."""

    rows: Sequence[dict[str, Any]] = ()  # from `_generate_and_score_completions` to `rollout_func`
    rewards: torch.Tensor | None = None  # (N, reward functions), from `_calculate_rewards` back to it
    scored: torch.Tensor | None = None  # (B, C), the tokens to score: to `_get_per_token_logps_and_entropies`
    to_correct: dict[str, Any] | None = None  # the batch of `_compute_loss` that this gives its importance ratio


class SearchTrainer(FinishedRuns, GRPOTrainer):
    """Train a policy to search: rollouts against a search engine, rewards on the answer, loss on the policy's tokens.

    Takes GRPOTrainer's arguments and
    - `engine`, which answers the searches;
    - `agent`, how the policy is asked and documents are shown to it;
    - `advantages`, in place of those of `args.algorithm` (not for ppo): see `training.advantages`;
    - `noise`, in place of Eq. 1 from `args.noise_start` to `args.noise_end`;
    - `eval_engine`, which answers the searches of evaluations, by default `engine`.
    Rows of the dataset are `{id, question, golden_answers, dataset}`; one with a `prompt` of its own is asked that.
    Reward functions get `answer`, `outcome` and `trajectories` beside TRL's arguments.
    An evaluation (`eval_dataset`, `args.eval_strategy`) is greedy and free of noise, and logs the means of `METRICS`
    over all its questions as `eval_em`, `eval_f1` and `eval_cover_em`.
    Raises `SearchError` when too many searches of a step fail, `GenerationError` when the inference engine of the
    policy does. Before these and any other exception of a rollout, a checkpoint is saved.

    >>> batch = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    >>> config = SearchConfig("policy", **batch, max_steps=1, max_turn_tokens=40, report_to="none", disable_tqdm=True)
    >>> trainer = SearchTrainer(
    ...     model="data/tinyworld/policy",
    ...     args=config,
    ...     train_dataset=load_questions("questions.jsonl"),
    ...     engine=BM25Engine("corpus.jsonl"),
    ...     agent=PROMPT_SETS["tinyworld"].policy,
    ...     reward_funcs=f1_reward,
    ... )
    >>> trainer.train().global_step
    {...}
    1
    """

    _tag_names = ["trl", "zerosearch"]  # noqa: RUF012 (as in TRL)
    args: SearchConfig
    beta: float
    entropy_coef: Any
    vllm_importance_sampling_correction: bool
    optimizer: Any
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(
        self,
        *,
        engine: SearchEngine,
        args: SearchConfig,
        agent: Agent = PAPER.policy,
        advantages: AdvantageFunction | None = None,
        noise: NoiseFunction | None = None,
        eval_engine: SearchEngine | None = None,
        **kwargs: Any,
    ) -> None:
        schedule = args.noise_schedule()
        self.engine, self.eval_engine = engine, eval_engine or engine
        self.agent, self.advantages = agent, advantages
        self.noise = noise or (lambda step, total_steps, history: schedule.p_noise(step, total_steps))
        self._handed = Handed()
        if advantages is not None and args.algorithm == "ppo":
            raise UserError("ppo has the advantages of its critic; an advantage function needs another algorithm")
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = with_prompts(kwargs.get(name), agent)
        check_arguments(args, **kwargs)
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        lora = engine_adapters(args, [self.engine, self.eval_engine], **kwargs)
        with warnings.catch_warnings(), colocated_engine_options(dtype, lora), policy_server_client():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(args=args, rollout_func=SearchTrainer._rollout, **kwargs)
        self.add_callback(CollapseSentinel(args.on_collapse))
        if args.on_collapse == "rollback" and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise UserError("on_collapse rollback works unsharded; with stop, resume from the checkpoint it names")
        let_quantized_policy_learn(self.model)
        self.generator, self.rollouts = policy_generator(self), Rollouts(self)
        self.sampler_gap = SamplerGap(args, self.accelerator)
        self.critic: Critic | None = None
        if args.algorithm == "ppo":
            options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            self.critic = Critic(get_config_model_id(self.model.config), options, args, self.accelerator)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does, and begin nothing further of a rollout ahead when the run is left early."""
        self.rollouts.forget()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.rollouts.abandon()

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Return TRL's sampler with the order of an epoch made from seed and epoch alone.

        TRL draws the orders of all epochs from one generator, so a resumed run would start with the first one's again.
        """
        sampler = super()._get_train_sampler(dataset)
        if self.shuffle_dataset:
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
        return sampler

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Roll out and score this rank's rows, and replace TRL's advantages by ours; an evaluation needs none."""
        self.rollouts.settle()  # before TRL pushes the weights
        self._handed.rows = inputs
        columns = [name for name in inputs[0] if name != "prompt"]  # before the rollout adds its own
        corrects = self.vllm_importance_sampling_correction
        self.vllm_importance_sampling_correction = corrects and not self._corrects_in_loss()
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self.vllm_importance_sampling_correction = corrects
        if not self.model.training:
            return batch
        assert self._handed.rewards is not None
        weighted = self._handed.rewards * self.reward_weights.to(self._handed.rewards.device)
        rewards = weighted.nansum(1).masked_fill(weighted.isnan().all(1), torch.nan)  # (N,)
        start = self.accelerator.process_index * len(inputs)
        own = slice(start, start + len(inputs))
        if self.critic is not None:
            batch |= self._ppo_advantages(batch, rewards[own], self.critic)
        elif self.advantages is not None:
            everyone = gather_object([[row["trajectories"], *(row[name] for name in columns)] for row in inputs])
            trajectories, *values = map(list, zip(*everyone, strict=True))
            by_name = dict(zip(columns, values, strict=True)) | {"log_likelihoods": partial(log_likelihoods, self)}
            group = self.num_generations
            custom = custom_advantages(self.advantages, rewards, trajectories, group, own, **by_name)
            width = batch["completion_ids"].shape[1]
            batch["advantages"] = custom if custom.ndim == 1 else pad(custom, (0, width - custom.shape[1]))
        else:
            batch["advantages"] = self._algorithm_advantages(rewards)[own]
        mean = batch["advantages"]
        if mean.ndim == 2:
            mask = policy_mask(batch)
            mean = (mean * mask).sum(1) / mask.sum(1).clamp(min=1)
        # The log keeps as many as a step has: these replace TRL's, which the call above has just written there.
        self._logs["advantages"].extend(self.accelerator.gather(mean).tolist())
        return batch

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._handed.rewards = super()._calculate_rewards(*args, **kwargs)
        return self._handed.rewards

    @property
    def current_engine(self) -> SearchEngine:
        """Return the engine that answers now: in an evaluation it may be another."""
        return self.engine if self.model.training else self.eval_engine

    def _algorithm_advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """Return the advantages (N,) of the trajectories of all ranks from their rewards (N,)."""
        if self.args.algorithm == "rloo":
            return leave_one_out(rewards, self.num_generations)
        if self.args.algorithm == "grpo":
            return group_normalized(rewards, self.num_generations, scale=self.args.scale_rewards)
        return raw_return(rewards, self.num_generations, self.args.baseline)

    @torch.no_grad()
    def _ppo_advantages(self, batch: dict[str, Any], rewards: torch.Tensor, critic: Critic) -> dict[str, torch.Tensor]:
        """Return PPO's advantages, values and returns (n, C) of this rank's trajectories, from their rewards (n,)."""
        logps = batch.get("old_per_token_logps")
        if logps is None:
            width, size = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
            logps, _, _ = self._get_per_token_logps_and_entropies(self.model, *whole(batch), width, size)
        found, logged = critic.advantages(batch, rewards, logps)
        for name, value in logged.items():
            self._metrics["train"][name].append(value)
        return found

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Return the next micro-batch; those of one optimizer step hold rows of like length, for less padding.

        The critic learns here, from a batch just rolled out, step by step as the policy will, before the policy does:
        so their activations are never held together.
        """
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        fresh = self._buffered_inputs
        if fresh is buffered or fresh is None:
            return inputs
        size = min(self.args.gradient_accumulation_steps, len(fresh))
        windows = [fresh[start : start + size] for start in range(0, len(fresh), size)]
        if self._sorts_rows():
            windows = [sort_micro_batches(window) for window in windows]
            self._buffered_inputs = fresh = [batch for window in windows for batch in window]
        if self.critic is not None:
            for window in windows * self.num_iterations:
                tokens = window[0]["num_items_in_batch"] / self.accelerator.num_processes
                loss = self.critic.learn(window, tokens * len(window) / len(fresh))
                self._metrics["train"]["critic/loss"].append(loss)
        return fresh[self._step % len(fresh)]

    def _sorts_rows(self) -> bool:
        """Say whether rows may change places within an optimizer step: not where a micro-batch has its own mean."""
        args = self.args
        longer = max(args.steps_per_generation, args.gradient_accumulation_steps)
        shorter = min(args.steps_per_generation, args.gradient_accumulation_steps)
        return longer % shorter == 0 and args.loss_type != "bnpo" and args.top_entropy_quantile == 1.0

    def _corrects_in_loss(self) -> bool:
        """Say whether the weights at the loss are those at the rollout; PPO asks for log-probabilities before it."""
        args = self.args
        one_update = args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations) == 0
        return one_update and args.use_vllm and args.algorithm != "ppo"

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Compute as TRL does, for the tokens that are learned from; ids and mask (B, P + C), results (B, C)."""
        assert all(value is None for value in images.values()), "text only"
        assert self._handed.scored is not None
        # The marks that `_rollout` or `_compute_loss` handed on for these rows, less what TRL took out since.
        scored = pad(self._handed.scored, (0, logits_to_keep - self._handed.scored.shape[1]))
        scored = scored.to(input_ids.device).bool() & attention_mask[:, -logits_to_keep:].bool()
        with self.accelerator.autocast(), compact_lm_head():
            found = scored_logps(
                model, input_ids, attention_mask, scored, batch_size, compute_entropy, compute_aux_loss
            )
        if (inputs := self._handed.to_correct) is not None:
            sampled = inputs["sampling_per_token_logps"]
            inputs["importance_sampling_ratio"] = self.sampler_gap.ratio(found[0], sampled, scored)
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute TRL's loss on the policy's tokens, with the entropy bonus averaged over those of the whole step."""
        self._handed.scored = mask = policy_mask(inputs)
        corrects = self.vllm_importance_sampling_correction and self._corrects_in_loss()
        self._handed.to_correct = inputs if corrects else None
        beta, coefficient = self.beta, self.entropy_coef
        if self.args.algorithm == "ppo":
            self.beta = 0.0
        weighted = self.model.training and self._entropy_bonus_enabled and not self.args.use_adaptive_entropy
        if weighted:  # TRL takes the mean of each micro-batch, whatever its share of the tokens
            parts = self.args.steps_per_generation
            mean = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes / parts
            self.entropy_coef = coefficient * mask.sum() / mean
        try:
            loss = super()._compute_loss(model, inputs)
            if corrects and self.accelerator.sync_gradients:
                self.sampler_gap.log(self._metrics["train" if self.model.training else "eval"])
            return loss
        finally:
            self.beta, self._handed.to_correct = beta, None
            if weighted:
                self.entropy_coef = coefficient
                self._metrics["train"].pop("entropy_coef", None)  # the weighted one

    @staticmethod
    def _rollout(prompts: list[Any], trainer: SearchTrainer) -> dict[str, list[Any]]:
        """TRL `rollout_func` for this rank's rows: a trajectory each, and the fields that reward functions read."""
        rows = trainer._handed.rows
        assert len(prompts) == len(rows)
        rollout = trainer.rollouts.of_step(rows)
        log_rollout(trainer, rows, rollout)
        if trainer.model.training:
            trainer.rollouts.begin_next()
        trajectories = rollout.trajectories
        masks = [trainer._loss_mask(trajectory) for trajectory in trajectories]
        trainer._handed.scored = pad_sequence([torch.tensor(mask) for mask in masks], batch_first=True)
        return {
            "prompt_ids": [trajectory.prompt_ids for trajectory in trajectories],
            "completion_ids": [trajectory.completion_ids for trajectory in trajectories],
            "logprobs": [trainer._sampling_logprobs(trajectory) for trajectory in trajectories],
            "env_mask": masks,
            "answer": [trajectory.answer for trajectory in trajectories],
            "outcome": [trajectory.outcome for trajectory in trajectories],
            "trajectories": trajectories,
        }

    def _loss_mask(self, trajectory: Trajectory) -> list[int]:
        if trajectory.outcome == "failed_search":
            return [0] * len(trajectory.env_mask)
        return trajectory.env_mask if self.args.mask_observations else [1] * len(trajectory.env_mask)

    def _sampling_logprobs(self, trajectory: Trajectory) -> list[float | None]:
        """Return 0.0 for ids that nobody sampled; where they are trained on, None: no importance correction."""
        if self.args.mask_observations:
            return list(trajectory.logprobs)
        return [p if own else None for p, own in zip(trajectory.logprobs, trajectory.env_mask, strict=True)]

    def _p_noise(self, ahead: int = 0) -> float:
        """Return the noise of this step, or of one ahead; an evaluation inside a training run is free of it."""
        if not self.model.training:
            return 0.0
        step = self.state.global_step + 1 + ahead
        p_noise = float(self.noise(step, self.state.max_steps, self.state.log_history))
        if not 0.0 <= p_noise <= 1.0:
            raise UserError(f"the noise function returned {p_noise} at step {step}: a probability lies in [0, 1]")
        return p_noise

    def _keys(self, rows: Sequence[Mapping[str, Any]], ahead: int = 0) -> list[tuple[int, ...]]:
        """Return (seed, step, row, sample) for each row of this rank, the same however many ranks share the batch."""
        group = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(rows)
        step = self.state.global_step + 1 + ahead
        return [(self.args.seed, step, row_number(row), (first + place) % group) for place, row in enumerate(rows)]

    def save_progress(self) -> None:
        """Save a checkpoint, unless nothing has been learned yet."""
        if self.state.global_step:
            self._save_checkpoint(self.model, trial=None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save what is ours first: a checkpoint is whole once TRL has written its trainer_state.json."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.critic is not None and not self.args.save_only_model:
            self.critic.save(folder / "critic")
        if self.args.overlap_steps and not self.args.save_only_model:
            self.rollouts.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # At the learning rate that is asked for now, which the checkpoint's would hide.
        bases = getattr(self.lr_scheduler, "base_lrs", [])  # DeepSpeed's own scheduler has none
        for place, base in enumerate(bases):
            group = self.optimizer.param_groups[place]
            group["lr"] *= self.args.learning_rate / base if base else 1.0
            bases[place], self.lr_scheduler._last_lr[place] = self.args.learning_rate, group["lr"]
        if self.critic is not None:
            self.critic.load(Path(checkpoint) / "critic")
        self.rollouts.load(Path(checkpoint))
        if self.accelerator.is_main_process:
            forget_later_steps(Path(self.args.output_dir), self.state.global_step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md of the output folder, at each checkpoint and before a push."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            describe_policy(self)

    def begin_again(self, checkpoint: Path) -> None:
        """Forget what came after a checkpoint of this run, so that `train` can go on from it in the same process."""
        later = whole_checkpoints(checkpoint.parent).keys() - range(int(checkpoint.name.split("-")[1]) + 1)
        if self.accelerator.is_main_process:
            for step in later:
                shutil.rmtree(checkpoint.with_name(f"checkpoint-{step}"))
        self.accelerator.wait_for_everyone()
        self.optimizer = self._buffered_inputs = None
        self._step, self._last_loaded_step, self._current_train_step_time = 0, -1, 0.0
        self._metrics["train"].clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's step time beside the other times, too."""
        metrics = self._metrics["train"]
        if "step_time" in metrics:
            metrics["time/step_s"] = list(metrics["step_time"])
        super().log(logs, start_time)


def with_prompts(dataset: Any, agent: Agent) -> Any:
    """Return a dataset, or a dictionary of them, whose rows have the agent's prompts; TRL asks for the column."""
    if isinstance(dataset, dict):
        return {name: with_prompts(one, agent) for name, one in dataset.items()}
    if dataset is None or "prompt" in (dataset.column_names or []):
        return dataset
    return dataset.map(lambda row: {"prompt": agent.messages(row["question"])})
