"""Token ids in, sampled token ids and their log-probabilities out: one turn of one trajectory at a time.

Three kinds of generator, by where the work is done:

1. `Generator`: in this thread. `submit` hands it a turn, `step` advances the turns in flight by at least one token and
   returns those that ended, so a new turn joins while others are still being decoded. `VLLMGenerator`, here, drives a
   vLLM engine in this process; `decoding.TransformersGenerator` runs a transformers model.
2. `CollectiveGenerator`: in this thread and, at the same time, in those of other ranks.
3. `RemoteGenerator`: elsewhere, behind a network. `sample` is awaited for each turn, on the loop that searches run on,
   and the rollout sleeps until the first turn or search arrives.

A turn ends when its text holds a stop string, at an end-of-sequence token, or at its token limit. Nothing is decoded
and encoded again: the ids returned are the ids sampled, also when the closing tag ends inside a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from zerosearch.encoding import decoded_text
from zerosearch.errors import UserError
from zerosearch.protocol import STOP_STRINGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm import LLM, RequestOutput

FinishReason = Literal["stop", "eos", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Both at 1.0, log-probabilities are those of the distribution sampled from; 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0

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
    """A turn could not be sampled. The message names the inference engine, where it is, and the remedy."""


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
class CollectiveGenerator(Generator, Protocol):
    """A generator whose every step is a collective call: all ranks make the same calls in the same order.

    A rank that has no turn in flight calls `attend` instead of `step`, again and again while it waits for searches;
    leaving the session waits until every rank is done with its rollout.
    """

    def attend(self) -> None:
        """Take part in what the other ranks do. Returns soon, also when no rank has anything to do."""
        ...


@runtime_checkable
class RemoteGenerator(Protocol):
    """What the rollout needs of an inference engine elsewhere; at most `max_concurrency` turns are awaited at once.

    `name` says in messages what it is and where. A turn has a time limit, `RolloutSettings.turn_timeout_s`.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    max_context_tokens: int
    max_concurrency: int

    def session(self, sampling: Sampling) -> AbstractContextManager[None]:
        """Sample in this way during one rollout. Raises `GenerationError` if the engine is not there."""
        ...

    async def sample(self, request: TurnRequest) -> SampledTurn:
        """Return a turn. Raises `GenerationError` once bounded retries are spent, which ends the rollout."""
        ...


class TurnEnd:
    """Tell when a turn's text holds a stop string, by decoding as little as possible."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = STOP_STRINGS) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = tuple(stop_strings)
        self.last_characters = {text[-1] for text in stop_strings}
        # A token holds at least one byte, so the stop string lies within this many tokens of the end.
        self.tail_tokens = max(len(text) for text in stop_strings)
        self.may_close: dict[int, bool] = {}

    def reached(self, token_ids: Sequence[int]) -> bool:
        """Say whether the last of these ids completes a stop string."""
        last = token_ids[-1]
        if last not in self.may_close:
            text = decoded_text(self.tokenizer, [last])
            self.may_close[last] = any(character in text for character in self.last_characters)
        if not self.may_close[last]:
            return False
        tail = decoded_text(self.tokenizer, token_ids[-self.tail_tokens :])
        return any(text in tail for text in self.stop_strings)


class VLLMGenerator:
    """Drive a vLLM engine that lives in this process: a turn is admitted the moment it is submitted."""

    def __init__(self, llm: LLM, tokenizer: PreTrainedTokenizerBase, colocated: VLLMGeneration | None = None) -> None:
        """Take the engine, and TRL's owner of it if it has one, which knows about sleep and weights."""
        self.llm = llm
        self.engine = llm.llm_engine
        self.tokenizer = tokenizer
        self.colocated = colocated
        self.max_context_tokens = self.engine.model_config.max_model_len
        self.numbers = count()
        self.in_flight: dict[str, TurnRequest] = {}

    @classmethod
    def of_trainer(cls, colocated: VLLMGeneration, tokenizer: PreTrainedTokenizerBase) -> VLLMGenerator:
        """Return a generator on the engine that TRL's trainer has made in this process."""
        return cls(colocated.llm, tokenizer, colocated)

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        """Wake the engine for one rollout if it sleeps, and put it back to sleep once."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.params = partial(
            SamplingParams,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=list(STOP_STRINGS),
            include_stop_str_in_output=True,
            logprobs=0,  # of the sampled token alone
            skip_special_tokens=False,  # or else a special token inside a tag would close it
            spaces_between_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        sleeps = self.colocated is not None and self.colocated.enable_sleep_mode
        if sleeps:
            self._wake()
        try:
            yield
        finally:
            self.engine.abort_request(list(self.in_flight))  # only when the rollout was left by an error
            self.in_flight.clear()
            if sleeps:
                self._sleep()

    def _wake(self) -> None:
        assert self.colocated is not None
        if self.colocated._llm_weights_sleeping:  # level 2 drops the weights: they must come from the trainer again
            self.colocated.sync_weights()
        self.llm.wake_up(tags=["kv_cache"])

    def _sleep(self) -> None:
        assert self.colocated is not None
        self.llm.sleep(level=2)
        self.colocated._llm_weights_sleeping = True

    def submit(self, request: TurnRequest) -> None:
        self._add(request)

    def _add(self, request: TurnRequest) -> str:
        """Hand a turn to the engine, and return the number by which the engine knows it."""
        number = str(next(self.numbers))
        params = self.params(seed=request.seed, max_tokens=request.max_new_tokens)
        self.in_flight[number] = request
        self.engine.add_request(number, {"prompt_token_ids": list(request.context_ids)}, params)
        return number

    def step(self) -> list[SampledTurn]:
        return [self._sampled_turn(output) for output in self._finished_outputs()]

    def _finished_outputs(self) -> list[RequestOutput]:
        return [output for output in self.engine.step() if output.finished]

    def release(self, trajectory: int) -> None:
        """Do nothing: the prefix cache forgets by itself."""

    def _sampled_turn(self, output: RequestOutput) -> SampledTurn:
        request = self.in_flight.pop(output.request_id)
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        logprobs = [entry[token_id].logprob for entry, token_id in zip(completion.logprobs, token_ids, strict=True)]
        finish: FinishReason = "length"
        if completion.finish_reason == "stop":
            # At an end of sequence, the reason is no string but None or an id.
            finish = "stop" if isinstance(completion.stop_reason, str) else "eos"
        return SampledTurn(request.trajectory, token_ids, logprobs, finish)
