"""Document sets: from judged searches to what a simulator should write for a query (paper, Section 3.3, Table 2).

A query gives at most two sets: up to five of its documents that were judged useful, and up to five judged noisy, cut
to about 30 words each. `zerosearch.simulator.examples` puts the simulator's prompt in front of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from zerosearch.errors import UserError
from zerosearch.metrics import normalize_answer
from zerosearch.simulator.excerpts import excerpt
from zerosearch.simulator.judge import RULE, rule_verdict
from zerosearch.simulator.traces import as_passage

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class SetOptions:
    """How document sets are assembled. `judge` is whose verdicts count: "rule", or the name of a model.

    `fill_from_question` fills a set of fewer than `num_documents` up with documents that other queries of the same
    question found: only with the rule, whose verdict is about the question and holds for every query of it. Sets that
    have fewer than `min_documents` even so are left out.
    """

    judge: str = RULE
    num_documents: int = 5  # Table 2
    num_words: int = 30  # Table 2
    min_documents: int = 1
    fill_from_question: bool = False
    p_test: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("num_words", self.num_words), ("min_documents", self.min_documents)):
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if self.num_documents < self.min_documents:
            raise UserError(f"num_documents is {self.num_documents}, less than min_documents {self.min_documents}")
        if not 0.0 <= self.p_test < 1.0:
            raise UserError(f"p_test is {self.p_test}: a share lies in [0, 1)")
        if self.fill_from_question and self.judge != RULE:
            raise UserError(
                f"--fill_from_question needs the verdicts of the rule: those of {self.judge!r} are about one query "
                "and say nothing about another of the same question"
            )


def split_of(question: str, p_test: float) -> Split:
    """Return the split of a question, by a hash of its words: the same in every run and every file it occurs in."""
    digest = hashlib.sha256(normalize_answer(question).encode()).digest()
    return "test" if int.from_bytes(digest[:8]) < p_test * 2**64 else "train"


def build_sets(traces: Sequence[Mapping[str, Any]], options: SetOptions) -> list[dict[str, Any]]:
    """Assemble document sets from judged searches: rows `{question, ..., documents, useful, judge, split}`.

    Searches of the same question by the same query are one search; a document, and a set, occurs once.
    Raises `UserError` where a search has no verdicts of the judge.
    """
    by_question: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for place, trace in enumerate(traces, start=1):
        _check_verdicts(trace, place, options.judge)
        by_question[normalize_answer(trace["question"])].append(trace)
    sets: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in tqdm(by_question.values(), desc="assembling", disable=len(traces) < 10_000):
        for built in _sets_of_question(group, options):
            content = (built["question"], built["query"], built["useful"], *built["documents"])
            sets.setdefault(tuple(normalize_answer(str(part)) for part in content), built)
    return list(sets.values())


def _check_verdicts(trace: Mapping[str, Any], place: int, judge: str) -> None:
    given = trace.get("verdicts", {})
    if judge not in given:
        names = ", ".join(given) or "nobody"
        raise UserError(
            f"search {place} has no verdicts of {judge!r}; it was judged by: {names} (recipes/judge_traces.py judges)"
        )
    if len(given[judge]) != len(trace["documents"]):
        raise UserError(
            f"search {place} has {len(given[judge])} verdicts of {judge!r} on {len(trace['documents'])} documents"
        )


def _sets_of_question(group: Sequence[Mapping[str, Any]], options: SetOptions) -> list[dict[str, Any]]:
    by_query: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for trace in group:
        by_query[normalize_answer(trace["query"])].append(trace)
    sets = []
    for same_query in by_query.values():
        first = same_query[0]
        for useful in (True, False):
            documents = _documents(same_query, first, useful, options)
            if documents and options.fill_from_question:
                documents = _documents([*same_query, *group], first, useful, options)
            if len(documents) < options.min_documents:
                continue
            sets.append(
                {
                    **{name: first[name] for name in ("id", "dataset") if first.get(name) is not None},
                    "question": first["question"],
                    "golden_answers": list(first["golden_answers"]),
                    "query": first["query"],
                    "documents": documents,
                    "useful": useful,
                    "judge": options.judge,
                    "split": split_of(first["question"], options.p_test),
                }
            )
    return sets


def _documents(
    traces: Sequence[Mapping[str, Any]], search: Mapping[str, Any], useful: bool, options: SetOptions
) -> list[str]:
    """Return the excerpts of the documents with this verdict, in the engine's order, each once."""
    answers = search["golden_answers"] if useful else ()
    documents: dict[str, str] = {}
    for trace in traces:
        for document, verdict in zip(trace["documents"], trace["verdicts"][options.judge], strict=True):
            if verdict is useful and len(documents) < options.num_documents:
                text = excerpt(as_passage(document), options.num_words, search["query"], answers)
                documents.setdefault(normalize_answer(text), text)
    return list(documents.values())


def statistics(traces: Sequence[Mapping[str, Any]], sets: Sequence[Mapping[str, Any]], judge: str) -> dict[str, Any]:
    """Count what went in and what came out; of useful and noisy sets, how many hold an answer, and how long they are.

    `answer_rate` is the share of sets of which some document holds a golden answer, by the rule, over those whose
    answers the rule can look for; `documents` counts sets by how many documents they have; `words` are a document's.
    """
    verdicts = Counter(verdict for trace in traces for verdict in trace["verdicts"][judge])
    return {
        "judge": judge,
        "searches": len(traces),
        "questions": len({normalize_answer(trace["question"]) for trace in traces}),
        "documents": {"useful": verdicts[True], "noisy": verdicts[False], "no_verdict": verdicts[None]},
        "sets": {
            split: {
                "questions": len({normalize_answer(row["question"]) for row in sets if row["split"] == split}),
                **{
                    name: _set_statistics([row for row in sets if row["split"] == split and row["useful"] is useful])
                    for name, useful in (("useful", True), ("noisy", False))
                },
            }
            for split in SPLITS
        },
    }


def _set_statistics(sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    held = [
        any(verdicts)
        for row in sets
        if None not in (verdicts := [rule_verdict(text, row["golden_answers"]) for text in row["documents"]])
    ]
    words = [len(text.split()) for row in sets for text in row["documents"]]
    sizes = Counter(len(row["documents"]) for row in sets)
    return {
        "sets": len(sets),
        "answer_rate": float(np.mean(held)) if held else None,
        "documents": {str(size): sizes[size] for size in sorted(sizes)},
        "words": {
            "mean": float(np.mean(words)),
            **{f"p{percent}": float(np.percentile(words, percent)) for percent in (5, 50, 95)},
        }
        if words
        else None,
    }


def statistics_table(found: Mapping[str, Any]) -> str:
    """Return the statistics as a Markdown table."""
    lines = [
        "| split | sets | questions | with an answer | documents a set | words a document (5 %, 50 %, 95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for split, parts in found["sets"].items():
        for name in ("useful", "noisy"):
            part = parts[name]
            rate = "" if part["answer_rate"] is None else f"{part['answer_rate']:.3f}"
            sizes = ", ".join(f"{size}: {count:,}" for size, count in part["documents"].items())
            words = part["words"]
            length = (
                f"{words['mean']:.1f} ({words['p5']:.0f}, {words['p50']:.0f}, {words['p95']:.0f})" if words else ""
            )
            lines.append(
                f"| {split} | {part['sets']:,} {name} | {parts['questions']:,} | {rate} | {sizes} | {length} |"
            )
    return "\n".join(lines)
