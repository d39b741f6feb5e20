"""Turns from a vLLM engine in this process: the trainer's colocated one, or a new one for evaluation and chat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from zerosearch.generation import FinishReason, SampledTurn, Sampling, TurnRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm import LLM, RequestOutput

    from zerosearch.generation.vllm_adapters import ColocatedAdapter


# Of every turn that vLLM samples, in this process or behind its server.
TURN_OPTIONS = {
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,  # or else a special token inside a tag would close it
    "spaces_between_special_tokens": False,
    "logprobs": 0,  # of the sampled token alone
}


class VLLMGenerator:
    """Drive a vLLM engine that lives in this process: a turn is admitted the moment it is submitted."""

    def __init__(
        self,
        llm: LLM,
        tokenizer: PreTrainedTokenizerBase,
        colocated: VLLMGeneration | None = None,
        adapter: ColocatedAdapter | None = None,
    ) -> None:
        """Take the engine and, in training, TRL's owner of it, which knows about sleep and weights.

        `adapter` is the policy's where the engine holds it apart from its base.
        """
        self.llm = llm
        self.engine = llm.llm_engine
        self.tokenizer = tokenizer
        self.colocated, self.adapter = colocated, adapter
        self.max_context_tokens = self.engine.model_config.max_model_len
        self.numbers = count()
        self.in_flight: dict[str, TurnRequest] = {}

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        """Wake a sleeping engine once for the rollout, and put it back to sleep at its end."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.params = partial(
            SamplingParams,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=list(sampling.stop_strings),
            **TURN_OPTIONS,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        sleeps = self.colocated is not None and self.colocated.enable_sleep_mode
        if self.colocated is not None and sleeps:
            if self.colocated._llm_weights_sleeping:  # level 2 drops the weights: they must come from the trainer
                self.colocated.sync_weights()
            self.llm.wake_up(tags=["kv_cache"])
        try:
            yield
        finally:
            self.engine.abort_request(list(self.in_flight))  # only when the rollout was left by an error
            self.in_flight.clear()
            if self.colocated is not None and sleeps:
                self.llm.sleep(level=1 if self.adapter else 2)  # a base that no sync brings waits in the host's memory
                self.colocated._llm_weights_sleeping = True

    def submit(self, request: TurnRequest) -> None:
        self._add(request)

    def _add(self, request: TurnRequest) -> str:
        """Hand a turn to the engine, and return the number by which the engine knows it."""
        number = str(next(self.numbers))
        params = self.params(seed=request.seed, max_tokens=request.max_new_tokens)
        self.in_flight[number] = request
        adapter = self.adapter.request if self.adapter else None
        self.engine.add_request(number, {"prompt_token_ids": list(request.context_ids)}, params, lora_request=adapter)
        return number

    def step(self) -> list[SampledTurn]:
        return [self._sampled_turn(output) for output in self._finished_outputs()]

    def _finished_outputs(self) -> list[RequestOutput]:
        return [output for output in self.engine.step() if output.finished]

    def release(self, trajectory: int) -> None:
        """Do nothing: the prefix cache evicts by itself."""

    def _sampled_turn(self, output: RequestOutput) -> SampledTurn:
        request = self.in_flight.pop(output.request_id)
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        logprobs = [entry[token_id].logprob for entry, token_id in zip(completion.logprobs, token_ids, strict=True)]
        finish = finish_of(completion.finish_reason, completion.stop_reason)
        return SampledTurn(request.trajectory, token_ids, logprobs, finish)


def finish_of(finish_reason: str, stop_reason: str | int | None) -> FinishReason:
    """Return how a turn ended, from what vLLM says; at an end of sequence its `stop_reason` is None or an id."""
    if finish_reason != "stop":
        return "length"
    return "stop" if isinstance(stop_reason, str) else "eos"
