"""Length, shape, diversity and likeness of documents, on texts whose numbers are counted by hand."""

from __future__ import annotations

import math

import pytest

from zerosearch.simulator.likeness import (
    distinct_n,
    jaccard,
    length_distance,
    mean,
    overlap_between,
    overlap_within,
    rouge_n,
    shape,
    words,
)


def test_words_are_without_case_articles_and_punctuation() -> None:
    assert words("The cat's on a MAT.") == ["cats", "on", "mat"]


def test_distinct_n_is_the_share_of_different_ngrams() -> None:
    documents = ["red fish blue fish", "red fish"]
    assert distinct_n(documents, 1) == 3 / 6  # red, fish, blue
    assert distinct_n(documents, 2) == 3 / 4  # red fish twice
    assert math.isnan(distinct_n(documents, 5))
    assert math.isnan(distinct_n([], 1))


def test_overlaps() -> None:
    assert jaccard("red fish", "blue fish") == pytest.approx(1 / 3)
    assert math.isnan(jaccard("", " "))
    assert overlap_within(["red fish", "red fish", "blue bird"]) == pytest.approx(1 / 3)
    assert math.isnan(overlap_within(["alone"]))
    assert overlap_between([["red", "fish"], ["fish red"]]) == 1.0
    assert overlap_between([["red fish"], ["blue fish"]]) == pytest.approx(1 / 3)


def test_rouge_counts_shared_ngrams_with_their_number() -> None:
    # 4 words against 3; shared: fish (once of two), red.
    assert rouge_n(["red fish", "blue fish"], ["red fish swims"], 1) == pytest.approx(2 * 2 / 7)
    # 2 against 2 bigrams, none across documents; shared: red fish.
    assert rouge_n(["red fish", "blue fish"], ["red fish swims"], 2) == pytest.approx(2 * 1 / 4)
    assert math.isnan(rouge_n(["red"], [], 1))


def test_shape_of_a_document() -> None:
    assert shape("Jane Austen: wrote Emma in 1815.") == {
        "words": 6,
        "characters_per_word": pytest.approx((4 + 7 + 5 + 4 + 2 + 5) / 6),
        "has_title": 1.0,
        "ends_a_sentence": 1.0,
        "has_digit": 1.0,
        "capitalised_words": 0.5,
    }
    plain = shape("she said: no")
    assert (plain["has_title"], plain["ends_a_sentence"], plain["has_digit"]) == (1.0, 0.0, 0.0)
    assert shape("one two three four five six seven eight nine ten eleven: x")["has_title"] == 0.0


def test_length_distance_is_the_largest_gap_of_the_distributions() -> None:
    assert length_distance(["a b", "a b c"], ["x y", "x y z"]) == 0.0
    assert length_distance(["a", "b"], ["x y", "x y z"]) == 1.0
    assert length_distance(["a", "b c"], ["x y", "x y"]) == 0.5
    assert math.isnan(length_distance([], ["x"]))


def test_a_mean_passes_over_what_is_no_number() -> None:
    assert mean([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(mean([]))
