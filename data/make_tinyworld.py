"""Write TinyWorld's data to a folder: what a real run would take from the Hub, from Wikipedia and from a search API.

    python data/make_tinyworld.py --output_dir outputs/tinyworld --seed 0

- corpus.jsonl: the passages of the evaluation world, in wiki-18's format, for a BM25 engine
- test.jsonl: questions about the evaluation world; the same for every seed
- train.jsonl: questions about training worlds, which share no fact with the evaluation world
- searches.jsonl: judged searches of a training world by BM25, from which the simulator is tuned
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import HfArgumentParser

from zerosearch.engines.bm25 import BM25Engine
from zerosearch.errors import exit_on_user_error
from zerosearch.tinyworld import World, judged_searches, question_rows

EVALUATION_SEED = 0


@dataclass
class TinyWorldArguments:
    """Where to write, and how much."""

    output_dir: str = "outputs/tinyworld"
    seed: int = 0
    n_train: int = 2000
    n_test: int = 300
    n_searches: int = 3000
    n_people: int = 400


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {sum(1 for _ in path.open(encoding='utf-8')):,} rows")


@exit_on_user_error
def main() -> None:
    arguments: TinyWorldArguments = HfArgumentParser(TinyWorldArguments).parse_args_into_dataclasses()[0]
    directory = Path(arguments.output_dir)
    directory.mkdir(parents=True, exist_ok=True)

    evaluation_world = World.draw(EVALUATION_SEED, arguments.n_people, held_out=True)
    write_jsonl(directory / "corpus.jsonl", evaluation_world.passages())
    write_jsonl(directory / "test.jsonl", question_rows(evaluation_world, arguments.n_test, EVALUATION_SEED))

    training_world = World.draw(arguments.seed, arguments.n_people)
    write_jsonl(directory / "train.jsonl", question_rows(training_world, arguments.n_train, arguments.seed))
    write_jsonl(directory / "train_corpus.jsonl", training_world.passages())
    engine = BM25Engine(directory / "train_corpus.jsonl", num_documents=12)
    searches = asyncio.run(judged_searches(training_world, engine, arguments.n_searches // 2, arguments.seed))
    write_jsonl(directory / "searches.jsonl", searches)


if __name__ == "__main__":
    main()
