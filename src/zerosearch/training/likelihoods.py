"""What the policy thinks of texts that it did not sample: for advantages that ask how near an answer is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence

from zerosearch.training.micro_batches import compact_lm_head, scored_logps

if TYPE_CHECKING:
    from zerosearch.training.trainer import SearchTrainer


@torch.no_grad()
def log_likelihoods(trainer: SearchTrainer, texts: Sequence[tuple[Sequence[int], str, str]]) -> list[float]:
    """Return the mean log-probability of a token of each text, under the policy as it is.

    A text comes as the token ids before it, the words that lead over to it, and itself. Every rank makes the same
    call, scores its share and gets all.
    """
    if not texts:
        return []
    share = -(-len(texts) // trainer.accelerator.num_processes)
    first = trainer.accelerator.process_index * share
    own = [texts[min(place, len(texts) - 1)] for place in range(first, first + share)]  # as many on each rank
    encode = partial(trainer._tokenizer.encode, add_special_tokens=False)
    contexts = [torch.tensor([*ids, *encode(words)]) for ids, words, _ in own]
    wanted = [torch.tensor(encode(text)) for *_, text in own]
    join = partial(pad_sequence, batch_first=True)
    ids = torch.cat([join(contexts, padding_side="left"), join(wanted)], 1)  # (B, P + C)
    scored = join([torch.ones_like(text) for text in wanted])  # (B, C)
    mask = torch.cat([join([torch.ones_like(context) for context in contexts], padding_side="left"), scored], 1)
    size, device = trainer.args.per_device_train_batch_size, trainer.accelerator.device
    with trainer.accelerator.autocast(), compact_lm_head():
        logps, *_ = scored_logps(trainer.model, ids.to(device), mask.to(device), scored.bool().to(device), size)
    return gather_object((logps.sum(1).cpu() / scored.sum(1)).tolist())[: len(texts)]
