"""A real byte-level BPE tokenizer and a tiny random policy, shared by the tests of rollouts and training."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports the Hub's client: no test asks the network for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # torch's threads would compete with the other worker's
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DO_NOT_TRACK"] = "1"

import pytest
from hypothesis import settings

if TYPE_CHECKING:  # the process that hands the tests out needs none of it
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

pytest_plugins = ("http_servers", "chat_server", "hub_stub", "paid_search", "recipe_modules")  # fixtures

settings.register_profile("alike", derandomize=True, database=None, deadline=None)  # every run tries the same cases
settings.load_profile("alike")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with slow tests first, so that no worker is left alone with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Put back the handlers that a recipe sets."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def launcher_variables() -> Iterator[None]:
    """Remove what TRL leaves when it makes a colocated vLLM, by which a later process would take itself for a rank."""
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test wait half a second before a service is asked again."""
    monkeypatch.setattr("zerosearch.http.FIRST_BACK_OFF_S", 0.01)


TEXT = (
    "<think>\nWho wrote Emma?\n</think>\n<search> Emma author </search>\n\n<information>Doc 1: Emma is a novel by "
    "Jane Austen.\nDoc 2: It rains.</information>\n\n<think> It is she.</think>\n<answer> Jane Austen </answer>\n"
)
WORDS = "Emma Jane Austen rain novel born who where".split()
CONTEXTS = ["Who wrote {}?", "x", "{}.</information>\n\n", "Let me try again.\n"]
TURNS = ["<search> {} {} </search>\n"] * 5 + ["<answer> {} </answer>."] * 2 + [" {} {} {}<|endoftext|>", "{} " * 15]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE without pre-tokenisation, so that its merges run across words, tags and line breaks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=6,
    )
    tokenizer.train_from_iterator([TEXT] * 3 + ["</search>\n</answer>\n"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_policy_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 130,000 parameters that can search, answer and fail, all three badly; saved with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # No Qwen2: for that type, AutoTokenizer builds Qwen2's tokenizer whatever the saved one is (transformers 5.17).
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32, the smallest head that vLLM takes on a CPU
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    teach_turns(model, tiny_tokenizer, steps=100)
    directory = tmp_path_factory.mktemp("tiny-policy")
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def teach_turns(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Train on turns of random words, in pieces tokenised one by one as in a rollout; far from enough to be good."""
    import torch

    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = []
        for _ in range(12):
            pieces = [rng.choice(choices).format(*rng.choices(WORDS, k=16)) for choices in [CONTEXTS, TURNS] * 4]
            rows.append([token_id for piece in pieces for token_id in tokenizer(piece)["input_ids"]])
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
