"""Held-out queries: searches that a simulator was not tuned on, and the rule by which documents answer them.

A query's answers are the column `answer` of its row (a text or a list: what the query itself asks for), or else the
golden answers of its question. Queries for which the rule cannot decide are left out of the rates:

- `yes_no`: every answer is a yes or a no, words that occur by chance;
- `answer_in_question`: the query or the question names the answer already, as comparisons do;
- `another_fact`: the row's own answer is none of the question's, so a simulator is not told it. TinyWorld's rule,
  `statement`, decides these too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zerosearch.errors import UserError
from zerosearch.metrics import holds_answer, normalize_answer
from zerosearch.simulator.judge import NOT_FOUND_IN_TEXT
from zerosearch.simulator.traces import as_passage, read_traces

# answer: a document that holds an answer, word for word, answers the query.
# statement: a query is a statement without its object, as in TinyWorld, and the document that states it answers the
# query: with the right object where the query asks for the question's answer, with any where it asks for another fact.
Rule = Literal["answer", "statement"]

WHY_LEFT_OUT = {
    "yes_no": "yes-or-no answer",
    "answer_in_question": "the question or the query names the answer",
    "another_fact": "the query asks for another fact than the question's answer",
}


@dataclass(frozen=True)
class HeldOutQuery:
    """One search to measure with. `real` holds recorded documents: "useful" and "noisy" where judged, or "all"."""

    question: str
    golden_answers: tuple[str, ...]
    query: str
    answers: tuple[str, ...]
    left_out: str = ""  # a key of WHY_LEFT_OUT, or "" where the rule decides
    rule: Rule = "answer"
    real: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def asks_for_answer(self) -> bool:
        """Say whether what the query asks for is the question's answer, which a simulator is told."""
        return _any_equal(self.answers, self.golden_answers)

    def is_answered_by(self, documents: Sequence[str]) -> bool:
        """Say whether one of the documents answers the query."""
        if self.rule == "answer":
            return any(holds_answer(document, self.answers) for document in documents)
        stated = [document for document in documents if _states(document, self.query)]
        if not self.asks_for_answer:
            return bool(stated)
        return any(holds_answer(document, self.answers) for document in stated)

    def is_leaked_by(self, documents: Sequence[str]) -> bool:
        """Say whether one of the documents gives the answer away, in whatever sentence it stands."""
        if self.rule == "statement" and not self.asks_for_answer:
            return self.is_answered_by(documents)
        return any(holds_answer(document, self.golden_answers) for document in documents)


def read_held_out(path: str | Path, rule: Rule = "answer") -> list[HeldOutQuery]:
    """Read searches, JSONL rows `{question, golden_answers, query, documents}`, one query for each that differs.

    Rows of the same words are one query where they share a golden answer: worlds ask alike and answer otherwise.
    `documents` may be empty; `answer` and `useful` (whether the documents were judged to answer the query) are used
    where given. With the rule `statement`, a row without `answer` takes it from its useful documents.
    Raises `UserError` that names the line and the column.
    """
    grouped: dict[tuple[str, str], list[list[Mapping[str, Any]]]] = {}
    for row in read_traces(path):
        groups = grouped.setdefault((row["question"], row["query"]), [])
        for group in groups:
            if any(_any_equal(row["golden_answers"], other["golden_answers"]) for other in group):
                group.append(row)
                break
        else:  # the first of its words, or a question of another world
            groups.append([row])
    return [_held_out(rows, rule) for groups in grouped.values() for rows in groups]


def choose(queries: Sequence[HeldOutQuery], count: int, seed: int) -> list[HeldOutQuery]:
    """Return `count` queries drawn at random by the seed, or all of them if there are no more.

    Raises `UserError` if fewer than two of them can be scored by rule.
    """
    drawn = random.Random(f"held-out-{seed}").sample(queries, count) if len(queries) > count else list(queries)
    decidable = sum(not query.left_out for query in drawn)
    if decidable < 2:
        raise UserError(
            f"of {len(drawn)} held-out queries {decidable} can tell whether documents answer them, and two must"
        )
    return drawn


def _held_out(rows: Sequence[Mapping[str, Any]], rule: Rule) -> HeldOutQuery:
    question, query = rows[0]["question"], rows[0]["query"]
    golden_answers = tuple(dict.fromkeys(answer for row in rows for answer in row["golden_answers"]))
    real: dict[str, tuple[str, ...]] = {}
    for row in rows:
        judged = row.get("useful")
        quality = "all" if judged is None else "useful" if judged else "noisy"
        real.setdefault(quality, tuple(as_passage(document).document for document in row["documents"]))
    own = rows[0].get("answer")
    if own is None and rule == "statement":
        own = _stated_object(real.get("useful", real.get("all", ())), query)
    answers = golden_answers if own is None else (own,) if isinstance(own, str) else tuple(own)
    if _any_equal(answers, golden_answers):  # its other forms count as well
        answers = tuple(dict.fromkeys((*answers, *golden_answers)))
    left_out = _why_left_out(question, query, answers, golden_answers, rule)
    return HeldOutQuery(question, golden_answers, query, answers, left_out, rule, real)


def _why_left_out(question: str, query: str, answers: Sequence[str], golden_answers: Sequence[str], rule: Rule) -> str:
    if not _any_equal(answers, golden_answers):
        return "" if rule == "statement" else "another_fact"
    if all(normalize_answer(answer) in NOT_FOUND_IN_TEXT for answer in answers):
        return "yes_no"
    if holds_answer(query, answers) or holds_answer(question, answers):
        return "answer_in_question"
    return ""


def _any_equal(first: Sequence[str], second: Sequence[str]) -> bool:
    return not {normalize_answer(text) for text in first}.isdisjoint(normalize_answer(text) for text in second)


def _states(document: str, query: str) -> bool:
    return normalize_answer(document).startswith(normalize_answer(query) + " ")


def _stated_object(documents: Sequence[str], query: str) -> str | None:
    """Return the object of a query's statement, from the first document that states it."""
    for document in documents:
        if _states(document, query):
            return document.rstrip(" .").removeprefix(query).strip()
    return None
