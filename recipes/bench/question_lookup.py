"""How often the question of a query is found by the query alone, as recipes/serve_retriever.py finds it.

    python recipes/bench/question_lookup.py --searches search_traces.jsonl \
        --questions qa_multihop.jsonl qa_dev.jsonl qa_train.jsonl

`searches` are real ones, rows `{question, query}`; `questions` are registered, those of the searches among them. The
first search of a question mostly repeats its words; a later one may name what an earlier one has found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.data import load_questions
from zerosearch.engines.simulated_retriever import MARGIN, QuestionLookup
from zerosearch.files import claim_output_dir, read_jsonl, write_json


@dataclass
class BenchArguments:
    """What to look up, and among what."""

    searches: str = field(metadata={"help": "Searches, JSONL."})
    questions: list[str] = field(metadata={"help": "Questions, .jsonl or .parquet."})
    output: str = "outputs/bench/question_lookup.json"


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Look each query up with and without a margin, count, write, print."""
    (arguments,) = parse(BenchArguments, argv=argv)
    searches = [row for _, row in read_jsonl(arguments.searches)]
    questions = [row for source in arguments.questions for row in load_questions(source)]
    asked = [row["question"].strip() for row in searches]
    first = [place for place, question in enumerate(asked) if question not in asked[:place]]
    later = [place for place, question in enumerate(asked) if question in asked[:place]]
    kinds = {"all": [*range(len(asked))], "first of a question": first, "later": later}
    rows = []
    for margin in (1.0, MARGIN):
        found = QuestionLookup(questions, margin).find([row["query"] for row in searches])
        for kind, places in kinds.items():
            taken = [row["question"] == asked[place] for place in places if (row := found[place])]
            share, right = len(taken) / len(places), sum(taken) / max(len(taken), 1)
            rows.append({"searches": kind, "n": len(places), "margin": margin, "taken": share, "right": right})
            print(f"{kind:<20} {len(places):>6} margin {margin}: taken {share:.3f}, of them right {right:.3f}")
    output = Path(arguments.output)
    claim_output_dir(output.parent, overwrite=True)
    write_json(output, {"questions": len(questions), "rows": rows})


if __name__ == "__main__":
    main()
