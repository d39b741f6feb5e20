"""How faithful a simulator is: do its useful documents help, do its noisy ones not, and are they like real ones.

`measure_simulator` asks any OpenAI-style endpoint, through the engine that training uses; `measure_recorded` measures
documents that a real engine returned, the yardstick. Both return the fidelity card, plain data for JSON;
`zerosearch.simulator.fidelity_card` writes it as Markdown and draws it. Intervals are 95 % bootstrap percentiles over
queries.

    card = measure_simulator(SimulatedEngine(url), read_held_out("searches.jsonl"))
    write_card(card, Path("outputs/fidelity/simulator"))     # .json, .md, .svg
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.evaluation.scores import INTERVAL, NUM_RESAMPLES
from zerosearch.http import ServiceError
from zerosearch.noise import NoiseSchedule, keyed_uniform
from zerosearch.simulator.held_out import WHY_LEFT_OUT, HeldOutQuery, choose
from zerosearch.simulator.likeness import (
    distinct_n,
    length_distance,
    mean,
    overlap_between,
    overlap_within,
    rouge_n,
    shape,
)

Card = dict[str, Any]
Documents = tuple[str, ...]
QUALITIES = ("useful", "noisy")
TOTAL_STEPS = 200  # of the paper's run, over which the schedule is laid
NUM_COINS = 64_000  # as many searches as the paper's run makes (Table 8)


@dataclass(frozen=True)
class FidelityOptions:
    """How much to measure: of each query, samples of either quality, and searches at points of a noise schedule."""

    num_queries: int | None = None  # None: 300 for a simulator, all that are recorded
    num_samples: int = 2  # two at least, for the diversity between samples
    noise_start: float = 0.0
    noise_end: float = 1.0
    noise_base: float = 4.0  # Eq. 1
    noise_points: int = 9
    noise_samples: int = 1  # searches of each query at each point
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_queries", 2), ("num_samples", 2), ("noise_points", 2), ("noise_samples", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}")
        NoiseSchedule(self.noise_start, self.noise_end, self.noise_base)

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

    `about` goes into the card as it is. The engine is closed at the end. Noise is measured with one coin a query.
    Raises `UserError` if no query can tell, or the endpoint fails for good.
    """
    options = options or FidelityOptions()
    chosen, decidable = _decidable(choose(queries, options.num_queries or 300, options.seed))
    engine.check()
    asks = [
        (_request(query, float(noisy), (options.seed, 0, row, sample, int(noisy))), (row, noisy))
        for row, query in enumerate(chosen)
        for noisy in (False, True)
        for sample in range(options.num_samples)
    ]
    noise_asks = [
        (_request(query, p_noise, (options.seed, step, row, sample, 0)), (row, point))
        for point, (step, p_noise) in enumerate(options.schedule())
        for row, query in enumerate(decidable)
        for sample in range(options.noise_samples)
    ]
    results = _search(engine, [request for request, _ in [*asks, *noise_asks]])
    samples: dict[str, list[list[Documents]]] = {quality: [[] for _ in chosen] for quality in QUALITIES}
    for (_, (row, noisy)), result in zip(asks, results, strict=False):
        samples[QUALITIES[noisy]][row].append(result.documents)
    rng = np.random.default_rng(options.seed)
    card = _head(chosen, decidable, about)
    card |= _answer_rates(chosen, samples, rng)
    card |= _noise(decidable, options, noise_asks, results[len(asks) :], rng)
    counts = engine.counts
    card["format"] = {
        **_flat("valid_format_rate", _share(counts.well_formed_replies, counts.replies, rng)),
        **_flat("short_reply_rate", _share(counts.short_replies, counts.replies, rng)),
        "replies": counts.replies,
        "failed_searches": counts.failed_searches,
    }
    card["documents"] = {quality: _describe(chosen, samples[quality], quality, rng) for quality in QUALITIES}
    real = _real_samples(chosen)
    card["documents"] |= {f"real {quality}": _describe(chosen, rows, None, rng) for quality, rows in real.items()}
    return card


