"""The tags between policy and environment: read an action, write an observation, read a simulator's reply.

What counts as an action, in one place:
1. Only what the policy wrote in this turn is read; never the prompt, the documents or an earlier turn.
2. What stands between `<think>` and `</think>` is thought: tags in it are text.
3. The first closing `</search>` or `</answer>` ends the turn. What follows it is ignored.
4. The action's content runs from the last matching opening tag to that closing tag. Other tags inside it are text.
5. No closing tag, a closing tag that nothing opened, or empty content make the turn invalid.
6. A thought left open hides nothing: generation stops at the first closing tag, so the policy had no chance to close
   the thought, and policies trained with the paper's code act that way.
7. "and" is no content: it is what the prompt's own "<search> and </search>" holds, quoted in an open thought.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

STOP_STRINGS = ("</search>", "</answer>")

ActionKind = Literal["search", "answer", "invalid"]

CLOSED_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
END_OF_TURN = re.compile("|".join(STOP_STRINGS))
QUOTED_INSTRUCTION = "and"
LONGEST_TITLE_WORDS = 10


@dataclass(frozen=True)
class Action:
    """What a turn of the policy does: `content` is the query or the answer, stripped, and "" when invalid."""

    kind: ActionKind
    content: str


INVALID = Action("invalid", "")


def parse_action(turn_text: str) -> Action:
    """Read the action in what the policy wrote in one turn, by the rules at the top of this file."""
    text = CLOSED_THOUGHT.sub(" ", turn_text)  # a space, so that what stood around a thought cannot join into a tag
    end = END_OF_TURN.search(text)
    if end is None:
        return INVALID
    kind: ActionKind = "search" if end.group() == "</search>" else "answer"
    _, opening_tag, content = text[: end.start()].rpartition(f"<{kind}>")
    content = content.strip()
    if not opening_tag or not content or content == QUOTED_INSTRUCTION:
        return INVALID
    return Action(kind, content)


def format_documents(documents: Sequence[str]) -> str:
    """Number documents as the simulator's own output is: "Doc 1: ..." to "Doc 5: ...", one to a line."""
    lines = (" ".join(document.split()) for document in documents)
    return "\n".join(f"Doc {number}: {line}" for number, line in enumerate(lines, start=1))


def format_observation(documents: Sequence[str]) -> str:
    """Write what the environment appends after a search; with no documents the information is empty."""
    return f"\n\n<information>{format_documents(documents)}</information>\n\n"


def format_titled_observation(documents: Sequence[str]) -> str:
    """Write an observation as Search-R1 does: `Doc 1(Title: "Emma") Emma is a novel.`, a line each.

    The title is what stands before the first ": ", where engines put it, unless that is long for a title.
    """
    lines = []
    for number, document in enumerate(documents, start=1):
        title, colon, text = " ".join(document.split()).partition(": ")
        if not colon or len(title.split()) > LONGEST_TITLE_WORDS:
            title, text = "", " ".join(document.split())
        lines.append(f'Doc {number}(Title: "{title}") {text}')
    return "\n\n<information>" + "\n".join(lines) + "</information>\n\n"


# "Doc 3:" anywhere, bold or not; "Doc:" without its number only where a line starts, as prose says "Doc" too.
DOCUMENT_HEADER = re.compile(
    r"(?<!\w)\**Doc(?:ument)?[ \t]*(?P<number>\d+)[ \t]*\**[ \t]*:|^[ \t]*\**Doc(?:ument)?[ \t]*\**[ \t]*:",
    re.MULTILINE | re.IGNORECASE,
)
LIST_MARKER = re.compile(r"^\s*(?:\**\d{1,2}[.)]\**|[-*•])\s+")


def split_documents(text: str, num_documents: int) -> tuple[str, ...]:
    """Split a simulator's reply into at most `num_documents` documents, each on one line and not empty.

    Survives lost numbers, a preamble, markdown bold, blank lines, too many documents and a last one cut short. A reply
    without a header counts each line as a document. Only a reply that holds no text besides headers gives none.
    """
    headers = list(DOCUMENT_HEADER.finditer(text))
    if headers:
        bounds = [*(header.start() for header in headers[1:]), len(text)]
        pieces = [text[header.end() : end] for header, end in zip(headers, bounds, strict=True)]
        if headers[0]["number"] == "2":  # the first document lost its header: this is no preamble
            pieces.insert(0, text[: headers[0].start()])
    else:
        pieces = [LIST_MARKER.sub("", line) for line in text.splitlines()]
    documents = (" ".join(piece.replace("**", "").split()) for piece in pieces)
    return tuple(document for document in documents if document)[:num_documents]
