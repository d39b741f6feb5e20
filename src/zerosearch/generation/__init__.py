"""Token ids in, sampled token ids and their log-probabilities out: one turn of one trajectory at a time.

Three kinds of generator, by where the work is done:

1. `Generator`: in this thread. `submit` hands it a turn, `step` advances the turns in flight by at least one token and
   returns those that ended, so a new turn joins while others are still being decoded (`vllm_colocated`,
   `transformers_engine`).
2. `SharedGenerator`: in this thread, by an engine that also works for others: in step with other ranks
   (`vllm_tensor_parallel`), or for a simulator (`vllm_two_adapters`).
3. `RemoteGenerator`: behind a network. `sample` is awaited for each turn, on the loop that searches run on, and the
   rollout sleeps until the first turn or search arrives (`vllm_server`, `chat_endpoint`).

A turn ends when its text holds a stop string, at an end-of-sequence token, or at its token limit. The ids returned are
the ids sampled, also when the closing tag ends inside a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from zerosearch.errors import UserError
from zerosearch.protocol import STOP_STRINGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "eos", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and at which strings a turn ends.

    With temperature and top_p at 1.0, log-probabilities are those of the distribution sampled from; temperature 0 is
    greedy.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = STOP_STRINGS

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise UserError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}: it must lie in (0, 1]")


@dataclass(frozen=True)
class TurnRequest:
    """One turn to sample. `context_ids` holds all ids of the trajectory so far and only grows from turn to turn."""

    trajectory: int
    context_ids: Sequence[int]
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class SampledTurn:
    """What was sampled, a log-probability for each id; "length" means that the token limit cut the turn off."""

    trajectory: int
    token_ids: list[int]
    logprobs: list[float]
    finish: FinishReason


class GenerationError(RuntimeError):
    """A turn could not be sampled. The message names the inference engine, its address, and the remedy."""


class Generator(Protocol):
    """What the rollout needs of an inference engine in this process."""

    tokenizer: PreTrainedTokenizerBase
    max_context_tokens: int

    def session(self, sampling: Sampling) -> AbstractContextManager[None]:
        """Hold the engine ready for one rollout; turns are submitted and sampled inside it only."""
        ...

    def submit(self, request: TurnRequest) -> None:
        """Queue a turn; a trajectory has at most one turn in flight."""
        ...

    def step(self) -> list[SampledTurn]:
        """Advance the turns in flight and return those that ended."""
        ...

    def release(self, trajectory: int) -> None:
        """Forget a trajectory: no further turn of it will be submitted."""
        ...


@runtime_checkable
class SharedGenerator(Generator, Protocol):
    """A generator whose engine also works for others: other ranks, or a simulator whose replies this rollout awaits.

    A rollout that has no turn in flight calls `attend` instead of `step`, again and again while it waits for searches.
    Between ranks every step is a collective call: all make the same calls in the same order, and leaving the session
    waits until every rank is done with its rollout.
    """

    def attend(self) -> None:
        """Take part in what others need of the engine. Returns soon, also when there is nothing to do."""
        ...


@runtime_checkable
class RemoteGenerator(Protocol):
    """What the rollout needs of an inference engine behind a network.

    At most `max_concurrency` turns are awaited at once, each for at most `RolloutSettings.turn_timeout_s`. `name` says
    in messages what the engine is and where.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    max_context_tokens: int
    max_concurrency: int

    def session(self, sampling: Sampling) -> AbstractContextManager[None]:
        """Sample in this way during one rollout. Raises `GenerationError` if the engine cannot be reached."""
        ...

    async def sample(self, request: TurnRequest) -> SampledTurn:
        """Return a turn. Raises `GenerationError` once bounded retries are spent, which ends the rollout."""
        ...
