"""`SearchTrainer`: TRL's GRPOTrainer with search rollouts, keyed noise and the paper's algorithms.

Built on TRL's `rollout_func` and `env_mask`, against TRL 1.16. Four methods of GRPOTrainer that are no public interface are
overridden, all in this file and held by tests/test_trainer.py:

1. `_generate_and_score_completions` sees the dataset rows, which `rollout_func` is not given, and returns the batch, in
   which the advantages are replaced;
2. `_calculate_rewards` returns the rewards of all ranks, which the advantages are made from;
3. `_metrics` takes what TRL logs;
4. the vLLM engine is created with two options that TRL has no field for (`vllm_engine_options`).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from zerosearch.advantages import group_normalized, raw_return
from zerosearch.curriculum import NoiseSchedule
from zerosearch.decoding import TransformersGenerator
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.errors import UserError
from zerosearch.generation import Generator, VLLMGenerator
from zerosearch.rollout import OUTCOMES, RolloutClock, RolloutSettings, Trajectory, run_rollouts

Algorithm = Literal["reinforce", "grpo"]


@dataclass
class SearchConfig(GRPOConfig):
    """GRPOConfig with the paper's values as defaults, and what search adds.

    Fields of GRPOConfig come first, where our default differs; "our choice" marks what the paper does not say.
    Raises `UserError` for a noise outside [0, 1] and for budgets that cannot work.
    """

    # Appendix F: KL coefficient 0.001, learning rate 1e-6, 64 prompts of 5 rollouts each a step.
    beta: float = field(default=0.001, metadata={"help": "Weight of the KL to the reference model (Appendix F)."})
    num_generations: int | None = field(default=5, metadata={"help": "Trajectories a prompt (Appendix F)."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "The paper's scheduler; without `warmup_steps` it is constant (our choice)."},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "As in the released code."})
    # The plain k3 estimate of the released code, as a penalty; TRL would weight it by the importance ratio.
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Weight the KL by the importance ratio."})
    # TRL's default sums log-ratios over a whole trajectory and then drops it, nearly every long one.
    vllm_importance_sampling_mode: str = field(
        default="token_truncate", metadata={"help": "Correction for vLLM's log-probabilities, token by token."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Leave it empty: `max_trajectory_tokens` is the limit."}
    )

    algorithm: Algorithm = field(
        default="reinforce", metadata={"help": "reinforce (the paper's default, Section 4) or grpo."}
    )
    mask_observations: bool = field(
        default=True, metadata={"help": "Learn from policy tokens only (Section 3.4); False is Table 7's ablation."}
    )
    noise_start: float = field(
        default=0.0, metadata={"help": "Probability of noisy documents at the start (p_s of Eq. 1)."}
    )
    noise_end: float = field(
        default=0.5, metadata={"help": "Probability of noisy documents at the end (p_e of Eq. 1)."}
    )
    noise_base: float = field(default=4.0, metadata={"help": "Exponential base b of Eq. 1."})
    max_turns: int = field(
        default=RolloutSettings.max_turns,
        metadata={"help": "Turns that may search; one that may only answer follows."},
    )
    max_turn_tokens: int = field(
        default=RolloutSettings.max_turn_tokens, metadata={"help": "Longest turn, in tokens."}
    )
    max_observation_tokens: int = field(
        default=RolloutSettings.max_observation_tokens, metadata={"help": "Longest observation, in tokens."}
    )
    max_trajectory_tokens: int = field(
        default=RolloutSettings.max_trajectory_tokens,
        metadata={"help": "Longest trajectory with its prompt, in tokens."},
    )
    max_failed_search_share: float = field(
        default=0.1,
        metadata={
            "help": "Stop the run when more than this share of a step's trajectories lost a search (our choice)."
        },
    )
    logged_trajectories: int = field(
        default=4, metadata={"help": "Trajectories a step written to <output_dir>/trajectories.jsonl."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self._fit_to_cpu()
        if self.max_completion_length is None:
            self.max_completion_length = self.max_trajectory_tokens
        if self.vllm_max_model_length is None:
            self.vllm_max_model_length = self.max_trajectory_tokens
        super().__post_init__()
        if self.algorithm not in ("reinforce", "grpo"):
            raise UserError(f"algorithm is {self.algorithm!r}: it must be reinforce or grpo")
        if not 0.0 <= self.max_failed_search_share <= 1.0:
            raise UserError(f"max_failed_search_share is {self.max_failed_search_share}: a share lies in [0, 1]")
        self.noise_schedule()
        self.rollout_settings()

    def _fit_to_cpu(self) -> None:
        """Set what a machine without an accelerator needs, so that no user has to know it."""
        self.bf16 = False
        self.vllm_enable_sleep_mode = False  # there is no device memory to hand back
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's default takes half the machine
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
            self.ddp_backend = "gloo"  # without it accelerate sees one process; with use_cpu it drops DeepSpeed
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        else:
            self.use_cpu = True

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


class SearchTrainer(GRPOTrainer):
    """Train a policy to search: rollouts against a search engine, rewards on the answer, loss on the policy's tokens.

    Takes GRPOTrainer's arguments and the engine. Rows of the dataset are `{id, prompt, question, golden_answers,
    dataset}`. Raises `SearchError` when too many searches of a step fail; the last state is saved first.
    """

    _tag_names = ["trl", "zerosearch"]  # noqa: RUF012 (as in TRL)
    args: SearchConfig

    def __init__(self, *, engine: SearchEngine, args: SearchConfig, **kwargs: Any) -> None:
        self.engine = engine
        with warnings.catch_warnings(), vllm_engine_options(args):
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(args=args, rollout_func=SearchTrainer._rollout, **kwargs)
        self.generator = self._make_generator()

    def _make_generator(self) -> Generator:
        limit = self.args.max_trajectory_tokens
        if self.use_vllm:
            return VLLMGenerator.of_trainer(self.vllm_generation, self._tokenizer)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return TransformersGenerator(
            self._load_for_generation, self._tokenizer, self.eos_token_ids, min(limit, positions or limit)
        )

    def _load_for_generation(self) -> AbstractContextManager[Any]:
        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Roll out and score this rank's rows; TRL's advantages give way to those of `args.algorithm`."""
        self._rows = inputs
        batch = super()._generate_and_score_completions(inputs)
        advantages = self._advantages()
        # As many as the log holds: they replace TRL's, which the call above has just written there.
        self._logs["advantages"].extend(advantages.tolist())
        start = self.accelerator.process_index * len(inputs)
        batch["advantages"] = advantages[start : start + len(inputs)]
        return batch

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._rewards_per_function = super()._calculate_rewards(*args, **kwargs)  # (N, reward functions), of all ranks
        return self._rewards_per_function

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Return the next micro-batch; those of one optimizer step hold rows of like length, for less padding."""
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        micro_batches = self._buffered_inputs
        window = self.args.gradient_accumulation_steps
        if micro_batches is buffered or micro_batches is None or self.args.steps_per_generation != window:
            return inputs
        self._buffered_inputs = sort_micro_batches(micro_batches)
        return self._buffered_inputs[self._step % window]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Compute as TRL does, with rows of like length together and each chunk trimmed to its own longest row.

        Takes ids and mask (B, P + C) and returns log-probabilities and entropies (B, C), 0 where a chunk was trimmed.
        """
        if any(value is not None for name, value in kwargs.items() if not name.startswith("compute_")):  # images
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
            )
        order = attention_mask.sum(1).argsort()
        parts = []
        for rows in order.split(batch_size or len(order)):
            used = attention_mask[rows].any(0).nonzero().flatten()
            start, end = int(used[0]), int(used[-1]) + 1
            kept = logits_to_keep - (input_ids.shape[1] - end)
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                model, input_ids[rows, start:end], attention_mask[rows, start:end], kept, **kwargs
            )
            widen = partial(torch.nn.functional.pad, pad=(0, logits_to_keep - kept))
            parts.append((widen(logps), None if entropies is None else widen(entropies), aux_loss))
        all_logps, all_entropies, aux_losses = zip(*parts, strict=True)
        back = order.argsort()
        return (
            torch.cat(all_logps)[back],
            None if all_entropies[0] is None else torch.cat(all_entropies)[back],
            None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
        )

    def _advantages(self) -> torch.Tensor:
        """Return the advantages (N,) of the trajectories of all ranks."""
        weighted = self._rewards_per_function * self.reward_weights.to(self._rewards_per_function.device)
        rewards = weighted.nansum(1).masked_fill(weighted.isnan().all(1), torch.nan)  # (N,)
        if self.args.algorithm == "reinforce":
            return raw_return(rewards)
        return group_normalized(rewards, self.num_generations if self.model.training else self.num_generations_eval)

    @staticmethod
    def _rollout(prompts: list[Any], trainer: SearchTrainer) -> dict[str, list[Any]]:
        """Be TRL's `rollout_func`: one trajectory for each row of this rank, and the fields its rewards read."""
        rows, clock = trainer._rows, RolloutClock()
        assert len(prompts) == len(rows)
        trajectories = run_rollouts(
            rows,
            trainer.generator,
            trainer.engine,
            trainer.args.rollout_settings(),
            p_noise=trainer._p_noise(),
            keys=trainer._keys(rows),
            clock=clock,
        )
        trainer._log_rollout(trajectories, clock)
        trainer._write_trajectories(rows, trajectories)
        return {
            "prompt_ids": [trajectory.prompt_ids for trajectory in trajectories],
            "completion_ids": [trajectory.completion_ids for trajectory in trajectories],
            "logprobs": [trainer._sampling_logprobs(trajectory) for trajectory in trajectories],
            "env_mask": [trainer._loss_mask(trajectory) for trajectory in trajectories],
            "answer": [trajectory.answer for trajectory in trajectories],
            "outcome": [trajectory.outcome for trajectory in trajectories],
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
        """Return the curriculum's noise at this step; an evaluation inside a training run is free of it."""
        if not self.model.training:
            return 0.0
        return self.args.noise_schedule().p_noise(self.state.global_step + 1, self.state.max_steps)

    def _keys(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, ...]]:
        """Return (seed, step, row, sample) for each row of this rank, the same however many ranks share the batch."""
        group = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(rows)
        step = self.state.global_step + 1
        return [(self.args.seed, step, row_number(row), (first + place) % group) for place, row in enumerate(rows)]

    def _log_rollout(self, trajectories: list[Trajectory], clock: RolloutClock) -> None:
        """Add the rollout's metrics, over the trajectories of all ranks, to TRL's log; stop if too many searches failed."""
        own = ([rollout_facts(trajectory) for trajectory in trajectories], clock)
        ranks = gather_object([own])
        facts = [fact for rank_facts, _ in ranks for fact in rank_facts]
        metrics = rollout_metrics(facts)
        metrics["search/p_noise"] = self._p_noise()
        for name in ("rollout_s", "generating_s", "waiting_s", "idle_s"):
            metrics[f"time/{name}"] = sum(getattr(clock, name) for _, clock in ranks) / len(ranks)
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        failed = metrics["search/failed_search"]
        if failed > self.args.max_failed_search_share:
            self._stop(failed, next((fact["error"] for fact in facts if fact["error"]), ""))

    def _stop(self, failed_share: float, error: str) -> None:
        if self.state.global_step:
            self._save_checkpoint(self.model, trial=None)
        raise SearchError(
            f"{failed_share:.0%} of the trajectories of step {self.state.global_step + 1} lost a search, more than "
            f"max_failed_search_share ({self.args.max_failed_search_share:.0%}). The first failure: {error} "
            f"Once it is mended, go on with --resume_from_checkpoint."
        )

    def _write_trajectories(self, rows: Sequence[Mapping[str, Any]], trajectories: list[Trajectory]) -> None:
        """Append the first trajectories of the first groups to `trajectories.jsonl`."""
        if not self.accelerator.is_main_process or not self.model.training:
            return
        every = max(1, len(rows) // max(1, self.args.logged_trajectories))
        step = self.state.global_step + 1
        with (Path(self.args.output_dir) / "trajectories.jsonl").open("a") as file:
            for place in range(0, len(rows), every)[: self.args.logged_trajectories]:
                prompt = self._tokenizer.decode(trajectories[place].prompt_ids)
                record = trajectories[place].to_record(rows[place], prompt, step)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's step time under the name of the other times, too."""
        metrics = self._metrics["train"]
        if "step_time" in metrics:
            metrics["time/step_s"] = list(metrics["step_time"])
        super().log(logs, start_time)


def sort_micro_batches(micro_batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Redistribute the rows of equal micro-batches so that each holds rows of like length; the sum of losses stays."""
    size = len(micro_batches[0]["completion_mask"])
    joined = {
        name: torch.cat([batch[name] for batch in micro_batches]) if value.ndim else value
        for name, value in micro_batches[0].items()
    }
    order = (joined["prompt_mask"].sum(1) + joined["completion_mask"].sum(1)).argsort()
    return [
        {name: value[rows] if value.ndim else value for name, value in joined.items()} for rows in order.split(size)
    ]


def row_number(row: Mapping[str, Any]) -> int:
    """Return a number for a dataset row that its id alone decides."""
    return int.from_bytes(hashlib.blake2b(str(row["id"]).encode(), digest_size=6).digest())


def rollout_facts(trajectory: Trajectory) -> dict[str, Any]:
    """Return what the metrics need of a trajectory, small enough to gather from every rank."""
    searched = trajectory.searched_turns
    return {
        "searches": len(searched),
        "turns": len(trajectory.turns),
        "policy_tokens": trajectory.policy_tokens,
        "observation_tokens": trajectory.observation_tokens,
        "invalid_actions": sum(turn.kind == "invalid" for turn in trajectory.turns),
        "outcome": trajectory.outcome,
        "noisy": [turn.noisy for turn in searched if turn.noisy is not None],
        "retries": sum(turn.retries for turn in searched),
        "latencies_s": [turn.latency_s for turn in searched],
        "error": trajectory.error,
    }


def rollout_metrics(facts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the log entries of a rollout: means per trajectory, shares of outcomes, and search times."""
    metrics = {}
    for name in ("searches", "turns", "policy_tokens", "observation_tokens", "invalid_actions", "retries"):
        metrics[f"search/{name}"] = sum(fact[name] for fact in facts) / len(facts)
    for outcome in OUTCOMES:
        metrics[f"search/{outcome}"] = sum(fact["outcome"] == outcome for fact in facts) / len(facts)
    noisy = [coin for fact in facts for coin in fact["noisy"]]
    metrics["search/noisy_share"] = sum(noisy) / len(noisy) if noisy else 0.0
    latencies = sorted(latency for fact in facts for latency in fact["latencies_s"])
    metrics["search/latency_median_s"] = median(latencies) if latencies else 0.0
    metrics["search/latency_p95_s"] = latencies[int(0.95 * (len(latencies) - 1))] if latencies else 0.0
    return metrics


@contextmanager
def vllm_engine_options(args: SearchConfig) -> Iterator[None]:
    """Let TRL 1.16 create its colocated engine in the dtype of training, and with prefix caching.

    vLLM turns float32 checkpoints into half precision by itself, so its log-probabilities would not be the trainer's; and
    with prefix caching a later turn costs its new tokens only. TRL's config has a field for neither.
    """
    from trl.generation import vllm_generation

    original: Callable[..., Any] | None = getattr(vllm_generation, "LLM", None)
    if original is None:  # vLLM is not installed
        yield
        return
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    vllm_generation.LLM = partial(original, dtype=dtype, enable_prefix_caching=True)
    try:
        yield
    finally:
        vllm_generation.LLM = original
