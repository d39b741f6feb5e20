"""Write TinyWorld's data to a folder: what a real run would take from the Hub, from Wikipedia and from a search API.

    python data/make_tinyworld.py --output_dir outputs/tinyworld --seed 0

- corpus.jsonl: the passages of the evaluation world, in wiki-18's format, for a BM25 engine
- test.jsonl: questions about the evaluation world; the same for every seed
- train.jsonl: questions about a training world, which shares no fact with the evaluation world
- train_corpus.jsonl: its passages, to train on a real engine
- searches.jsonl: judged searches of training worlds by BM25, from which the simulator is tuned
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.engines.bm25 import BM25Engine
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, sole_writer, write_jsonl
from zerosearch.tinyworld.world import World, judged_searches, question_rows

EVALUATION_SEED = 0
MOST_SEARCHED_WORLDS = 1000  # the worlds of one seed are numbered apart from those of the next


@dataclass
class TinyWorldArguments:
    """Where to write, and how much."""

    output_dir: str = "outputs/tinyworld"
    seed: int = 0
    n_train: int = field(default=2000, metadata={"min": 1})
    n_test: int = field(default=300, metadata={"min": 1})
    n_searches: int = 6000
    n_searched_worlds: int = 40
    asked_relation_in_noise: bool = field(
        default=True, metadata={"help": "noisy documents may state the relation the query asks for, about others"}
    )
    n_people: int = 400

    def __post_init__(self) -> None:
        if not 1 <= self.n_searched_worlds <= MOST_SEARCHED_WORLDS:
            raise UserError(f"n_searched_worlds is {self.n_searched_worlds}: choose 1 to {MOST_SEARCHED_WORLDS}")
        if self.n_searches < 2 * self.n_searched_worlds:
            raise UserError(
                f"n_searches is {self.n_searches}: {self.n_searched_worlds} worlds need two each, useful and noisy"
            )


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_jsonl(path, rows)
    print(f"{path}: {len(rows):,} rows")


def search_many_worlds(arguments: TinyWorldArguments) -> list[dict[str, object]]:
    """Search many small training worlds with BM25: from a single one the simulator would learn its facts by heart."""
    searches: list[dict[str, object]] = []
    num_documents = 12 if arguments.asked_relation_in_noise else 48  # enough that five noisy ones are left
    for number in tqdm(range(arguments.n_searched_worlds), desc="searching"):
        seed = MOST_SEARCHED_WORLDS * (arguments.seed + 1) + number
        world = World.draw(seed, n_people=100)
        with TemporaryDirectory() as directory:
            corpus = Path(directory) / "corpus.jsonl"
            corpus.write_text("".join(json.dumps(passage) + "\n" for passage in world.passages()), encoding="utf-8")
            engine = BM25Engine(corpus, num_documents=num_documents)
        n_questions = arguments.n_searches // (2 * arguments.n_searched_worlds)
        searches += asyncio.run(judged_searches(world, engine, n_questions, seed, arguments.asked_relation_in_noise))
    return searches


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse(TinyWorldArguments, argv=argv)
    directory = claim_output_dir(arguments.output_dir, overwrite=True)
    evaluation_world = World.draw(EVALUATION_SEED, arguments.n_people, held_out=True)
    training_world = World.draw(arguments.seed, arguments.n_people)
    with sole_writer(directory):
        write(directory / "corpus.jsonl", evaluation_world.passages())
        write(directory / "test.jsonl", question_rows(evaluation_world, arguments.n_test, EVALUATION_SEED))
        write(directory / "train.jsonl", question_rows(training_world, arguments.n_train, arguments.seed))
        write(directory / "train_corpus.jsonl", training_world.passages())
        write(directory / "searches.jsonl", search_many_worlds(arguments))


if __name__ == "__main__":
    main()
