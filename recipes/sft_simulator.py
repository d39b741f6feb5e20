"""Tune a model to play the search engine (Search Simulation Tuning; paper, Section 3.3).

    python recipes/sft_simulator.py --config recipes/configs/sft-tinyworld.yaml
    accelerate launch recipes/sft_simulator.py --config recipes/configs/sft-qwen2.5-3b.yaml --use_peft   # LoRA

Loss on the documents only. `--use_peft` trains a LoRA adapter and saves it merged, so that the same folder is served
either way. `--push_to_hub` works as in every TRL trainer. Serve the result with `recipes/serve_simulator.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from zerosearch.data import claim_output_dir
from zerosearch.errors import exit_on_user_error, user_mistakes
from zerosearch.hardware import fit_to_cpu
from zerosearch.models import load_tokenizer
from zerosearch.prompts import SIMULATOR_PROMPT, TINYWORLD_SIMULATOR_PROMPT
from zerosearch.simulation import read_searches, simulator_examples

# Edit here for an ablation: what the simulator is asked.
PROMPTS = {"paper": SIMULATOR_PROMPT, "tinyworld": TINYWORLD_SIMULATOR_PROMPT}


@dataclass
class RecipeArguments:
    """What to learn from."""

    searches: str = field(metadata={"help": "JSONL rows {question, golden_answers, query, documents, useful}"})
    prompt: str = field(default="paper", metadata={"choices": list(PROMPTS), "help": "the simulator's prompt"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "write into a folder that is not empty"})


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


@exit_on_user_error
def main() -> None:
    with user_mistakes():
        parser = TrlParser((RecipeArguments, SimulatorConfig, ModelConfig))
        recipe, training, model = parser.parse_args_and_config()
    output_dir = claim_output_dir(training.output_dir, recipe.overwrite_output_dir)
    examples = simulator_examples(read_searches(recipe.searches), PROMPTS[recipe.prompt])
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training.trust_remote_code)
    training.model_init_kwargs = {"dtype": model.dtype, "revision": model.model_revision}
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    if model.use_peft:
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(tags=["zerosearch", "search-simulator"])
    print(f"simulator saved to {output_dir}; serve it: python recipes/serve_simulator.py --model {output_dir}")


if __name__ == "__main__":
    main()