def measure_recorded(
    queries: Sequence[HeldOutQuery],
    options: FidelityOptions | None = None,
    about: Mapping[str, Any] | None = None,
) -> Card:
    """Return the card of recorded documents: what a real engine found, for comparison with a simulator's card.

    A real engine is not asked for noise: `answer_rate` is the share of searches that answer their query. Where the
    documents were judged, the rates of those judged useful and noisy are given as a simulator's are.
    Raises `UserError` if no query can tell or none has documents.
    """
    options = options or FidelityOptions()
    found = [query for query in queries if any(query.real.values())]
    chosen, decidable = _decidable(choose(found, options.num_queries or len(found), options.seed))
    rng = np.random.default_rng(options.seed)
    samples = _real_samples(chosen)
    card = _head(chosen, decidable, about) | _answer_rates(chosen, samples, rng)
    card["documents"] = {
        f"real {quality}": _describe(chosen, rows, None, rng, _of_the_same_question(chosen, quality))
        for quality, rows in samples.items()
    }
    return card


def _decidable(chosen: list[HeldOutQuery]) -> tuple[list[HeldOutQuery], list[HeldOutQuery]]:
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
        return asyncio.run(together())
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
    """Return the shares of replies that answer or leak, over decidable queries; (queries,) before the mean."""
    rates: Card = {}
    for quality, name in (("useful", "useful_answer_rate"), ("noisy", "noisy_leak_rate"), ("all", "answer_rate")):
        found: dict[bool, list[float]] = {True: [], False: []}
        for query, replies in zip(chosen, samples.get(quality, [()] * len(chosen)), strict=True):
            if query.left_out or not replies:
                continue
            holds = query.is_leaked_by if quality == "noisy" else query.is_answered_by
            found[query.asks_for_answer].append(fmean(holds(documents) for documents in replies))
        if values := found[True] + found[False]:
            rates |= _flat(name, _interval(values, rng))
        if found[True] and found[False]:
            rates |= _flat(f"{name}_where_the_answer_is_asked", _interval(found[True], rng))
            rates |= _flat(f"{name}_where_another_fact_is_asked", _interval(found[False], rng))
    return rates


def _noise(
    decidable: Sequence[HeldOutQuery],
    options: FidelityOptions,
    asks: Sequence[tuple[SearchRequest, tuple[int, int]]],
    results: Sequence[SearchResult],
    rng: np.random.Generator,
) -> Card:
    """Return requested against realised noise.

    `coin` is the share of NUM_COINS searches for which the keyed coin falls on noisy. `realised` is what the documents
    come to: the share of searches that do not answer their query, those asked to be noisy and those asked to be useful
    weighted by the coin. `observed` is that share in the searches made here, where few coins were tossed.
    """
    schedule = options.schedule()
    made = np.zeros((len(decidable), 2, len(schedule)))  # useful and noisy
    unanswered = np.zeros_like(made)
    for (_, (row, point)), result in zip(asks, results, strict=True):
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

    size = len(decidable)
    realised = realised_by(np.ones(size))  # (points,)
    resampled = realised_by(rng.multinomial(size, np.full(size, 1 / size), NUM_RESAMPLES))  # (resamples, points)
    low, high = np.percentile(resampled, INTERVAL, axis=0)
    errors = np.abs(resampled - requested).max(axis=1)  # (resamples,)
    searches = size * options.noise_samples
    return {
        "max_noise_error": float(np.abs(realised - requested).max()),
        "max_noise_error_interval": [float(bound) for bound in np.percentile(errors, INTERVAL)],
        "max_coin_error": float(np.abs(coins - requested).max()),
        "noise": [
            {
                "step": step,
                "requested": p_noise,
                "coin": float(coins[point]),
                "realised": float(realised[point]),
                "realised_interval": [float(low[point]), float(high[point])],
                "observed": float(unanswered[:, :, point].sum() / searches),
                "searches": searches,
            }
            for point, (step, p_noise) in enumerate(schedule)
        ],
    }


def _coin_share(seed: int, step: int, p_noise: float) -> float:
    """Return how often the coin of a search falls on noisy."""
    return fmean(keyed_uniform(seed, step, row, 0, 0) < p_noise for row in range(NUM_COINS))


