"""The whole method on TinyWorld, on a laptop: no GPU, no account, no key; about ten minutes on two cores.

    make demo                       # or: python recipes/demo.py --seed 1 --generator vllm

Each stage is another recipe, run as a user would run it, with its output in outputs/demo/logs:
data -> simulator (tuned, then served) -> evaluation before -> training on the simulator alone -> evaluation after,
with the real BM25 engine, which the policy has never met -> report.html.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zerosearch.checkpoints import clear
from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.files import claim_output_dir, sole_writer, write_json
from zerosearch.report import summary_table, write_report
from zerosearch.report.run import outcome
from zerosearch.simulator.server import exit_on_signals, free_port, simulator_server
from zerosearch.stages import Stages, training_status

RECIPES = Path(__file__).resolve().parent
ROOT, CONFIGS = RECIPES.parent, RECIPES / "configs"
BASE_POLICY = ROOT / "data/tinyworld/policy"
MADE_BY_THE_DEMO = ("data", "logs", "simulator", "policy", "evaluation", "results.json", "report.html")


@dataclass
class DemoArguments:
    """What varies between demos; everything else is in recipes/configs/tinyworld.yaml and sft-tinyworld.yaml."""

    seed: int = 0
    generator: Literal["transformers", "vllm"] = "transformers"
    output_dir: str = "outputs/demo"
    port: int = field(default=6001, metadata={"help": "port of the simulator's server"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace the results of an earlier demo"})


class Demo:
    """Runs the recipes one after another, each as a user would, and says in a line what each has come to."""

    def __init__(self, directory: Path, seed: int, generator: str):
        self.directory = directory
        self.seed = seed
        self.generator = generator
        self.data, self.simulator, self.policy = (directory / name for name in ("data", "simulator", "policy"))
        self.stages = Stages(directory / "logs", ROOT)

    def make_data(self) -> None:
        """Draw the worlds, the questions and the searches that the simulator learns from."""
        self.stages.run("data", "data/make_tinyworld.py", "--output_dir", self.data, "--seed", self.seed)

    def tune_simulator(self) -> None:
        """Tune the simulator's base on judged searches of a training world."""
        flags = ("--searches", self.data / "searches.jsonl", "--output_dir", self.simulator, "--seed", self.seed)
        self.stages.run(
            "simulator tuning", "recipes/sft_simulator.py", "--config", CONFIGS / "sft-tinyworld.yaml", *flags
        )

    def train(self, simulator_url: str) -> float:
        """Train the policy against the simulator alone and return the seconds it took."""
        flags = ("--dataset", self.data / "train.jsonl", "--output_dir", self.policy, "--seed", self.seed)
        generator = ("--simulator_url", simulator_url, "--use_vllm", self.generator == "vllm")
        recipe = ("recipes/grpo.py", "--config", CONFIGS / "tinyworld.yaml", *flags, *generator)
        launch = ("-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate/cpu.yaml")
        return self.stages.run("training", *launch, *recipe, status=training_status(5))

    def evaluate(self, when: str, model: Path, engine: str, simulator_url: str = "") -> None:
        """Score a policy on the evaluation world with one engine."""
        config = ("--config", CONFIGS / "evaluate-tinyworld.yaml", "--dataset", self.data / "test.jsonl")
        flags = ("--model", model, "--generator", self.generator, "--engine", engine)
        source = (
            ("--simulator_url", simulator_url) if engine == "simulated" else ("--corpus", self.data / "corpus.jsonl")
        )
        where = self.directory / "evaluation" / f"{when}-{engine}"
        title = f"evaluation {when} training with {engine}"
        self.stages.run(title, "recipes/evaluate.py", *config, *flags, *source, "--output_dir", where)

    def run(self, port: int) -> float:
        """Run everything up to the report and return the seconds that training took."""
        self.make_data()
        self.tune_simulator()
        with ThreadPoolExecutor(1) as meanwhile, self.stages:
            before = meanwhile.submit(self.evaluate, "before", BASE_POLICY, "bm25")
            with simulator_server(
                str(self.simulator), port, max_model_len=1024, dtype="float32", num_threads=1
            ) as server:
                self.stages.say(f"simulator ready at {server.base_url}")
                before.result()
                self.evaluate("before", BASE_POLICY, "simulated", server.base_url)
                train_seconds = self.train(server.base_url)
                self.evaluate("after", self.policy, "simulated", server.base_url)
        self.evaluate("after", self.policy, "bm25")
        return train_seconds


def results(directory: Path, arguments: DemoArguments, train_seconds: float, total_seconds: float) -> dict[str, Any]:
    """Gather what the stages wrote into the demo's results."""
    return {
        **outcome(directory, "bm25"),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(total_seconds, 1),
        "generator": arguments.generator,
        "seed": arguments.seed,
    }


@exit_on_user_error
def main() -> None:
    """Run the demo, write results.json and report.html, print a table."""
    (arguments,) = parse(DemoArguments)
    exit_on_signals()  # so that no server outlives the demo
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # several processes share the cores: none may spin on one
    directory = claim_output_dir(arguments.output_dir, arguments.overwrite_output_dir).resolve()
    free_port("127.0.0.1", arguments.port)  # before minutes are spent on the model that is to be served there
    with sole_writer(directory):
        clear(directory, MADE_BY_THE_DEMO)
        demo = Demo(directory, arguments.seed, arguments.generator)
        train_seconds = demo.run(arguments.port)
        outcome = results(directory, arguments, train_seconds, time.monotonic() - demo.stages.started)
        write_json(directory / "results.json", outcome)
        report = write_report(directory)
    print(f"\n{summary_table(directory)}\n\nreport: {report}\nresults: {directory / 'results.json'}")


if __name__ == "__main__":
    main()
