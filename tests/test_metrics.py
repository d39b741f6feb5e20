"""EM, cover EM and F1 on cases written out by hand."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch.metrics import METRICS, cover_exact_match, exact_match, f1, holds_answer, normalize_answer

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


# What the official evaluation scripts of SQuAD and HotpotQA, which normalise alike, make of these texts, but for
# those of which nothing would remain.
NORMALIZED = [
    ("The  Beatles", "beatles"),
    ("a Cat and an Ant", "cat and ant"),
    ("Theatre anthem banana", "theatre anthem banana"),
    ("rock 'n' roll!", "rock n roll"),
    ("twenty-one", "twentyone"),
    ("\tNew\nYork ", "new york"),
    ("ÅNGSTRÖM", "ångström"),
    ("1939–1945", "1939–1945"),  # typographic signs are no ASCII punctuation, and stay
    ("A", "a"),  # nothing would remain, so the words stay
    ("The The", "the the"),
    ("?", "?"),
    ("  ", ""),
    ("1,000,000", "1000000"),
    ("$5.00", "500"),
    ("3.14", "314"),
    ("No. 1", "no 1"),
    ("100%", "100"),
    ("A.D. 79", "ad 79"),
    ("4 a.m.", "4 am"),  # signs go before articles: "a.m." holds none
    ("a-ha", "aha"),
    ("the-the", "thethe"),
    ("An a the b", "b"),
    ("a1 a", "a1"),
    ("C++", "c"),
    ("AT&T", "att"),
    ("the_office", "theoffice"),
    ("An’ so", "’ so"),  # a typographic sign is no punctuation, and ends a word
    ("L’a b", "l’ b"),
    ("“The” End", "“ ” end"),
    ("¿Qué?", "¿qué"),
    ("the\u00a0Cat", "cat"),  # a space that does not break is a space
    ("x\u200by", "x\u200by"),  # one without width is none
    ("İstanbul", "i\u0307stanbul"),
    ("STRASSE ß", "strasse ß"),
    ("Dvořák's 9th", "dvořáks 9th"),
    ("e\u0301clair", "e\u0301clair"),  # two ways to write é stay two
    ("Ａ b", "ａ b"),
    ("日本、東京", "日本、東京"),
]


@pytest.mark.parametrize(("text", "normalized"), NORMALIZED)
def test_normalization_is_that_of_squad_and_hotpotqa(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


def test_scores_differ_from_the_official_scripts_in_two_places() -> None:
    # Where nothing would remain, the official scripts compare "" with "": every such answer equals every other.
    assert exact_match("T.h.e", ["A"]) == 0.0
    # HotpotQA's F1 of yes and no is all or nothing; SQuAD's, which the paper's code uses, counts words.
    assert f1("yes it is", ["yes"]) == pytest.approx(2 * 1 / (3 + 1))


@pytest.mark.parametrize(
    ("document", "answer"),
    [
        ("The novel is by Jane Austen.", "jane austen"),
        ("The capital is \u201cLisbon\u201d, on the Tagus.", "Lisbon"),
        ("La capitale est \u00abLisbonne\u00bb.", "Lisbonne"),
        ("Jane Austen\u2019s novel appeared in 1815.", "Jane Austen"),
        ("Jane Austen's novel appeared in 1815.", "Jane Austen"),
        ("The Austens' novel.", "Austens"),
        ("The Lisbon-born painter.", "Lisbon"),
        ("He reigned 1815\u20131832 in Lisbon.", "1815"),
        ("He reigned 1815-1832 in Lisbon.", "1832"),
        ("The city\u2014Lisbon\u2014lies on the Tagus.", "Lisbon"),
        ("Written by Jane Austen/Cassandra.", "Jane Austen"),
        ("Written by Jane Austen\u2026", "Jane Austen"),
        ("Written by Jane Austen.It appeared in 1815.", "Jane Austen"),
        ("Sung by Beyonce\u0301.", "Beyonc\u00e9"),
        ("Sung by Beyonc\u00e9.", "Beyonce\u0301"),
        ("By Saint\u2011Exup\u00e9ry", "Saint-Exup\u00e9ry"),
        ("Sung by Ab\u200bba.", "Abba"),
        ("Sung by Ab\u00adba.", "Abba"),
        ("\uff21\uff22\uff22\uff21", "ABBA"),
        ("It has 3,500 inhabitants.", "3500"),
        ("It has 3500 inhabitants.", "3,500"),
        ("It cost $5 million.", "5 million"),
        ("Played by Peter O\u2019Toole.", "Peter O'Toole"),
        ("\u2022Lisbon \u2022Porto", "Lisbon"),
        ("Lisbon(Portugal)", "Lisbon"),
        ("In the US.", "U.S."),
        ("J.K. Rowling wrote it.", "JK Rowling"),
        ("Spiderman", "Spider-Man"),
        ("\u201cBeatles\u201d", "The Beatles"),
        ("Wind in the Willows", "The Wind in the Willows"),
    ],
)
def test_a_document_holds_an_answer_as_pages_are_written(document: str, answer: str) -> None:
    assert holds_answer(document, [answer])
    assert holds_answer(document, ["nothing of the kind", answer])


@pytest.mark.parametrize(
    ("document", "answers"),
    [
        ("It lies in South Sudan.", ["Dan"]),  # words, not letters
        ("Austen wrote of Jane.", ["Jane Austen"]),  # together and in order
        ("It has 3,500 inhabitants.", ["500", "3"]),  # numbers are whole
        ("It cost 10.5 million.", ["10", "5 million"]),
        ("I am a man.", ["Ama"]),  # spaces part words
        ("Beyonce", ["Beyonc\u00e9"]),  # an accent is part of a letter
        ("Anything.", ["", "?", "\u2014"]),
        ("", ["Jane Austen"]),
        ("Anything.", []),
    ],
)
def test_a_document_does_not_hold_what_only_looks_like_an_answer(document: str, answers: list[str]) -> None:
    assert not holds_answer(document, answers)


def test_exact_match_stays_the_papers_where_documents_are_read_more_freely() -> None:
    for document, answer in (("Peter O\u2019Toole", "Peter O'Toole"), ("Beyonce\u0301", "Beyonc\u00e9")):
        assert holds_answer(document, [answer])
        assert exact_match(document, [answer]) == cover_exact_match(document, [answer]) == 0.0


def test_golden_answers_of_a_document_are_a_list() -> None:
    with pytest.raises(TypeError, match="got the string 'Beijing'"):
        holds_answer("B", "Beijing")


ANSWERS = st.text(st.sampled_from("ab THEthe.,?!é’ 1\n\u2028"), max_size=12) | st.text(max_size=12)
WORDS = st.lists(st.text(st.characters(categories=["L", "Nd"]), min_size=1, max_size=6), min_size=1, max_size=3)


@settings(max_examples=60)
@given(st.none() | ANSWERS, st.lists(ANSWERS, min_size=1, max_size=3), ANSWERS)
def test_metrics_keep_their_properties(prediction: str | None, golden: list[str], other: str) -> None:
    scores = {name: metric(prediction, golden) for name, metric in METRICS.items()}
    assert scores["em"] in (0.0, 1.0) and scores["cover_em"] in (0.0, 1.0) and 0.0 <= scores["f1"] <= 1.0
    assert scores["em"] <= min(scores["cover_em"], scores["f1"])  # an exact match is covered, and has every word
    for name, metric in METRICS.items():
        assert metric(None, golden) == 0.0
        assert metric(prediction, [*golden, other]) == max(
            scores[name], metric(prediction, [other])
        )  # the best counts
        assert metric(prediction, golden[::-1]) == scores[name]
        if prediction is not None:
            assert metric(f" {prediction}\n", golden) == metric(normalize_answer(prediction), golden) == scores[name]


@given(ANSWERS, ANSWERS)
def test_exact_match_and_f1_are_symmetric(first: str, second: str) -> None:
    assert exact_match(first, [second]) == exact_match(second, [first])
    assert f1(first, [second]) == f1(second, [first])


@given(ANSWERS)
def test_an_answer_that_says_something_matches_itself(answer: str) -> None:
    assert normalize_answer(normalize_answer(answer)) == normalize_answer(answer)
    assert {metric(answer, [answer]) for metric in METRICS.values()} == {float(bool(answer.strip()))}


@given(WORDS)
def test_a_document_holds_words_that_stand_in_it_however_they_are_encoded(words: list[str]) -> None:
    answer = " ".join(words)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        document = unicodedata.normalize(form, f"“Title”: it is {answer}, they say.")
        assert holds_answer(document, [answer]) and holds_answer(document, [unicodedata.normalize("NFD", answer)])
