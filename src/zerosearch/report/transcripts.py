"""Example trajectories for the report: which to show, by a rule that the page states, and how their text is marked.

Trajectories are read from JSONL, `Trajectory.to_record` a line. Evaluation files may be large: they are read twice,
once for the scores and once for the few records to show, and never held whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from zerosearch.errors import UserError
from zerosearch.files import read_jsonl

Record = Mapping[str, Any]  # a trajectory, checked

NUM_PAIRS = 4  # with before and after each, and the training ones, a dozen
NUM_TRAINING = 4
SOURCES = ("prompt", "policy", "documents", "hint")
FIELDS: dict[str, Any] = {  # of a record, with the type of each
    "question": str,
    "golden_answers": list,
    "answer": str | None,
    "outcome": str,
    "searches": int | float,
    "em": int | float,
    "f1": int | float,
    "segments": list,
}
# (right before, right after) in the order of the page
CHANGES = {
    (False, True): "wrong before, right after",
    (True, True): "right before and after",
    (False, False): "wrong before and after",
    (True, False): "right before, wrong after",
}
POLICY_TAG = re.compile(r"(</?(?:think|search|answer)>)")
DOCUMENT_MARK = r"</?information>|\bDoc \d+:"


@dataclass(frozen=True)
class Pair:
    """One question before and after training. `num_alike` counts the questions that changed as this one did."""

    change: str
    num_alike: int
    before: Record | None
    after: Record | None


@dataclass(frozen=True)
class Examples:
    """The trajectories to show; `num_paired` counts the questions recorded both times, `notes` say what is missing."""

    pairs: list[Pair]
    num_paired: int
    training: Sequence[Record]
    training_rule: str
    notes: list[str]


def read_examples(run_dir: Path, engine: str | None) -> Examples:
    """Choose pairs from the evaluations with `engine`, and trajectories of training.

    Raises `UserError` that names the line for a record that is not what `Trajectory.to_record` writes.
    """
    notes: list[str] = []
    training_file = run_dir / "policy" / "trajectories.jsonl"
    recorded = [_checked(*line) for line in read_jsonl(training_file)] if training_file.is_file() else []
    if not recorded:
        notes.append("policy/trajectories.jsonl is missing or empty: no trajectories of training are shown.")
    files = {}
    for policy in ("before", "after") if engine else ():
        path = run_dir / "evaluation" / f"{policy}-{engine}" / "trajectories.jsonl"
        if path.is_file():
            files[policy] = path
        else:
            notes.append(f"{path.relative_to(run_dir)} is missing: no trajectories {policy} training are shown.")
    right = {policy: _right(path) for policy, path in files.items()}
    if len(right) == 2:
        chosen, num_paired = choose_pairs(right["before"], right["after"])
    else:
        chosen, num_paired = [(name, "", 0) for one in right.values() for name in islice(one, NUM_PAIRS)], 0
    wanted = {name for name, _, _ in chosen}
    found = {policy: _find(files[policy], wanted) if policy in files else {} for policy in ("before", "after")}
    pairs = [Pair(change, count, *(one.get(name) for one in found.values())) for name, change, count in chosen]
    return Examples(pairs, num_paired, *choose_training(recorded), notes)


def choose_pairs(before: Mapping[str, bool], after: Mapping[str, bool]) -> tuple[list[tuple[str, str, int]], int]:
    """Return (id, change, number of such questions) of the questions to show, and the number of questions in both.

    The first of each kind of change in the file's order, so that none is picked by hand; a kind that never occurs
    leaves its place to the next question of the first kind that has one.
    """
    alike: dict[tuple[bool, bool], list[str]] = {change: [] for change in CHANGES}
    for name, right in before.items():
        if name in after:
            alike[right, after[name]].append(name)
    shown = {change: names[:1] for change, names in alike.items()}
    for change, names in alike.items():
        spare = NUM_PAIRS - sum(map(len, shown.values()))
        shown[change] += names[1 : 1 + spare]
    chosen = [(name, CHANGES[change], len(alike[change])) for change, names in shown.items() for name in names]
    return chosen, sum(map(len, alike.values()))


def choose_training(recorded: Sequence[Record]) -> tuple[Sequence[Record], str]:
    """Return trajectories spread evenly over training, with noisy searches if enough have one, and this rule."""
    in_order = sorted(recorded, key=lambda record: record.get("step") or 0)
    noisy = [record for record in in_order if any(segment["noisy"] for segment in record["segments"])]
    pool = noisy if len(noisy) >= NUM_TRAINING else in_order
    shown = f"{min(len(pool), NUM_TRAINING)} of {'these' if pool is noisy else 'all'}"
    rule = (
        f"Of {len(in_order)} trajectories recorded in training, {len(noisy)} have a search with noisy documents. "
        f"Shown are {shown}, spread evenly over the steps."
    )
    if len(pool) > NUM_TRAINING:
        pool = [pool[round(place * (len(pool) - 1) / (NUM_TRAINING - 1))] for place in range(NUM_TRAINING)]
    return pool, rule


def pieces(segment: Mapping[str, Any], golden_answers: Sequence[str]) -> list[tuple[str, str]]:
    """Split a segment's text into (what it is, text), nothing lost but white space at the ends.

    In what the policy wrote tags are "tag", and what follows an opening one carries its name. In documents headers are
    "tag" and every golden answer in whole words, whatever the case, "golden". All else is "".
    """
    text = segment["text"].strip()
    if segment["source"] == "policy":
        found, inside = [], ""
        for part in POLICY_TAG.split(text):
            is_tag = bool(POLICY_TAG.fullmatch(part))
            inside = ("" if part.startswith("</") else part[1:-1]) if is_tag else inside
            found.append(("tag" if is_tag else inside, part))
    elif segment["source"] == "documents":
        longest_first = sorted(
            {str(answer) for answer in golden_answers if str(answer).strip()}, key=len, reverse=True
        )
        golden = "|".join(map(re.escape, longest_first)) or r"(?!)"
        pattern = rf"({DOCUMENT_MARK})|(?<!\w)({golden})(?!\w)"
        parts = re.split(pattern, text, flags=re.IGNORECASE)  # text, mark or None, golden answer or None, text, ...
        found = [(("", "tag", "golden")[place % 3], part) for place, part in enumerate(parts)]
    else:
        found = [("", text)]
    return [(kind, part) for kind, part in found if part]


def _right(path: Path) -> dict[str, bool]:
    """Return which questions of a file were answered right, in its order; of an id that recurs, the first."""
    right: dict[str, bool] = {}
    for place, record in read_jsonl(path):
        _checked(place, record)
        if record.get("id") is None:
            raise UserError(f"{place} lacks 'id', by which before and after are paired")
        right.setdefault(str(record["id"]), record["em"] >= 1)
    return right


def _find(path: Path, wanted: set[str]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for _, record in read_jsonl(path):
        if str(record.get("id")) in wanted:
            found.setdefault(str(record["id"]), record)
    return found


def _checked(place: str, record: Record) -> Record:
    for name, kind in FIELDS.items():
        if name not in record:
            raise UserError(f"{place} lacks {name!r}; it has {', '.join(sorted(record))}")
        if not isinstance(record[name], kind):
            raise UserError(f"{place}: {name!r} is {record[name]!r}")
    for segment in record["segments"]:
        fields = segment if isinstance(segment, dict) else {}
        is_text, noisy = isinstance(fields.get("text"), str), fields.get("noisy")
        if fields.get("source") not in SOURCES or not is_text or noisy not in (True, False, None):
            raise UserError(
                f"{place}: the segment {str(segment)[:200]} needs a text, a source ({', '.join(SOURCES)}), and true, "
                "false or null as noisy"
            )
    return record
