"""Tune a model to play the search engine (Search Simulation Tuning; paper, Section 3.3).

    python recipes/sft_simulator.py --config recipes/configs/sft-tinyworld.yaml
    accelerate launch recipes/sft_simulator.py --config recipes/configs/sft-qwen2.5-3b.yaml --searches outputs/sft
    ... --tuning lora     # or qlora, over 4-bit weights; --merge true puts the adapter into the weights

Loss on the documents only. `--searches` takes what recipes/build_simulator_data.py made, other judged searches, or
published examples (prompt and completion, messages, instruction and output). Without `--merge` the folder of a LoRA
holds the adapter alone, and recipes/serve_simulator.py serves it over its base; with it, the folder is a model of its
own and `adapter/` in it the adapter.

Then vLLM serves the simulator for a while to measure its fidelity on held-out searches, test.jsonl beside the tuning
data or `--held_out`; `--measure_fidelity false` leaves that out. The card, README.md in the folder, says how the
simulator was made and how faithful it is. `--push_to_hub true --hub_model_id you/simulator` uploads the folder.
"""

from __future__ import annotations

import gc
import json
import os
import socket
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir
from zerosearch.generation.loading import fit_to_cpu, load_tokenizer, whole_model
from zerosearch.generation.tokenization import chat_messages
from zerosearch.prompts import PROMPT_SETS, PromptSetName
from zerosearch.report.plots import write_fidelity_plot
from zerosearch.simulator.cards import create_repository, push_folder, simulator_card
from zerosearch.simulator.examples import load_examples
from zerosearch.simulator.fidelity import FidelityOptions, measure_simulator
from zerosearch.simulator.fidelity_card import card_markdown, write_card
from zerosearch.simulator.held_out import HeldOutQuery, read_held_out
from zerosearch.simulator.server import SERVED_ADAPTER, ServerDied, exit_on_signals, is_adapter, simulator_server

# What launchers set: a server that is started by one rank must not take itself for a rank.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")


