"""A real byte-level BPE tokenizer and a tiny random policy, shared by the tests of rollouts and training."""

from __future__ import annotations

import math
import os
from pathlib import Path

# Before anything imports the Hub's client: no test asks the network for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TEXT = (
    "<think>\nWho wrote Emma?\n</think>\n<search> Emma author </search>\n\n<information>Doc 1: Emma is a novel by Jane "
    "Austen.\nDoc 2: It rains.</information>\n\n<think> It is Jane Austen.</think>\n<answer> Jane Austen </answer>\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Likely tokens of the random policy: opening tags, and closing tags with something behind them in the same token.
P_TAGS = {"<search>": 0.1, "</search>\n": 0.05, "<answer>": 0.06, "</answer>.": 0.02}


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE without pre-tokenisation, so that its merges run across words, tags and line breaks."""
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
    """A Qwen2 of 150,000 random parameters, most of whose turns search or answer, saved with its tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-policy")
    tiny_tokenizer.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.add_tokens(list(P_TAGS))
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32, the smallest head that vLLM takes on a CPU
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    make_tags_likely(model, tokenizer)
    model.save_pretrained(directory)
    return directory


def make_tags_likely(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Use the first dimension of the hidden state, where every embedding has a large entry, as the head's bias."""
    p_others = (1 - sum(P_TAGS.values())) / (len(tokenizer) - len(P_TAGS))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 20.0
        model.lm_head.weight[:, 0] = 0.0
        for tag, p_tag in P_TAGS.items():
            row = tokenizer.convert_tokens_to_ids(tag)
            model.lm_head.weight[row] *= 0.1
            model.lm_head.weight[row, 0] = math.log(p_tag / p_others) / math.sqrt(model.config.hidden_size)
