"""A scripted policy and a scripted engine over real token ids, and rollouts of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerFast

from zerosearch.engines import SearchRequest, SearchResult
from zerosearch.generation import SampledTurn, Sampling, TurnRequest
from zerosearch.generation.tokenization import text_token_ids
from zerosearch.noise import keyed_uniform
from zerosearch.rollout.loop import RolloutSettings, Trajectory, run_rollouts

Policy = Callable[[int, int], str]  # trajectory, turn -> the text it writes


class ScriptedGenerator:
    """Writes what `policy` says, as the tokenizer cuts it; finishes turns in an order of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, policy: Policy, order_seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.max_context_tokens = 100_000
        self.policy = policy
        self.order = random.Random(order_seed)
        self.waiting: list[TurnRequest] = []
        self.requests: dict[int, list[TurnRequest]] = {}
        self.released: list[int] = []
        self.sessions = 0

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        self.sessions += 1
        self.sampling = sampling
        yield

    def submit(self, request: TurnRequest) -> None:
        assert all(request.trajectory != other.trajectory for other in self.waiting), "two turns in flight"
        self.waiting.append(request)
        self.requests.setdefault(request.trajectory, []).append(request)

    def step(self) -> list[SampledTurn]:
        self.order.shuffle(self.waiting)
        count = self.order.randint(1, len(self.waiting))
        ended, self.waiting = self.waiting[:count], self.waiting[count:]
        return [self.write(request) for request in ended]

    def write(self, request: TurnRequest) -> SampledTurn:
        text = self.policy(request.trajectory, len(self.requests[request.trajectory]) - 1)
        ids = text_token_ids(self.tokenizer, text)
        if len(ids) > request.max_new_tokens:
            ids = ids[: request.max_new_tokens]
            return SampledTurn(request.trajectory, ids, [-0.5] * len(ids), "length")
        return SampledTurn(request.trajectory, ids, [-0.5] * len(ids), "stop")

    def release(self, trajectory: int) -> None:
        self.released.append(trajectory)


class ScriptedRemoteGenerator(ScriptedGenerator):
    """The same, elsewhere: each turn is awaited for as long as `delay` draws."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        policy: Policy,
        delay: Callable[[], float] = lambda: 0.0,
        max_concurrency: int = 1000,
    ) -> None:
        super().__init__(tokenizer, policy)
        self.name = "the scripted server"
        self.delay, self.max_concurrency = delay, max_concurrency
        self.most_in_flight = 0
        self.in_flight: set[int] = set()

    async def sample(self, request: TurnRequest) -> SampledTurn:
        assert request.trajectory not in self.in_flight, "two turns in flight"
        self.requests.setdefault(request.trajectory, []).append(request)
        self.in_flight.add(request.trajectory)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        await asyncio.sleep(self.delay())
        self.in_flight.discard(request.trajectory)
        return self.write(request)


class ScriptedEngine:
    """Answers by `reply`, after a delay that `delay` draws; remembers what it was asked."""

    name = "scripted"

    def __init__(
        self,
        reply: Callable[[SearchRequest], Any] = lambda request: ["It rains."],
        delay: Callable[[], float] = lambda: 0.0,
        max_concurrency: int = 1000,
    ) -> None:
        self.reply, self.delay, self.max_concurrency = reply, delay, max_concurrency
        self.requests: list[SearchRequest] = []
        self.in_flight = self.most_in_flight = 0

    async def search(self, request: SearchRequest) -> SearchResult:
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay())
        finally:
            self.in_flight -= 1
        documents = self.reply(request)
        if isinstance(documents, Exception):
            raise documents
        return SearchResult(tuple(documents), noisy=keyed_uniform(*request.key) < request.p_noise)

    async def aclose(self) -> None:
        pass


def questions(count: int) -> list[dict[str, Any]]:
    asked = [(n, f"Question {n}?") for n in range(count)]
    return [
        {"id": str(n), "prompt": f"{text}\n", "question": text, "golden_answers": [f"gold {n}", "g"]}
        for n, text in asked
    ]


def writer_of(tokenizer: PreTrainedTokenizerFast, *turns: str) -> ScriptedGenerator:
    """Return a generator that writes these turns, for every question alike."""
    return ScriptedGenerator(tokenizer, lambda trajectory, turn: turns[turn])


def roll_out(
    tokenizer: PreTrainedTokenizerFast, turns: list[str], engine: ScriptedEngine | None = None, **settings: Any
) -> Trajectory:
    """Roll out one trajectory whose policy writes these turns."""
    generator = writer_of(tokenizer, *turns)
    budgets = RolloutSettings(**{"max_turns": 4, **settings})
    (trajectory,) = run_rollouts(questions(1), generator, engine or ScriptedEngine(), budgets)
    assert generator.released == [0]
    return trajectory


def runs(trajectory: Trajectory, tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, str]]:
    """Return the completion as texts of equal mask, in order."""
    texts: list[tuple[int, list[int]]] = []
    for token_id, own in zip(trajectory.completion_ids, trajectory.env_mask, strict=True):
        if not texts or texts[-1][0] != own:
            texts.append((own, []))
        texts[-1][1].append(token_id)
    return [(own, tokenizer.decode(ids)) for own, ids in texts]


def wandering_policy(seed: int) -> Policy:
    """Search for its own number, answer early, or do neither, at random."""

    def write(trajectory: int, turn: int) -> str:
        draw = random.Random(f"{seed}-{trajectory}-{turn}").random()
        if draw < 0.15:
            return "<think> I forgot what to do. </think>"
        if draw < 0.45:
            return f"<think> Done. </think>\n<answer> answer {trajectory} </answer>"
        return f"<think> More. </think>\n<search> query of {trajectory} turn {turn} </search>"

    return write
