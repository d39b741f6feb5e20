"""Build what a simulator learns from, out of real searches (Search Simulation Tuning; paper, Section 3.3 and Table 2).

    python recipes/build_simulator_data.py --traces search_traces.jsonl --output_dir outputs/sft      # the free rule
    python recipes/build_simulator_data.py --traces judged.jsonl --judge qwen-max --output_dir outputs/sft

The output folder is a dataset for `datasets.load_dataset` and the Hub: train.jsonl, test.jsonl and a card;
statistics.json holds the counts of the card. Rows are judged searches; the tuning recipe adds the prompt.
`--push_to_hub you/name` uploads it. Searches that nobody has judged yet are judged here by the rule (the answer occurs
in the document). Next: recipes/sft_simulator.py --searches FOLDER.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir, sole_writer, write_json, write_jsonl
from zerosearch.hub import create_repository, push_folder
from zerosearch.prompts import PROMPT_SETS, PromptSetName
from zerosearch.simulator.cards import write_dataset_card
from zerosearch.simulator.dataset import SPLITS, SetOptions, build_sets, statistics, statistics_table
from zerosearch.simulator.examples import simulator_example
from zerosearch.simulator.judge import RULE, rule_verdicts
from zerosearch.simulator.traces import read_traces

MADE = (*(f"{split}.jsonl" for split in SPLITS), "statistics.json", "README.md")


@dataclass
class BuildArguments:
    """What to build from, and where it goes."""

    traces: str = field(metadata={"help": "JSONL rows {question, golden_answers, query, documents}, judged or not."})
    output_dir: str = field(metadata={"help": "Folder for the dataset; must be new or empty."})
    prompt: PromptSetName = field(default="paper", metadata={"help": "Prompts of the example that the card shows."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Upload the folder as this dataset, you/name."})
    private: bool = field(default=False, metadata={"help": "Make the dataset on the Hub private."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the dataset that is there."})


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
    arguments, options = parse(BuildArguments, SetOptions, argv=argv)
    traces = judged(read_traces(arguments.traces))
    sets = build_sets(traces, options)
    if not sets:
        raise UserError(f"no document of {arguments.traces} makes a set: see --judge and --min_documents")
    directory = Path(arguments.output_dir)
    with sole_writer(directory):
        claim_output_dir(directory, arguments.overwrite_output_dir)
        repository = arguments.push_to_hub and create_repository(arguments.push_to_hub, "dataset", arguments.private)
        for name in MADE:
            (directory / name).unlink(missing_ok=True)
        for split in SPLITS:
            if rows := [row for row in sets if row["split"] == split]:
                write_jsonl(directory / f"{split}.jsonl", rows)
        found = statistics(traces, sets, options.judge)
        write_json(directory / "statistics.json", found)
        about = {"traces": Path(arguments.traces).name, "prompt": arguments.prompt, **asdict(options)}
        example = simulator_example(sets[0], PROMPT_SETS[arguments.prompt].simulator)
        shown = "\n".join(message["content"] for message in [*example["prompt"][1:], *example["completion"]])
        write_dataset_card(directory, found, about, shown, repository)
        print(statistics_table(found))
        print(f"dataset: {directory}; tune with: python recipes/sft_simulator.py --searches {directory}")
        if repository:
            print(f"pushed to {push_folder(directory, repository, 'dataset', 'Add simulator examples')}")


if __name__ == "__main__":
    main()