@dataclass
class RecipeArguments:
    """What to learn from, and what of the model learns."""

    searches: str = field(metadata={"help": "A .jsonl, .json or .parquet file, a folder, or a dataset on the Hub."})
    searches_split: str = field(default="train", metadata={"help": "Split of a folder or of a dataset on the Hub."})
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
        metadata={"help": "Searches to measure with, JSONL. Default: test.jsonl in the folder --searches."},
    )
    fidelity_queries: int = field(default=300, metadata={"help": "Held-out queries to measure with."})
    leave_out_held_out: bool = field(
        default=False, metadata={"help": "Tune on no search whose query is held out, whatever its question is."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into a folder that is not empty."})

    def __post_init__(self) -> None:
        if self.leave_out_held_out and not self.measure_fidelity:
            raise UserError("--leave_out_held_out is for --measure_fidelity true, which names what is held out")
        if self.merge and self.tuning == "full":
            raise UserError("--merge is for --tuning lora or qlora: full tuning has no adapter to merge")
        if self.tuning == "qlora" and find_spec("bitsandbytes") is None:
            raise UserError("--tuning qlora needs bitsandbytes: pip install 'zerosearch[train]'")
        if self.measure_fidelity and find_spec("vllm") is None:
            raise UserError("measuring needs vLLM, which is not installed; --measure_fidelity false leaves it out")

    def held_out_queries(self) -> list[HeldOutQuery]:
        """Return what to measure with. Raises `UserError` if there is nothing."""
        path = Path(self.held_out or Path(self.searches) / "test.jsonl")
        if not path.is_file():
            raise UserError(
                f"there are no held-out searches in {path} to measure the simulator with; name some with --held_out, "
                "or pass --measure_fidelity false"
            )
        return read_held_out(path, PROMPT_SETS[self.prompt].rule)


@dataclass
class SimulatorConfig(SFTConfig):
    """TRL's settings with the author's values: lr 1e-6, batch 2, 1,000 steps (ZeroSearch issue 25)."""

    output_dir: str = "outputs/simulator"
    learning_rate: float = 1e-6
    per_device_train_batch_size: int = 2
    max_steps: int = 1000
    completion_only_loss: bool | None = True
    logging_steps: float = 20
    report_to: str = "none"
    save_strategy: str = "no"

    def __post_init__(self) -> None:
        fit_to_cpu(self)
        super().__post_init__()


def choose_tuning(tuning: str, model: ModelConfig) -> None:
    """Set TRL's own flags; they are refused by themselves, as they could contradict `--tuning`."""
    if model.use_peft or model.load_in_4bit or model.load_in_8bit:
        raise UserError("say --tuning lora instead of --use_peft, and --tuning qlora for 4-bit weights")
    model.use_peft = tuning != "full"
    model.load_in_4bit = tuning == "qlora"


def checkpoint_to_resume(config: SFTConfig) -> str | None:
    """Return the checkpoint to go on from: the folder named, or for "true" the last one in the output folder."""
    asked = config.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    last = get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
    checkpoint = last if asked.lower() == "true" else asked
    if checkpoint is None or not Path(checkpoint, "trainer_state.json").is_file():
        raise UserError(f"there is no checkpoint to resume from: {checkpoint or config.output_dir}")
    return checkpoint


def check_lengths(trainer: SFTTrainer, num_examples: int) -> None:
    """Refuse examples that TRL has cut or dropped: the simulator would learn to stop in the middle of a document."""
    longest, prepared = trainer.args.max_length, trainer.train_dataset
    if longest is None or trainer.args.packing:
        return
    cut = num_examples - len(prepared) + sum(len(token_ids) >= longest for token_ids in prepared["input_ids"])
    if cut:
        raise UserError(
            f"{cut:,} of {num_examples:,} examples do not fit into {longest} tokens and would be cut; "
            "pass a larger --max_length, or build them with fewer --num_words"
        )


def save_merged(model: ModelConfig, training: SFTConfig, adapter: Path, output_dir: Path) -> None:
    """Save the base, in its own precision and not in 4 bits, with the adapter merged into it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 this one process would load a share of the weights
    base = AutoModelForCausalLM.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        dtype=model.dtype,
        trust_remote_code=training.trust_remote_code,
    )
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(output_dir)


def serve_commands(folder: Path, repository: str | None, is_adapter: bool) -> list[str]:
    """Return the commands that serve the simulator, from the Hub if it was pushed there."""
    download = [f"hf download {repository} --local-dir {folder.name}"] if repository and is_adapter else []
    model = folder if repository is None else folder.name if is_adapter else repository
    return [*download, f"python recipes/serve_simulator.py --model {model}"]


def measured(recipe: RecipeArguments, queries: list[HeldOutQuery], folder: Path, dtype: str) -> str:
    """Serve the simulator, measure it, write the card beside it and return it as Markdown.

    Raises `UserError` if that fails; the simulator is saved by then.
    """
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        del os.environ[name]
    again = f"python recipes/measure_fidelity.py --model {folder} --queries QUERIES"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    on_gpu = torch.accelerator.is_available()
    options = {"dtype": "auto", "vllm_arguments": ("--gpu-memory-utilization", "0.6")} if on_gpu else {"dtype": dtype}
    template = PROMPT_SETS[recipe.prompt].simulator
    try:
        exit_on_signals()  # so that no server stays
        with simulator_server(str(folder), port, **options) as server:
            engine = SimulatedEngine(server.base_url, SERVED_ADAPTER if is_adapter(str(folder)) else None, template)
            amount = FidelityOptions(num_queries=recipe.fidelity_queries)
            about = {"model": str(folder), "prompt": recipe.prompt, "queries": recipe.held_out or recipe.searches}
            card = measure_simulator(engine, queries, amount, about)
    except (ServerDied, UserError) as error:
        raise UserError(f"the simulator is saved, but could not be measured ({again}): {error}") from error
    write_card(card, folder / "fidelity")
    write_fidelity_plot(card, folder / "fidelity")
    return card_markdown(card)


def about(recipe: RecipeArguments, training: SFTConfig, model: ModelConfig, trainer: SFTTrainer) -> dict[str, Any]:
    """Say how the simulator was made, for its card."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    made: dict[str, Any] = {
        "base_model": model.model_name_or_path,
        "searches": recipe.searches,
        "examples": len(trainer.train_dataset),
        "prompt": recipe.prompt,
        "tuning": recipe.tuning,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)),
        "batch_size": batch,
        "steps": trainer.state.global_step,
        "last_loss": losses[-1] if losses else None,
        "seed": training.seed,
    }
    if recipe.tuning != "full":
        made |= {"lora_r": model.lora_r, "lora_alpha": model.lora_alpha, "merged": recipe.merge}
    return made


