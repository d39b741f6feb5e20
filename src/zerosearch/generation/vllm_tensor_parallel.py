"""Turns from a vLLM engine in parts: tensor parallelism, each rank holding a part of every layer.

Every step is a collective call, so all ranks must make the same calls in the same order. Before each step they agree,
in one small all-reduce on the CPU, whether any of them has work, is not done yet, or has failed. So a turn joins at
any token here, too: a rank whose trajectories are all at their searches, or have ended, takes part in the steps of the
others, and no rank waits for another one's searches. Leaving the session is collective as well: a rank stays until all
are done, and a failure ends the rollout on every rank.
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
from zerosearch.generation.vllm_colocated import VLLMGenerator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl.generation.vllm_generation import VLLMGeneration

    from zerosearch.generation.vllm_adapters import ColocatedAdapter

REST_S = 0.002  # between two looks, while every rank waits for searches


class Ranks:
    """Groups of neighbouring ranks that step together; each makes every call below, in the same order."""

    def __init__(self, size: int, timeout_s: float) -> None:
        """Divide all ranks of the job into groups of `size` neighbours. Every rank of the job must do this.

        A rank that keeps the others of its group waiting for more than `timeout_s` ends the rollout.
        """
        groups = [list(range(first, first + size)) for first in range(0, distributed.get_world_size(), size)]
        # On the CPU: agreeing must not wait for what is queued on an accelerator.
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


class TensorParallelGenerator(VLLMGenerator):
    """Drive a vLLM engine whose ranks each hold a part of the model, and so must all be given the same requests.

    Every rank hands the turns of all of them to its part of the engine, by rank, and keeps what comes of its own.
    """

    def __init__(
        self,
        ranks: Ranks,
        colocated: VLLMGeneration,
        tokenizer: PreTrainedTokenizerBase,
        adapter: ColocatedAdapter | None = None,
    ) -> None:
        super().__init__(colocated.llm, tokenizer, colocated, adapter)
        self.ranks = ranks

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        """Stay until every rank is done; leave at once, all together, when one fails."""
        self.submitted: list[TurnRequest] = []
        self.own: set[str] = set()
        self.between_steps = True
        with super().session(sampling):
            try:
                yield
            except BaseException:
                # In the middle of a step the others do not listen; the end of this process will tell them.
                if self.between_steps:
                    self.ranks.any_of(False, False, False, True)
                raise
            unfinished = True
            while unfinished:
                _, unfinished = self._agreed_step(done=True)

    def submit(self, request: TurnRequest) -> None:
        self.submitted.append(request)

    def step(self) -> list[SampledTurn]:
        finished, _ = self._agreed_step(done=False)
        return finished

    def attend(self) -> None:
        self._agreed_step(done=False)

    def _agreed_step(self, done: bool) -> tuple[list[SampledTurn], bool]:
        """Make a step if any rank has work; return the turns of this rank that ended, and whether any is not done."""
        self.between_steps = False
        has_work = bool(self.submitted or self.in_flight)
        flags = self.ranks.any_of(bool(self.submitted), has_work, not done, False)
        any_submitted, any_work, any_unfinished, any_failed = flags
        if any_failed:
            raise GenerationError("another rank gave up its rollout; its own message says why")
        if any_submitted:
            self._add_all()
        finished = []
        if any_work:
            turns = {output.request_id: self._sampled_turn(output) for output in self._finished_outputs()}
            finished = [turn for number, turn in turns.items() if number in self.own]
        elif not done:
            time.sleep(REST_S)
        self.between_steps = True
        return finished, any_unfinished

    def _add_all(self) -> None:
        """Hand the turns that any rank has submitted to this rank's part of the engine, in the order of the ranks."""
        for rank, requests in enumerate(self.ranks.gathered(self.submitted)):
            numbers = {self._add(request) for request in requests}
            if rank == self.ranks.rank:
                self.own |= numbers
        self.submitted = []
