"""Make a small model that knows nothing, to try the whole pipeline on real data without downloading weights.

Trains a byte-level BPE tokenizer on the passages of a corpus and saves it beside a Llama with random weights:

    python recipes/random_model.py --corpus wiki_passages.jsonl --output_dir outputs/random-model
    python recipes/evaluate.py --model outputs/random-model --dataset qa.jsonl --corpus wiki_passages.jsonl \
        --temperature 1 --max_turn_tokens 64 --output_dir outputs/random-evaluation

By chance it would hardly ever write a whole tag. So each tag is one token, and a likely one: most of its turns search
or answer. The chat template passes each message through as it is, so the model serves as policy and as simulator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import read_passages
from zerosearch.files import claim_output_dir, sole_writer

END_OF_TEXT = "<|endoftext|>"
P_TAGS = {"<search>": 0.10, "</search>": 0.03, "<answer>": 0.05, "</answer>": 0.015}  # at each token
HIDDEN_SIZE, NUM_HEADS = 64, 2  # heads of 32: vLLM's attention on a CPU takes no smaller ones
PASS_THROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass
class RandomModelArguments:
    """What to make; these give about 600,000 parameters."""

    corpus: str = field(metadata={"help": "JSONL file of passages in wiki-18's format, to train the tokenizer on."})
    output_dir: str = field(metadata={"help": "Folder for the model and the tokenizer; must be new or empty."})
    vocab_size: int = field(
        default=4096, metadata={"min": 257, "help": "Number of tokens; 256 of them are the single bytes."}
    )
    seed: int = field(default=0, metadata={"min": 0, "help": "Seed of the random weights."})


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text can be encoded, and decoding gives it back unchanged. Tags come on top."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(P_TAGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        chat_template=PASS_THROUGH,
        clean_up_tokenization_spaces=False,
    )


def random_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a small Llama with random weights for the tokenizer's vocabulary.

    Not a Qwen2: with a model of that type, transformers 5.17 loads Qwen2's own tokenizer in place of the saved one.
    """
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=3,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    make_tags_likely(model, tokenizer)
    return model


def make_tags_likely(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give each tag about the probability of `P_TAGS`, whatever came before.

    A 1 in the first dimension of every input embedding outweighs the random rest, so the state before the output
    layer, whose length is sqrt(HIDDEN_SIZE), is about sqrt(HIDDEN_SIZE) there: the constant that a bias needs.
    """
    p_others = (1 - sum(P_TAGS.values())) / (len(tokenizer) - len(P_TAGS))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        for tag, p_tag in P_TAGS.items():
            row = tokenizer.convert_tokens_to_ids(tag)
            model.lm_head.weight[row, 0] = math.log(p_tag / p_others) / math.sqrt(HIDDEN_SIZE)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Train the tokenizer, draw the weights, save both."""
    (arguments,) = parse(RandomModelArguments, argv=argv)
    output_dir = Path(arguments.output_dir)
    with sole_writer(output_dir):
        claim_output_dir(output_dir)
        texts = [f"{passage.title}\n{passage.text}" for passage in read_passages(arguments.corpus)]
        tokenizer = train_tokenizer(texts, arguments.vocab_size)
        model = random_model(tokenizer, arguments.seed)
        model.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
    print(f"{output_dir}: {model.num_parameters():,} random parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
