"""Example trajectories for the report: which to show, by a rule that the page states, and how their text is marked.

Trajectories are read from JSONL, `Trajectory.to_record` a line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from zerosearch.errors import UserError
from zerosearch.evaluation.answering import FIELDS, read_trajectories

Record = Mapping[str, Any]  # a trajectory, checked

NUM_PAIRS = 4  # with before and after each, and the training ones, a dozen
NUM_TRAINING = 4
SOURCES = ("prompt", "policy", "documents", "hint")
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
    """The trajectories to show; `num_paired` counts the questions recorded both times."""

    pairs: list[Pair]
    num_paired: int
    training: Sequence[Record]
    training_rule: str


def read_examples(run_dir: Path, engine: str | None) -> Examples:
    """Choose pairs from the evaluations with `engine`, and trajectories of training.

    Raises `UserError` that names the line for a record that is not what `Trajectory.to_record` writes.
    """
    before, after = (
        _first_by_id(_read(run_dir / f"evaluation/{policy}-{engine}/trajectories.jsonl"))
        for policy in ("before", "after")
    )
    training = choose_training(_read(run_dir / "policy/trajectories.jsonl"))
    return Examples(choose_pairs(before, after), len(before.keys() & after), *training)


def _first_by_id(records: Sequence[Record]) -> dict[str, Record]:
    """Return the records by id, or question where there is none; of several samples the first."""
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(str(record["id"] or record["question"]), record)
    return found


def choose_pairs(before: Mapping[str, Record], after: Mapping[str, Record]) -> list[Pair]:
    """Return the questions to show, of records by id; if only one side is there, its first.

    The first of each kind of change in the file's order, so that none is picked by hand; a kind that never occurs
    leaves its place to the next question of the first kind that has one.
    """
    if not before or not after:
        return [Pair("", 0, before.get(name), after.get(name)) for name in islice(before or after, NUM_PAIRS)]
    alike: dict[tuple[bool, bool], list[str]] = {change: [] for change in CHANGES}
    for name in before:
        if name in after:
            alike[before[name]["em"] >= 1, after[name]["em"] >= 1].append(name)
    shown = {change: names[:1] for change, names in alike.items()}
    for change, names in alike.items():
        spare = NUM_PAIRS - sum(map(len, shown.values()))
        shown[change] += names[1 : 1 + spare]
    return [
        Pair(CHANGES[change], len(alike[change]), before[name], after[name])
        for change, names in shown.items()
        for name in names
    ]


def choose_training(recorded: Sequence[Record]) -> tuple[Sequence[Record], str]:
    """Return trajectories spread evenly over training, with noisy searches if enough have one, and this rule."""
    in_order = sorted(recorded, key=lambda record: record["step"] or 0)
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


def _read(path: Path) -> Sequence[Record]:
    """Read trajectories, none if there is no such file. Raises `UserError` for a line that is none."""
    records: Sequence[Record] = read_trajectories(path, FIELDS) if path.is_file() else []
    for number, record in enumerate(records, start=1):
        for segment in record["segments"]:
            fields = segment if isinstance(segment, dict) else {}
            is_text, noisy = isinstance(fields.get("text"), str), fields.get("noisy", "")
            if fields.get("source") not in SOURCES or not is_text or noisy not in (True, False, None):
                raise UserError(
                    f"{path} line {number}: the segment {str(segment)[:200]} needs a text, a source "
                    f"({', '.join(SOURCES)}), and true, false or null as noisy"
                )
    return records
