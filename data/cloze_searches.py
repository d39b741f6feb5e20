"""Make searches for a simulator to learn from, where real ones are few: gaps in passages, looked up by BM25.

    python data/cloze_searches.py --corpus wiki_passages.jsonl --leave_out outputs/smollm/data/test.jsonl \
        --output outputs/smollm/data/cloze.jsonl

A sentence of a passage loses a name or a number, which is the answer to look for; the query is the passage's title
with words of that sentence. So a tuned simulator learns above all to bring in the answer it is told, of which a few
hundred real searches show too little to a small model. What BM25 finds for the questions of `--leave_out` is used for
nothing. Rows are search traces, `{dataset, question, golden_answers, query, documents}`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import Passage, load_questions
from zerosearch.engines.bm25 import BM25Index
from zerosearch.engines.corpus import read_corpus
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, write_jsonl
from zerosearch.metrics import holds_answer
from zerosearch.simulator.dataset import END_OF_SENTENCE

# Two capitalised words or more ("Suicide Kings", "House of Commons"), a year or a large number.
ANSWER = re.compile(r"\b[A-Z][\w'-]+(?: (?:of |the |de |von )*[A-Z][\w'-]+)+|\b\d{4}\b|\b\d+(?:,\d{3})+\b")
NUM_DOCUMENTS = 5  # of a search
NUM_WORDS = 4  # of the sentence that go into the query
SHORTEST_WORD = 4  # letters


@dataclass
class ClozeArguments:
    """What to make searches of, and how many."""

    corpus: str = field(metadata={"help": "Passages, JSONL in wiki-18's format."})
    output: str = field(metadata={"help": "JSONL file to write."})
    leave_out: str | None = field(default=None, metadata={"help": "Questions whose passages are left out."})
    num_searches: int = field(default=1000, metadata={"min": 1, "help": "How many at most, one a passage."})
    seed: int = 0


def cloze(passage: Passage, rng: random.Random) -> tuple[str, str, str] | None:
    """Return question, answer and query of a gap in a passage; `None` where it has no answer to look for."""
    gaps = [
        (sentence, found)
        for sentence in END_OF_SENTENCE.split(passage.text)
        for found in ANSWER.finditer(sentence)
        if not holds_answer(passage.title, [found[0]])
    ]
    if not passage.title or not gaps:
        return None
    sentence, answer = rng.choice(gaps)
    before, after = sentence[: answer.start()], sentence[answer.end() :]
    known = passage.title.lower().split()
    words = [word for word in re.findall(rf"\w{{{SHORTEST_WORD},}}", f"{before} {after}") if word.lower() not in known]
    return f"{before}___{after}", answer[0], " ".join([passage.title, *words[:NUM_WORDS]])


def searches(arguments: ClozeArguments) -> Iterator[dict[str, Any]]:
    """Yield search traces, the passages in a random order."""
    rng = random.Random(arguments.seed)
    index = BM25Index(arguments.corpus)
    left_out: set[int] = set()
    if arguments.leave_out:
        questions = [row["question"] for row in load_questions(arguments.leave_out)]
        left_out = {start for found in index.find(questions, NUM_DOCUMENTS) for start, _ in found}
    passages = [passage for start, passage in read_corpus(Path(arguments.corpus)) if start not in left_out]
    rng.shuffle(passages)
    made = [(passage, gap) for passage in passages if (gap := cloze(passage, rng))][: arguments.num_searches]
    every = index.find([query for _, (_, _, query) in made], NUM_DOCUMENTS + len(left_out))
    for (_, (question, answer, query)), found in zip(made, every, strict=True):
        starts = [start for start, _ in found if start not in left_out][:NUM_DOCUMENTS]
        documents = [{"title": one.title, "text": one.text} for one in map(index.passage, starts)]
        row = {"dataset": "cloze", "question": question, "golden_answers": [answer], "query": query}
        yield {**row, "documents": documents}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write the searches, and say how many there are."""
    (arguments,) = parse(ClozeArguments, argv=argv)
    output = Path(arguments.output)
    claim_output_dir(output.parent, overwrite=True)
    rows = list(searches(arguments))
    if not rows:
        raise UserError(f"{arguments.corpus} has no passage left with a title and a name or a number to look for")
    write_jsonl(output, rows)
    print(f"{output}: {len(rows):,} searches")


if __name__ == "__main__":
    main()
