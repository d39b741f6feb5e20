"""Fidelity of a simulator: whether useful replies answer, noisy ones leak, and the noise is what was requested.

`measure_simulator` asks any OpenAI-style endpoint, through the engine that training uses; `measure_recorded` measures
documents that a real engine returned, for comparison. Both return the fidelity card, plain data for JSON;
`zerosearch.simulator.fidelity_card` writes it. Intervals are 95 % bootstrap percentiles over queries.

    card = measure_simulator(SimulatedEngine(url), read_held_out("searches.jsonl"))
    write_card(card, Path("outputs/fidelity/simulator"))     # .json, .md
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from zerosearch.command_line import check_bounds
from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.http import ServiceError, run_in_background
from zerosearch.intervals import INTERVAL, NUM_RESAMPLES, mean_with_interval
from zerosearch.noise import NoiseSchedule, keyed_uniform
from zerosearch.simulator.held_out import WHY_LEFT_OUT, HeldOutQuery, choose

Card = dict[str, Any]
Documents = tuple[str, ...]
QUALITIES = ("useful", "noisy")
TOTAL_STEPS = 200  # of the paper's run, over which the schedule is laid
NUM_COINS = 64_000  # as many searches as the paper's run makes (Table 8)


@dataclass(frozen=True)
class FidelityOptions:
    """How much to measure: of each query, samples of either quality, and searches at points of a noise schedule."""

    num_queries: int | None = field(
        default=None,
        metadata={"min": 2, "help": "Held-out queries. Default: 300, or all recorded ones."},
    )
    num_samples: int = field(default=2, metadata={"min": 1, "help": "Replies to each query, of either quality."})
    noise_start: float = field(default=0.0, metadata={"min": 0, "max": 1})
    noise_end: float = field(default=1.0, metadata={"min": 0, "max": 1})
    noise_base: float = field(default=4.0, metadata={"min": 1})  # Eq. 1
    noise_points: int = field(default=9, metadata={"min": 2, "help": "Steps at which noise is measured."})
    noise_samples: int = field(default=1, metadata={"min": 1, "help": "Searches of each query at each of them."})
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self)

    def schedule(self) -> list[tuple[int, float]]:
        """Return the points at which noise is measured: optimizer step and noise probability."""
        noise = NoiseSchedule(self.noise_start, self.noise_end, self.noise_base)
        steps = np.linspace(1, TOTAL_STEPS, self.noise_points).round().astype(int).tolist()
        return [(step, noise.p_noise(step, TOTAL_STEPS)) for step in steps]


def measure_simulator(
    engine: SimulatedEngine,
    queries: Sequence[HeldOutQuery],
    options: FidelityOptions | None = None,
    about: Mapping[str, Any] | None = None,
) -> Card:
    """Ask a simulator for documents of either quality and over a noise schedule, and return its fidelity card.

    `about` goes into the card as it is. The engine is closed at the end.
    Raises `UserError` if fewer than two queries are decidable, or the endpoint fails for good.
    """
    options = options or FidelityOptions()
    chosen, decidable = _chosen(queries, options.num_queries or 300, options.seed)
    engine.check()
    requests = [
        _request(query, float(noisy), (options.seed, 0, row, sample, int(noisy)))
        for row, query in enumerate(chosen)
        for noisy in (False, True)
        for sample in range(options.num_samples)
    ]
    at_noise = [
        _request(query, p_noise, (options.seed, step, row, sample, 0))
        for step, p_noise in options.schedule()
        for row, query in enumerate(decidable)
        for sample in range(options.noise_samples)
    ]
    results = _search(engine, [*requests, *at_noise])
    replies = iter([result.documents for result in results[: len(requests)]])
    by_query = [[[next(replies) for _ in range(options.num_samples)] for _ in QUALITIES] for _ in chosen]
    samples = {quality: [both[noisy] for both in by_query] for noisy, quality in enumerate(QUALITIES)}
    rng = np.random.default_rng(options.seed)
    counts = engine.counts
    return {
        **_head(chosen, decidable, about),
        **_answer_rates(chosen, samples, rng),
        **_noise(decidable, options, results[len(requests) :], rng),
        "format": {
            **_share("valid_format_rate", counts.well_formed_replies, counts.replies, rng),
            **_share("short_reply_rate", counts.short_replies, counts.replies, rng),
            "replies": counts.replies,
            "failed_searches": counts.failed_searches,
        },
        "documents": {
            **{quality: _lengths(rows, rng) for quality, rows in samples.items()},
            **{f"real {quality}": _lengths(rows, rng) for quality, rows in _recorded(chosen).items()},
        },
    }


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
    chosen, decidable = _chosen(found, options.num_queries or len(found), options.seed)
    rng = np.random.default_rng(options.seed)
    samples = _recorded(chosen)
    return {
        **_head(chosen, decidable, about),
        **_answer_rates(chosen, samples, rng),
        "documents": {f"real {quality}": _lengths(rows, rng) for quality, rows in samples.items()},
    }


def _chosen(queries: Sequence[HeldOutQuery], count: int, seed: int) -> tuple[list[HeldOutQuery], list[HeldOutQuery]]:
    """Return the queries to measure with, and those of them for which documents can be scored by rule."""
    chosen = choose(queries, count, seed)
    decidable = [query for query in chosen if not query.left_out]
    if len(decidable) < 2:
        raise UserError(
            f"of {len(chosen)} held-out queries {len(decidable)} can tell whether documents answer them, and two must"
        )
    return chosen, decidable


def _request(query: HeldOutQuery, p_noise: float, key: tuple[int, ...]) -> SearchRequest:
    return SearchRequest(query.query, query.question, query.golden_answers, p_noise, key)


def _search(engine: SimulatedEngine, requests: Sequence[SearchRequest]) -> list[SearchResult]:
    """Return the result of every search; one for which the simulator wrote nothing has no documents."""

    async def one(request: SearchRequest, bar: tqdm) -> SearchResult:
        try:
            return await engine.search(request)
        except SearchError as error:
            if isinstance(error.__cause__, ServiceError):
                raise
            return SearchResult((), noisy=None)
        finally:
            bar.update()

    async def together() -> list[SearchResult]:
        tasks = []
        try:
            with tqdm(total=len(requests), desc="searching") as bar:
                tasks = [asyncio.create_task(one(request, bar)) for request in requests]
                return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await engine.aclose()

    try:
        return run_in_background(together())
    except SearchError as error:
        raise UserError(f"the measurement stopped: {error}") from error


def _head(chosen: Sequence[HeldOutQuery], decidable: Sequence[HeldOutQuery], about: Mapping[str, Any] | None) -> Card:
    left_out = Counter(query.left_out for query in chosen if query.left_out)
    return {
        "about": dict(about or {}),
        "rule": chosen[0].rule,
        "queries": len(chosen),
        "decidable": len(decidable),
        "left_out": {why: left_out[why] for why in WHY_LEFT_OUT},
    }


def _answer_rates(
    chosen: Sequence[HeldOutQuery], samples: Mapping[str, Sequence[Sequence[Documents]]], rng: np.random.Generator
) -> Card:
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


def _noise(
    decidable: Sequence[HeldOutQuery],
    options: FidelityOptions,
    results: Sequence[SearchResult],
    rng: np.random.Generator,
) -> Card:
    """Return requested against realised noise, from results in the order points, queries, samples.

    `coin` is the share of NUM_COINS searches for which the keyed coin falls on noisy. `realised` is what the documents
    come to: the share of searches that do not answer their query, those asked to be noisy and those asked to be useful
    weighted by the coin. `observed` is that share in the searches made here, where few coins were tossed.
    """
    schedule, size = options.schedule(), len(decidable)
    made = np.zeros((size, 2, len(schedule)))  # useful and noisy
    unanswered = np.zeros_like(made)
    for place, result in enumerate(results):
        point, row = divmod(place // options.noise_samples, size)
        quality = int(bool(result.noisy))
        made[row, quality, point] += 1
        unanswered[row, quality, point] += not decidable[row].is_answered_by(result.documents)
    requested = np.array([p_noise for _, p_noise in schedule])
    coins = np.array([_coin_share(options.seed, step, p_noise) for step, p_noise in schedule])

    def realised_by(weights: np.ndarray) -> np.ndarray:
        """Return the realised noise, (..., points), with each query counted `weights` times, (..., queries)."""
        asked = np.tensordot(weights, made, axes=1)  # (..., 2, points)
        missed = np.tensordot(weights, unanswered, axes=1)
        # Where the coin never fell on one side, that side's share at the other points.
        overall = missed.sum(axis=-1, keepdims=True) / np.maximum(asked.sum(axis=-1, keepdims=True), 1)
        shares = np.where(asked > 0, missed / np.maximum(asked, 1), overall)
        return coins * shares[..., 1, :] + (1 - coins) * shares[..., 0, :]

    realised = realised_by(np.ones(size))  # (points,)
    resampled = realised_by(rng.multinomial(size, np.full(size, 1 / size), NUM_RESAMPLES))  # (resamples, points)
    intervals = np.percentile(resampled, INTERVAL, axis=0)  # (2, points)
    errors = np.abs(resampled - requested).max(axis=1)  # (resamples,)
    searches = size * options.noise_samples
    return {
        "max_noise_error": float(np.abs(realised - requested).max()),
        "max_noise_error_interval": np.percentile(errors, INTERVAL).tolist(),
        "max_coin_error": float(np.abs(coins - requested).max()),
        "noise": [
            {
                "step": step,
                "requested": p_noise,
                "coin": float(coins[point]),
                "realised": float(realised[point]),
                "realised_interval": intervals[:, point].tolist(),
                "observed": float(unanswered[:, :, point].sum() / searches),
                "searches": searches,
            }
            for point, (step, p_noise) in enumerate(schedule)
        ],
    }


@cache
def _coin_share(seed: int, step: int, p_noise: float) -> float:
    """Return how often the coin of a search falls on noisy."""
    return fmean(keyed_uniform(seed, step, row, 0, 0) < p_noise for row in range(NUM_COINS))


def _lengths(samples: Sequence[Sequence[Documents]], rng: np.random.Generator) -> Card:
    """Return how many documents a reply has, and how many words a document; the unit of the means is a query."""
    asked = [replies for replies in samples if replies]
    words = [[len(text.split()) for documents in replies for text in documents] for replies in asked]
    described = _mean("documents", [fmean(map(len, replies)) for replies in asked], rng)
    if any(words):
        described |= _mean("words", [fmean(row) for row in words if row], rng)
        percentiles = np.percentile([length for row in words for length in row], (5, 50, 95)).tolist()
        described["word_percentiles"] = dict(zip(("5", "50", "95"), percentiles, strict=True))
    return described


def _recorded(chosen: Sequence[HeldOutQuery]) -> dict[str, list[list[Documents]]]:
    """Return recorded documents as if they were one reply a query, by quality."""
    found = {
        quality: [[query.real[quality]] if query.real.get(quality) else [] for query in chosen]
        for quality in (*QUALITIES, "all")
    }
    return {quality: rows for quality, rows in found.items() if any(rows)}


def _mean(name: str, values: Sequence[float], rng: np.random.Generator) -> Card:
    mean, low, high = mean_with_interval(values, rng)
    return {name: mean, f"{name}_interval": [low, high]}


def _share(name: str, count: int, total: int, rng: np.random.Generator) -> Card:
    """Return a share of independent replies."""
    total = max(total, 1)
    bounds = np.percentile(rng.binomial(total, count / total, size=NUM_RESAMPLES) / total, INTERVAL)
    return {name: count / total, f"{name}_interval": bounds.tolist()}
