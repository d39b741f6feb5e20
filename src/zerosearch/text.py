"""Text from outside, made fit for use where it enters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

UNENCODABLE = re.compile("[\x00\ud800-\udfff]")
# Control characters but for tab and line feed, what sets the direction of writing or ends a line, half characters.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")


def clean_text(text: str) -> str:
    """Replace NUL and lone surrogates, halves of a character that no tokenizer or file takes, by U+FFFD."""
    return UNENCODABLE.sub("\ufffd", text)


def printable(text: str) -> str:
    """Write as escapes, such as "\\x1b", the characters that a terminal or a page would obey instead of showing."""
    return UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def clean_json(content: Any) -> Any:
    """Clean every text in decoded JSON, names included."""
    if isinstance(content, str):
        return clean_text(content)
    if isinstance(content, list):
        return [clean_json(item) for item in content]
    if isinstance(content, dict):
        return {clean_text(name): clean_json(item) for name, item in content.items()}
    return content


def any_token(names: Iterable[str]) -> re.Pattern[str]:
    """Return what finds any of these tokens in a text; single characters and runs of spaces do not count."""
    found = sorted((name for name in names if len(name) > 1 and not name.isspace()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)) or "(?!)")


def cut_tokens(tokens: re.Pattern[str], text: str, kept: Collection[str] = ()) -> Iterator[str]:
    """Yield the pieces of a text that is cut behind the first character of each token it spells out but for `kept`."""
    start = place = 0
    while match := tokens.search(text, place):
        if match.group() in kept:
            place = match.end()
            continue
        yield text[start : match.start() + 1]
        start = place = match.start() + 1
    yield text[start:]


def without_thoughts(text: str) -> str:
    """Return what a reasoning model says after its last thought, "" if a thought was cut off.

    Chat templates may write the opening `<think>`, so that the reply holds the closing tag alone.
    """
    answer = text.rpartition("</think>")[2]
    return "" if "<think>" in answer else answer
