"""`SearchTrainer`: TRL's GRPOTrainer with search rollouts, keyed noise and the paper's algorithms.

Built on TRL 1.16's `rollout_func` and `env_mask`. What it overrides or reads beyond TRL's public interface is all in
this file and `zerosearch.generation`, and tests of their names hold it:

1. `_generate_and_score_completions` sees the dataset rows, which `rollout_func` is not given, and returns the batch,
   whose advantages are replaced;
2. `_calculate_rewards` returns the rewards of all ranks, from which the advantages are made;
3. `_prepare_inputs` and `_get_per_token_logps_and_entropies` leave out work that changes no result: padding, and the
   head of the model at tokens that are not learned from;
4. `_compute_loss` is TRL's, told which tokens those are, with PPO's KL kept out of it (it is in the reward);
5. `_save_checkpoint` and `_load_optimizer_and_scheduler` take the critic along;
6. `_metrics` and `_logs` take what TRL logs, `_step` and `_buffered_inputs` say where in an optimizer step we are.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from zerosearch.checkpoints import forget_later_steps
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.errors import UserError
from zerosearch.files import read_json, write_json
from zerosearch.generation import GenerationError, Generator, RemoteGenerator
from zerosearch.generation.adapter_weights import push_merged_copies
from zerosearch.generation.loading import longest_context
from zerosearch.generation.tokenization import decoded_text
from zerosearch.generation.transformers_engine import TransformersGenerator
from zerosearch.generation.vllm_colocated import VLLMGenerator
from zerosearch.generation.vllm_server import VLLMServerGenerator, policy_server_client, server_url, wait_for_weights
from zerosearch.generation.vllm_tensor_parallel import Ranks, TensorParallelGenerator
from zerosearch.generation.vllm_workarounds import colocated_engine_options, let_quantized_policy_learn
from zerosearch.prompts import PAPER, Agent
from zerosearch.rollout.loop import RolloutClock, Trajectory, run_rollouts
from zerosearch.rollout.statistics import TrajectoryFacts, rollout_metrics
from zerosearch.training.advantages import (
    AdvantageFunction,
    group_normalized,
    leave_one_out,
    masked_gae,
    per_token,
    raw_return,
    token_rewards,
    whiten,
)
from zerosearch.training.config import SearchConfig, check_arguments
from zerosearch.training.critic import Critic, policy_mask
from zerosearch.training.micro_batches import compact_lm_head, sort_micro_batches, trimmed_parts

__all__ = ["NoiseFunction", "SearchConfig", "SearchTrainer"]

# From the step, counted from 1, the number of steps, and what was logged so far (TRL's `log_history`) to p_noise.
NoiseFunction = Callable[[int, int, Sequence[Mapping[str, Any]]], float]


@dataclass
class Handed:
    """What one of TRL's calls hands to a later one of the same batch, as TRL has no argument for it."""

    rows: Sequence[dict[str, Any]] = ()  # from `_generate_and_score_completions` to `rollout_func`
    rewards: torch.Tensor | None = None  # (N, reward functions), from `_calculate_rewards` back to it
    scored: torch.Tensor | None = None  # (B, C), the tokens to score: to `_get_per_token_logps_and_entropies`


