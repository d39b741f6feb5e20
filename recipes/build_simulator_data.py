"""Build what a simulator learns from, out of real searches (Search Simulation Tuning; paper, Section 3.3 and Table 2).

    python recipes/build_simulator_data.py --traces search_traces.jsonl --output_dir outputs/sft      # the free rule
    python recipes/build_simulator_data.py --traces judged.jsonl --judge qwen-max --output_dir outputs/sft

The output folder is a dataset as `datasets.load_dataset` and the Hub take it: train.jsonl, test.jsonl and a card;
statistics.json holds the counts of the card. Rows are judged
searches; the tuning recipe writes the prompt. `--push_to_hub you/name` uploads it. Searches that nobody has judged yet
are judged here by the rule (the answer occurs in the document). Next: recipes/sft_simulator.py --searches FOLDER.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, write_jsonl
from zerosearch.prompts import PAPER
from zerosearch.simulator.cards import create_repository, dataset_card, push_folder
from zerosearch.simulator.dataset import SPLITS, SetOptions, build_sets, statistics, statistics_table
from zerosearch.simulator.examples import simulator_example
from zerosearch.simulator.judge import RULE, rule_verdicts
from zerosearch.simulator.traces import read_traces


@dataclass
class BuildArguments:
    """What to build from, and how."""

    traces: str = field(metadata={"help": "JSONL rows {question, golden_answers, query, documents}, judged or not."})
    output_dir: str = field(metadata={"help": "Folder for the dataset; must be new or empty."})
    judge: str = field(default=RULE, metadata={"help": "Whose verdicts count: rule, or the name of the model."})
    num_documents: int = field(default=5, metadata={"help": "Most documents in a set (Table 2)."})
    num_words: int = field(default=30, metadata={"help": "Words of a document, about (Table 2)."})
    min_documents: int = field(default=1, metadata={"help": "Leave out sets of fewer documents."})
    fill_from_question: bool = field(
        default=False, metadata={"help": "Fill sets up with what other queries of the question found (rule only)."}
    )
    p_test: float = field(default=0.1, metadata={"help": "Share of the questions that goes into test.jsonl."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Upload the folder as this dataset, you/name."})
    private: bool = field(default=False, metadata={"help": "Make the dataset on the Hub private."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into a folder that is not empty."})

    def set_options(self) -> SetOptions:
        return SetOptions(
            self.judge, self.num_documents, self.num_words, self.min_documents, self.fill_from_question, self.p_test
        )


def judged(traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the rule's verdicts where they are missing: they cost nothing."""
    return [
        trace
        if RULE in trace.get("verdicts", {})
        else {**trace, "verdicts": {**trace.get("verdicts", {}), RULE: rule_verdicts(trace)}}
        for trace in traces
    ]


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse(BuildArguments, argv=argv)
    options = arguments.set_options()
    traces = judged(read_traces(arguments.traces))
    sets = build_sets(traces, options)
    if not sets:
        raise UserError(f"no document of {arguments.traces} makes a set: see --judge and --min_documents")
    directory = claim_output_dir(arguments.output_dir, arguments.overwrite_output_dir)
    repository = arguments.push_to_hub and create_repository(arguments.push_to_hub, "dataset", arguments.private)
    found = statistics(traces, sets, options.judge)
    for split in SPLITS:
        rows = [row for row in sets if row["split"] == split]
        if rows:
            write_jsonl(directory / f"{split}.jsonl", rows)
    (directory / "statistics.json").write_text(json.dumps(found, indent=2) + "\n")
    about = {"traces": Path(arguments.traces).name, **asdict(options)}
    example = simulator_example(sets[0], PAPER.simulator)
    shown = "\n".join(message["content"] for message in [*example["prompt"][1:], *example["completion"]])
    title = (repository or directory.resolve().name).split("/")[-1]
    (directory / "README.md").write_text(dataset_card(title, found, about, shown), encoding="utf-8")
    print(statistics_table(found))
    print(f"dataset: {directory}; tune with: python recipes/sft_simulator.py --searches {directory}")
    if repository:
        print(f"pushed to {push_folder(directory, repository, 'dataset', 'Add simulator examples')}")


if __name__ == "__main__":
    main()
