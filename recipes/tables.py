"""The paper's Tables 3 to 7 on TinyWorld, the price of the released code's defects, and newer methods, over seeds.

    make paper-tables                          # or: python recipes/tables.py; five seeds of everything take hours
    python recipes/tables.py --runs curriculum no-mask grpo --seeds 2            # a quick look

Each run trains a policy by recipes/grpo.py or a variant of it, at equal budget, and answers TinyWorld's test questions
with BM25. Runs of one simulator share its server, `--jobs` at a time. A run that is done is passed over, here and
where it stands in recipes/results/tables.json, so commands add up: one after another, or, once the data are there,
side by side with other `--runs` and the same folder. Differences are from the recipe's own run ("curriculum"), paired
by seed and question. Writes tables.json, tables.md and tables.svg. Flags that are not its own go to every training.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.data import data_hash
from zerosearch.errors import UserError
from zerosearch.evaluation.answering import read_trajectories
from zerosearch.evaluation.tables import measured_table
from zerosearch.files import claim_output_dir, read_json, read_jsonl, write_json, write_jsonl, write_text
from zerosearch.intervals import over_seeds
from zerosearch.report.page import duration
from zerosearch.report.plots import rows_plot
from zerosearch.report.run import read_log
from zerosearch.simulator.server import exit_on_signals, simulator_server
from zerosearch.stages import Stages
from zerosearch.training.sentinel import first_collapse

RECIPES = Path(__file__).resolve().parent
ROOT, CONFIGS = RECIPES.parent, RECIPES / "configs"
BASE = ROOT / "data/tinyworld"
PUBLISHED = RECIPES / "results/tables.json"
REFERENCE = "curriculum"


@dataclass(frozen=True)
class Run:
    """A policy that is trained, or the base policy where `script` is empty, and how it is scored."""

    flags: str = ""  # what differs from recipes/configs/tinyworld.yaml; {data} is the folder of the seed's data
    script: str = "recipes/grpo.py"
    simulator: str | None = "demo"
    evaluation: str = ""  # what differs from recipes/configs/evaluate-tinyworld.yaml


REAL = "--engine bm25 --corpus {data}/train_corpus.jsonl"
VARIANTS = "recipes/variants"
RUNS = {
    REFERENCE: Run(),
    "untrained": Run(script="", simulator=None),
    "direct": Run(script="", simulator=None, evaluation="--agent direct"),
    "cot": Run(script="", simulator=None, evaluation="--agent cot"),
    "rag": Run(script="", simulator=None, evaluation="--agent rag"),
    "no-search": Run(f"{REAL} --max_turns 0", simulator=None, evaluation="--max_turns 0"),
    "real-engine": Run(REAL, simulator=None),
    "untuned-simulator": Run(simulator="untuned"),
    "half-noise-simulator": Run(simulator="half-noise"),
    "faithful-simulator": Run(simulator="faithful"),
    "rloo": Run("--algorithm rloo"),
    "grpo": Run("--algorithm grpo"),
    "ppo": Run("--algorithm ppo --critic_learning_rate 1e-3"),  # of a critic as small as the policy
    "constant-half": Run("--noise_start 0.5 --noise_end 0.5"),
    "no-noise": Run("--noise_end 0"),
    "constant-noise": Run(script=f"{VARIANTS}/noise.py constant"),
    "random-noise": Run(script=f"{VARIANTS}/noise.py random"),
    "reversed-noise": Run(script=f"{VARIANTS}/noise.py reversed"),
    "closed-loop-noise": Run(script=f"{VARIANTS}/noise.py closed-loop"),
    "no-mask": Run("--mask_observations false"),
    "swapped-rows": Run(script=f"{VARIANTS}/defects.py swapped-rows"),
    "wrong-kl-sign": Run(script=f"{VARIANTS}/defects.py wrong-kl-sign"),
    "containment": Run(script=f"{VARIANTS}/defects.py containment"),
    "example-for-no-answer": Run(script=f"{VARIANTS}/defects.py example-for-no-answer"),
    "retokenised": Run(script=f"{VARIANTS}/defects.py retokenised"),
    "top-p": Run("--top_p 0.95"),
    "long-warm-up": Run("--warmup_steps 0.95"),
    "gigpo": Run(script=f"{VARIANTS}/gigpo.py"),
    "igpo": Run(script=f"{VARIANTS}/igpo.py"),
    "stepsearch": Run(script=f"{VARIANTS}/stepsearch.py"),
    "search-price": Run(script=f"{VARIANTS}/search_price.py"),
    "self-search": Run(script=f"{VARIANTS}/self_search.py", simulator=None),
    "sim-to-real": Run("--corpus {data}/train_corpus.jsonl", f"{VARIANTS}/sim_to_real.py"),
}
# As in recipes/configs/sft-tinyworld-faithful.yaml.
MANY_SEARCHES = ("--n_searches", 40_000, "--n_searched_worlds", 400, "--asked_relation_in_noise", False)

# Table, row, run.
ROWS = (
    ("3", "untrained", "untrained"),
    ("3", "Direct", "direct"),
    ("3", "CoT", "cot"),
    ("3", "RAG", "rag"),
    ("3", "R1: trained without search", "no-search"),
    ("3", "trained on BM25", "real-engine"),
    ("3", "trained on the simulator", REFERENCE),
    ("4", "simulator: untuned base", "untuned-simulator"),
    ("4", "simulator: useful or noisy by chance", "half-noise-simulator"),
    ("4", "simulator: the demo's", REFERENCE),
    ("4", "simulator: the faithful one", "faithful-simulator"),
    ("5", "REINFORCE", REFERENCE),
    ("5", "RLOO", "rloo"),
    ("5", "GRPO", "grpo"),
    ("5", "PPO", "ppo"),
    ("6", "curriculum, 0 to 0.5", REFERENCE),
    ("6", "constant 0.5 (the paper's random)", "constant-half"),
    ("6", "constant, of the curriculum's mean", "constant-noise"),
    ("6", "random, of its mean", "random-noise"),
    ("6", "reversed", "reversed-noise"),
    ("6", "closed loop", "closed-loop-noise"),
    ("6", "none", "no-noise"),
    ("7", "observations masked", REFERENCE),
    ("7", "not masked", "no-mask"),
    ("defects", "none", REFERENCE),
    ("defects", "another row's question and answers", "swapped-rows"),
    ("defects", "KL with the wrong sign", "wrong-kl-sign"),
    ("defects", "containment as the reward", "containment"),
    ("defects", "the example for no answer", "example-for-no-answer"),
    ("defects", "top-p 0.95 in sampling", "top-p"),
    ("defects", "text decoded and encoded again", "retokenised"),
    ("defects", "warm-up over 95 % of the steps", "long-warm-up"),
    ("successors", "the recipe", REFERENCE),
    ("successors", "GiGPO", "gigpo"),
    ("successors", "IGPO", "igpo"),
    ("successors", "StepSearch", "stepsearch"),
    ("successors", "self-search", "self-search"),
    ("successors", "sim-to-real", "sim-to-real"),
    ("successors", "F1 less 0.1 a search", "search-price"),
)
COLUMNS = [
    {"title": "table", "key": "table"},
    {"title": "run", "key": "name"},
    {"title": "seeds", "key": "num_seeds"},
    {"title": "EM [95 %]", "key": "em"},
    {"title": "difference [95 %]", "key": "difference"},
    {"title": "which is", "key": "verdict"},
    {"title": "searches", "key": "searches", "digits": 2},
    {"title": "collapsed", "key": "collapsed"},
]


@dataclass
class TablesArguments:
    """Which runs, how many seeds, and where."""

    runs: list[str] = field(default_factory=lambda: ["all"], metadata={"help": f"all, or some of {', '.join(RUNS)}."})
    seeds: int = field(default=5, metadata={"min": 1, "help": "So many seeds, from 0 on."})
    jobs: int = field(default=os.cpu_count() or 1, metadata={"min": 1, "help": "Runs at a time."})
    output_dir: str = "outputs/tables"
    num_questions: int = field(default=300, metadata={"min": 2, "help": "Test questions to answer."})

    def __post_init__(self) -> None:
        if self.runs == ["all"]:
            self.runs = list(RUNS)
        if unknown := set(self.runs) - RUNS.keys():
            raise UserError(f"there is no run {min(unknown)}; there are {', '.join(RUNS)}")


class Tables:
    """The runs that are asked for, and those that are done."""

    def __init__(self, arguments: TablesArguments, train_flags: Sequence[str], folder: Path) -> None:
        self.arguments, self.train_flags, self.folder = arguments, train_flags, folder
        self.stages = Stages(folder / "logs", ROOT)

    def done(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Return the records of all runs that are done, here or in what is published, by name and seed."""
        records = read_json(PUBLISHED)["runs"] if PUBLISHED.exists() else []
        records += [read_json(path) for path in sorted(self.folder.glob("runs/*/*/run.json"))]
        return {
            (record["name"], record["seed"]): record
            for record in records
            if record["name"] in RUNS
            and record["settings"] == settings_of(record["name"], self.arguments, self.train_flags)
        }

    def run(self) -> None:
        """Run what is not done yet, simulator by simulator, and write the tables after each run."""
        seeds = range(self.arguments.seeds)
        wanted = [(name, seed) for seed in seeds for name in self.arguments.runs if RUNS[name].script or seed == 0]
        done = self.done()
        todo = [pair for pair in wanted if pair not in done]
        self.stages.say(f"{len(todo)} of {len(wanted)} runs to do")
        for seed in sorted({seed for _, seed in todo}):
            self.make_data(f"seed-{seed}", "--seed", seed)
        seconds: list[float] = []
        failures: list[str] = []

        def take(pair: tuple[str, int], future: Future[float]) -> None:
            try:
                seconds.append(future.result())
            except UserError as error:
                failures.append(f"{pair[0]} {pair[1]}: {error}")
            self.write()
            left = len(todo) - len(seconds) - len(failures)
            wait = left * sum(seconds) / max(len(seconds), 1) / self.arguments.jobs
            self.stages.say(f"{left} runs left, about {duration(wait)}")

        for simulator in dict.fromkeys(RUNS[name].simulator for name, _ in todo):
            pairs = [pair for pair in todo if RUNS[pair[0]].simulator == simulator]
            with self.served(simulator) as url, ThreadPoolExecutor(self.arguments.jobs) as pool, self.stages:
                futures = {pool.submit(self.one, *pair, url): pair for pair in pairs}
                try:
                    for future in as_completed(futures):
                        take(futures[future], future)
                except BaseException:  # a signal, say: nothing more is started, and what runs is ended
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        self.write()
        if failures:
            raise UserError(f"{len(failures)} runs failed, the others are done: {'; '.join(failures)}")

    def make_data(self, name: str, *flags: object) -> Path:
        """Make a folder of TinyWorld's data; the test questions are the same in all."""
        folder = self.folder / "data" / name
        how = ("--output_dir", folder, *flags)
        self.stages.run(f"data {name}", "data/make_tinyworld.py", *how, makes=folder / "searches.jsonl")
        return folder

    @contextmanager
    def served(self, simulator: str | None) -> Iterator[str]:
        """Serve a simulator, which is tuned if need be."""
        if simulator is None:
            yield ""
            return
        options: dict[str, Any] = {"max_model_len": 1024, "dtype": "float32", "num_threads": 1}
        with simulator_server(str(self.simulator(simulator)), port=0, **options) as server:
            self.stages.say(f"simulator {simulator} ready at {server.base_url}")
            yield server.base_url

    def simulator(self, name: str) -> Path:
        """Return the folder of a simulator, which is tuned if need be."""
        if name == "untuned":
            return BASE / "simulator"
        folder, config, made = self.folder / "simulators" / name, "sft-tinyworld", "simulator.json"
        if name == "faithful":
            config, made = "sft-tinyworld-faithful", "fidelity.json"
            held_out = self.make_data("held-out", "--seed", 7)
            searches = self.make_data("many", *MANY_SEARCHES) / "searches.jsonl"
            flags = ["--searches", searches, "--held_out", held_out / "searches.jsonl"]
        else:
            searches = self.make_data("seed-0", "--seed", 0) / "searches.jsonl"
            flags = ["--searches", half_noise(searches) if name == "half-noise" else searches]
        how = ("--config", CONFIGS / f"{config}.yaml", *flags, "--output_dir", folder, "--overwrite_output_dir", True)
        self.stages.run(f"simulator {name}", "recipes/sft_simulator.py", *how, makes=folder / made)
        return folder

    def one(self, name: str, seed: int, simulator_url: str) -> float:
        """Train and score one policy, keep its record, and return the seconds it took."""
        run, started = RUNS[name], time.monotonic()
        settings = settings_of(name, self.arguments, self.train_flags)
        folder, data = self.folder / "runs" / name / f"seed-{seed}", self.folder / f"data/seed-{seed}"
        if (folder / "settings.json").exists() and read_json(folder / "settings.json") != settings:
            shutil.rmtree(folder)  # what a command with other flags began
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)
        policy, scored = folder / "policy" if run.script else BASE / "policy", folder / "evaluation"
        if run.script:
            train = [*run.script.split(), "--config", CONFIGS / "tinyworld.yaml", "--use_vllm", False, "--seed", seed]
            train += ["--dataset", data / "train.jsonl", "--output_dir", policy, "--overwrite_output_dir", True]
            train += ["--simulator_url", simulator_url] if simulator_url else []
            train += ["--on_collapse", "warn", *run.flags.format(data=data).split(), *self.train_flags]
            self.stages.run(f"{name} {seed} training", *train, makes=policy / "trainer_state.json")
        how = ["--config", CONFIGS / "evaluate-tinyworld.yaml", "--model", policy, "--generator", "transformers"]
        how += ["--dataset", data / "test.jsonl", "--corpus", data / "corpus.jsonl", "--output_dir", scored]
        how += ["--dataset_limit", self.arguments.num_questions, "--overwrite_output_dir", True]
        how += run.evaluation.split()
        self.stages.run(f"{name} {seed} evaluation", "recipes/evaluate.py", *how, makes=scored / "results.json")
        seconds = time.monotonic() - started
        results, records = read_json(scored / "results.json"), read_trajectories(scored / "trajectories.jsonl")
        log = read_log(policy / "trainer_state.json") if run.script else None
        queries = policy / "engine_queries.json"
        record = {
            "name": name,
            "seed": seed,
            "settings": settings,
            "versions": results["versions"],
            "questions_sha256": data_hash(records),
            "em": "".join(str(int(record["em"])) for record in records),  # a digit a question
            "searches": results["searches"],
            "collapsed": first_collapse(log or []),
            "queries_in_training": read_json(queries) if run.script and queries.exists() else {},
            "seconds": round(seconds, 1),
        }
        write_json(folder / "run.json", record)
        return seconds

    def write(self) -> None:
        """Write tables.json, tables.md and tables.svg from all that is done."""
        done = self.done()
        rows, seeds = table_rows(done), sorted({seed for _, seed in done})
        if not rows:
            return
        results: dict[str, Any] = {
            "what": "Policies trained and scored on TinyWorld, with 95 % intervals over seeds and questions",
            "command": " ".join(["python recipes/tables.py", *self.train_flags]),
            "machine": f"{os.cpu_count()} cores, {'a GPU' if torch.accelerator.is_available() else 'no GPU'}",
            "versions": next((record["versions"] for record in done.values()), {}),
            "seed": seeds,
            "seeds": seeds,
            "columns": COLUMNS,
            "rows": rows,
            "runs": list(done.values()),
        }
        write_json(self.folder / "tables.json", results)
        write_text(self.folder / "tables.md", measured_table(results) + "\n")
        write_text(self.folder / "tables.svg", rows_plot(rows))


