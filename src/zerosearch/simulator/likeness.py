"""What generated documents are like: their length, shape and diversity, and how near they come to real ones.

Words are those of `normalize_answer`: lower case, without punctuation and articles. Every function takes texts and
returns plain numbers; where there is nothing to measure, NaN.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean

from zerosearch.metrics import normalize_answer

TITLE = re.compile(r"^(?:\S+ ){0,9}\S+: ")  # "Jane Austen: ...", at most ten words before the colon
END_OF_SENTENCE = re.compile(r"[.!?][\"')\]]?$")


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return normalize_answer(text).split()


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Yield every run of `n` words."""
    tokens = words(text)
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def distinct_n(documents: Sequence[str], n: int) -> float:
    """Return the share of the documents' n-grams that are different ones: distinct-n of Li et al. (2016)."""
    counts = Counter(gram for document in documents for gram in ngrams(document, n))
    return len(counts) / counts.total() if counts else math.nan


def jaccard(first: str, second: str) -> float:
    """Return how many words two texts share, of all that occur in either."""
    ours, theirs = set(words(first)), set(words(second))
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else math.nan


def overlap_within(documents: Sequence[str]) -> float:
    """Return the mean Jaccard overlap of two documents of one reply: 1 if all say the same."""
    return mean([jaccard(first, second) for first, second in combinations(documents, 2)])


def overlap_between(samples: Sequence[Sequence[str]]) -> float:
    """Return the mean Jaccard overlap of two replies to the same prompt."""
    return mean([jaccard(" ".join(first), " ".join(second)) for first, second in combinations(samples, 2)])


def rouge_n(documents: Sequence[str], real: Sequence[str], n: int) -> float:
    """Return the F1 of the n-grams of all generated with those of all real documents (ROUGE-n, without stemming)."""
    ours = Counter(gram for document in documents for gram in ngrams(document, n))
    theirs = Counter(gram for document in real for gram in ngrams(document, n))
    if not ours or not theirs:
        return math.nan
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def shape(document: str) -> Mapping[str, float]:
    """Return what a document looks like, without regard to what it says."""
    return {
        "words": len(document.split()),
        "characters_per_word": mean([len(word) for word in document.split()]),
        "has_title": float(bool(TITLE.match(document))),
        "ends_a_sentence": float(bool(END_OF_SENTENCE.search(document))),
        "has_digit": float(any(character.isdigit() for character in document)),
        "capitalised_words": mean([word[0].isupper() for word in document.split()]),
    }


def length_distance(documents: Sequence[str], real: Sequence[str]) -> float:
    """Return the Kolmogorov-Smirnov distance of their lengths in words, 0 (the same lengths) to 1 (none shared)."""
    if not documents or not real:
        return math.nan
    ours, theirs = (sorted(len(text.split()) for text in texts) for texts in (documents, real))
    bounds = sorted(set(ours) | set(theirs))
    return max(abs(_share_up_to(ours, bound) - _share_up_to(theirs, bound)) for bound in bounds)


def mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are numbers, NaN if there are none."""
    finite = [value for value in values if not math.isnan(value)]
    return fmean(finite) if finite else math.nan


def _share_up_to(ordered: Sequence[int], bound: int) -> float:
    return sum(value <= bound for value in ordered) / len(ordered)
