"""Compare two evaluations of the same questions, question by question: is the second better, and by how much?

    python recipes/compare.py --first outputs/before --second outputs/after

Prints the differences of EM and F1 with 95 % intervals. They are paired: differences of single questions are
resampled, which is sharper than two intervals side by side. `--output comparison.json` keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import read_trajectories
from zerosearch.evaluation.scores import Record, compare
from zerosearch.evaluation.tables import comparison_table
from zerosearch.files import write_json


@dataclass
class ComparisonArguments:
    """What to compare."""

    first: str = field(metadata={"help": "Output folder of an evaluation."})
    second: str = field(metadata={"help": "Output folder of another; a difference above 0 says that it is better."})
    seed: int = field(default=0, metadata={"min": 0, "help": "Seed of the bootstrap."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the comparison."})


def trajectories(folder: str) -> list[Record]:
    """Return the trajectories of an evaluation."""
    path = Path(folder, "trajectories.jsonl")
    records = read_trajectories(path) if path.is_file() else []
    if not records:
        raise UserError(f"{folder} holds no evaluation: trajectories.jsonl is missing or empty")
    return records


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Read two evaluations, compare them, print and keep the result."""
    (arguments,) = parse(ComparisonArguments, argv=argv)
    differences = compare(trajectories(arguments.first), trajectories(arguments.second), arguments.seed)
    say(comparison_table(differences))
    if differences["unpaired"]:
        say(f"\n{differences['unpaired']} questions are in one of the two only, and left out")
    if arguments.output:
        write_json(Path(arguments.output), differences)


if __name__ == "__main__":
    main()
