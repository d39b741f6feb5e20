"""Excerpts: short, about what they say, and never without the answer that the passage holds."""

from __future__ import annotations

import random

import pytest

from zerosearch.data import Passage
from zerosearch.metrics import holds_answer
from zerosearch.simulator.excerpts import excerpt

EMMA = Passage(
    "Emma (novel)",
    "Emma is set in the village of Highbury. It was written by Jane Austen from January 1814. It is about a "
    "matchmaker who is wrong. The rain in it is much discussed. It came out in December 1815, in three volumes, with "
    "a title page that names 1816. John Murray of Albemarle St. in London published it.",
)


def test_a_short_passage_is_kept_whole() -> None:
    assert excerpt(Passage("Emma", "It is a novel."), 30, "Emma") == "Emma: It is a novel."


def test_the_sentence_with_the_answer_is_kept_and_what_follows_it() -> None:
    assert excerpt(EMMA, 16, "Emma author", ["Jane Austen"]) == (
        "Emma (novel): It was written by Jane Austen from January 1814. It is about a matchmaker who is wrong."
    )


def test_without_an_answer_the_sentence_nearest_to_the_query_is_kept() -> None:
    assert excerpt(EMMA, 10, "who published it in London") == (
        "Emma (novel): John Murray of Albemarle St. in London published it."
    )


def test_a_long_sentence_is_cut_around_the_answer_and_says_so() -> None:
    sentence = " ".join(f"w{n}" for n in range(100))
    text = excerpt(Passage("", sentence), 10, "q", ["w49 W50"])
    words = text.split()
    assert words[0] == words[-1] == "..." and len(words) == 14
    assert {"w49", "w50"} <= set(words) and text == excerpt(Passage("", sentence), 10, "q", ["w49 W50"])
    assert excerpt(Passage("", sentence), 10, "q") == " ".join(f"w{n}" for n in range(12)) + " ..."


@pytest.mark.parametrize(
    ("passage", "answer"),
    [
        (Passage("", "one two three four five. " + "Six words are in here now. " * 9), "five six"),  # over a full stop
        (Passage("Pride and Prejudice", "A novel of manners. " * 20), "Pride and Prejudice"),  # in the title
        (
            Passage("The great Jane", "Austen wrote it. " + "There is more to say of her. " * 20),
            "Jane Austen",
        ),  # in both
    ],
)
def test_an_answer_in_an_odd_place_is_kept(passage: Passage, answer: str) -> None:
    assert holds_answer(passage.document, [answer])
    assert holds_answer(excerpt(passage, 8, "something else", [answer]), [answer])


def test_an_excerpt_of_anything_is_short_and_keeps_the_answer() -> None:
    rng, held = random.Random(0), 0.0
    words = [*"a b. c! The Dr. J. St. U.S. d? e, 1999 Über".split(), "  ", "\n"]
    for _ in range(2000):
        text = " ".join(rng.choices(words, k=rng.randint(1, 120)))
        if not text.strip():
            continue
        passage = Passage(rng.choice(["", "A title", "The very long title of a work in many words"]), text.strip())
        start = rng.randrange(len(passage.document.split()))
        answer = " ".join(passage.document.split()[start : start + rng.randint(1, 4)])
        result = excerpt(passage, 15, "c d", [answer])
        assert 1 <= len(result.split()) <= 18 + 2
        held += holds_answer(passage.document, [answer])  # "The" alone counts as no word, so it occurs nowhere
        assert holds_answer(result, [answer]) == holds_answer(passage.document, [answer])
    assert held > 1500
