"""recipes/random_model.py: a tokenizer that is loaded as it was saved, and weights that write tags."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_modules import Refusal, as_flags, load_recipe
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerosearch.files import sole_writer

TEXT = "Who's <search> Emma, 1815 </search>\n\n  Ünïcode <answer>don't</answer>?"


def test_the_tokenizer_is_lossless_and_loaded_as_it_was_saved(random_model: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(random_model)
    ids = loaded(TEXT)["input_ids"]
    assert ids == Tokenizer.from_file(str(random_model / "tokenizer.json")).encode(TEXT).ids
    assert loaded.decode(ids) == TEXT
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": TEXT}]
    assert loaded.apply_chat_template(messages, tokenize=False) == TEXT
    for tag in ("<search>", "</search>", "<answer>", "</answer>"):
        assert len(loaded(tag)["input_ids"]) == 1


def test_tags_are_as_likely_as_they_should_be(random_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    model = AutoModelForCausalLM.from_pretrained(random_model)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits
    probabilities = logits.softmax(-1)[0].mean(0)  # (V,)
    expected = {"<search>": 0.10, "</search>": 0.03, "<answer>": 0.05, "</answer>": 0.015}
    found = {tag: probabilities[tokenizer.convert_tokens_to_ids(tag)].item() for tag in expected}
    assert found == pytest.approx(expected, rel=0.3)


def test_the_seed_decides_the_weights(corpus: Path, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        flags = {"corpus": corpus, "output_dir": tmp_path / name, "vocab_size": 300, "seed": seed}
        load_recipe("random_model").main(as_flags(flags))
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = weights("a", seed=1)
    assert weights("b", seed=1) == first
    assert weights("c", seed=2) != first


def test_a_full_folder_is_left_alone_and_so_is_one_in_use(refusal: Refusal, corpus: Path, tmp_path: Path) -> None:
    flags = ["--corpus", str(corpus), "--output_dir", str(tmp_path)]
    with sole_writer(tmp_path):
        assert "another run is writing to" in refusal("random_model", flags)
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty" in refusal("random_model", flags)
