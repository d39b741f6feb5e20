"""Between text and token ids, to the letter; special tokens that a text spells out are taken as plain text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from zerosearch.errors import UserError
from zerosearch.protocol import format_observation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise what the environment says: nothing put in front, and special tokens spelled out are plain text.

    A rollout's own time goes here: a fast tokenizer's backend, called directly, takes a third less of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # Whoever used it last may have left these set; a call of the tokenizer itself sets what it needs.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


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
) -> tuple[str, list[int], bool]:
    """Write the observation within a token budget: the longest documents lose their ends first, the tags nothing.

    `write` puts documents into the form that the policy reads. Returns the text, its ids, and whether it had to be
    cut. Raises `UserError` if even empty documents do not fit.
    """
    documents = [" ".join(document.split()) for document in documents]

    def written(longest: int) -> tuple[str, list[int]]:
        text = write([document[:longest] for document in documents])
        return text, encode(text)

    longest = max(map(len, documents), default=0)
    text, token_ids = written(longest)
    if len(token_ids) <= max_tokens:
        return text, token_ids, False
    too_long, excess = longest, len(token_ids)
    fits = 0
    text, token_ids = written(fits)
    if len(token_ids) > max_tokens:
        raise UserError(f"max_observation_tokens is {max_tokens}: tags and numbers alone need {len(token_ids)} tokens")
    # Near enough is a token a document. To tokenise is where a rollout's own time goes: a search by share needs it two
    # or three times, where halving needs it ten times.
    while too_long - fits > 1 and len(token_ids) < max_tokens - len(documents):
        share = (max_tokens - len(token_ids)) / (excess - len(token_ids))
        middle = length_between(documents, fits, too_long, share)
        shorter = written(middle)
        if len(shorter[1]) <= max_tokens:
            fits, (text, token_ids) = middle, shorter
        else:
            too_long, excess = middle, len(shorter[1])
    return text, token_ids, True


def length_between(documents: Sequence[str], low: int, high: int, share: float) -> int:
    """Return a length between two others at which the documents have this share of the characters between them."""

    def characters(longest: int) -> int:
        return sum(min(len(document), longest) for document in documents)

    wanted = characters(low) + share * (characters(high) - characters(low))
    return bisect_left(range(low + 1, high - 1), wanted, key=characters) + low + 1