class SearchTrainer(GRPOTrainer):
    """Train a policy to search: rollouts against a search engine, rewards on the answer, loss on the policy's tokens.

    Takes GRPOTrainer's arguments and
    - `engine`, which answers the searches;
    - `agent`, how the policy is asked and documents are shown to it;
    - `advantages`, in place of those of `args.algorithm` (not for ppo): see `training.advantages`;
    - `noise`, in place of Eq. 1 from `args.noise_start` to `args.noise_end`.
    Rows of the dataset are `{id, question, golden_answers, dataset}`; one with a `prompt` of its own is asked that.
    Reward functions get `answer`, `outcome` and `trajectories` beside TRL's arguments.
    Raises `SearchError` when too many searches of a step fail, `GenerationError` when the inference engine of the
    policy does. After either, and after any other exception of a rollout, the last state is saved first.
    """

    _tag_names = ["trl", "zerosearch"]  # noqa: RUF012 (as in TRL)
    args: SearchConfig
    beta: float
    entropy_coef: Any
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(
        self,
        *,
        engine: SearchEngine,
        args: SearchConfig,
        agent: Agent = PAPER.policy,
        advantages: AdvantageFunction | None = None,
        noise: NoiseFunction | None = None,
        **kwargs: Any,
    ) -> None:
        self.engine, self.agent, self.advantages, self.noise = engine, agent, advantages, noise
        self._handed = Handed()
        if advantages is not None and args.algorithm == "ppo":
            raise UserError("ppo has the advantages of its critic; an advantage function needs another algorithm")
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = with_prompts(kwargs.get(name), agent)
        check_arguments(args, **kwargs)
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        with warnings.catch_warnings(), colocated_engine_options(dtype), policy_server_client():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(args=args, rollout_func=SearchTrainer._rollout, **kwargs)
        let_quantized_policy_learn(self.model)
        if args.use_vllm and is_peft_model(self.model):
            push_merged_copies(self.vllm_generation)
        self.generator = self._make_generator()
        self.critic: Critic | None = None
        if args.algorithm == "ppo":
            options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            self.critic = Critic(get_config_model_id(self.model.config), options, args, self.accelerator)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Take no step beyond the last when a finished run is resumed; the Trainer would take one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Return TRL's sampler with the order of an epoch made from seed and epoch alone.

        TRL's own order goes on from epoch to epoch, so a run resumed in a later one would ask the first one's again.
        """
        sampler = super()._get_train_sampler(dataset)
        if self.shuffle_dataset:
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
        return sampler

    def _make_generator(self) -> Generator | RemoteGenerator:
        limit, timeout_s = self.args.max_trajectory_tokens, self.args.turn_timeout_s
        if self.use_vllm and self.args.vllm_mode == "server":
            ready = partial(wait_for_weights, self.accelerator, self.vllm_generation)
            return VLLMServerGenerator(server_url(self.args), self._tokenizer, limit, timeout_s=timeout_s, ready=ready)
        if self.use_vllm and self.args.vllm_tensor_parallel_size > 1:
            ranks = Ranks(self.args.vllm_tensor_parallel_size, timeout_s)
            return TensorParallelGenerator(ranks, self.vllm_generation, self._tokenizer)
        if self.use_vllm:
            return VLLMGenerator(self.vllm_generation.llm, self._tokenizer, self.vllm_generation)
        longest = longest_context(self.model.config, limit)
        return TransformersGenerator(self._load_for_generation, self._tokenizer, self.eos_token_ids, longest)

    def _load_for_generation(self) -> AbstractContextManager[Any]:
        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Roll out and score this rank's rows; TRL's advantages give way to ours."""
        self._handed.rows = inputs
        batch = super()._generate_and_score_completions(inputs)
        assert self._handed.rewards is not None
        weighted = self._handed.rewards * self.reward_weights.to(self._handed.rewards.device)
        rewards = weighted.nansum(1).masked_fill(weighted.isnan().all(1), torch.nan)  # (N,)
        start = self.accelerator.process_index * len(inputs)
        own = slice(start, start + len(inputs))
        if self.critic is not None:
            batch |= self._ppo_advantages(batch, rewards[own], self.critic)
        elif self.advantages is not None:
            trajectories = [row["trajectories"] for row in inputs]
            custom = self._custom_advantages(self.advantages, rewards, trajectories, own).to(rewards)
            width = batch["completion_ids"].shape[1]
            batch["advantages"] = custom if custom.ndim == 1 else pad(custom, (0, width - custom.shape[1]))
        else:
            batch["advantages"] = self._algorithm_advantages(rewards)[own]
        mean = batch["advantages"]
        if mean.ndim == 2:
            mask = policy_mask(batch)
            mean = (mean * mask).sum(1) / mask.sum(1).clamp(min=1)
        # As many as the log holds: they replace TRL's, which the call above has just written there.
        self._logs["advantages"].extend(self.accelerator.gather(mean).tolist())
        return batch

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._handed.rewards = super()._calculate_rewards(*args, **kwargs)
        return self._handed.rewards

    @property
    def _group(self) -> int:
        """Return how many consecutive trajectories answer one question."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _custom_advantages(
        self, function: AdvantageFunction, rewards: torch.Tensor, trajectories: list[Trajectory], own: slice
    ) -> torch.Tensor:
        """Return what the user's function makes of all ranks' rewards (N,) for this rank, (n,) or (n, C)."""
        everyone = gather_object(trajectories)
        returned = function(rewards, everyone, self._group)
        if isinstance(returned, torch.Tensor) and returned.shape == rewards.shape:
            return returned[own].nan_to_num(nan=0.0)
        if len(returned) != len(everyone):
            raise UserError(
                f"the advantage function returned {len(returned)} rows, and there are {len(everyone)} trajectories"
            )
        return per_token(returned[own], trajectories).nan_to_num(nan=0.0)

    def _algorithm_advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """Return the advantages (N,) of the trajectories of all ranks from their rewards (N,)."""
        group = self._group
        if self.args.algorithm == "rloo":
            return leave_one_out(rewards, group)
        if self.args.algorithm == "grpo":
            return group_normalized(rewards, group, scale=self.args.scale_rewards)
        return raw_return(rewards, group, self.args.baseline)

    @torch.no_grad()
    def _ppo_advantages(self, batch: dict[str, Any], rewards: torch.Tensor, critic: Critic) -> dict[str, Any]:
        """Return PPO's advantages, values and returns (n, C) of this rank's trajectories, from their rewards (n,)."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        mask = policy_mask(batch)
        size = self.args.per_device_train_batch_size
        logps, ref_logps = batch.get("old_per_token_logps"), batch.get("ref_per_token_logps")
        if logps is None:
            logps, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, attention_mask, mask.shape[1], size)
        values = critic.values(ids, attention_mask, mask, size)
        paid = token_rewards(rewards, mask, logps, ref_logps, self.beta)
        advantages, returns = masked_gae(paid, values, mask, self.args.gae_gamma, self.args.gae_lambda)
        everyone = self._from_all_ranks(advantages[mask.bool()])
        logged = {"critic/value": values, "critic/squared_error": (returns - values).square()}
        if ref_logps is not None:
            logged["kl"] = logps - ref_logps  # k1, as in the reward
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, of_tokens in logged.items():
            metrics[name].append(self._from_all_ranks(of_tokens[mask.bool()]).mean().item())
        return {"advantages": whiten(advantages, mask, everyone), "values": values, "returns": returns}

    def _from_all_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values (n,) of this rank and those of all others, one after another, (M,)."""
        padded = self.accelerator.pad_across_processes(values, pad_index=torch.nan)
        gathered: torch.Tensor = self.accelerator.gather(padded)
        return gathered[~gathered.isnan()]

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
        """Compute as TRL does, at the tokens that are learned from alone, in parts trimmed to their own longest row.

        Takes ids and mask (B, P + C) and returns log-probabilities and entropies (B, C), 0 at every other token.
        """
        assert all(value is None for value in images.values()), "text only"
        prompt_length = input_ids.shape[1] - logits_to_keep
        # (B, C): the marks that `_rollout` or `_compute_loss` handed on for these rows, less what TRL took out since.
        assert self._handed.scored is not None
        scored = self._handed.scored
        scored = pad(scored, (0, logits_to_keep - scored.shape[1])).to(input_ids.device).bool()
        scored = scored & attention_mask[:, prompt_length:].bool()
        logps = torch.zeros(scored.shape, device=input_ids.device)
        entropies = torch.zeros_like(logps)
        aux_losses = []
        for part in trimmed_parts(attention_mask, scored, batch_size):
            columns = slice(part.start, part.end)
            ids, mask = input_ids[part.rows, columns], attention_mask[part.rows, columns]
            marks = pad(scored[part.rows], (prompt_length, 0))[:, columns]
            with self.accelerator.autocast(), compact_lm_head():
                outputs = model(
                    input_ids=ids,
                    attention_mask=mask,
                    labels=ids.masked_fill(~marks, -100),
                    fused_lm_head=True,
                    **({"output_router_logits": True} if compute_aux_loss else {}),
                )
            first = prompt_length - part.start - 1  # the first column says what it makes of the second
            widen = (0, logits_to_keep - outputs.log_probs[:, first:].shape[1])
            logps = logps.index_put((part.rows,), pad(outputs.log_probs[:, first:], widen))
            if compute_entropy:
                entropies = entropies.index_put((part.rows,), pad(outputs.entropy[:, first:], widen))
            aux_losses.append(outputs.aux_loss)
        aux_loss = torch.stack(aux_losses).mean() if compute_aux_loss else None
        return logps, entropies if compute_entropy else None, aux_loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute TRL's loss on the policy's tokens, with the entropy bonus averaged over those of the whole step."""
        self._handed.scored = mask = policy_mask(inputs)
        beta, coefficient = self.beta, self.entropy_coef
        if self.args.algorithm == "ppo":
            self.beta = 0.0
        weighted = self.model.training and self._entropy_bonus_enabled and not self.args.use_adaptive_entropy
        if weighted:  # TRL takes the mean of each micro-batch, whatever its share of the tokens
            parts = self.args.steps_per_generation
            mean = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes / parts
            self.entropy_coef = coefficient * mask.sum() / mean
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
            if weighted:
                self.entropy_coef = coefficient
                self._metrics["train"].pop("entropy_coef", None)  # the weighted one

    @staticmethod
    def _rollout(prompts: list[Any], trainer: SearchTrainer) -> dict[str, list[Any]]:
        """TRL `rollout_func` for this rank's rows: a trajectory each, and the fields that reward functions read."""
        rows, clock = trainer._handed.rows, RolloutClock()
        assert len(prompts) == len(rows)
        trajectories: list[Trajectory] = []
        failure: Exception | None = None
        try:
            trajectories = run_rollouts(
                rows,
                trainer.generator,
                trainer.engine,
                trainer.args.rollout_settings(),
                p_noise=trainer._p_noise(),
                keys=trainer._keys(rows),
                clock=clock,
                agent=trainer.agent,
            )
        except Exception as error:  # raised in `_log_rollout`, once every rank has saved its part of a checkpoint
            failure = error
        trainer._log_rollout(trajectories, clock, failure)
        trainer._write_trajectories(rows, trajectories)
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

    def _p_noise(self) -> float:
        """Return the noise of this step; an evaluation inside a training run is free of it."""
        step, total = self.state.global_step + 1, self.state.max_steps
        if not self.model.training:
            return 0.0
        if self.noise is None:
            return self.args.noise_schedule().p_noise(step, total)
        p_noise = float(self.noise(step, total, self.state.log_history))
        if not 0.0 <= p_noise <= 1.0:
            raise UserError(f"the noise function returned {p_noise} at step {step}: a probability lies in [0, 1]")
        return p_noise

    def _keys(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, ...]]:
        """Return (seed, step, row, sample) for each row of this rank, the same however many ranks share the batch."""
        group = self._group
        first = self.accelerator.process_index * len(rows)
        step = self.state.global_step + 1
        return [(self.args.seed, step, row_number(row), (first + place) % group) for place, row in enumerate(rows)]

    def _log_rollout(self, trajectories: list[Trajectory], clock: RolloutClock, failure: Exception | None) -> None:
        """Log the rollout over all ranks, count its queries, and stop the run if it or too many searches failed.

        `failure` is what ended this rank's rollout, `None` if nothing did.
        """
        own_facts = [TrajectoryFacts.of(trajectory) for trajectory in trajectories]
        account = getattr(self.engine, "account", None)
        sent = account.newly_sent() if account else sum(fact.searches + fact.retries for fact in own_facts)
        ranks = gather_object([(own_facts, clock, failure and f"{failure}", sent)])
        self._count_queries(sum(rank_sent for *_, rank_sent in ranks))
        failures = [rank_failure for _, _, rank_failure, _ in ranks if rank_failure is not None]
        if failures:
            self._save_progress()
            if failure is not None and not isinstance(failure, GenerationError):
                raise failure
            raise GenerationError(f"step {self.state.global_step + 1} could not be rolled out: {failures[0]}")
        facts = [fact for rank_facts, *_ in ranks for fact in rank_facts]
        metrics = rollout_metrics(facts, [rank_clock for _, rank_clock, *_ in ranks])
        metrics["search/p_noise"] = self._p_noise()
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        failed = metrics["search/failed_search"]
        if failed > self.args.max_failed_search_share:
            self._stop(failed, next(fact.error for fact in facts if fact.error))

    def _count_queries(self, sent: int) -> None:
        """Add what all ranks sent, retries included, to `engine_queries.json`: what was really asked of whom."""
        if not self.accelerator.is_main_process:
            return
        path = Path(self.args.output_dir) / "engine_queries.json"
        queries = read_json(path) if path.exists() else {}
        write_json(path, {**queries, self.engine.name: queries.get(self.engine.name, 0) + sent})

    def _stop(self, failed_share: float, error: str) -> None:
        """Save what was learned so far, and raise `SearchError`."""
        self._save_progress()
        raise SearchError(
            f"{failed_share:.0%} of the trajectories of step {self.state.global_step + 1} lost a search, more than "
            f"max_failed_search_share ({self.args.max_failed_search_share:.0%}) allows: {error}"
        )

    def _save_progress(self) -> None:
        if self.state.global_step:
            self._save_checkpoint(self.model, trial=None)

    def _write_trajectories(self, rows: Sequence[Mapping[str, Any]], trajectories: list[Trajectory]) -> None:
        """Append a few trajectories, spread over the rows of the first rank, to `trajectories.jsonl`."""
        wanted = min(self.args.logged_trajectories, len(rows))
        if not self.accelerator.is_main_process or not self.model.training or wanted < 1:
            return
        step = self.state.global_step + 1
        with (Path(self.args.output_dir) / "trajectories.jsonl").open("a", encoding="utf-8") as file:
            for place in range(0, len(rows), len(rows) // wanted)[:wanted]:
                prompt = decoded_text(self._tokenizer, trajectories[place].prompt_ids)
                record = trajectories[place].to_record(rows[place], prompt, step)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the critic first: a checkpoint is whole once TRL has written its trainer_state.json."""
        if self.critic is not None and not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            self.critic.save(folder / "critic")
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.critic is not None:
            self.critic.load(Path(checkpoint) / "critic")
        if self.accelerator.is_main_process:
            forget_later_steps(Path(self.args.output_dir) / "trajectories.jsonl", self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's step time under the name of the other times, too."""
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
    return dataset.map(lambda row: {"prompt": agent.messages(row["question"])}, desc="prompts")


def row_number(row: Mapping[str, Any]) -> int:
    """Return a number for a dataset row that its names alone decide, wherever it stands in the dataset."""
    name = f"{row.get('dataset')}/{row['id']}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")
