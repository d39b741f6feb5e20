"""Fidelity of a simulator: whether useful replies answer, noisy ones leak, and the noise is what was requested.

`measure_simulator` asks any OpenAI-style endpoint, through the engine that training uses; `measure_recorded` measures
documents that a real engine returned, for comparison. Both return the fidelity card, plain data for JSON;
`zerosearch.simulator.fidelity_card` writes it. Intervals are 95 % bootstrap percentiles over queries.

    card = measure_simulator(SimulatedEngine(url), read_held_out("searches.jsonl"))
    write_card(card, Path("outputs/fidelity/simulator"))     # .json, .md
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from zerosearch.engines import SearchError, SearchRequest
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.http import ServiceError, run_in_background
from zerosearch.intervals import INTERVAL, NUM_RESAMPLES, mean_with_interval, resampled_means
from zerosearch.prompts import SimulatorTemplate
from zerosearch.simulator.held_out import WHY_LEFT_OUT, HeldOutQuery, choose
from zerosearch.simulator.server import simulator_server

Card = dict[str, Any]
Documents = tuple[str, ...]
Samples = Mapping[str, Sequence[Sequence[Documents]]]  # quality to (queries, replies)

QUALITIES = ("useful", "noisy")
NOISE = (0.0, 0.25, 0.5, 0.75, 1.0)  # the requested noise that is compared with what is realised


@dataclass(frozen=True)
class FidelityOptions:
    """How much to measure."""

    num_queries: int | None = field(
        default=None,
        metadata={"min": 2, "help": "Held-out queries. Default: 300, or all recorded ones."},
    )
    num_samples: int = field(default=2, metadata={"min": 1, "help": "Replies to each query, of either quality."})
    seed: int = 0


def measure_simulator(
    engine: SimulatedEngine,
    queries: Sequence[HeldOutQuery],
    options: FidelityOptions | None = None,
    about: Mapping[str, Any] | None = None,
) -> Card:
    """Ask a simulator for documents of either quality, and return its fidelity card.

    `about` goes into the card as it is. The engine is closed at the end.
    Raises `UserError` if fewer than two queries are decidable, or the endpoint fails for good.
    """
    options = options or FidelityOptions()
    chosen = choose(queries, options.num_queries or 300, options.seed)
    engine.check()
    requests = [
        SearchRequest(
            query.query, query.question, query.golden_answers, float(noisy), (options.seed, 0, row, sample, int(noisy))
        )
        for row, query in enumerate(chosen)
        for noisy in (False, True)
        for sample in range(options.num_samples)
    ]
    replies = iter(_search(engine, requests))
    by_query = [[[next(replies) for _ in range(options.num_samples)] for _ in QUALITIES] for _ in chosen]
    samples = {quality: [both[noisy] for both in by_query] for noisy, quality in enumerate(QUALITIES)}
    rng = np.random.default_rng(options.seed)
    counts = engine.counts
    return {
        **_head(chosen, about),
        **_answer_rates(chosen, samples, rng),
        **_noise(chosen, samples, rng),
        "format": {
            **_share("valid_format_rate", counts.well_formed_replies, counts.replies, rng),
            **_share("short_reply_rate", counts.short_replies, counts.replies, rng),
            "replies": counts.replies,
            "failed_searches": engine.account.failures,
        },
        "documents": {**_lengths(samples, rng), **_lengths(_recorded(chosen), rng)},
    }


def measure_tuned(
    folder: Path,
    queries: Sequence[HeldOutQuery],
    options: FidelityOptions,
    template: SimulatorTemplate,
    dtype: str,
    about: Mapping[str, Any],
) -> Card:
    """Serve a simulator just tuned, beside the process that tuned it, and return its fidelity card."""
    import torch

    gc.collect()
    vllm_arguments: tuple[str, ...] = ()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
        vllm_arguments = ("--gpu-memory-utilization", "0.6")
    with simulator_server(str(folder), port=0, dtype=dtype, vllm_arguments=vllm_arguments) as server:
        return measure_simulator(SimulatedEngine(server.base_url, template=template), queries, options, about)


def measure_recorded(
    queries: Sequence[HeldOutQuery],
    options: FidelityOptions | None = None,
    about: Mapping[str, Any] | None = None,
) -> Card:
    """Return the card of recorded documents: what a real engine found, for comparison with a simulator's card.

    A real engine is not asked for noise: `answer_rate` is the share of searches that answer their query. Where the
    documents were judged, the rates of those judged useful and noisy are given as a simulator's are.
    Raises `UserError` if fewer than two queries with documents are decidable.
    """
    options = options or FidelityOptions()
    found = [query for query in queries if any(query.real.values())]
    chosen = choose(found, options.num_queries or len(found), options.seed)
    rng = np.random.default_rng(options.seed)
    samples = _recorded(chosen)
    rates = _answer_rates(chosen, {name.removeprefix("real "): replies for name, replies in samples.items()}, rng)
    return {**_head(chosen, about), **rates, "documents": _lengths(samples, rng)}


def _search(engine: SimulatedEngine, requests: Sequence[SearchRequest]) -> list[Documents]:
    """Return the documents of every search, none where the simulator wrote none."""

    async def one(request: SearchRequest, bar: tqdm) -> Documents:
        try:
            return (await engine.search(request)).documents
        except SearchError as error:
            if isinstance(error.__cause__, ServiceError):
                raise
            return ()
        finally:
            bar.update()

    async def together() -> list[Documents]:
        try:
            with tqdm(total=len(requests), desc="searching") as bar:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(request, bar)) for request in requests]
            return [task.result() for task in tasks]
        finally:
            await engine.aclose()

    try:
        return run_in_background(together())
    except ExceptionGroup as failures:  # not except*: what is raised there, Python 3.11.2 wraps in a group
        if (searches := failures.subgroup(SearchError)) is None:
            raise
        raise UserError(f"the measurement stopped: {searches.exceptions[0]}") from failures


def _head(chosen: Sequence[HeldOutQuery], about: Mapping[str, Any] | None) -> Card:
    left_out = Counter(query.left_out for query in chosen)
    return {
        "about": dict(about or {}),
        "rule": chosen[0].rule,
        "queries": len(chosen),
        "decidable": left_out[""],
        "left_out": {why: left_out[why] for why in WHY_LEFT_OUT},
    }


def _answer_rates(chosen: Sequence[HeldOutQuery], samples: Samples, rng: np.random.Generator) -> Card:
    """Return the shares of replies that answer or leak, over decidable queries; a query is the mean of its samples."""
    rates: Card = {}
    for quality, name in (("useful", "useful_answer_rate"), ("noisy", "noisy_leak_rate"), ("all", "answer_rate")):
        found: dict[bool, list[float]] = {True: [], False: []}
        for query, replies in zip(chosen, samples.get(quality, [()] * len(chosen)), strict=True):
            if query.left_out or not replies:
                continue
            holds = query.is_leaked_by if quality == "noisy" else query.is_answered_by
            found[query.asks_for_answer].append(fmean(holds(documents) for documents in replies))
        if values := found[True] + found[False]:
            rates |= _mean(name, values, rng)
        if found[True] and found[False]:
            rates |= _mean(f"{name}_where_the_answer_is_asked", found[True], rng)
            rates |= _mean(f"{name}_where_another_fact_is_asked", found[False], rng)
    return rates


def _noise(chosen: Sequence[HeldOutQuery], samples: Samples, rng: np.random.Generator) -> Card:
    """Return requested against realised noise.

    Realised noise is the share of searches whose documents do not answer their query. Where noise p is requested, a
    search is noisy with probability p: the noisy replies weigh p, the useful ones 1 - p.
    """
    missed = np.array(
        [
            [fmean(not query.is_answered_by(documents) for documents in samples[name][row]) for name in QUALITIES]
            for row, query in enumerate(chosen)
            if not query.left_out
        ]
    )  # (queries, 2)
    weights = np.array([[1 - p_noise, p_noise] for p_noise in NOISE]).T  # (2, points)
    realised = missed.mean(axis=0) @ weights  # (points,)
    resampled = resampled_means(missed, rng) @ weights  # (resamples, points)
    low, high = np.percentile(resampled, INTERVAL, axis=0)
    errors = np.abs(resampled - NOISE).max(axis=1)  # (resamples,)
    return {
        "max_noise_error": float(np.abs(realised - NOISE).max()),
        "max_noise_error_interval": np.percentile(errors, INTERVAL).tolist(),
        "noise": [
            {
                "requested": p_noise,
                "realised": float(realised[point]),
                "realised_interval": [float(low[point]), float(high[point])],
            }
            for point, p_noise in enumerate(NOISE)
        ],
    }


def _lengths(samples: Samples, rng: np.random.Generator) -> Card:
    """Return how many documents a reply has, and how many words a document; the unit of the means is a query."""
    described: Card = {}
    for name, rows in samples.items():
        asked = [replies for replies in rows if replies]
        words = [[len(text.split()) for documents in replies for text in documents] for replies in asked]
        described[name] = _mean("documents", [fmean(map(len, replies)) for replies in asked], rng)
        if any(words):
            described[name] |= _mean("words", [fmean(row) for row in words if row], rng)
    return described


def _recorded(chosen: Sequence[HeldOutQuery]) -> dict[str, list[list[Documents]]]:
    """Return recorded documents as if they were one reply a query, by quality."""
    found = {
        f"real {quality}": [[query.real[quality]] if query.real.get(quality) else [] for query in chosen]
        for quality in (*QUALITIES, "all")
    }
    return {name: rows for name, rows in found.items() if any(rows)}


def _mean(name: str, values: Sequence[float], rng: np.random.Generator) -> Card:
    mean, low, high = mean_with_interval(values, rng)
    return {name: mean, f"{name}_interval": [low, high]}


def _share(name: str, count: int, total: int, rng: np.random.Generator) -> Card:
    """Return a share of independent replies."""
    total = max(total, 1)
    bounds = np.percentile(rng.binomial(total, count / total, size=NUM_RESAMPLES) / total, INTERVAL)
    return {name: count / total, f"{name}_interval": bounds.tolist()}
