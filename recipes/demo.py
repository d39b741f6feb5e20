"""The whole method on TinyWorld, on a laptop: no GPU, no account, no key; about ten minutes on two cores.

    make demo                       # or: python recipes/demo.py --seed 1 --generator vllm

Each stage is another recipe, run as a user would run it, with its output in outputs/demo/logs:
data -> simulator (tuned, then served) -> evaluation before -> training on the simulator alone -> evaluation after, with the
real BM25 engine, which the policy has never met -> report.html.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from zerosearch.data import claim_output_dir
from zerosearch.errors import UserError, exit_on_user_error
from zerosearch.report import summary_table, write_report
from zerosearch.serving import simulator_server

RECIPES = Path(__file__).parent
ROOT = RECIPES.parent
BASE_POLICY = ROOT / "data/tinyworld/policy"
MADE_BY_THE_DEMO = ("data", "logs", "simulator", "policy", "evaluation", "results.json", "report.html")


@dataclass
class DemoArguments:
    """What varies between demos; everything else is in recipes/configs/tinyworld.yaml and sft-tinyworld.yaml."""

    seed: int = 0
    generator: str = field(default="transformers", metadata={"choices": ["transformers", "vllm"]})
    output_dir: str = "outputs/demo"
    port: int = field(default=6001, metadata={"help": "port of the simulator's server"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace the results of an earlier demo"})


class Demo:
    """Runs stages one after another and shows, in one line each, how far they are."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.logs = directory / "logs"
        self.logs.mkdir()
        self.started = time.monotonic()

    def stage(self, title: str, command: Sequence[str], status: Callable[[str], str | None] | None = None) -> float:
        """Run a recipe and return its seconds. Ends the demo with the recipe's last lines if it fails."""
        log_path = self.logs / f"{title.split(':')[0].replace(' ', '-')}.log"
        started = time.monotonic()
        with (
            log_path.open("w", encoding="utf-8") as log,
            subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                progress = status(line) if status else None
                if progress:
                    self.say(f"  {progress}")
        seconds = time.monotonic() - started
        if process.returncode:
            last_lines = "\n".join(log_path.read_text(encoding="utf-8").splitlines()[-15:])
            print(f"{last_lines}\n", file=sys.stderr)
            raise UserError(
                f"the stage {title!r} failed with exit status {process.returncode}; all of it is in {log_path}"
            )
        self.say(f"{title} ({seconds:.0f} s)")
        return seconds

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", flush=True)


def training_status(line: str) -> str | None:
    """Turn a line of the trainer's log into a line of ours, every fifth step."""
    values = dict(re.findall(r"'([\w/]+)': '?(-?[\d.]+(?:e-?\d+)?)'?", line))
    step = re.search(r"'step': '?(\d+)", line)
    if "reward" not in values or step is None or int(step[1]) % 5:
        return None
    return f"step {step[1]:>3}: reward {float(values['reward']):.2f}, {float(values['search/searches']):.1f} searches a question, noise {float(values['search/p_noise']):.2f}"


def results(directory: Path, arguments: DemoArguments, train_seconds: float, total_seconds: float) -> dict[str, Any]:
    """Gather what the stages wrote into the demo's results."""

    def evaluation(name: str) -> dict[str, Any]:
        return json.loads((directory / "evaluation" / name / "results.json").read_text())

    before, after = evaluation("before-bm25"), evaluation("after-bm25")
    state = json.loads((directory / "policy" / "trainer_state.json").read_text())
    queries = json.loads((directory / "policy" / "engine_queries.json").read_text())
    return {
        "em_before": before["em"]["mean"],
        "em_after": after["em"]["mean"],
        "em_after_interval": [after["em"]["low"], after["em"]["high"]],
        "f1_after": after["f1"]["mean"],
        "engine": after["engine"],
        "real_engine_queries_in_training": sum(count for engine, count in queries.items() if engine != "simulated"),
        "simulated_queries_in_training": queries.get("simulated", 0),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(total_seconds, 1),
        "generator": arguments.generator,
        "seed": arguments.seed,
        "steps": state["global_step"],
    }


@exit_on_user_error
def main() -> None:
    arguments: DemoArguments = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()[0]
    directory = claim_output_dir(arguments.output_dir, arguments.overwrite_output_dir).resolve()
    for name in MADE_BY_THE_DEMO:  # and nothing else that somebody may have put there
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    demo = Demo(directory)
    data, simulator, policy = directory / "data", directory / "simulator", directory / "policy"

    def recipe(name: str, *flags: object) -> list[str]:
        return [sys.executable, str(RECIPES / name), *map(str, flags)]

    def evaluate(when: str, model: Path, engine: str, *flags: object) -> float:
        where = directory / "evaluation" / f"{when}-{engine}"
        config = ("--config", RECIPES / "configs/evaluate-tinyworld.yaml", "--dataset", data / "test.jsonl")
        options = ("--model", model, "--engine", engine, "--generator", arguments.generator, "--output_dir", where)
        return demo.stage(f"evaluation {when} {engine}", recipe("evaluate.py", *config, *options, *flags))

    corpus = ("--corpus", data / "corpus.jsonl")
    make_data = [
        sys.executable,
        str(ROOT / "data/make_tinyworld.py"),
        "--output_dir",
        str(data),
        "--seed",
        str(arguments.seed),
    ]
    demo.stage("data", make_data)
    sft_flags = ("--searches", data / "searches.jsonl", "--output_dir", simulator, "--seed", arguments.seed)
    demo.stage(
        "simulator tuning", recipe("sft_simulator.py", "--config", RECIPES / "configs/sft-tinyworld.yaml", *sft_flags)
    )
    with ThreadPoolExecutor(1) as meanwhile:
        before = meanwhile.submit(evaluate, "before", BASE_POLICY, "bm25", *corpus)
        with simulator_server(
            str(simulator), arguments.port, max_model_len=1024, dtype="float32", num_threads=1
        ) as server:
            demo.say(f"simulator ready at {server.base_url} after {server.startup_s:.0f} s")
            before.result()
            simulated = ("--simulator_url", server.base_url)
            evaluate("before", BASE_POLICY, "simulated", *simulated)
            train = ["accelerate", "launch", *recipe("grpo.py", "--config", RECIPES / "configs/tinyworld.yaml")[1:]]
            train += [
                "--dataset",
                str(data / "train.jsonl"),
                "--output_dir",
                str(policy),
                "--seed",
                str(arguments.seed),
            ]
            train += ["--simulator_url", server.base_url, "--use_vllm", str(arguments.generator == "vllm")]
            train_seconds = demo.stage("training", [sys.executable, "-m", *train], training_status)
            evaluate("after", policy, "simulated", *simulated)
    evaluate("after", policy, "bm25", *corpus)
    outcome = results(directory, arguments, train_seconds, time.monotonic() - demo.started)
    (directory / "results.json").write_text(json.dumps(outcome, indent=2) + "\n")
    report = write_report(directory)
    print(f"\n{summary_table(directory)}\n\nreport: {report}\nresults: {directory / 'results.json'}")


if __name__ == "__main__":
    main()
