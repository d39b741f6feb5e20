"""A generator and an engine without a model: what the tests of agents, evaluation and chat share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from scripted_rollouts import ScriptedEngine

from zerosearch.engines import SearchError, SearchRequest
from zerosearch.generation import SampledTurn, Sampling, TurnRequest
from zerosearch.generation.chat_endpoint import PieceTokenizer


class Writer:
    """Writes each turn by `write(context)`, and remembers every context it was given."""

    def __init__(self, write: Callable[[str], str]) -> None:
        self.tokenizer: Any = PieceTokenizer()
        self.max_context_tokens = 100_000
        self.write = write
        self.contexts: list[str] = []
        self.seeds: list[int] = []
        self.waiting: list[TurnRequest] = []
        self.released: list[int] = []

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        yield

    def submit(self, request: TurnRequest) -> None:
        self.waiting.append(request)

    def step(self) -> list[SampledTurn]:
        request = self.waiting.pop()
        context = self.tokenizer.decode(request.context_ids)
        self.contexts.append(context)
        self.seeds.append(request.seed)
        ids = self.tokenizer(self.write(context))["input_ids"]
        return [SampledTurn(request.trajectory, ids, [0.0] * len(ids), "stop")]

    def release(self, trajectory: int) -> None:
        self.released.append(trajectory)


class Library(ScriptedEngine):
    """Finds two documents about whatever it is asked, or fails."""

    name = "library"

    def __init__(self, broken: bool = False) -> None:
        def reply(request: SearchRequest) -> Any:
            found = [f"Emma: Found for {request.query}", "Rain: It rains."]
            return SearchError("the library is closed") if broken else found

        super().__init__(reply, max_concurrency=4)