def settings_of(name: str, arguments: TablesArguments, train_flags: Sequence[str]) -> dict[str, Any]:
    """Return what a run is made by; what was recorded with other settings is another run."""
    of_all = {"train_flags": list(train_flags), "num_questions": arguments.num_questions}
    return asdict(RUNS[name]) | of_all


def table_rows(done: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the tables whose runs are done, each with its difference from the reference."""
    found = []
    reference = {seed: record for (name, seed), record in done.items() if name == REFERENCE}
    for table, name, run in ROWS:
        records = {seed: record for (of_run, seed), record in done.items() if of_run == run}
        if not records:
            continue
        difference = None
        if run != REFERENCE and reference:
            has_seeds = RUNS[run].script != ""
            shared = sorted(reference.keys() & records.keys() if has_seeds else reference)
            ours = [records[seed] if has_seeds else records[0] for seed in shared]
            if len(shared) > 1:
                difference = over_seeds(bits(ours) - bits([reference[seed] for seed in shared]))
        differs = difference is not None and not difference["low"] <= 0.0 <= difference["high"]
        worse_or_better = "better" if difference and difference["mean"] > 0 else "worse"
        collapses = [record["collapsed"] for record in records.values() if record["collapsed"] is not None]
        found.append(
            {
                "table": table,
                "name": name,
                "num_seeds": len(records),
                "em": over_seeds(bits(list(records.values()))),
                "difference": difference,
                "verdict": None if difference is None else worse_or_better if differs else "no difference seen",
                "differs": differs,
                "searches": sum(record["searches"] for record in records.values()) / len(records),
                "collapsed": len(collapses),
            }
        )
    return found


def bits(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the exact match of each run and question, (runs, questions)."""
    if len({record["questions_sha256"] for record in records}) > 1:
        raise UserError("runs of different test questions cannot be compared; name another --output_dir")
    return np.array([[float(digit) for digit in record["em"]] for record in records])


def half_noise(searches: Path) -> Path:
    """Write the searches with documents called useful or noisy by chance: what learns from them obeys neither word."""
    path, rng = searches.with_name("half-noise.jsonl"), random.Random(0)
    if not path.exists():
        write_jsonl(path, [row | {"useful": rng.random() < 0.5} for _, row in read_jsonl(searches)])
    return path


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet, write and print the tables."""
    arguments, train_flags = parse(TablesArguments, argv=argv, rest=True)
    exit_on_signals()  # so that no server outlives it
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    folder = claim_output_dir(arguments.output_dir, overwrite=True).resolve()
    Tables(arguments, train_flags, folder).run()
    say(f"\n{(folder / 'tables.md').read_text(encoding='utf-8')}\n{folder}/tables.json, tables.md, tables.svg")


if __name__ == "__main__":
    main()
