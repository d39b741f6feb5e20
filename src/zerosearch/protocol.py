"""The language between policy and environment: read an action, write an observation, read a simulator's reply.

What counts as an action, in one place:
1. Only what the policy wrote in this turn is read; never the prompt, the documents or an earlier turn.
2. What stands between `<think>` and `</think>` is thought: tags in it are text.
3. The first closing tag, `</answer>` or that of a search, ends the turn. What follows it is ignored.
4. The action's content runs from the last matching opening tag to that closing tag. Other tags inside it are text.
5. No closing tag, a closing tag that nothing opened, or empty content make the turn invalid.
6. A thought left open hides nothing: generation stops at the first closing tag, so the policy had no chance to close
   the thought, and policies trained with the paper's code act that way.
7. "and" is no content: it is what the prompt's own "<search> and </search>" holds, quoted in an open thought.
8. How a search is written is the `Grammar`'s. Where it is the call of a tool, one that is not JSON, names another tool
   or has no query makes the turn invalid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

ActionKind = Literal["search", "answer", "invalid"]

QUOTED_INSTRUCTION = "and"
LONGEST_TITLE_WORDS = 10
TITLED = '(Title: "'


@dataclass(frozen=True)
class Action:
    """What a turn of the policy does: `content` is the query or the answer, stripped, and "" when invalid."""

    kind: ActionKind
    content: str


INVALID = Action("invalid", "")
# The tool that a chat template is told of, in the form that transformers makes of a function.
SEARCH_TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search for documents.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What to search for."}},
            "required": ["query"],
        },
    },
}


@dataclass(frozen=True)
class Grammar:
    """How a policy writes a search: between two tags, as text or as the JSON of a tool call.

    Without tags the call is all that the message holds, and its end of sequence ends it. `arguments` names what holds
    the query in a call; `None`: a search is text. The answer stands between `<answer>` and `</answer>` in any case.
    """

    opening: str
    closing: str
    arguments: str | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Return what ends a turn as soon as it is sampled."""
        return (self.closing, "</answer>") if self.closing else ("</answer>",)

    @property
    def tags(self) -> tuple[str, ...]:
        """Return what a policy writes as a token of its own where the tokenizer has one."""
        return tuple(filter(None, ("<think>", "</think>", "<answer>", "</answer>", self.opening, self.closing)))

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Return what the chat template is told of; `None` where the prompt says it all."""
        return None if self.arguments is None else [SEARCH_TOOL]

    def write_search(self, query: str) -> str:
        """Return the text of a search."""
        if self.arguments is None:
            return f"{self.opening} {query} {self.closing}"
        call = json.dumps({"name": "search", self.arguments: {"query": query}}, ensure_ascii=False)
        return f"{self.opening}\n{call}\n{self.closing}" if self.closing else call

    def read_query(self, text: str) -> str:
        """Return the query of what stands between the tags, "" if it is none."""
        if self.arguments is None:
            return text.strip()
        try:
            call, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
            query = call[self.arguments]["query"] if call["name"] == "search" else None
        except (ValueError, LookupError, TypeError, RecursionError):
            return ""
        return query.strip() if isinstance(query, str) else ""


TAGS = Grammar("<search>", "</search>")
# Qwen2.5, Qwen3, Hermes: <tool_call>\n{"name": "search", "arguments": {"query": ".."}}\n</tool_call>
TOOL_CALLS = Grammar("<tool_call>", "</tool_call>", "arguments")
# Llama 3.1 to 3.3: {"name": "search", "parameters": {"query": ".."}} and nothing else
BARE_CALLS = Grammar("", "", "parameters")
STOP_STRINGS = TAGS.stop_strings


def parse_action(turn_text: str, grammar: Grammar = TAGS) -> Action:
    """Read the action in what the policy wrote in one turn, by the rules at the top of this file."""
    text = without_closed_thoughts(turn_text)
    ends = [(place, stop) for stop in grammar.stop_strings if (place := text.find(stop)) >= 0]
    if not ends and grammar.closing:
        return INVALID
    end, closing = min(ends, default=(len(text), grammar.closing))
    is_answer = closing == "</answer>"
    content = text[:end]
    if opening := "<answer>" if is_answer else grammar.opening:
        _, found, content = content.rpartition(opening)
        if not found:
            return INVALID
    content = content.strip() if is_answer else grammar.read_query(content)
    if not content or content == QUOTED_INSTRUCTION:
        return INVALID
    return Action("answer" if is_answer else "search", content)


def without_closed_thoughts(text: str) -> str:
    """Return a text with a space in place of each thought, so that what stood around it cannot join into a tag.

    A thought runs from `<think>` to the next `</think>`. Takes linear time, where a lazy regular expression reads the
    rest of the text again for every `<think>` that is left open.
    """
    *closed, rest = text.split("</think>")
    parts = (before.partition("<think>") for before in closed)
    return "".join(before + (" " if opening else "</think>") for before, opening, _ in parts) + rest


def format_documents(documents: Sequence[str]) -> str:
    """Number documents as the simulator's own output is: "Doc 1: ..." to "Doc 5: ...", one to a line."""
    lines = (" ".join(document.split()) for document in documents)
    return "\n".join(f"Doc {number}: {line}" for number, line in enumerate(lines, start=1))


def format_observation(documents: Sequence[str]) -> str:
    """Write what the environment appends after a search; with no documents the information is empty."""
    return f"\n\n<information>{format_documents(documents)}</information>\n\n"


