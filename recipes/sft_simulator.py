"""Tune a model to play the search engine (Search Simulation Tuning; paper, Section 3.3).

    python recipes/sft_simulator.py --config recipes/configs/sft-tinyworld.yaml
    accelerate launch recipes/sft_simulator.py --config recipes/configs/sft-qwen2.5-3b.yaml --searches outputs/sft
    ... --tuning lora     # or qlora, over 4-bit weights; --merge true puts the adapter into the weights

Loss on the documents only. `--searches` takes what recipes/build_simulator_data.py made, other judged searches, or
published examples (prompt and completion, messages, instruction and output). Without `--merge` the folder of a LoRA
holds the adapter alone, and recipes/serve_simulator.py serves it over its base; with it, the folder is a model of its
own and `adapter/` in it the adapter. `--save_strategy steps` and `--resume_from_checkpoint true` survive a kill.

Then vLLM serves the simulator to measure its fidelity on held-out searches, test.jsonl beside the tuning data or
`--held_out`; `--measure_fidelity false` leaves that out. The card, README.md in the folder, says how the simulator was
made and how faithful it is. `--push_to_hub true --hub_model_id you/simulator` uploads the folder.
"""

from __future__ import annotations

import zerosearch  # noqa: F401 (first: it sets what the libraries below read)

# isort: split
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from datasets import concatenate_datasets
from trl import ModelConfig

from zerosearch.checkpoints import training_run
from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import UserError
from zerosearch.files import write_json
from zerosearch.generation.loading import load_tokenizer
from zerosearch.hub import push_folder
from zerosearch.prompts import PROMPT_SETS, PromptSetName
from zerosearch.report.plots import write_fidelity_plot
from zerosearch.simulator.cards import write_simulator_card
from zerosearch.simulator.examples import load_examples
from zerosearch.simulator.fidelity import FidelityOptions, measure_tuned
from zerosearch.simulator.fidelity_card import card_markdown, write_card
from zerosearch.simulator.held_out import choose, read_held_out
from zerosearch.simulator.server import exit_on_signals
from zerosearch.training.tuning import TuningConfig, take_over_push, tune

MADE_HERE = ("adapter", "simulator.json", "fidelity.json", "fidelity.md", "fidelity.svg")  # beside the model


@dataclass
class RecipeArguments:
    """What to learn from, and what of the model learns."""

    searches: list[str] = field(
        metadata={"help": ".jsonl, .json or .parquet files, folders, or datasets on the Hub; all are learned from."}
    )
    searches_split: str = field(default="train", metadata={"help": "Split of folders and of datasets on the Hub."})
    prompt: PromptSetName = field(default="paper", metadata={"help": "The prompt set: see zerosearch.prompts."})
    tuning: Literal["full", "lora", "qlora"] = field(
        default="full", metadata={"help": "Every weight, a LoRA adapter, or one over 4-bit weights. See --lora_r etc."}
    )
    merge: bool = field(
        default=False, metadata={"help": "For lora and qlora: save the adapter merged into the model."}
    )
    measure_fidelity: bool = field(default=True, metadata={"help": "Measure the simulator once it is tuned."})
    held_out: str | None = field(
        default=None,
        metadata={"help": "Searches to measure with, JSONL. Default: test.jsonl in the first of --searches."},
    )
    fidelity_queries: int = field(default=300, metadata={"min": 2, "help": "Held-out queries to measure with."})
    leave_out_held_out: bool = field(
        default=False, metadata={"help": "Tune on no search whose query is held out, whatever its question is."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier run's output."})

    def __post_init__(self) -> None:
        if self.merge and self.tuning == "full":
            raise UserError("--merge is for --tuning lora or qlora: full tuning has no adapter to merge")
        if self.measure_fidelity and find_spec("vllm") is None:
            raise UserError("measuring needs vLLM, which is not installed; --measure_fidelity false leaves it out")


@dataclass
class SimulatorConfig(TuningConfig):
    """TRL's settings with the author's values: lr 1e-6, batch 2, 1,000 steps (ZeroSearch issue 25)."""

    output_dir: str = "outputs/simulator"
    learning_rate: float = 1e-6
    per_device_train_batch_size: int = 2
    max_steps: int = 1000
    completion_only_loss: bool | None = True
    logging_steps: float = 20


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check what can be checked early, then tune, save, describe, measure and push."""
    recipe, training, model = parse(RecipeArguments, SimulatorConfig, ModelConfig, argv=argv)
    if model.use_peft or model.load_in_4bit or model.load_in_8bit:  # these could contradict --tuning
        raise UserError("say --tuning lora instead of --use_peft, and --tuning qlora for 4-bit weights")
    model.use_peft, model.load_in_4bit = recipe.tuning != "full", recipe.tuning == "qlora"
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training.trust_remote_code)
    prompts = PROMPT_SETS[recipe.prompt]
    queries = Path(recipe.held_out or Path(recipe.searches[0], "test.jsonl"))
    reads_held_out = recipe.measure_fidelity or recipe.leave_out_held_out
    if reads_held_out and not queries.is_file():
        flags = "--held_out, --measure_fidelity and --leave_out_held_out"
        raise UserError(f"{queries} holds no searches to measure with or to leave out: see {flags}")
    held_out = read_held_out(queries, prompts.rule) if reads_held_out else []
    options = FidelityOptions(num_queries=recipe.fidelity_queries)
    if recipe.measure_fidelity:
        choose(held_out, recipe.fidelity_queries, options.seed)  # refuses what cannot be measured before it is tuned
    left_out = {held.query for held in held_out} if recipe.leave_out_held_out else set()
    examples = concatenate_datasets(
        [load_examples(source, recipe.searches_split, prompts.simulator, left_out) for source in recipe.searches]
    )
    folder = Path(training.output_dir)
    with training_run(training, recipe.overwrite_output_dir, MADE_HERE) as checkpoint:
        repository = take_over_push(training)
        made = {
            "base_model": model.model_name_or_path,
            "searches": ", ".join(recipe.searches),
            "prompt": recipe.prompt,
        }
        made |= {"tuning": recipe.tuning} | ({} if recipe.tuning == "full" else {"merged": recipe.merge})
        made |= tune(model, training, tokenizer, examples, checkpoint, recipe.merge)
        if training.process_index != 0:
            return
        write_json(folder / "simulator.json", made)
        command = write_simulator_card(folder, made, prompts.simulator, repository)
        print(f"simulator saved to {folder}; serve it: {command}")
        if recipe.measure_fidelity:
            exit_on_signals()  # so that no server stays
            about = {"model": str(folder), "prompt": recipe.prompt, "queries": str(queries)}
            card = measure_tuned(folder, held_out, options, prompts.simulator, model.dtype or "auto", about)
            write_card(card, folder / "fidelity")
            write_fidelity_plot(card, folder / "fidelity")
            write_simulator_card(folder, made, prompts.simulator, repository, card_markdown(card))
            print(f"\n{card_markdown(card)}\n")
        if repository:
            print(f"pushed to {push_folder(folder, repository, 'model', 'Add the simulator')}")


if __name__ == "__main__":
    main()
