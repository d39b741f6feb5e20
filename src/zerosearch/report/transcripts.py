"""Example trajectories for the report: which to show, by a rule that the page states, and how their text is split.

Trajectories are read from JSONL, `Trajectory.to_record` a line. Evaluation files may be large: they are read twice,
once for the scores and once for the few records to show, and never held whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from zerosearch.data import read_jsonl
from zerosearch.errors import UserError

NUM_PAIRS = 4  # with before and after each, and the training ones, a dozen
NUM_TRAINING = 4
SOURCES = ("prompt", "policy", "documents", "hint")
FIELDS: dict[str, type | tuple[type, ...]] = {  # of a record, with what each must be
    "question": str,
    "golden_answers": list,
    "answer": (str, type(None)),
    "outcome": str,
    "searches": (int, float),
    "em": (int, float),
    "f1": (int, float),
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
class Piece:
    """A stretch of text and the CSS class that says what it is: "tag", "think", "search", "answer", "golden" or ""."""

    text: str
    css: str = ""


@dataclass(frozen=True)
class Segment:
    """What one author wrote. `noisy` is None where the engine has no such notion."""

    source: str
    noisy: bool | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Transcript:
    """A record, checked, with its text in pieces."""

    record: Mapping[str, Any]
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Pair:
    """One question before and after training. `num_alike` counts the questions that changed as this one did."""

    change: str
    num_alike: int
    before: Transcript | None
    after: Transcript | None

    @property
    def either(self) -> Transcript:
        transcript = self.before or self.after
        assert transcript is not None
        return transcript


@dataclass(frozen=True)
class Examples:
    """The trajectories to show; `num_paired` counts the questions recorded both times, `notes` what is missing."""

    pairs: tuple[Pair, ...]
    num_paired: int
    training: tuple[Transcript, ...]
    training_rule: str
    notes: tuple[str, ...]


def read_examples(run_dir: Path, engine: str | None) -> Examples:
    """Choose pairs from the evaluations with `engine`, and trajectories of training.

    Raises `UserError` that names the line for a record that is not what `Trajectory.to_record` writes.
    """
    notes: list[str] = []
    training_file = run_dir / "policy" / "trajectories.jsonl"
    recorded = (
        [_transcript(record, place) for place, record in read_jsonl(training_file)] if training_file.is_file() else []
    )
    if not recorded:
        notes.append("policy/trajectories.jsonl is missing or empty: no trajectories of training are shown.")
    training, training_rule = choose_training(recorded)
    files: dict[str, Path] = {}
    for policy in ("before", "after") if engine else ():
        path = run_dir / "evaluation" / f"{policy}-{engine}" / "trajectories.jsonl"
        if path.is_file():
            files[policy] = path
        else:
            notes.append(f"{path.relative_to(run_dir)} is missing: no trajectories {policy} training are shown.")
    pairs, num_paired = _read_pairs(files)
    return Examples(pairs, num_paired, training, training_rule, tuple(notes))


def choose_pairs(before: Mapping[str, bool], after: Mapping[str, bool]) -> tuple[list[tuple[str, str, int]], int]:
    """Return (id, change, number of such questions) of the questions to show, and the number of questions in both.

    The first of each kind of change in the file's order, so that none is picked by hand; a kind that never occurs
    leaves its place to the next question of the first kind that has one.
    """
    alike: dict[tuple[bool, bool], list[str]] = {change: [] for change in CHANGES}
    for identifier, right in before.items():
        if identifier in after:
            alike[right, after[identifier]].append(identifier)
    shown = {change: identifiers[:1] for change, identifiers in alike.items()}
    for change, identifiers in alike.items():
        spare = NUM_PAIRS - sum(map(len, shown.values()))
        shown[change] += identifiers[1 : 1 + spare]
    chosen = [
        (identifier, CHANGES[change], len(alike[change]))
        for change, identifiers in shown.items()
        for identifier in identifiers
    ]
    return chosen, sum(map(len, alike.values()))


def choose_training(recorded: Sequence[Transcript]) -> tuple[tuple[Transcript, ...], str]:
    """Return trajectories spread evenly over training, with noisy searches if enough have one, and this rule."""
    in_order = sorted(recorded, key=lambda one: one.record.get("step") or 0)
    noisy = [one for one in in_order if any(segment.noisy for segment in one.segments)]
    pool = noisy if len(noisy) >= NUM_TRAINING else in_order
    shown = f"{min(len(pool), NUM_TRAINING)} of {'these' if pool is noisy else 'all'}"
    rule = (
        f"Of {len(in_order)} trajectories recorded in training, {len(noisy)} have a search with noisy documents. "
        f"Shown are {shown}, spread evenly over the steps."
    )
    if len(pool) > NUM_TRAINING:
        pool = [pool[round(place * (len(pool) - 1) / (NUM_TRAINING - 1))] for place in range(NUM_TRAINING)]
    return tuple(pool), rule


def split_policy_text(text: str) -> tuple[Piece, ...]:
    """Split what the policy wrote at its tags; what follows an opening tag carries its name."""
    pieces, inside = [], ""
    for part in POLICY_TAG.split(text):
        if POLICY_TAG.fullmatch(part):
            inside = "" if part.startswith("</") else part[1:-1]
            pieces.append(Piece(part, "tag"))
        elif part:
            pieces.append(Piece(part, inside))
    return tuple(pieces)


def split_documents_text(text: str, golden_answers: Iterable[str]) -> tuple[Piece, ...]:
    """Split documents at their headers and at every golden answer in them, in whole words, whatever the case."""
    longest_first = sorted({answer for answer in golden_answers if answer.strip()}, key=len, reverse=True)
    golden = "|".join(map(re.escape, longest_first)) or r"(?!)"
    pattern = re.compile(rf"(?P<tag>{DOCUMENT_MARK})|(?<!\w)(?P<golden>{golden})(?!\w)", re.IGNORECASE)
    pieces, end = [], 0
    for match in pattern.finditer(text):
        pieces += [Piece(text[end : match.start()]), Piece(match.group(), match.lastgroup or "")]
        end = match.end()
    return tuple(piece for piece in [*pieces, Piece(text[end:])] if piece.text)


def _read_pairs(files: Mapping[str, Path]) -> tuple[tuple[Pair, ...], int]:
    """Return pairs from the files "before" and "after", and the number of questions in both; one file gives halves."""
    right = {policy: _right(path) for policy, path in files.items()}
    if len(right) == 2:
        chosen, num_paired = choose_pairs(right["before"], right["after"])
    else:
        chosen = [(identifier, "", 0) for of_one in right.values() for identifier in islice(of_one, NUM_PAIRS)]
        num_paired = 0
    wanted = {identifier for identifier, _, _ in chosen}
    found = {policy: _find(path, wanted) for policy, path in files.items()}
    pairs = (
        Pair(change, num_alike, found.get("before", {}).get(identifier), found.get("after", {}).get(identifier))
        for identifier, change, num_alike in chosen
    )
    return tuple(pairs), num_paired


def _right(path: Path) -> dict[str, bool]:
    """Return which questions of a file were answered right, in its order; of an id that recurs, the first."""
    right: dict[str, bool] = {}
    for place, record in read_jsonl(path):
        _check(record, place)
        if record.get("id") is None:
            raise UserError(f"{place} lacks 'id', by which before and after are paired")
        right.setdefault(str(record["id"]), record["em"] >= 1)
    return right


def _find(path: Path, wanted: set[str]) -> dict[str, Transcript]:
    found: dict[str, Transcript] = {}
    for place, record in read_jsonl(path):
        identifier = str(record.get("id"))
        if identifier in wanted and identifier not in found:
            found[identifier] = _transcript(record, place)
    return found


def _transcript(record: Mapping[str, Any], place: str) -> Transcript:
    _check(record, place)
    return Transcript(
        record, tuple(_segment(segment, record["golden_answers"], place) for segment in record["segments"])
    )


def _segment(segment: Any, golden_answers: Sequence[str], place: str) -> Segment:
    if not isinstance(segment, dict):
        raise UserError(f"{place}: a segment is {segment!r}, not an object")
    source, text, noisy = segment.get("source"), segment.get("text"), segment.get("noisy")
    if source not in SOURCES or not isinstance(text, str) or noisy not in (True, False, None):
        raise UserError(
            f"{place}: a segment has source {source!r}, text {text!r} and noisy {noisy!r}; "
            f"sources are {', '.join(SOURCES)}"
        )
    text = text.strip()
    if source == "policy":
        pieces = split_policy_text(text)
    elif source == "documents":
        pieces = split_documents_text(text, golden_answers)
    else:
        pieces = (Piece(text),) if text else ()
    return Segment(source, noisy, pieces)


def _check(record: Mapping[str, Any], place: str) -> None:
    for name, kind in FIELDS.items():
        if name not in record:
            raise UserError(f"{place} lacks {name!r}; it has {', '.join(sorted(record))}")
        if not isinstance(record[name], kind):
            raise UserError(f"{place}: {name!r} is {record[name]!r}")