def titled_documents(documents: Sequence[str], titles: Sequence[str]) -> tuple[str, ...]:
    """Return documents as Search-R1 shows them, behind their title: `(Title: "Emma") Emma is a novel.`

    A text that itself begins with "Emma: " loses that. Where an engine gives no `titles`, they are those of
    `split_title`. A document without a title stays as it is.
    """
    titled = []
    for document, title in zip_longest(documents, titles, fillvalue=""):
        title, text = (title, document.removeprefix(f"{title}: ")) if titles else split_title(document)
        titled.append(f'{TITLED}{title}") {text}' if title else document)
    return tuple(titled)


def split_title(document: str) -> tuple[str, str]:
    """Return title and text of a document "title: text"; the title is "" where it would be longer than ten words."""
    title, *text = re.split(r":\s+", document.strip(), maxsplit=1)
    return (title, text[0]) if text and len(title.split()) <= LONGEST_TITLE_WORDS else ("", document.strip())


def format_titled_observation(documents: Sequence[str]) -> str:
    """Write an observation of `titled_documents` as Search-R1 does: `Doc 1(Title: "Emma") Emma is a novel.`, ..."""
    lines = (" ".join(document.split()) for document in documents)
    numbered = (
        f"Doc {number}{line}" if line.startswith(TITLED) else f"Doc {number}: {line}"
        for number, line in enumerate(lines, start=1)
    )
    return "\n\n<information>" + "\n".join(numbered) + "</information>\n\n"


# "Doc 3:" anywhere, bold or not; where a line starts, "Doc:" without its number, "[Doc 3]", "### Document 3 - " or
# "Doc 3" alone on its line as well. Prose says "Doc" too, so no more than that. Every repetition is bounded: a reply
# may be thousands of asterisks. (\uff1a is the full-width colon, \u2013 and \u2014 are dashes.)
_WORD = r"Doc(?:ument)?\.?"
_NUMBER = r"[ \t]{0,4}(?:#|No\.?)?[ \t]{0,4}(\d{1,4})"
_REMARK = r"(?:[ \t]{0,4}\([^()\n]{0,40}\))?"  # "Doc 3 (useful):"
_BOLD = r"[ \t]{0,4}\*{0,3}[ \t]{0,4}"
_LINE_START = r"^[ \t]{0,8}[#>*\[(<-]{0,4}[ \t]{0,4}\*{0,3}[\[(<]?"
DOCUMENT_HEADER = re.compile(
    rf"(?<!\w)\*{{0,3}}{_WORD}{_NUMBER}{_REMARK}{_BOLD}[:\uff1a]"
    rf"|{_LINE_START}{_WORD}{_NUMBER}{_REMARK}{_BOLD}(?:[\])>]{{1,2}}{_BOLD}[:\uff1a.\u2013\u2014-]?|[.\u2013\u2014-](?=\s)|$)"
    rf"|{_LINE_START}{_WORD}{_BOLD}[:\uff1a]",
    re.MULTILINE | re.IGNORECASE,
)
LIST_MARKER = re.compile(r"^\s{0,8}(?:\**\(?\d{1,2}[.):]\)?\**|[-*•])\s+")
WORD_CHARACTER = re.compile(r"[^\W_]")


def split_documents(text: str, num_documents: int) -> tuple[str, ...]:
    """Split a simulator's reply into at most `num_documents` documents, each on one line and with a letter or digit.

    Survives lost numbers, a preamble, markdown, blank lines, too many documents and a last one cut short. A reply
    without a header counts each item of its list as a document, or each line where there is no list. Only a reply
    that holds no words besides headers gives none.
    """
    headers = list(DOCUMENT_HEADER.finditer(text))
    before = text[: headers[0].start()] if headers else text
    bounds = [*(header.start() for header in headers[1:]), len(text)] if headers else []
    pieces = [text[header.end() : end] for header, end in zip(headers, bounds, strict=True)]
    if headers and "2" in headers[0].groups():  # the first document lost its header: this is no preamble
        pieces.insert(0, before)
    return (_documents(pieces) or _documents(_items(before.split("\n"))))[:num_documents]


def is_well_formed(text: str, num_documents: int) -> bool:
    """Say whether a reply is "Doc 1: ..." to "Doc `num_documents`: ...", a line each, and nothing else.

    Blank lines between them do not count: the paper's models write them.
    """
    documents = split_documents(text, num_documents)
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
    return len(documents) == num_documents and lines == format_documents(documents).split("\n")


def _documents(pieces: Sequence[str]) -> tuple[str, ...]:
    """Return the pieces that hold a word, each on one line."""
    documents = (" ".join(piece.replace("**", "").split()) for piece in pieces)
    return tuple(document for document in documents if WORD_CHARACTER.search(document))


def _items(lines: Sequence[str]) -> list[str]:
    """Return the items of a list, or the lines where there are fewer than two items.

    A line that follows an item directly continues it; one after a gap, or before the first item, is no part of a list.
    Where there is no list, a first line that ends in a colon only announces the rest.
    """
    items: list[list[str]] = []
    in_item = False
    for line in lines:
        if LIST_MARKER.match(line):
            items.append([LIST_MARKER.sub("", line)])
            in_item = True
        elif not line.strip():
            in_item = False
        elif in_item:
            items[-1].append(line)
    if len(items) > 1:
        return [" ".join(item) for item in items]
    written = [LIST_MARKER.sub("", line) for line in lines if line.strip()]
    return written[1:] if written and written[0].rstrip(" *").endswith(":") else written
