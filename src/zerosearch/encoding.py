"""Between text and token ids, to the letter; special tokens that a text spells out are taken as plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from zerosearch.errors import UserError
from zerosearch.protocol import format_observation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise what the environment says: nothing put in front, and special tokens spelled out are plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def decoded_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Return the text of ids to the letter: special tokens spelled out, no space before a full stop tidied away."""
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Tokenise a prompt: messages by the chat template where the tokenizer has one, else their plain text.

    Without a template the text gets what the tokenizer puts first (a BOS token for Llama's base models).
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [{**message, "content": plain_text(message["content"], tokenizer)} for message in messages]
    if tokenizer.chat_template is None or isinstance(prompt, str):
        return tokenizer("".join(message["content"] for message in messages))["input_ids"]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return encoded["input_ids"]


def plain_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Break up special tokens that a text spells out, "<|im_end|>" to "< |im_end|>", so that no model sees them."""
    for token in tokenizer.all_special_tokens:
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def fit_observation(
    documents: Sequence[str],
    max_tokens: int,
    encode: Callable[[str], list[int]],
    write: Callable[[Sequence[str]], str] = format_observation,
) -> tuple[str, list[int]]:
    """Write the observation within a token budget: the longest documents lose their ends first, the tags nothing.

    `write` puts documents into the form that the policy reads. Returns the text and its ids. Raises `UserError` if
    even empty documents do not fit.
    """
    documents = [" ".join(document.split()) for document in documents]

    def written(longest: int) -> tuple[str, list[int]]:
        text = write([document[:longest] for document in documents])
        return text, encode(text)

    low, high = 0, max(map(len, documents), default=0)
    text, token_ids = written(high)
    if len(token_ids) <= max_tokens:
        return text, token_ids
    while low < high:  # the greatest length, in characters, at which the observation fits
        middle = (low + high + 1) // 2
        if len(written(middle)[1]) <= max_tokens:
            low = middle
        else:
            high = middle - 1
    text, token_ids = written(low)
    if len(token_ids) > max_tokens:
        raise UserError(f"max_observation_tokens is {max_tokens}: tags and numbers alone need {len(token_ids)} tokens")
    return text, token_ids
