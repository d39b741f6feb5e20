"""Which queries can tell, and what counts as an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonl_files import write_rows

from zerosearch.errors import UserError
from zerosearch.simulator.held_out import HeldOutQuery, choose, read_held_out


def write(path: Path, *rows: dict[str, Any]) -> Path:
    return write_rows(path, ({"documents": [], **row} for row in rows))


EMMA = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen", "Austen"], "query": "Emma author"}


def test_a_query_is_answered_by_a_document_that_holds_an_answer(tmp_path: Path) -> None:
    (query,) = read_held_out(write(tmp_path / "rows.jsonl", EMMA))
    assert query.left_out == "" and query.asks_for_answer
    assert query.is_answered_by(["It rains.", "Emma is by AUSTEN."])
    assert query.is_leaked_by(["Emma is by Austen."])
    assert not query.is_answered_by(["Emma is by Austensen."])
    assert not query.is_answered_by([])


@pytest.mark.parametrize(
    ("row", "left_out"),
    [
        ({"golden_answers": ["yes"]}, "yes_no"),
        ({"golden_answers": ["No", "false"]}, "yes_no"),
        ({"golden_answers": ["no", "nobody"]}, ""),
        ({"query": "Jane Austen Emma"}, "answer_in_question"),
        (
            {"question": "Who was born first, Jane Austen or Mary Shelley?", "query": "Shelley born"},
            "answer_in_question",
        ),
        ({"answer": "1815"}, "another_fact"),
        ({"answer": ["austen"]}, ""),
        ({"answer": "Austen"}, ""),
    ],
)
def test_queries_that_say_nothing_are_left_out_and_say_why(tmp_path: Path, row: dict[str, Any], left_out: str) -> None:
    (query,) = read_held_out(write(tmp_path / "rows.jsonl", {**EMMA, **row}))
    assert query.left_out == left_out


def test_the_same_search_judged_twice_is_one_query_with_real_documents_of_both_kinds(tmp_path: Path) -> None:
    documents = [{"title": "Emma", "text": "A novel."}, {"title": "", "text": "Rain."}]
    rows = [
        {**EMMA, "documents": documents, "useful": True},
        {**EMMA, "documents": ["Oh."], "useful": False},
        {**EMMA, "query": "another", "documents": ["Ah."]},
    ]
    first, second = read_held_out(write(tmp_path / "rows.jsonl", *rows))
    assert first.real == {"useful": ("Emma: A novel.", "Rain."), "noisy": ("Oh.",)}
    assert second.real == {"all": ("Ah.",)}


HOP = {"question": "Where does the author of Emma sit?", "golden_answers": ["Bath"], "query": "Emma is by"}


def test_the_same_words_with_another_answer_are_a_query_of_another_world(tmp_path: Path) -> None:
    rows = [
        {**EMMA, "documents": ["Emma is by Jane Austen."], "useful": True},
        {**EMMA, "golden_answers": ["Mary Shelley"], "documents": ["Emma is by Mary Shelley."], "useful": True},
        {**EMMA, "golden_answers": ["austen"], "documents": ["Rain."], "useful": False},
    ]
    first, second = read_held_out(write(tmp_path / "rows.jsonl", *rows))
    assert first.golden_answers == ("Jane Austen", "Austen", "austen")
    assert first.real == {"useful": ("Emma is by Jane Austen.",), "noisy": ("Rain.",)}
    assert second.golden_answers == ("Mary Shelley",)
    assert not first.is_leaked_by(second.real["useful"])


def test_tinyworlds_rule_asks_for_the_statement(tmp_path: Path) -> None:
    last = {**HOP, "query": "Ida Holt sits in", "answer": "Bath"}
    first_hop, last_hop = read_held_out(
        write(tmp_path / "rows.jsonl", {**HOP, "answer": "Ida Holt"}, last), "statement"
    )
    assert not first_hop.left_out and not first_hop.asks_for_answer
    # The simulator is not told who wrote Emma: any author will do.
    assert first_hop.is_answered_by(["It rains.", "Emma is by Ada Rowe."])
    assert not first_hop.is_answered_by(["Emma is bygone.", "Persuasion is by Ida Holt.", "Emma is by"])
    assert first_hop.is_leaked_by(["Emma is by Ada Rowe."])
    # But of the last hop it is.
    assert last_hop.asks_for_answer
    assert last_hop.is_answered_by(["Ida Holt sits in Bath."])
    assert not last_hop.is_answered_by(["Ida Holt sits in Ghent.", "Ada Rowe sits in Bath."])
    assert last_hop.is_leaked_by(["Ada Rowe sits in Bath."])  # the answer, in another sentence
    assert not last_hop.is_leaked_by(["Ida Holt sits in Ghent."])


def test_without_an_answer_tinyworlds_rule_reads_it_from_useful_documents(tmp_path: Path) -> None:
    useful = {**HOP, "documents": ["It rains.", "Emma is by Ida Holt."], "useful": True}
    (query,) = read_held_out(write(tmp_path / "rows.jsonl", useful), "statement")
    assert query.answers == ("Ida Holt",) and not query.asks_for_answer


def test_a_comparison_can_tell_by_tinyworlds_rule(tmp_path: Path) -> None:
    row = {"question": "Who was born first, Ida Holt or Ada Rowe?", "golden_answers": ["Ida Holt"], "answer": "1945"}
    (query,) = read_held_out(write(tmp_path / "rows.jsonl", {**row, "query": "Ada Rowe dates from"}), "statement")
    assert not query.left_out
    assert query.is_answered_by(["Ada Rowe dates from 1900."])


def test_a_row_that_is_no_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: 'query' must be a text"):
        read_held_out(write(tmp_path / "rows.jsonl", {**EMMA, "query": ""}))


def test_the_choice_is_the_seeds() -> None:
    queries = [HeldOutQuery(f"Q{row}?", ("a",), f"q{row}", ("a",)) for row in range(50)]
    assert choose(queries, 10, seed=0) == choose(queries, 10, seed=0) != choose(queries, 10, seed=1)
    assert choose(queries, 50, seed=0) == queries
