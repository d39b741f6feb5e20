"""Generators whose every step is a collective call: all ranks must make the same calls in the same order.

Two engines are such: vLLM with tensor parallelism, where each rank holds a part of every layer, and a transformers
model under ZeRO-3 that is not gathered as a whole, where each forward pass gathers it layer by layer.

Before each step the ranks agree, in one small all-reduce on the CPU, whether any of them has work, is not done yet, or
has failed. So a turn joins at any token here, too: a rank whose trajectories are all at their searches, or have ended,
takes part in the steps of the others, and no rank waits for another one's searches. What is a collective call besides:
leaving the session, where a rank stays until all are done, and a failure, which ends the rollout on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from zerosearch.generation import GenerationError, SampledTurn, Sampling, TurnRequest
from zerosearch.generation.transformers_engine import TransformersGenerator
from zerosearch.generation.vllm_colocated import VLLMGenerator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl.generation.vllm_generation import VLLMGeneration

REST_S = 0.002  # between two looks, while every rank waits for searches


class Ranks:
    """Ranks that step together; each makes every call below, in the same order as the others."""

    def __init__(self, size: int, timeout_s: float) -> None:
        """Part all ranks of the job into groups of `size` neighbours. Every rank of the job must do this.

        A rank that lets the others of its group wait for more than `timeout_s` ends the rollout.
        """
        groups = [list(range(first, first + size)) for first in range(0, distributed.get_world_size(), size)]
        # On the CPU: to agree must not wait for what is queued on an accelerator.
        self.group, _ = distributed.new_subgroups_by_enumeration(
            groups, timeout=timedelta(seconds=timeout_s), backend="gloo"
        )
        self.rank = distributed.get_rank(self.group)
        self.timeout_s = timeout_s

    def any_of(self, *flags: bool) -> list[bool]:
        """Return, for each flag, whether any rank raised it."""
        raised = torch.tensor(flags, dtype=torch.int32)  # (flags,)
        with self._in_time():
            distributed.all_reduce(raised, distributed.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in raised.tolist()]

    def gathered(self, value: Any) -> list[Any]:
        """Return the value of each rank, by rank."""
        values = [None] * distributed.get_world_size(self.group)
        with self._in_time():
            distributed.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo has no error of its own
            raise GenerationError(
                f"another rank ended, or was not heard of for {self.timeout_s:g} s, during the rollout; its own "
                f"message says why: {error}"
            ) from error


class StepsTogether:
    """The steps of a rank in agreement with the others; a subclass says what a step is."""

    ranks: Ranks

    def step(self) -> list[SampledTurn]:
        finished, _ = self._agreed_step(done=False)
        return finished

    def attend(self) -> None:
        self._agreed_step(done=False)

    @contextmanager
    def _until_all_are_done(self) -> Iterator[None]:
        """Stay until every rank is done; leave at once, all together, when one fails."""
        self.between_steps = True
        try:
            yield
        except BaseException:
            # In the midst of a step the others listen no longer; the end of this process will tell them.
            if self.between_steps:
                self.ranks.any_of(False, False, False, True)
            raise
        unfinished = True
        while unfinished:
            _, unfinished = self._agreed_step(done=True)

    def _agreed_step(self, done: bool) -> tuple[list[SampledTurn], bool]:
        """Make a step if any rank has work; return the turns of this rank that ended, and whether any is not done."""
        self.between_steps = False
        flags = self._has_submitted(), self._has_work(), not done, False
        any_submitted, any_work, any_unfinished, any_failed = self.ranks.any_of(*flags)
        if any_failed:
            raise GenerationError("another rank gave up its rollout; its own message says why")
        finished = []
        if any_work:
            finished = self._step_with_others(any_submitted)
        elif not done:
            time.sleep(REST_S)
        self.between_steps = True
        return finished, any_unfinished

    def _has_submitted(self) -> bool:
        """Say whether there are turns that the other ranks do not know of."""
        raise NotImplementedError

    def _has_work(self) -> bool:
        raise NotImplementedError

    def _step_with_others(self, any_submitted: bool) -> list[SampledTurn]:
        raise NotImplementedError


class ShardedTransformersGenerator(StepsTogether, TransformersGenerator):
    """Decode with a model whose forward pass is a collective call: one pass a step on every rank, or none on any.

    A rank without a turn to decode runs the model over one token, and forgets it.
    """

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks = ranks

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        with TransformersGenerator.session(self, sampling), self._until_all_are_done():
            yield

    def _has_submitted(self) -> bool:
        return False  # each rank decodes its own

    def _has_work(self) -> bool:
        return bool(self.waiting or self.active)

    def _step_with_others(self, any_submitted: bool) -> list[SampledTurn]:
        if self._has_work():
            return TransformersGenerator.step(self)
        self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.model.device), use_cache=False)
        return []


class TensorParallelGenerator(StepsTogether, VLLMGenerator):
    """Drive a vLLM engine whose ranks each hold a part of the model, and so must all be told the same.

    Every rank hands the turns of all of them to its part of the engine, by rank, and keeps what comes of its own.
    """

    def __init__(self, ranks: Ranks, colocated: VLLMGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(colocated.llm, tokenizer, colocated)
        self.ranks = ranks
        self.submitted: list[TurnRequest] = []
        self.own: set[str] = set()

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        self.submitted, self.own = [], set()
        with VLLMGenerator.session(self, sampling), self._until_all_are_done():
            yield

    def submit(self, request: TurnRequest) -> None:
        self.submitted.append(request)

    def _has_submitted(self) -> bool:
        return bool(self.submitted)

    def _has_work(self) -> bool:
        return bool(self.submitted or self.in_flight)

    def _step_with_others(self, any_submitted: bool) -> list[SampledTurn]:
        if any_submitted:
            for rank, requests in enumerate(self.ranks.gathered(self.submitted)):
                numbers = {self._add(request) for request in requests}
                if rank == self.ranks.rank:
                    self.own |= numbers
            self.submitted = []
        turns = {output.request_id: self._sampled_turn(output) for output in self._finished_outputs()}
        return [turn for number, turn in turns.items() if number in self.own]
