"""Split real questions four ways, so that no question is in two of cold start, simulator tuning, RL and test.

    python data/split_questions.py --questions qa_multihop.jsonl --traces search_traces.jsonl \
        --train_questions qa_train.jsonl --output_dir outputs/smollm/data

A hash of its words decides where a question belongs, in whatever file it occurs, by the shares of SHARES.
`--questions` can be answered with the corpus at hand and `--traces` are searches for them; `--train_questions` need no
passages, as RL against a simulator needs none, so all of them that are in neither of the other files are for RL.

- cold_start.jsonl, simulator.jsonl: searches, for recipes/sft_policy.py and recipes/build_simulator_data.py
- rl.jsonl: questions to train on; rl_with_passages.jsonl: those of them that the corpus can answer
- test.jsonl: questions that nothing is trained on
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import load_questions
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, sole_writer, write_jsonl
from zerosearch.metrics import normalize_answer
from zerosearch.simulator.traces import read_traces

SHARES = {"cold_start": 0.22, "simulator": 0.16, "rl": 0.08, "test": 0.54}  # ours; test: over 500 of 1,000

Rows = Sequence[Mapping[str, Any]]


@dataclass
class SplitArguments:
    """What to split, and where it goes."""

    questions: str = field(metadata={"help": "Questions that the corpus can answer."})
    traces: str = field(metadata={"help": "Searches for them: {question, golden_answers, query, documents}."})
    train_questions: str | None = field(default=None, metadata={"help": "More questions, for RL alone."})
    output_dir: str = field(default="outputs/smollm/data", metadata={"help": "Folder for the parts; new or empty."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the parts that are there."})


def part_of(question: str) -> str:
    """Return the one part that a question belongs to: a key of SHARES, by a hash of its words."""
    digest = hashlib.sha256(f"part {normalize_answer(question)}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    return next(name for name, end in zip(SHARES, accumulate(SHARES.values()), strict=True) if place < end)


def split(questions: Rows, traces: Rows, train_questions: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows of each file. A train question is for RL unless it is one of the others."""
    parts = {name: [row for row in questions if part_of(row["question"]) == name] for name in ("rl", "test")}
    parts |= {
        name: [row for row in traces if part_of(row["question"]) == name] for name in ("cold_start", "simulator")
    }
    parts["rl_with_passages"] = parts["rl"]
    known = {normalize_answer(row["question"]) for row in (*questions, *traces)}
    parts["rl"] = [
        *parts["rl"],
        *(row for row in train_questions if normalize_answer(row["question"]) not in known),
    ]
    return parts


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write the parts, and say how many questions each has."""
    (arguments,) = parse(SplitArguments, argv=argv)
    questions = load_questions(arguments.questions).to_list()
    train_questions = load_questions(arguments.train_questions).to_list() if arguments.train_questions else []
    parts = split(questions, read_traces(arguments.traces), train_questions)
    for name, rows in parts.items():
        if not rows:
            raise UserError(f"no question is left for {name}: give more questions")
    folder = claim_output_dir(arguments.output_dir, arguments.overwrite_output_dir)
    with sole_writer(folder):
        for name, rows in parts.items():
            write_jsonl(folder / f"{name}.jsonl", rows)
            print(f"{folder / name}.jsonl: {len(rows):,} rows, {len({row['question'] for row in rows}):,} questions")


if __name__ == "__main__":
    main()
