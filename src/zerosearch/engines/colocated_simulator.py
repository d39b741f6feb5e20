"""A simulator in the policy's own vLLM engine: an adapter over the same base, decoded in the same batches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zerosearch.engines import SearchEngine, SearchError
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError

# Messages, temperature, longest reply and seed (None: random) to the text of a reply.
Reply = Callable[[list[dict[str, str]], float, int, int | None], Awaitable[str]]


@dataclass(eq=False, repr=False)
class ColocatedSimulator(SimulatedEngine):
    """Ask a simulator as `SimulatedEngine` does, but in this process: `model` is the folder or Hub id of its adapter.

    The trainer sets `reply` (zerosearch.generation.vllm_two_adapters). Nothing is retried: no network is between.
    """

    max_concurrency: int = 1024  # vLLM queues what it has no room for
    reply: Reply | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.address = f"{self.model}, in the policy's engine,"  # behind "the simulator at"

    def check(self) -> None:
        """Raise `UserError` unless an adapter is named; the trainer checks that it fits the policy."""
        if self.model is None:
            raise UserError("--simulator colocated needs --simulator_model, the folder or Hub id of the adapter")

    async def _reply(self, messages: list[dict[str, str]], seed: int | None) -> tuple[str, int]:
        if self.reply is None:
            raise UserError("a colocated simulator works in training alone, in the vLLM engine of a policy with LoRA")
        async with self.account.call(retries=0):
            try:
                return await self.reply(messages, self.temperature, self.max_tokens, seed), 0
            except ValueError as error:
                raise SearchError(f"the simulator at {self.address} was not asked: {error}") from error


def colocated_simulators(engines: Sequence[SearchEngine]) -> list[ColocatedSimulator]:
    """Return the colocated simulators among engines, also behind a cache or beside others."""
    found: list[Any] = []
    for engine in engines:
        parts = getattr(engine, "engines", None) or [getattr(engine, "engine", engine)]
        found += [one for one in parts if isinstance(one, ColocatedSimulator) and one not in found]
    return found