def tune(
    recipe: RecipeArguments,
    training: SFTConfig,
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    checkpoint: str | None,
) -> dict[str, Any]:
    """Tune and save the model, and say how; what fills the device is gone when this returns."""
    training.model_init_kwargs = {"dtype": model.dtype, "revision": model.model_revision}
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=examples,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    check_lengths(trainer, len(examples))
    trainer.train(resume_from_checkpoint=checkpoint)
    output_dir = Path(training.output_dir)
    adapter = output_dir / "adapter" if recipe.merge else output_dir
    trainer.save_model(adapter)
    if recipe.merge and training.process_index == 0:
        save_merged(model, training, adapter, output_dir)
        tokenizer.save_pretrained(output_dir)
    return about(recipe, training, model, trainer)


def finish(
    recipe: RecipeArguments,
    model: ModelConfig,
    folder: Path,
    made: dict[str, Any],
    held_out: list[HeldOutQuery],
    repository: str | None,
) -> None:
    """Describe the simulator, measure it, and push it."""
    base = model.model_name_or_path if not Path(model.model_name_or_path).exists() else None
    title = (repository or folder.resolve().name).split("/")[-1]
    commands = serve_commands(folder, repository, is_adapter(str(folder)))
    template = PROMPT_SETS[recipe.prompt].simulator
    template = template if isinstance(template, str) else template.useful

    def describe(fidelity: str = "") -> None:
        card = simulator_card(title, base, template, made, fidelity, commands, is_adapter(str(folder)))
        (folder / "README.md").write_text(card, encoding="utf-8")

    (folder / "simulator.json").write_text(json.dumps(made, indent=2) + "\n")
    describe()
    print(f"simulator saved to {folder}; serve it: {commands[-1]}")
    if recipe.measure_fidelity:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        fidelity = measured(recipe, held_out, folder, model.dtype or "auto")
        describe(fidelity)
        print(f"\n{fidelity}\n")
    if repository:
        print(f"pushed to {push_folder(folder, repository, 'model', 'Add the simulator')}")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check what can be checked early, then tune, save, describe, measure and push."""
    recipe, training, model = parse(RecipeArguments, SimulatorConfig, ModelConfig, argv=argv)
    choose_tuning(recipe.tuning, model)
    checkpoint = checkpoint_to_resume(training)
    is_first = training.process_index == 0
    if checkpoint is None and is_first:
        claim_output_dir(training.output_dir, recipe.overwrite_output_dir)
    folder = Path(training.output_dir)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training.trust_remote_code)
    held_out = recipe.held_out_queries() if recipe.measure_fidelity else []
    left_out = {held.query for held in held_out} if recipe.leave_out_held_out else set()
    examples = load_examples(recipe.searches, recipe.searches_split, PROMPT_SETS[recipe.prompt].simulator, left_out)
    examples = examples.map(
        lambda row: {name: chat_messages(tokenizer, row[name]) for name in ("prompt", "completion")}
    )
    with training.main_process_first(local=False):  # an adapter is merged into its base, once
        model.model_name_or_path = whole_model(
            model.model_name_or_path, folder, model.model_revision, training.trust_remote_code
        )
    repository = None
    if training.push_to_hub and is_first:
        repository = create_repository(training.hub_model_id or folder.name, "model", training.hub_private_repo)
    training.push_to_hub = False  # TRL would push a card of its own
    made = tune(recipe, training, model, tokenizer, examples, checkpoint)
    if is_first:
        finish(recipe, model, folder, made, held_out, repository)


if __name__ == "__main__":
    main()
