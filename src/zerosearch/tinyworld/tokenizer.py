"""TinyWorld's tokenizer: a token for each of its words, tags and document headers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from zerosearch.prompts import INVALID_ACTION_HINT, TINYWORLD, simulator_messages
from zerosearch.protocol import format_observation
from zerosearch.tinyworld import world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
# Messages as they are, one after another; an assistant's ends the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
# Tags and document headers are one token each; everything else splits as in GPT-2.
TOKEN_PATTERN = (
    r" ?</?(?:think|search|information|answer)>|Doc \d+:"
    r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}<]+|<|\s+(?!\S)|\s+"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build TinyWorld's tokenizer: a byte-level BPE whose vocabulary is the 256 bytes and every word of the world.

    It encodes any text without loss, and a word that TinyWorld does not use byte by byte. Tags are ordinary tokens.
    The chat template passes messages through, so that a chat endpoint serves a model that has never seen roles.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TOKEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = (word for text in _all_texts() for word, _ in splitter.pre_tokenize_str(text))
    tokens = dict.fromkeys([END_OF_TEXT, PADDING, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _all_texts() -> Iterator[str]:
    """Yield texts that hold every word of TinyWorld, with and without the space before it where both occur."""
    names = (*world.FIRST_NAMES, *world.LAST_NAMES, *world.CITY_NAMES, *world.CITY_PREFIXES, *world.COUNTRY_NAMES)
    names += (*world.WORK_ADJECTIVES, *world.WORK_NOUNS, *world.ORGANISATION_NAMES, *world.ORGANISATION_KINDS)
    yield " ".join(["", "The", *names, "Republic of"])
    yield " ".join(["", *(str(year) for year in range(world.FIRST_YEAR, world.LAST_YEAR + 1))])
    for relation in world.RELATIONS:
        yield f" {relation.statement} {relation.noun} unknown.".format("The", "The")
        yield relation.question.format("the")
        yield f" {relation.question}".format("the")
    yield " ".join(["", *world.FILLERS, "Look up.", world.COMPARISON.format("A", "B")])
    yield TINYWORLD.policy.prompt("Who?")
    yield INVALID_ACTION_HINT
    for noisy in (False, True):
        messages = simulator_messages(
            question="Who?", golden_answers=["A"], query="A", noisy=noisy, template=TINYWORLD.simulator
        )
        yield messages[-1]["content"]
    yield format_observation(["A"] * 6)
    for tag in ("think", "search", "information", "answer"):
        yield f"<{tag}> <{tag}> </{tag}>\n</{tag}>"