def _describe(
    chosen: Sequence[HeldOutQuery],
    samples: Sequence[Sequence[Documents]],
    quality: str | None,
    rng: np.random.Generator,
    compared: Sequence[Documents] | None = None,
) -> Card:
    """Describe documents: number, length, shape, diversity, and likeness to real documents of the same query.

    `quality` is the one asked for: replies are compared with the real documents judged to be of it, or with all where
    none were judged. `compared` names other documents to compare with, (queries,).
    """
    if compared is None:
        compared = [_real(query, quality) for query in chosen] if quality else [()] * len(chosen)
    half = len(compared) // 2  # far away, as queries of one question are neighbours in a file
    elsewhere = [*compared[half:], *compared[:half]]  # what likeness comes to by chance
    rows = []
    for replies, real, other in zip(samples, compared, elsewhere, strict=True):
        written = [documents for documents in replies if documents]
        shapes = [shape(document) for documents in written for document in documents]
        row = {
            "documents": mean([len(documents) for documents in replies]),
            **{name: mean([one[name] for one in shapes]) for name in SHAPE_NAMES},
            "distinct_1": mean([distinct_n(documents, 1) for documents in written]),
            "distinct_2": mean([distinct_n(documents, 2) for documents in written]),
            "overlap_of_documents": mean([overlap_within(documents) for documents in written]),
            "overlap_of_samples": overlap_between(written),
            "identical_samples": float(len(set(written)) == 1) if len(written) > 1 else math.nan,
            "rouge_1": mean([rouge_n(documents, real, 1) for documents in written]),
            "rouge_2": mean([rouge_n(documents, real, 2) for documents in written]),
            "rouge_1_by_chance": mean([rouge_n(documents, other, 1) for documents in written]),
        }
        if replies:
            rows.append(row)
    described: Card = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows if not math.isnan(row[name])]
        if values:
            described |= _flat(name, _interval(values, rng))
    texts = [document for replies in samples for documents in replies for document in documents]
    real_texts = [document for documents in compared for document in documents]
    lengths = [len(text.split()) for text in texts]
    if lengths:
        described["word_percentiles"] = {str(at): float(np.percentile(lengths, at)) for at in (5, 50, 95)}
    if texts and real_texts:
        described["length_distance"] = length_distance(texts, real_texts)
    return described


SHAPE_NAMES = tuple(shape("a"))


def _real(query: HeldOutQuery, quality: str | None) -> Documents:
    return query.real.get(quality or "all") or query.real.get("all", ())


def _real_samples(chosen: Sequence[HeldOutQuery]) -> dict[str, list[list[Documents]]]:
    """Return recorded documents as if they were one reply a query, by quality."""
    found = {
        quality: [[query.real[quality]] if query.real.get(quality) else [] for query in chosen]
        for quality in (*QUALITIES, "all")
    }
    return {quality: rows for quality, rows in found.items() if any(rows)}


def _of_the_same_question(chosen: Sequence[HeldOutQuery], quality: str) -> list[Documents]:
    """Return, for each query, what another query of its question found; () where there is none."""
    by_question: dict[str, list[HeldOutQuery]] = {}
    for query in chosen:
        by_question.setdefault(query.question, []).append(query)
    found: list[Documents] = []
    for query in chosen:
        others = [other for other in by_question[query.question] if other is not query]
        found.append(_real(others[0], quality) if others else ())
    return found


def _interval(values: Sequence[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """Return mean, low and high, by resampling the values."""
    numbers = np.array(values, dtype=float)
    size = len(numbers)
    # In blocks, which is much faster than one by one and needs little memory.
    blocks = [numbers[rng.integers(size, size=(100, size))].mean(axis=1) for _ in range(NUM_RESAMPLES // 100)]
    low, high = np.percentile(np.concatenate(blocks), INTERVAL)
    return float(numbers.mean()), float(low), float(high)


def _share(count: int, total: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return a share of independent replies with its interval."""
    share = count / max(total, 1)
    low, high = np.percentile(rng.binomial(max(total, 1), share, size=NUM_RESAMPLES) / max(total, 1), INTERVAL)
    return share, float(low), float(high)


def _flat(name: str, interval: tuple[float, float, float]) -> dict[str, Any]:
    mean_value, low, high = interval
    return {name: mean_value, f"{name}_interval": [low, high]}
