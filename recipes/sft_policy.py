"""Give a policy a cold start: teach it to search and answer by demonstrations, before RL.

    python recipes/sft_policy.py --config recipes/configs/sft-policy-smollm2-135m.yaml --traces cold_start.jsonl
    python recipes/sft_policy.py --model_name_or_path MODEL --trajectories outputs/evaluation/trajectories.jsonl

`--traces` are real searches, rows `{question, golden_answers, query, documents}`; those of a question become one
demonstration. `--trajectories` are those of an evaluation, of a larger model's say, with `--agent policy`: what scored
at least `--min_f1` is learned (rejection sampling). Either way prompt, observations, ids and masks are made by the
rollout itself, and the loss is on what the policy wrote. The budgets should be those of the training that follows.
The paper has no cold start; small models need one. `--use_peft true` trains an adapter. `--save_strategy steps` and
`--resume_from_checkpoint true` survive a kill.
"""

from __future__ import annotations

import zerosearch  # noqa: F401 (first: it sets what the libraries below read)

# isort: split
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig

from zerosearch.checkpoints import training_run
from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import FIELDS, read_trajectories
from zerosearch.files import write_json
from zerosearch.generation.loading import load_tokenizer
from zerosearch.hub import push_folder
from zerosearch.prompts import PROMPT_SETS, Agent, PromptSetName
from zerosearch.rollout.loop import Budgets, RolloutSettings
from zerosearch.simulator.dataset import excerpt
from zerosearch.simulator.traces import as_passage, read_traces
from zerosearch.training.demonstrations import Demonstration, example, from_record, from_traces, replay
from zerosearch.training.policy_card import describe_cold_start
from zerosearch.training.tuning import TuningConfig, take_over_push, tune

MADE_HERE = ("cold_start.json",)


@dataclass
class RecipeArguments:
    """What to learn from."""

    traces: str | None = field(default=None, metadata={"help": "Searches to make demonstrations of, JSONL."})
    trajectories: str | None = field(default=None, metadata={"help": "trajectories.jsonl of an evaluation."})
    min_f1: float = field(default=1.0, metadata={"min": 0, "max": 1, "help": "For trajectories: what is learned."})
    num_documents: int = field(default=5, metadata={"min": 1, "help": "For traces: documents of a search."})
    num_words: int = field(default=30, metadata={"min": 1, "help": "For traces: words of a document, about."})
    prompt: PromptSetName = field(default="paper", metadata={"help": "The prompt set: see zerosearch.prompts."})
    agent: str = field(default="policy", metadata={"help": "How the policy is asked and searches: policy, tools ..."})
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": 'JSON for the chat template, such as {"enable_thinking": false}.'}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier run's output."})

    def __post_init__(self) -> None:
        if (self.traces is None) == (self.trajectories is None):
            raise UserError("name what to learn from: --traces or --trajectories, one of the two")


@dataclass
class PolicyConfig(TuningConfig):
    """TRL's settings with values for a small model; all are our choice, as the paper has no cold start."""

    output_dir: str = "outputs/cold-start"
    learning_rate: float = 1e-4
    per_device_train_batch_size: int = 8
    num_train_epochs: float = 1
    max_length: int | None = None  # the budgets limit a trajectory, and none is cut
    logging_steps: float = 1


def demonstrations(recipe: RecipeArguments, agent: Agent) -> list[Demonstration | None]:
    """Return a demonstration of each question or trajectory, `None` where it gives none."""
    if recipe.trajectories is not None:
        records = read_trajectories(Path(recipe.trajectories), FIELDS)
        return [from_record(record) if record["f1"] >= recipe.min_f1 else None for record in records]
    traces = read_traces(str(recipe.traces))
    shown = [{**trace, "documents": shortened(trace, recipe)} for trace in traces]
    return from_traces(shown, agent.grammar)


def shortened(trace: dict[str, Any], recipe: RecipeArguments) -> list[str]:
    """Return the documents of a search, cut as a simulator's are."""
    passages = map(as_passage, trace["documents"][: recipe.num_documents])
    return [excerpt(passage, recipe.num_words, trace["query"], trace["golden_answers"]) for passage in passages]


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write the demonstrations, tokenise them by the rollout, train, save."""
    recipe, budgets, training, model = parse(RecipeArguments, Budgets, PolicyConfig, ModelConfig, argv=argv)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training.trust_remote_code)
    (agent,) = PROMPT_SETS[recipe.prompt].choose([recipe.agent])
    given = demonstrations(recipe, agent)
    settings = RolloutSettings(**vars(budgets), chat_template_kwargs=recipe.chat_template_kwargs)
    trajectories = replay([one for one in given if one], tokenizer, settings, agent)
    # Of a document that was cut a thought might quote what the policy cannot see.
    kept = [one for one in trajectories if one.outcome == "answered" and not one.cut_observations]
    source = recipe.traces or recipe.trajectories
    counted = f"{len(kept)} of {len(given)} become demonstrations; {len(trajectories) - len(kept)} exceed the budgets"
    if not kept:
        raise UserError(f"{source} gives none to learn from: {counted}")
    print(f"{source}: {counted}")
    examples = Dataset.from_list([example(trajectory) for trajectory in kept])
    folder = Path(training.output_dir)
    with training_run(training, recipe.overwrite_output_dir, MADE_HERE) as checkpoint:
        repository = take_over_push(training)
        about = {
            "base_model": model.model_name_or_path,
            "source": source,
            "prompt": recipe.prompt,
            "agent": recipe.agent,
            "chat_template_kwargs": settings.chat_template_kwargs,
        }
        about |= vars(budgets)
        made = about | tune(model, training, tokenizer, examples, checkpoint)
        if training.process_index != 0:
            return
        write_json(folder / "cold_start.json", made)
        describe_cold_start(folder, agent, made, repository)
        print(f"policy saved to {folder}; train it: python recipes/grpo.py --model_name_or_path {folder} ...")
        if repository:
            print(f"pushed to {push_folder(folder, repository, 'model', 'Add the policy')}")


if __name__ == "__main__":
    main()
