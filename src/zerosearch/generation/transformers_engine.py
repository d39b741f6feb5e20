"""The decode loop over a transformers model: many trajectories at once, each at its own pace.

For machines without vLLM, and fast for small models on a CPU, where `generate` with stop strings is not: keys and
values are kept from turn to turn, and a turn joins or leaves at any token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TopPLogitsWarper

from zerosearch.errors import UserError
from zerosearch.generation import FinishReason, SampledTurn, Sampling, TurnRequest
from zerosearch.generation.tokenization import decoded_text


class TurnEnd:
    """Tell when a turn's text holds a stop string, by decoding as little as possible."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.last_characters = {text[-1] for text in stop_strings}
        # A token holds at least one byte, so the stop string lies within this many tokens of the end.
        self.tail_tokens = max(map(len, stop_strings))
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


class SlotCache:
    """Keys and values of many trajectories, one slot each; the token at position p stands in column p.

    So "no column after my own position" is the whole attention mask: padding, free slots and what an earlier owner of
    the slot left behind lie in later columns. What must not be kept is written to a spare last column that none reads.
    """

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []  # per layer (slots, heads, columns + 1, head_dim)
        self.values: list[torch.Tensor] = []
        self.slots = 0
        self.columns = 0

    def reserve(self, slots: int, columns: int) -> None:
        """Make room for this many slots and columns; columns double, so that copies stay rare."""
        if columns > self.columns:
            columns = max(columns, 2 * self.columns, 128)
        more_slots, more_columns = max(slots - self.slots, 0), max(columns - self.columns, 0)
        if more_slots or more_columns:
            self.slots, self.columns = self.slots + more_slots, self.columns + more_columns
            padding = (0, 0, 0, more_columns + 1, 0, 0, 0, more_slots)
            for tensors in (self.keys, self.values):
                tensors[:] = [torch.nn.functional.pad(old[:, :, :-1], padding) for old in tensors]

    def aim(self, slots: torch.Tensor | None, columns: torch.Tensor, visible: int) -> None:
        """Say where the next forward pass writes: `slots` (B,), or None for the first B, and `columns` (B, T)."""
        self.read_slots, self.write_columns, self.visible = slots, columns, visible
        self.write_slots = (torch.arange(len(columns), device=columns.device) if slots is None else slots).unsqueeze(1)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values (B, heads, T, head_dim) and return all that the queries may look at."""
        if layer == len(self.keys):
            shape = (self.slots, keys.shape[1], self.columns + 1, keys.shape[3])
            self.keys.append(keys.new_zeros(shape))
            self.values.append(values.new_zeros(shape))
        return self._write(self.keys[layer], keys), self._write(self.values[layer], values)

    def _write(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        store[self.write_slots, :, self.write_columns] = new.transpose(1, 2)
        if self.read_slots is None:
            return store[: len(self.write_columns), :, : self.visible]
        return store[self.read_slots, :, : self.visible]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns in use; part of the interface that transformers expects of a cache."""
        return self.visible


