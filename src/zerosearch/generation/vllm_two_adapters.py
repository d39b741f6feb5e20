"""Turns and simulated searches from one colocated vLLM engine: two adapters over one base, decoded in one batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from zerosearch.generation import SampledTurn, Sampling
from zerosearch.generation.tokenization import prompt_token_ids
from zerosearch.generation.vllm_adapters import SIMULATOR_NUMBER
from zerosearch.generation.vllm_colocated import VLLMGenerator

REST_S = 0.002  # between two looks, while neither a turn nor a reply is under way


@dataclass
class Asked:
    """A reply that the simulator is to write; `text` is set, or raises, once it is written."""

    messages: list[dict[str, str]]
    sampling: dict[str, Any]
    text: Future[str] = field(default_factory=Future)


class TwoAdapterGenerator(VLLMGenerator):
    """Drive an engine that also writes a simulator's replies, by an adapter of its own.

    Replies are asked for on the loop that searches run on. The rollout's thread writes them, in the steps that turns
    are decoded in: in `step` while turns are under way, in `attend` while all trajectories wait for searches.
    """

    def __init__(self, *args: Any, simulator: str) -> None:
        """Take what `VLLMGenerator` takes, and the folder or Hub id of the simulator's adapter."""
        from vllm.lora.request import LoRARequest

        super().__init__(*args)
        path = str(Path(simulator).resolve()) if Path(simulator).exists() else simulator
        self.simulator = LoRARequest("simulator", SIMULATOR_NUMBER, path)  # loaded with its first reply
        self.asked: SimpleQueue[Asked] = SimpleQueue()
        self.replies: dict[str, Asked] = {}

    async def reply(
        self, messages: list[dict[str, str]], temperature: float, max_tokens: int, seed: int | None
    ) -> str:
        """Have the simulator answer messages as the chat endpoint of vLLM's server does, and return its text.

        Raises `ValueError` if prompt and reply do not fit the engine's context.
        """
        asked = Asked(messages, {"temperature": temperature, "max_tokens": max_tokens, "seed": seed})
        self.asked.put(asked)
        return await asyncio.wrap_future(asked.text)

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        """Write no reply beyond the end of the rollout: a search that timed out may have left one."""
        with super().session(sampling):
            try:
                yield
            finally:
                self.engine.abort_request(list(self.replies))
                self.replies.clear()
                self.asked = SimpleQueue()

    def step(self) -> list[SampledTurn]:
        while not self.asked.empty():
            self._add_reply(self.asked.get())
        turns = []
        for output in self._finished_outputs():
            asked = self.replies.pop(output.request_id, None)
            if asked is None:
                turns.append(self._sampled_turn(output))
            else:
                asked.text.set_result(output.outputs[0].text)
        return turns

    def attend(self) -> None:
        if self.replies or not self.asked.empty():
            turns = self.step()
            assert not turns, "no turn is under way"
        else:
            time.sleep(REST_S)

    def _add_reply(self, asked: Asked) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if not asked.text.set_running_or_notify_cancel():  # the search is at its time limit
            return
        token_ids = prompt_token_ids(self.tokenizer, asked.messages)
        room, needed = self.max_context_tokens - len(token_ids), asked.sampling["max_tokens"]
        if room < needed:
            sizes = f"a prompt of {len(token_ids)} tokens and a reply of up to {needed}"
            limit = f"vllm_max_model_length, {self.max_context_tokens}"
            asked.text.set_exception(ValueError(f"{sizes} do not fit {limit}; a longer one works"))
            return
        number = str(next(self.numbers))
        params = SamplingParams(**asked.sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        self.replies[number] = asked
        prompt = {"prompt_token_ids": token_ids}
        self.engine.add_request(number, prompt, params, lora_request=self.simulator)
