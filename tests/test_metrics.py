"""EM, cover EM and F1 on cases written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from zerosearch.metrics import cover_exact_match, exact_match, f1, normalize_answer


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Beatles", "beatles"),
        ("a Cat and an Ant", "cat and ant"),
        ("Theatre anthem banana", "theatre anthem banana"),
        ("U.S.A.", "usa"),
        ("rock 'n' roll!", "rock n roll"),
        ("twenty-one", "twentyone"),
        ("\tNew\nYork ", "new york"),
        ("Beyoncé", "beyoncé"),
        ("ÅNGSTRÖM", "ångström"),
        # string.punctuation is ASCII: typographic signs stay.
        ("Schindler’s List", "schindler’s list"),
        ("1939–1945", "1939–1945"),
        # Nothing would remain, so the words stay.
        ("A", "a"),
        ("The The", "the the"),
        ("?", "?"),
        ("", ""),
        ("  ", ""),
    ],
)
def test_normalize_answer(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


# prediction, golden answers, EM, cover EM, F1
CASES = [
    ("Jane Austen", ["Jane Austen"], 1.0, 1.0, 1.0),
    ("jane austen.", ["The Jane Austen"], 1.0, 1.0, 1.0),
    # Characters within a word are no containment.
    ("Sudan", ["Dan"], 0.0, 0.0, 0.0),
    ("Dan", ["Sudan"], 0.0, 0.0, 0.0),
    # Naming several answers covers, and is no exact match: one shared word of 5 and 1.
    ("Paris or London or Beijing", ["Beijing"], 0.0, 1.0, 2 * 1 / (5 + 1)),
    # The words must stand together and in order to cover.
    ("York is New", ["New York"], 0.0, 0.0, 2 * 2 / (3 + 2)),
    ("New York City", ["New York"], 0.0, 1.0, 2 * 2 / (3 + 2)),
    ("York", ["New York"], 0.0, 0.0, 2 * 1 / (1 + 2)),
    # A word repeated counts as often as both hold it.
    ("new new new york", ["new york"], 0.0, 1.0, 2 * 2 / (4 + 2)),
    # The best of several golden answers counts, in any position.
    ("Austen", ["Jane Austen", "Austen"], 1.0, 1.0, 1.0),
    ("J. Austen", ["Austen", "Jane Austen"], 0.0, 1.0, 2 * 1 / (2 + 1)),
    ("London", ["Paris", "Rome"], 0.0, 0.0, 0.0),
    # No answer scores nothing, whatever is accepted.
    (None, ["Beijing"], 0.0, 0.0, 0.0),
    (None, [""], 0.0, 0.0, 0.0),
    ("", [""], 0.0, 0.0, 0.0),
    # An empty golden answer matches nothing (the paper's code: everything), and spoils no other.
    ("Beijing", [""], 0.0, 0.0, 0.0),
    ("Beijing", ["", "Beijing"], 1.0, 1.0, 1.0),
    # Golden answers made of articles or signs equal themselves only.
    ("a", ["A"], 1.0, 1.0, 1.0),
    ("the", ["A"], 0.0, 0.0, 0.0),
    ("anything", ["?"], 0.0, 0.0, 0.0),
    ("beyoncé", ["Beyoncé"], 1.0, 1.0, 1.0),
    ("Beyonce", ["Beyoncé"], 0.0, 0.0, 0.0),
    ("東京", ["東京"], 1.0, 1.0, 1.0),
    ("yes", ["no"], 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("prediction", "golden_answers", "em", "cover_em", "f1_score"), CASES)
def test_scores(
    prediction: str | None, golden_answers: list[str], em: float, cover_em: float, f1_score: float
) -> None:
    assert exact_match(prediction, golden_answers) == em
    assert cover_exact_match(prediction, golden_answers) == cover_em
    assert f1(prediction, golden_answers) == pytest.approx(f1_score)


@pytest.mark.parametrize("metric", [exact_match, cover_exact_match, f1])
def test_golden_answers_must_be_a_list_with_something_in_it(metric: Callable[..., float]) -> None:
    with pytest.raises(TypeError, match="got the string 'Beijing'"):
        metric("B", "Beijing")
    with pytest.raises(ValueError, match="golden_answers is empty"):
        metric("Beijing", [])