@dataclass
class ActiveTurn:
    """A turn being decoded: its slot, and what was sampled so far."""

    request: TurnRequest
    slot: int
    random: Random
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersGenerator:
    """Decode with a transformers model, many trajectories at once, keys and values kept from turn to turn.

    `load` yields the model for one rollout (gathered, if it is sharded).
    """

    PREFILL_TOKENS = 16_384  # padded tokens in one forward pass over new context

    def __init__(
        self,
        load: Callable[[], AbstractContextManager[PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        max_context_tokens: int,
    ) -> None:
        self.load = load
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_context_tokens = max_context_tokens

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        """Hold the model in evaluation mode, with an empty cache."""
        with self.load() as model, torch.no_grad():
            check_full_attention(model)
            was_training = model.training
            model.eval()
            self.model, self.sampling = model, sampling
            self.turn_end = TurnEnd(self.tokenizer, sampling.stop_strings)
            self.cache = SlotCache()
            self.waiting: list[TurnRequest] = []  # for the next forward pass over new context
            self.active: list[ActiveTurn] = []
            self.slot_of: dict[int, int] = {}
            self.lengths: list[int] = []  # tokens in the cache, by slot
            self.free_slots: list[int] = []
            try:
                yield
            finally:
                model.train(was_training)
                del self.model, self.cache

    def submit(self, request: TurnRequest) -> None:
        if request.trajectory not in self.slot_of:
            if not self.free_slots:
                self.free_slots.append(len(self.lengths))
                self.lengths.append(0)
            self.slot_of[request.trajectory] = self.free_slots.pop()
        self.waiting.append(request)

    def release(self, trajectory: int) -> None:
        if trajectory in self.slot_of:
            slot = self.slot_of.pop(trajectory)
            self.lengths[slot] = 0
            self.free_slots.append(slot)

    def step(self) -> list[SampledTurn]:
        if self.waiting:
            return self._finished(self._prefill())
        return self._finished(self._decode()) if self.active else []

    def _prefill(self) -> list[ActiveTurn]:
        """Read new context, the shortest first, up to one forward pass; return the turns that begin.

        Rows are padded on the left, so that the last column of each predicts the next token.
        """
        self.waiting.sort(key=self._num_new)
        count = 1
        while count < len(self.waiting) and self._num_new(self.waiting[count]) * (count + 1) <= self.PREFILL_TOKENS:
            count += 1
        requests, self.waiting = self.waiting[:count], self.waiting[count:]
        width = self._num_new(requests[-1])
        self.cache.reserve(len(self.lengths), max(len(request.context_ids) for request in requests))
        turns, ids, positions, columns = [], [], [], []
        for request in requests:
            slot, end = self.slot_of[request.trajectory], len(request.context_ids)
            placed = range(self.lengths[slot], end)
            padding = width - len(placed)
            ids.append([0] * padding + list(request.context_ids[placed.start :]))
            positions.append([0] * padding + list(placed))
            columns.append([self.cache.columns] * padding + list(placed))
            self.lengths[slot] = end
            turns.append(ActiveTurn(request, slot, Random(request.seed)))
        self._forward(turns, [turn.slot for turn in turns], ids, positions, columns)
        self.active += turns
        return turns

    def _num_new(self, request: TurnRequest) -> int:
        return len(request.context_ids) - self.lengths[self.slot_of[request.trajectory]]

    def _decode(self) -> list[ActiveTurn]:
        """Feed each active turn its last token; return them. Where most slots are active, run over all of them."""
        turns = self.active
        self.cache.reserve(len(self.lengths), max(self.lengths[turn.slot] for turn in turns) + 1)
        slots = None if 2 * len(turns) >= len(self.lengths) else [turn.slot for turn in turns]
        rows = len(self.lengths) if slots is None else len(slots)
        ids, positions, columns = ([[value] for _ in range(rows)] for value in (0, 0, self.cache.columns))
        for place, turn in enumerate(turns):
            row = turn.slot if slots is None else place
            ids[row] = [turn.token_ids[-1]]
            positions[row] = columns[row] = [self.lengths[turn.slot]]
            self.lengths[turn.slot] += 1
        self._forward(turns, slots, ids, positions, columns)
        return turns

    def _forward(
        self,
        turns: list[ActiveTurn],
        slots: list[int] | None,
        ids: list[list[int]],  # (B, T), as are the next two
        positions: list[list[int]],
        columns: list[list[int]],
    ) -> None:
        """Run the model, and draw a token for each turn; `slots` None means that row b is slot b.

        A view of all slots saves copying the keys and values of some.
        """
        device = self.model.device
        position_ids = torch.tensor(positions, device=device)  # (B, T)
        visible = int(position_ids.max()) + 1
        slot_index = None if slots is None else torch.tensor(slots, device=device)
        self.cache.aim(slot_index, torch.tensor(columns, device=device), visible)
        seen = torch.arange(visible, device=device) <= position_ids.unsqueeze(-1)  # (B, T, visible)
        lowest = torch.finfo(self.model.dtype).min
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=device).masked_fill_(~seen, lowest)
        logits = self.model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=mask.unsqueeze(1),
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if slots is None:
            logits = logits[torch.tensor([turn.slot for turn in turns], device=device)]
        uniform = torch.tensor([turn.random.random() for turn in turns], dtype=torch.float64)
        token_ids, logprobs = draw(logits, uniform, self.sampling)
        for turn, token_id, logprob in zip(turns, token_ids.tolist(), logprobs.tolist(), strict=True):
            turn.token_ids.append(token_id)
            turn.logprobs.append(logprob)

    def _finished(self, sampled: list[ActiveTurn]) -> list[SampledTurn]:
        """Return those of the turns that their last token ended; the others stay active."""
        reasons = {turn.slot: self._finish_reason(turn) for turn in sampled}
        self.active = [turn for turn in self.active if reasons.get(turn.slot) is None]
        return [
            SampledTurn(turn.request.trajectory, turn.token_ids, turn.logprobs, reason)
            for turn in sampled
            if (reason := reasons[turn.slot])
        ]

    def _finish_reason(self, turn: ActiveTurn) -> FinishReason | None:
        if turn.token_ids[-1] in self.eos_token_ids:
            return "eos"
        if self.turn_end.reached(turn.token_ids):
            return "stop"
        return "length" if len(turn.token_ids) >= turn.request.max_new_tokens else None


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token per row by the inverse of the cumulative distribution, so that each row has its own random stream.

    Takes logits (B, V) and numbers in [0, 1) (B,); returns ids (B,) and the log-probabilities (B,) of the distribution
    that was sampled from (at temperature 0: of the model's own).
    """
    if logits.device.type == "mps":  # which knows no float64
        logits = logits.cpu()
    if sampling.temperature == 0.0:
        logprobs = logits.float().log_softmax(-1)
        token_ids = logprobs.argmax(-1)
    else:
        logprobs = (logits.float() / sampling.temperature).log_softmax(-1)
        if sampling.top_p < 1.0:
            logprobs = TopPLogitsWarper(sampling.top_p)(None, logprobs).log_softmax(-1)
        cumulative = logprobs.exp().double().cumsum(-1)  # in float32, 150,000 additions would lose the tail
        threshold = (uniform.to(cumulative.device) * cumulative[:, -1]).unsqueeze(-1)
        # The first id whose cumulative probability exceeds the threshold; rounding must not lead past the last one.
        token_ids = (cumulative <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)
    return token_ids, logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def check_full_attention(model: PreTrainedModel) -> None:
    """Raise `UserError` for a model whose layers do not all attend to the whole context, or not by a dense mask."""
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise UserError(
            f"generation by transformers needs full attention in every layer, not {sorted(layer_types)}; use vLLM"
        )
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model  # without its adapters
    if "position_ids" not in signature(bare.forward).parameters:
        raise UserError(f"generation by transformers needs position_ids, which {type(bare).__name__} lacks; use vLLM")
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UserError(
            f"generation by transformers needs attn_implementation sdpa or eager, not {implementation!r}; or use vLLM"
        )
