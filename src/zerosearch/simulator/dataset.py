"""Document sets: from judged searches to what a simulator should write for a query (paper, Section 3.3, Table 2).

A query gives at most two sets: up to five of its documents that were judged useful, and up to five judged noisy, each
an excerpt of about 30 words. `zerosearch.simulator.examples` puts the simulator's prompt in front of them.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from zerosearch.command_line import check_bounds
from zerosearch.data import Passage
from zerosearch.errors import UserError
from zerosearch.metrics import holds_answer, normalize_answer
from zerosearch.simulator.judge import RULE, rule_verdict
from zerosearch.simulator.traces import as_passage

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

ROOM = 1.2  # an excerpt may take this much more than `num_words`: 36 words for 30
# Not after an initial or an abbreviation: "J. Austen", "St. Louis", "U.S. Army".
END_OF_SENTENCE = re.compile(
    r"(?<!\b[A-Z]\.)(?<!\b(?:St|Dr|Mr|Ms|Jr|Sr|No|vs)\.)(?<!\bMrs\.)(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])"
)
ELLIPSIS = "..."  # as search engines mark a sentence that is cut


@dataclass(frozen=True)
class SetOptions:
    """How document sets are assembled."""

    judge: str = field(default=RULE, metadata={"help": "Whose verdicts count: rule, or the name of the model."})
    num_documents: int = field(default=5, metadata={"help": "Most documents in a set (Table 2)."})
    num_words: int = field(default=30, metadata={"min": 1, "help": "Words of a document, about (Table 2)."})
    min_documents: int = field(default=1, metadata={"min": 1, "help": "Leave out sets of fewer documents."})
    fill_from_question: bool = field(
        default=False, metadata={"help": "Fill sets up with what other queries of the question found (rule only)."}
    )
    fill_useful: bool = field(
        default=False, metadata={"help": "Fill useful sets up with noisy documents, the useful ones first."}
    )
    p_test: float = field(default=0.1, metadata={"min": 0.0, "help": "Share of the questions that is for testing."})

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.num_documents < self.min_documents:
            raise UserError(f"num_documents is {self.num_documents}, less than min_documents {self.min_documents}")
        if self.p_test >= 1.0:
            raise UserError(f"p_test is {self.p_test}: it must be below 1, or nothing is left to train on")
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

    Searches of the same question by the same query are one search, and a set holds a document once.
    Raises `UserError` where a search lacks verdicts of the judge.
    """
    for place, trace in enumerate(traces, start=1):
        _check_verdicts(trace, place, options.judge)
    groups = tqdm(_grouped(traces, "question").values(), desc="assembling", disable=len(traces) < 10_000)
    return [row for group in groups for row in _sets_of_question(group, options)]


def _check_verdicts(trace: Mapping[str, Any], place: int, judge: str) -> None:
    given, size = trace.get("verdicts", {}), len(trace["documents"])
    if judge not in given:
        names = ", ".join(given) or "nobody"
        raise UserError(
            f"search {place} has no verdicts of {judge!r}; it was judged by: {names} (recipes/judge_traces.py judges)"
        )
    if len(given[judge]) != size:
        raise UserError(f"search {place} has {len(given[judge])} verdicts of {judge!r} on {size} documents")


def _grouped(traces: Iterable[Mapping[str, Any]], column: str) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for trace in traces:
        groups[normalize_answer(trace[column])].append(trace)
    return groups


def _sets_of_question(group: Sequence[Mapping[str, Any]], options: SetOptions) -> list[dict[str, Any]]:
    sets = []
    for same_query in _grouped(group, "query").values():
        first = same_query[0]
        for useful in (True, False):
            traces, documents = same_query, _documents(same_query, first, useful, options)
            if documents and options.fill_from_question:
                traces = [*same_query, *group]
                documents = _documents(traces, first, useful, options)
            if documents and useful and options.fill_useful:
                documents = [*documents, *_documents(traces, first, False, options)][: options.num_documents]
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


def excerpt(passage: Passage, num_words: int, query: str, answers: Sequence[str]) -> str:
    """Return about `num_words` words of a passage, title included, at most a fifth more; marks of cuts come on top.

    The excerpt is the sentence that holds one of `answers`, or else the one that shares most words with the query,
    with as many sentences after it and then before it as fit, and the title in front. An excerpt holds an answer
    wherever the passage does. How the paper cut real documents it does not say: this is ours.
    """
    limit = int(num_words * ROOM)
    if len(passage.document.split()) <= limit:
        return passage.document
    title = passage.title if 2 * len(passage.title.split()) <= limit else ""
    room = limit - len(title.split())
    shortened = Passage(title, _window_of_sentences(passage.text, room, query, answers)).document
    if not holds_answer(passage.document, answers):
        return shortened
    if not holds_answer(shortened, answers):  # the answer runs over the end of a sentence
        shortened = Passage(title, _window_of_words(passage.text, room, answers)).document
    if not holds_answer(shortened, answers):  # it begins in the title
        shortened = _window_of_words(passage.document, limit, answers)
    return shortened


