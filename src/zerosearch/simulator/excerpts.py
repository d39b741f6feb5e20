"""Cut a passage to the length of a search result, around what matters in it; the same input gives the same excerpt.

Table 2 of the paper asks for documents of about 30 words; how real ones were cut it does not say, so this is ours: the
sentence that holds an answer, or else the one that shares most words with the query, with as many sentences after it
and then before it as fit, and the title in front where the excerpt would not say what it is about.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

from zerosearch.data import Passage
from zerosearch.metrics import holds_answer, normalize_answer

ROOM = 1.2  # an excerpt may take this much more than `num_words`: 36 words for 30
# Not after an initial or an abbreviation: "J. Austen", "St. Louis", "U.S. Army".
END_OF_SENTENCE = re.compile(
    r"(?<!\b[A-Z]\.)(?<!\b(?:St|Dr|Mr|Ms|Jr|Sr|No|vs)\.)(?<!\bMrs\.)(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])"
)
ELLIPSIS = "..."  # as search engines mark a sentence that is cut


def excerpt(passage: Passage, num_words: int, query: str, answers: Sequence[str] = ()) -> str:
    """Return about `num_words` words of a passage, title included, at most a fifth more; marks of cuts come on top.

    What answers the query by one of `answers` is kept: an excerpt holds an answer wherever the passage does.
    """
    limit = max(int(num_words * ROOM), 1)
    if len(passage.document.split()) <= limit:
        return passage.document
    title = passage.title if 2 * len(passage.title.split()) <= limit else ""
    room = limit - len(title.split())
    shortened = Passage(title, _window_of_sentences(passage.text, room, query, answers)).document
    if holds_answer(passage.document, answers) and not holds_answer(
        shortened, answers
    ):  # it runs over the end of a sentence
        shortened = Passage(title, _window_of_words(passage.text, room, answers)).document
    if holds_answer(passage.document, answers) and not holds_answer(shortened, answers):  # it begins in the title
        shortened = _window_of_words(passage.document, limit, answers)
    return shortened


def _window_of_sentences(text: str, room: int, query: str, answers: Sequence[str]) -> str:
    sentences = END_OF_SENTENCE.split(text)
    lengths = [len(sentence.split()) for sentence in sentences]
    wanted = set(normalize_answer(query).split())
    relevance = [
        (holds_answer(sentence, answers), len(wanted & set(normalize_answer(sentence).split())))
        for sentence in sentences
    ]
    first = last = relevance.index(max(relevance))
    if lengths[first] > room:
        return _window_of_words(sentences[first], room, answers)
    while last + 1 < len(sentences) and sum(lengths[first : last + 2]) <= room:
        last += 1
    while first > 0 and sum(lengths[first - 1 : last + 1]) <= room:
        first -= 1
    return " ".join(sentences[first : last + 1])


def _window_of_words(text: str, room: int, answers: Sequence[str]) -> str:
    """Cut a text to `room` words: its beginning if that holds an answer or nothing does, else around the answer."""
    words = text.split()

    def holds(start: int, end: int) -> bool:
        return holds_answer(" ".join(words[start:end]), answers)

    start = 0
    if holds(0, len(words)):
        end = bisect_left(range(len(words)), True, key=lambda end: holds(0, end))  # of the first answer
        begin = bisect_left(range(end), True, key=lambda begin: not holds(begin, end)) - 1
        if room < end <= begin + room:
            start = (end - room + min(begin, len(words) - room) + 1) // 2
    before, after = ELLIPSIS if start else "", ELLIPSIS if start + room < len(words) else ""
    return " ".join(filter(None, (before, *words[start : start + room], after)))
