"""TinyWorld: nothing to memorise, everything to be found, and a tokenizer that loses nothing."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from jsonl_files import write_rows
from searching import searched

from zerosearch.engines import SearchRequest
from zerosearch.engines.bm25 import BM25Engine
from zerosearch.errors import UserError
from zerosearch.tinyworld.world import (
    RELATION,
    RELATIONS,
    Fact,
    World,
    golden_answers,
    is_held_out,
    judged_searches,
    question_rows,
)

EVALUATION = World.draw(0, held_out=True)


def corpus_of(world: World, directory: Path) -> Path:
    return write_rows(directory / "corpus.jsonl", world.passages())


def test_the_same_seed_draws_the_same_world_and_another_seed_another():
    assert World.draw(3).facts == World.draw(3).facts
    assert World.draw(3).passages() == World.draw(3).passages()
    assert World.draw(3).facts != World.draw(4).facts


@pytest.mark.parametrize("n_people", [0, 19, 701])
def test_a_world_that_cannot_be_drawn_is_refused(n_people: int):
    with pytest.raises(UserError, match=f"{n_people} people"):
        World.draw(0, n_people)


@pytest.mark.parametrize("n_people", [20, 700])
def test_the_smallest_and_the_largest_world_hold_every_relation(n_people: int):
    world = World.draw(0, n_people)
    assert {fact.relation for fact in world.facts} == {relation.name for relation in RELATIONS}


@pytest.mark.parametrize("held_out", [False, True])
def test_training_worlds_share_no_fact_with_evaluation_worlds(held_out: bool):
    facts = World.draw(0, 300, held_out).facts
    assert len(facts) > 1_000 and all(is_held_out(fact) == held_out for fact in facts)


def test_the_hold_out_depends_on_the_fact_alone():
    cities = ("Arken", "Port Arken", "Belmar", "Corin", "Galen", "Melk")
    held_out = [city for city in cities if is_held_out(Fact("Ada Voss", "birthplace", city))]
    assert held_out == ["Port Arken", "Galen"]


def test_questions_are_answered_by_their_path():
    for question in islice(EVALUATION.questions(random.Random(1)), 500):
        assert all(EVALUATION.of_subject[fact.subject][fact.relation] == fact for fact in question.path)
        if question.kind == "comparison":
            years = {fact.subject: int(fact.object) for fact in question.path}
            assert question.golden_answers[0] == min(years, key=years.__getitem__)
            assert len(set(years.values())) == 2
        else:
            assert question.golden_answers[0] == question.path[-1].object
            assert all(
                first.object == second.subject for first, second in zip(question.path, question.path[1:], strict=False)
            )
        assert question.path[0].subject in question.text
        assert question.golden_answers[0] not in question.text or question.kind == "comparison"


def test_every_kind_of_question_and_answer_occurs():
    questions = list(islice(EVALUATION.questions(random.Random(2)), 1000))
    shares = {
        kind: sum(question.kind == kind for question in questions) / 1000
        for kind in ("one_hop", "two_hop", "comparison")
    }
    assert shares["one_hop"] == pytest.approx(0.45, abs=0.06)
    assert shares["two_hop"] == pytest.approx(0.40, abs=0.06)
    assert shares["comparison"] == pytest.approx(0.15, abs=0.05)
    assert {len(question.path) for question in questions} == {1, 2}
    assert sum(len(question.golden_answers) > 1 for question in questions) > 300
    assert sum(len(question.golden_answers[0].split()) > 1 for question in questions) > 300


def test_golden_answers_name_every_accepted_form():
    assert golden_answers("person", "Ada Voss") == ("Ada Voss", "Voss")
    assert golden_answers("country", "Umbria") == ("Umbria", "Republic of Umbria")
    assert golden_answers("work", "The Silent Harbor") == ("The Silent Harbor", "Silent Harbor")
    assert golden_answers("city", "Port Arken") == ("Port Arken",)


def test_passages_state_every_fact_once_and_much_else():
    texts = [row["contents"].split("\n", 1) for row in EVALUATION.passages()]
    for title, text in texts:
        assert text.startswith(title.strip('"'))
    sentences = Counter(text for _, text in texts)
    assert all(sentences[fact.sentence] == 1 for fact in EVALUATION.facts)
    assert len(texts) > 1.2 * len(EVALUATION.facts)


def test_bm25_finds_the_fact_among_others_of_the_same_relation(tmp_path: Path):
    engine = BM25Engine(corpus_of(EVALUATION, tmp_path))
    facts = random.Random(3).sample(EVALUATION.facts, 200)
    results = searched(engine, *(SearchRequest(fact.query, "?", ("?",)) for fact in facts))
    found = distracted = 0
    for fact, documents in zip(facts, [result.documents for result in results], strict=True):
        relation_words = RELATION[fact.relation].statement.removeprefix("{}")
        found += fact.sentence in documents
        distracted += any(relation_words in document and fact.subject not in document for document in documents)
    assert found >= 195
    assert distracted >= 80  # the policy must tell subjects apart


def test_judged_searches_are_what_their_label_says(tmp_path: Path):
    engine = BM25Engine(corpus_of(EVALUATION, tmp_path), num_documents=12)
    searches = asyncio.run(judged_searches(EVALUATION, engine, 200, seed=0))
    assert len(searches) > 360
    sentences = {fact.query: fact.sentence for fact in EVALUATION.facts}
    for search in searches:
        documents = search["documents"]
        assert len(documents) == len(set(documents)) == 5
        assert (sentences[search["query"]] in documents) == search["useful"]
        if search["useful"]:  # in the engine's order: it ranks what the query is the beginning of first
            assert documents[0] == sentences[search["query"]]
    # Noisy documents of the query that answers the question name no golden answer either.
    answering = [
        search
        for search in searches
        if not search["useful"] and sentences[search["query"]] == f"{search['query']} {search['golden_answers'][0]}."
    ]
    assert len(answering) > 60
    for search in answering:
        assert not any(answer in document for answer in search["golden_answers"] for document in search["documents"])


def test_noise_can_be_kept_from_the_relation_that_is_asked_for(tmp_path: Path) -> None:
    engine = BM25Engine(corpus_of(EVALUATION, tmp_path), num_documents=48)
    relation_of = {fact.query: fact.relation for fact in EVALUATION.facts}
    stated = {fact.sentence: fact.relation for fact in EVALUATION.facts}
    states_it = {}
    for allowed in (True, False):
        searches = asyncio.run(judged_searches(EVALUATION, engine, 100, seed=0, asked_relation_in_noise=allowed))
        noisy = [row for row in searches if not row["useful"]]
        states_it[allowed] = [
            any(stated.get(document) == relation_of[row["query"]] for document in row["documents"]) for row in noisy
        ]
        assert sum(row["useful"] for row in searches) > 80 and len(noisy) > 80
    assert any(states_it[True]) and not any(states_it[False])


def test_question_rows_have_the_columns_of_a_benchmark():
    rows = question_rows(EVALUATION, 50, seed=0)
    assert [set(row) for row in rows] == [{"id", "question", "golden_answers", "dataset", "golden_documents"}] * 50
    facts = {fact.sentence for fact in EVALUATION.facts}
    assert all(set(row["golden_documents"]) <= facts for row in rows)
    assert {len(row["golden_documents"]) for row in rows if row["dataset"] == "tinyworld_two_hop"} == {2}
    assert len({row["id"] for row in rows}) == 50
    assert {row["dataset"] for row in rows} == {"tinyworld_one_hop", "tinyworld_two_hop", "tinyworld_comparison"}
