"""What the policy thinks of texts that it did not sample."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from zerosearch.training import likelihoods
from zerosearch.training.likelihoods import log_likelihoods
from zerosearch.training.trainer import SearchTrainer

MakeTrainer = Callable[..., SearchTrainer]


def test_the_likelihood_of_a_text_is_that_of_its_tokens_after_their_context(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(per_device_train_batch_size=4)
    encode, model = trainer._tokenizer.encode, trainer.model
    before, words, text = encode("Who wrote Emma?"), "<answer> ", "Jane Austen"
    ids = torch.tensor([[*before, *encode(words), *encode(text)]])
    start = ids.shape[1] - len(encode(text))
    with torch.no_grad():
        logps = model(input_ids=ids).logits.log_softmax(-1)
    expected = torch.stack([logps[0, place - 1, ids[0, place]] for place in range(start, ids.shape[1])]).mean()
    others = [(before * 3, "", "rain"), (encode("x"), "<think>", "Emma Jane Austen novel"), (before, "", "Emma")] * 2
    found = log_likelihoods(trainer, [*others, (before, words, text)])
    assert log_likelihoods(trainer, []) == []
    assert len(found) == 7 and found[:3] == pytest.approx(found[3:6], abs=1e-5)
    assert found[-1] == pytest.approx(expected.item(), abs=1e-4)


def test_ranks_score_equal_shares_and_all_get_all(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    texts = [([1, 2, 3], "", word) for word in ("Emma", "rain", "Jane Austen", "novel", "born")]
    alone = log_likelihoods(trainer, texts)
    shares: list[list[float]] = []
    monkeypatch.setattr(likelihoods, "gather_object", lambda share: shares.append(share) or share)
    accelerator = trainer.accelerator
    for rank in range(3):
        trainer.accelerator = SimpleNamespace(
            num_processes=3, process_index=rank, device=accelerator.device, autocast=accelerator.autocast
        )
        log_likelihoods(trainer, texts)
    assert [len(share) for share in shares] == [2, 2, 2], "as many forward passes on each rank"
    assert [value for share in shares for value in share][:5] == pytest.approx(alone, abs=1e-5)
