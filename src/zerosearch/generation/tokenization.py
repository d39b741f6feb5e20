"""Between text and token ids, to the letter; added tokens that text from outside spells out are plain text.

An added token (`<|im_end|>`, Qwen3's `<think>`) is matched before anything else is tokenised, whether it is marked as
special or not. So text from outside is cut inside each one it spells out, and no other text is touched.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from zerosearch.errors import UserError
from zerosearch.protocol import format_observation
from zerosearch.text import any_token, cut_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=8)
def added_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds any added token of a tokenizer in a text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return any_token({*tokenizer.all_special_tokens, *(token.content for token in added)})


def plain_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Break up added tokens that a text spells out, "<|im_end|>" to "< |im_end|>", so that no model sees them."""
    return " ".join(cut_tokens(added_tokens(tokenizer), text))


def text_token_ids(tokenizer: PreTrainedTokenizerBase, text: str, kept: Collection[str] = ()) -> list[int]:
    """Tokenise what the environment says: nothing put in front, and added tokens spelled out are plain text.

    Those of `kept` are tokens, as a policy would sample them.
    """
    # No warning if it is long.
    options = {"add_special_tokens": False, "split_special_tokens": not kept, "verbose": False}
    pieces = cut_tokens(added_tokens(tokenizer), text, kept)
    if not (skipped := space_before(tokenizer)):
        return [token_id for piece in pieces for token_id in tokenizer(piece, **options)["input_ids"]]
    return [one for piece in pieces for one in tokenizer(f"\n{piece}", **options)["input_ids"][skipped:]]


@lru_cache(maxsize=8)
def space_before(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many ids a line break takes at the start of a text, for a tokenizer that puts a space in front.

    So do SentencePiece's of Llama 2 and Mistral; behind a line break, which joins no other piece, a text comes out as
    it would in the middle of another. 0 for any other tokenizer.
    """
    alone, line_break = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("x", "\n"))
    return 0 if decoded_text(tokenizer, alone * 2) == "xx" else len(line_break)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the special tokens: those that have a role, and all that were added as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    roles = getattr(tokenizer, "all_special_ids", ())
    return frozenset({*roles, *(token_id for token_id, token in added.items() if token.special)})


def decoded_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Return the text of ids to the letter: special tokens spelled out, no space before a full stop tidied away."""
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def chat_messages(tokenizer: PreTrainedTokenizerBase, messages: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return messages as a chat template takes them: added tokens in them are plain text.

    An empty system message is left out where the template refuses one, as Gemma's does. Raises `UserError` for one
    with content there.
    """
    from jinja2 import TemplateError

    plain = [{**message, "content": plain_text(message["content"], tokenizer)} for message in messages]
    if tokenizer.chat_template is not None and plain[0]["role"] == "system":
        try:
            tokenizer.apply_chat_template(plain[:2], tokenize=False)
        except TemplateError as error:
            if plain[0]["content"]:
                raise UserError(f"the model's chat template refuses a system message ({error})") from error
            return plain[1:]
    return plain


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    is_plain: bool = False,
    **template_options: Any,
) -> list[int]:
    """Tokenise a prompt: messages by the chat template where the tokenizer has one, else their plain text.

    All of a prompt counts as text from outside, unless it `is_plain`: written around parts that went through
    `plain_text`. Without a template the text gets what the tokenizer puts first (a BOS token for Llama's base models).
    `template_options` are those of `apply_chat_template`.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not is_plain:
        messages = chat_messages(tokenizer, messages)
    if tokenizer.chat_template is None or isinstance(prompt, str):
        return tokenizer("".join(message["content"] for message in messages))["input_ids"]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **template_options
    )
    return encoded["input_ids"]


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
