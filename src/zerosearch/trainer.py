"""`SearchTrainer`: TRL's GRPOTrainer with search rollouts, keyed noise and the paper's algorithms.

Built on TRL 1.16's `rollout_func` and `env_mask`. What it overrides or reads beyond TRL's public interface is all in
this file and in `colocation.py`, and tests/test_trainer.py holds it:

1. `_generate_and_score_completions` sees the dataset rows, which `rollout_func` is not given, and returns the batch,
   whose advantages are replaced;
2. `_calculate_rewards` returns the rewards of all ranks, from which the advantages are made;
3. `_prepare_inputs` and `_get_per_token_logps_and_entropies` save padding and change no result;
4. `_metrics` and `_logs` take what TRL logs, `_step` and `_buffered_inputs` say where in an optimizer step we are.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from zerosearch.advantages import group_normalized, raw_return
from zerosearch.colocation import colocated_engine_options
from zerosearch.config import SearchConfig
from zerosearch.decoding import TransformersGenerator
from zerosearch.encoding import decoded_text
from zerosearch.engines import SearchEngine, SearchError
from zerosearch.generation import Generator, VLLMGenerator
from zerosearch.rollout import RolloutClock, Trajectory, run_rollouts
from zerosearch.rollout_metrics import TrajectoryFacts, rollout_metrics

__all__ = ["SearchConfig", "SearchTrainer"]


class SearchTrainer(GRPOTrainer):
    """Train a policy to search: rollouts against a search engine, rewards on the answer, loss on the policy's tokens.

    Takes GRPOTrainer's arguments and the engine. Rows of the dataset are `{id, prompt, question, golden_answers,
    dataset}`. Raises `SearchError` when too many searches of a step fail; the last state is saved first.
    """

    _tag_names = ["trl", "zerosearch"]  # noqa: RUF012 (as in TRL)
    args: SearchConfig
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(self, *, engine: SearchEngine, args: SearchConfig, **kwargs: Any) -> None:
        self.engine = engine
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        with warnings.catch_warnings(), colocated_engine_options(dtype):
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
        """Log the rollout over all ranks, count its queries, and stop the run if too many searches failed."""
        ranks = gather_object([([TrajectoryFacts.of(trajectory) for trajectory in trajectories], clock)])
        facts = [fact for rank_facts, _ in ranks for fact in rank_facts]
        metrics = rollout_metrics(facts, [rank_clock for _, rank_clock in ranks])
        metrics["search/p_noise"] = self._p_noise()
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        self._count_queries(sum(fact.searches + fact.retries for fact in facts))
        failed = metrics["search/failed_search"]
        if failed > self.args.max_failed_search_share:
            self._stop(failed, next(fact.error for fact in facts if fact.error))

    def _count_queries(self, sent: int) -> None:
        """Add queries sent, retries included, to `engine_queries.json`: what was really asked of which engine."""
        if not self.accelerator.is_main_process:
            return
        path = Path(self.args.output_dir) / "engine_queries.json"
        queries = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**queries, self.engine.name: queries.get(self.engine.name, 0) + sent}))

    def _stop(self, failed_share: float, error: str) -> None:
        """Save what was learned so far, and raise `SearchError`."""
        if self.state.global_step:
            self._save_checkpoint(self.model, trial=None)
        raise SearchError(
            f"{failed_share:.0%} of the trajectories of step {self.state.global_step + 1} lost a search, more than "
            f"max_failed_search_share ({self.args.max_failed_search_share:.0%}) allows: {error}"
        )

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
    """Return a number for a dataset row that its names alone decide, wherever it stands in the dataset."""
    name = f"{row.get('dataset')}/{row['id']}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")
