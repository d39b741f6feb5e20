"""The whole method on TinyWorld, on a laptop: no GPU, no account, no key; five to seven minutes on two cores.

    make demo                       # or: python recipes/demo.py --seed 1 --generator vllm

Each stage is another recipe, run as a user would run it, with its output in outputs/demo/logs:
data -> simulator (tuned, then served) -> evaluation before -> training on the simulator alone -> evaluation after,
with the real BM25 engine, which the policy has never met -> report.html.
"""

from __future__ import annotations

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

    seed: int = field(default=0, metadata={"min": 0})
    generator: Literal["transformers", "vllm"] = "transformers"
    output_dir: str = "outputs/demo"
    port: int = field(default=6001, metadata={"help": "port of the simulator's server"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace the results of an earlier demo"})


def run(arguments: DemoArguments, directory: Path, stages: Stages) -> float:
    """Run the recipes one after another, each as a user would, and return the seconds that training took."""
    data, simulator, policy = (directory / name for name in ("data", "simulator", "policy"))
    seed = ("--seed", arguments.seed)

    def evaluate(when: str, model: Path, engine: str, *source: object) -> None:
        """Score a policy on the evaluation world with one engine."""
        config = ("--config", CONFIGS / "evaluate-tinyworld.yaml", "--dataset", data / "test.jsonl")
        flags = ("--model", model, "--generator", arguments.generator, "--engine", engine, *source)
        where = ("--output_dir", directory / "evaluation" / f"{when}-{engine}")
        stages.run(f"evaluation {when} training with {engine}", "recipes/evaluate.py", *config, *flags, *where)

    real = ("bm25", "--corpus", data / "corpus.jsonl")
    stages.run("data", "data/make_tinyworld.py", "--output_dir", data, *seed)
    searches = ("--searches", data / "searches.jsonl", "--output_dir", simulator, *seed)
    sft = ("recipes/sft_simulator.py", "--config", CONFIGS / "sft-tinyworld.yaml")
    stages.run("simulator tuning", *sft, *searches)
    server_options: dict[str, Any] = {"max_model_len": 1024, "dtype": "float32", "num_threads": 1}
    with ThreadPoolExecutor(1) as meanwhile, stages:
        before = meanwhile.submit(evaluate, "before", BASE_POLICY, *real)
        with simulator_server(str(simulator), arguments.port, **server_options) as server:
            stages.say(f"simulator ready at {server.base_url}")
            before.result()
            simulated = ("simulated", "--simulator_url", server.base_url)
            evaluate("before", BASE_POLICY, *simulated)
            launch = ("-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate/cpu.yaml")
            grpo = ("recipes/grpo.py", "--config", CONFIGS / "tinyworld.yaml", "--dataset", data / "train.jsonl")
            flags = ("--output_dir", policy, *seed, "--use_vllm", arguments.generator == "vllm", *simulated[1:])
            train_seconds = stages.run("training", *launch, *grpo, *flags, status=training_status(5))
            evaluate("after", policy, *simulated)
    evaluate("after", policy, *real)
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
def main(argv: list[str] | None = None) -> None:
    """Run the demo, write results.json and report.html, print a table."""
    (arguments,) = parse(DemoArguments, argv=argv)
    exit_on_signals()  # so that no server outlives the demo
    directory = claim_output_dir(arguments.output_dir, arguments.overwrite_output_dir).resolve()
    free_port("127.0.0.1", arguments.port)  # before minutes are spent on the model that is to be served there
    with sole_writer(directory):
        clear(directory, MADE_BY_THE_DEMO)
        stages = Stages(directory / "logs", ROOT)
        train_seconds = run(arguments, directory, stages)
        total_seconds = time.monotonic() - stages.started
        write_json(directory / "results.json", results(directory, arguments, train_seconds, total_seconds))
        report = write_report(directory)
    print(f"\n{summary_table(directory)}\n\nreport: {report}\nresults: {directory / 'results.json'}")


if __name__ == "__main__":
    main()
