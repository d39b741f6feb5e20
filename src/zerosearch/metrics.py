"""Exact match, cover exact match and F1: the one definition that rewards, evaluation and reports share.

Each takes the policy's answer (`None` when it gave none: score 0) and the golden answers, and returns the best score
over those, in [0, 1].
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


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
