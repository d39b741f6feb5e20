"""Exact match, cover exact match and F1: the one definition that rewards, evaluation and reports share.

Each takes the policy's answer (`None` when it gave none: score 0) and the golden answers, and returns the best score
over those, in [0, 1].
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
NUMBER_OR_WORD = re.compile(r"(?<!\w)\d+(?:(?:,\d{3})+(?:\.\d+)?|\.\d+)(?!\w)|[^\W_]+")  # 3,500 and 3.5 are whole
ASCII_SIGNS = str.maketrans("\u2018\u2019\u02bc\u2010\u2011", "'''--")
INVISIBLE = re.compile("[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
FOREIGN_SIGN = re.compile(r"[^\w\s\x00-\x7f]")


def normalize_answer(text: str) -> str:
    """Lower the case, drop ASCII punctuation and the articles a, an, the, and collapse white space (Section 4.1).

    A text of which nothing would remain ("A", "The The", "?") keeps its words and signs, so that it equals itself only
    and not every other such text: our choice, the paper does not say.
    """
    lowered = text.lower()
    normalized = " ".join(ARTICLES.sub(" ", lowered.translate(WITHOUT_PUNCTUATION)).split())
    return normalized or " ".join(lowered.split())


def exact_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """Score 1 if the prediction equals a golden answer once both are normalised, else 0 (Section 4.1)."""
    predicted, golden = _normalized(prediction, golden_answers)
    return float(bool(predicted) and predicted in golden)


def cover_exact_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """Score 1 if the words of a golden answer stand, in order and together, in the prediction, else 0.

    Whole words, where the paper's code compares characters: "Sudan" does not cover "Dan".
    """
    predicted, golden = _normalized(prediction, golden_answers)
    return float(any(answer and f" {answer} " in f" {predicted} " for answer in golden))


def f1(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """Score the best harmonic mean of word precision and recall over the golden answers (Section 3.5)."""
    predicted, golden = _normalized(prediction, golden_answers)
    return max(_word_f1(predicted.split(), answer.split()) for answer in golden)


METRICS: Mapping[str, Callable[[str | None, Sequence[str]], float]] = {
    "em": exact_match,
    "f1": f1,
    "cover_em": cover_exact_match,
}


def holds_answer(document: str, golden_answers: Sequence[str]) -> bool:
    """Say whether the words of a golden answer stand, in order and together, in a document as pages are written.

    Unicode counts: composed and decomposed letters are alike, curly quotes and dashes are signs, what is invisible is
    not there. A sign within a word may join or part it: "U.S." is "US", and "Lisbon-born" and "Austen's" hold "Lisbon"
    and "Austen". Exact match stays the paper's.
    """
    if isinstance(golden_answers, str):
        raise TypeError(f"golden_answers must be a list of strings, got the string {golden_answers!r}")
    texts = [_readings(text) for text in (document, *golden_answers)]
    return any(
        words and f" {words} " in f" {held} " for held, *answers in zip(*texts, strict=True) for words in answers
    )


def _readings(text: str) -> tuple[str, str]:
    """Return the words of a text without its punctuation, and with punctuation taken for spaces."""
    if not text.isascii():
        text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).translate(ASCII_SIGNS)
    return normalize_answer(FOREIGN_SIGN.sub(" ", text)), " ".join(NUMBER_OR_WORD.findall(text.lower()))


def _word_f1(predicted: list[str], golden: list[str]) -> float:
    shared = sum((Counter(predicted) & Counter(golden)).values())
    return 2 * shared / (len(predicted) + len(golden)) if shared else 0.0


def _normalized(prediction: str | None, golden_answers: Sequence[str]) -> tuple[str, list[str]]:
    # A string is a sequence of strings too: without this check its letters would be the golden answers.
    if isinstance(golden_answers, str):
        raise TypeError(f"golden_answers must be a list of strings, got the string {golden_answers!r}")
    if not golden_answers:
        raise ValueError("golden_answers is empty: nothing to compare an answer with")
    return normalize_answer(prediction or ""), [normalize_answer(answer) for answer in golden_answers]
