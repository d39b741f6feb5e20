"""The whole method on a real pretrained model, real questions and real passages: the real counterpart of the demo.

    make smollm DATA=path/to/data       # or: python recipes/smollm.py --data path/to/data --output_dir outputs/smollm

Each stage is another recipe, run as a user would run it, with its output in OUTPUT_DIR/logs: model (SmolLM2-135M) ->
split of the questions -> cold start -> simulator data and tuning -> its fidelity -> evaluation before -> RL against
the served simulator alone -> evaluation after, with BM25 over real passages -> report.html. The defaults are a small
run: it shows that everything works, not what the method can do. A long run is the same command with larger numbers
(minutes a stage on a GPU), and flags that are not its own go to recipes/grpo.py (--algorithm grpo --baseline none):

    python recipes/smollm.py --data DATA --output_dir outputs/smollm-long --cold_start_steps 44 --gaps 6000 \
        --simulator_steps 1400 --fidelity_queries 300 --num_questions 500 --rl_steps 200 --rl_questions 32

Whatever stops it: the same command goes on, with the checkpoint of the stage that was under way. DATA holds
qa_multihop.jsonl, qa_train.jsonl, search_traces.jsonl and wiki_passages.jsonl (data/README.md says what they are).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from zerosearch.checkpoints import whole_checkpoints
from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import read_trajectories
from zerosearch.evaluation.scores import compare
from zerosearch.files import claim_output_dir, models_folder, read_json, sole_writer, write_json
from zerosearch.report import summary_table, write_report
from zerosearch.report.run import outcome, read_log
from zerosearch.simulator.server import exit_on_signals, simulator_server
from zerosearch.stages import Stages, training_status

RECIPES = Path(__file__).resolve().parent
ROOT, CONFIGS = RECIPES.parent, RECIPES / "configs"
DATA = ("qa_multihop.jsonl", "qa_train.jsonl", "search_traces.jsonl", "wiki_passages.jsonl")
MODEL = "SmolLM2-135M-Instruct"


@dataclass
class SmollmArguments:
    """How much of each; everything else is in recipes/configs/*smollm2-135m*.yaml."""

    data: str = field(metadata={"help": f"Folder with {', '.join(DATA)}."})
    output_dir: str = "outputs/smollm"
    models_dir: str = field(default=str(models_folder()), metadata={"help": "Folder of recipes/get_model.py."})
    rl_config: Literal["smollm2-135m", "smollm2-135m-lora"] = field(
        default="smollm2-135m", metadata={"help": "The configuration of RL: all weights, or an adapter."}
    )
    generator: Literal["vllm", "transformers"] = "vllm"
    seed: int = 0
    cold_start_steps: int = field(default=6, metadata={"min": 1, "help": "Steps of eight demonstrations."})
    simulator_steps: int = field(default=10, metadata={"min": 1, "help": "Steps of eight searches."})
    gaps: int = field(default=1000, metadata={"min": 1, "help": "Gaps in passages, for the simulator to learn from."})
    fidelity_queries: int = field(default=12, metadata={"min": 2, "help": "Held-out searches to measure with."})
    rl_steps: int = field(default=3, metadata={"min": 1, "help": "Steps of RL."})
    rl_questions: int = field(default=2, metadata={"min": 1, "help": "Questions a step, five trajectories each."})
    num_questions: int = field(default=15, metadata={"min": 1, "help": "Test questions of each dataset."})

    def __post_init__(self) -> None:
        for name in DATA:
            if not Path(self.data, name).is_file():
                raise UserError(f"{self.data} lacks {name}: --data names the folder of the real data")


class Smollm:
    """Runs the recipes one after another; a stage whose last file is there is passed over."""

    def __init__(self, arguments: SmollmArguments, rl_flags: Sequence[str], folder: Path) -> None:
        self.arguments, self.rl_flags, self.folder = arguments, rl_flags, folder
        self.data = Path(arguments.data).resolve()
        self.model = Path(arguments.models_dir, MODEL).resolve()
        self.stages = Stages(folder / "logs", ROOT)
        self.on_gpu = torch.accelerator.is_available()
        self.in_16_bits = self.on_gpu or torch.cpu.get_capabilities().get("avx512_bf16", False)

    def prepare(self) -> None:
        """Get the model and split the questions."""
        get = flags(models=MODEL, output_dir=self.model.parent)
        self.stages.run("model", "recipes/get_model.py", *get, makes=self.model)
        parts = self.folder / "data"
        files = {"questions": "qa_multihop", "train_questions": "qa_train", "traces": "search_traces"}
        split = flags(**{name: self.data / f"{file}.jsonl" for name, file in files.items()})
        split += flags(output_dir=parts, overwrite_output_dir=True)
        self.stages.run("split", "data/split_questions.py", *split, makes=parts / "rl_with_passages.jsonl")

    def cold_start(self) -> None:
        """Teach the policy by demonstrations."""
        policy = self.folder / "cold-start"
        how = self.sft("sft-policy-smollm2-135m", self.arguments.cold_start_steps, policy)
        how += flags(traces=self.folder / "data/cold_start.jsonl")
        self.stages.run("cold start", "recipes/sft_policy.py", *how, makes=policy / "cold_start.json")

    def tune_simulator(self) -> None:
        """Tune the simulator, and measure it beside the real engine's documents."""
        simulator, searches = self.folder / "simulator", self.folder / "simulator-data"
        every = flags(num_documents=3, fill_useful=True, overwrite_output_dir=True)
        sets = every + flags(fill_from_question=True, p_test=0.25)
        sets += flags(traces=self.folder / "data/simulator.jsonl", output_dir=searches)
        self.stages.run("searches", "recipes/build_simulator_data.py", *sets, makes=searches / "README.md")
        gaps, more_searches = self.folder / "data/cloze.jsonl", self.folder / "cloze-data"
        made = flags(corpus=self.data / "wiki_passages.jsonl", leave_out=self.folder / "data/test.jsonl")
        made += flags(output=gaps, num_searches=self.arguments.gaps)
        self.stages.run("gaps", "data/cloze_searches.py", *made, makes=gaps)
        sets = every + flags(p_test=0.0, traces=gaps, output_dir=more_searches)
        self.stages.run("more searches", "recipes/build_simulator_data.py", *sets, makes=more_searches / "README.md")
        how = self.sft("sft-smollm2-135m", self.arguments.simulator_steps, simulator)
        how += ["--searches", str(searches), str(more_searches), *flags(measure_fidelity=False)]
        self.stages.run("simulator", "recipes/sft_simulator.py", *how, makes=simulator / "simulator.json")
        measured = {
            "tuned": flags(model=simulator, port=0),
            "untuned": flags(model=self.model, prompt="prompted", port=0),
            "real": flags(engine="recorded"),
        }
        for name, who in measured.items():
            to = self.folder / "fidelity" / name
            what = flags(queries=searches / "test.jsonl", num_queries=self.arguments.fidelity_queries, output=to)
            what += flags(config=CONFIGS / "fidelity-smollm2-135m.yaml")
            card = to.with_suffix(".json")
            self.stages.run(f"fidelity {name}", "recipes/measure_fidelity.py", *who, *what, makes=card)

    def sft(self, config: str, steps: int, folder: Path) -> list[str]:
        """Return what both trainings of SmolLM2 are told."""
        how = flags(config=CONFIGS / f"{config}.yaml", model_name_or_path=self.model, max_steps=steps)
        how += flags(bf16=self.in_16_bits)
        if self.on_gpu:  # the same eight examples a step
            how += flags(per_device_train_batch_size=8, gradient_accumulation_steps=1)
        return how + flags(output_dir=folder, seed=self.arguments.seed, save_steps=1 + steps // 20) + go_on(folder)

    def train(self) -> None:
        """Train the policy against the served simulator alone."""
        given, policy = self.arguments, self.folder / "policy"
        made = policy / "trainer_state.json"
        if made.exists():
            return
        how = flags(config=CONFIGS / f"{given.rl_config}.yaml", max_steps=given.rl_steps, seed=given.seed)
        how += flags(save_steps=1 + given.rl_steps // 20)
        # In 16 bits engine and trainer differ, so their ratio is corrected for.
        how += flags(bf16=self.in_16_bits, vllm_importance_sampling_correction=self.in_16_bits)
        if self.on_gpu:
            how += flags(per_device_train_batch_size=5, gradient_accumulation_steps=given.rl_questions)
        else:
            how += flags(gradient_accumulation_steps=5 * given.rl_questions)
        how += flags(use_vllm=given.generator == "vllm")
        how += flags(model_name_or_path=self.folder / "cold-start", dataset=self.folder / "data/rl.jsonl")
        # On a GPU the two share its memory; the policy's share is in its configuration.
        share = ("--gpu-memory-utilization", "0.2") if self.on_gpu else ()
        simulator = str(self.folder / "simulator")
        with simulator_server(simulator, port=0, max_model_len=2048, vllm_arguments=share) as server:
            self.stages.say(f"simulator ready at {server.base_url}")
            how += flags(simulator_url=server.base_url, output_dir=policy) + go_on(policy)
            status = training_status(1, done=max(whole_checkpoints(policy), default=0))
            self.stages.run("training", "recipes/grpo.py", *how, *self.rl_flags, status=status, makes=made)

    def evaluate(self, when: str, model: Path) -> None:
        """Score a policy with BM25 over the real passages."""
        to, given = self.folder / "evaluation" / f"{when}-bm25", self.arguments
        how = flags(config=CONFIGS / "evaluate-smollm2-135m.yaml", model=model, generator=given.generator)
        how += flags(corpus=self.data / "wiki_passages.jsonl", dataset=self.folder / "data/test.jsonl")
        how += flags(num_questions=given.num_questions, seed=given.seed, output_dir=to, resume=to.exists())
        self.stages.run(f"evaluation {when}", "recipes/evaluate.py", *how, makes=to / "results.json")

    def results(self) -> dict[str, Any]:
        """Gather what the stages wrote, with the paired difference of the two evaluations."""
        evaluated = self.folder / "evaluation"
        before, after = (evaluated / f"{when}-bm25/trajectories.jsonl" for when in ("before", "after"))
        difference = compare(read_trajectories(before), read_trajectories(after))
        log = read_log(self.folder / "policy/trainer_state.json") or ()
        cards = {name: read_json(self.folder / f"fidelity/{name}.json") for name in ("tuned", "untuned", "real")}
        return {
            **outcome(self.folder, "bm25"),
            "em_difference": difference["em"],
            "f1_difference": difference["f1"],
            "questions": read_json(before.with_name("results.json"))["n"],
            "fidelity": {
                who: {name: rate for name, rate in card.items() if "_rate" in name} for who, card in cards.items()
            },
            "model": read_json(source) if (source := self.model / "source.json").exists() else "copied by hand",
            "seed": self.arguments.seed,
            "generator": self.arguments.generator,
            "train_seconds": sum(entry["time/step_s"] for entry in log),
        }


def flags(**options: object) -> list[str]:
    """Return options as a command line has them."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def go_on(folder: Path) -> list[str]:
    """Return what resumes a training from its last checkpoint, or starts it anew where there is none."""
    return flags(resume_from_checkpoint=True) if whole_checkpoints(folder) else flags(overwrite_output_dir=True)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet, write results.json and report.html, print a table."""
    arguments, rl_flags = parse(SmollmArguments, argv=argv, rest=True)
    exit_on_signals()  # so that no server outlives it
    begun = Path(arguments.output_dir, "settings.json").exists()
    folder = claim_output_dir(arguments.output_dir, overwrite=begun).resolve()
    with sole_writer(folder):
        settings = {**asdict(arguments), "rl_flags": rl_flags}
        del settings["output_dir"]
        if begun and read_json(folder / "settings.json") != settings:
            raise UserError(f"{folder} holds a run of other settings (settings.json): name another --output_dir")
        write_json(folder / "settings.json", settings)
        run = Smollm(arguments, rl_flags, folder)
        run.prepare()
        run.cold_start()
        run.tune_simulator()
        run.evaluate("before", folder / "cold-start")
        run.train()
        run.evaluate("after", folder / "policy")
        write_json(folder / "results.json", run.results())
        report = write_report(folder)
    print(f"\n{summary_table(folder)}\n\nreport: {report}\nresults: {folder / 'results.json'}")


if __name__ == "__main__":
    main()