def _window_of_sentences(text: str, room: int, query: str, answers: Sequence[str]) -> str:
    sentences = END_OF_SENTENCE.split(text)
    lengths = [len(sentence.split()) for sentence in sentences]
    wanted = set(normalize_answer(query).split())
    shared = [len(wanted & set(normalize_answer(sentence).split())) for sentence in sentences]
    relevance = [(holds_answer(text, answers), count) for text, count in zip(sentences, shared, strict=True)]
    first = last = relevance.index(max(relevance))
    if lengths[first] > room:
        return _window_of_words(sentences[first], room, answers)
    while last + 1 < len(sentences) and sum(lengths[first : last + 2]) <= room:
        last += 1
    while first > 0 and sum(lengths[first - 1 : last + 1]) <= room:
        first -= 1
    return " ".join(sentences[first : last + 1])


def _window_of_words(text: str, room: int, answers: Sequence[str]) -> str:
    """Cut a text to `room` words: its beginning if that holds an answer or nothing does, else around the answer."""
    words = text.split()

    def holds(start: int, end: int) -> bool:
        return holds_answer(" ".join(words[start:end]), answers)

    start = 0
    if holds(0, len(words)):
        end = bisect_left(range(len(words)), True, key=lambda end: holds(0, end))  # of the first answer
        begin = bisect_left(range(end), True, key=lambda begin: not holds(begin, end)) - 1
        if room < end <= begin + room:
            start = (end - room + min(begin, len(words) - room) + 1) // 2
    before, after = ELLIPSIS if start else "", ELLIPSIS if start + room < len(words) else ""
    return " ".join(filter(None, (before, *words[start : start + room], after)))


def statistics(traces: Sequence[Mapping[str, Any]], sets: Sequence[Mapping[str, Any]], judge: str) -> dict[str, Any]:
    """Count what went in and what came out; of useful and noisy sets, how many hold an answer, and how long they are.

    `answer_rate` is the share of sets of which some document holds a golden answer, by the rule, over those whose
    answers the rule can look for; `documents` counts sets by how many documents they have; `words` are a document's.
    """
    verdicts = Counter(verdict for trace in traces for verdict in trace["verdicts"][judge])
    splits = {split: [row for row in sets if row["split"] == split] for split in SPLITS}
    return {
        "judge": judge,
        "searches": len(traces),
        "questions": _count_questions(traces),
        "documents": {"useful": verdicts[True], "noisy": verdicts[False], "no_verdict": verdicts[None]},
        "sets": {
            split: {
                "questions": _count_questions(rows),
                "useful": _set_statistics([row for row in rows if row["useful"]]),
                "noisy": _set_statistics([row for row in rows if not row["useful"]]),
            }
            for split, rows in splits.items()
        },
    }


def _count_questions(rows: Iterable[Mapping[str, Any]]) -> int:
    return len(_grouped(rows, "question"))


def _set_statistics(sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    verdicts = [[rule_verdict(text, row["golden_answers"]) for text in row["documents"]] for row in sets]
    held = [any(given) for given in verdicts if None not in given]
    words = [len(text.split()) for row in sets for text in row["documents"]]
    sizes = Counter(len(row["documents"]) for row in sets)
    percentiles = {f"p{percent}": float(np.percentile(words, percent)) for percent in (5, 50, 95)} if words else {}
    return {
        "sets": len(sets),
        "answer_rate": float(np.mean(held)) if held else None,
        "documents": {str(size): sizes[size] for size in sorted(sizes)},
        "words": {"mean": float(np.mean(words)), **percentiles} if words else None,
    }


def statistics_table(found: Mapping[str, Any]) -> str:
    """Return the statistics as a Markdown table."""
    lines = [
        "| split | sets | questions | with an answer | documents a set | words a document (5 %, 50 %, 95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for split, parts in found["sets"].items():
        for name in ("useful", "noisy"):
            part, words = parts[name], parts[name]["words"]
            rate = "" if part["answer_rate"] is None else f"{part['answer_rate']:.3f}"
            sizes = ", ".join(f"{size}: {count:,}" for size, count in part["documents"].items())
            length = words and f"{words['mean']:.1f} ({words['p5']:.0f}, {words['p50']:.0f}, {words['p95']:.0f})"
            cells = (split, f"{part['sets']:,} {name}", f"{parts['questions']:,}", rate, sizes, length or "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
