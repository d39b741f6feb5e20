"""The paper's Tables 3 to 7 on TinyWorld, the price of the released code's defects, and newer methods, over seeds.

    make paper-tables                          # or: python recipes/tables.py; 4.5 hours on two cores
    python recipes/tables.py --runs curriculum no-mask grpo --seeds 2            # a quick look

Each run trains a policy by recipes/grpo.py or a variant of it, at equal budget, and answers TinyWorld's test questions
with BM25. Runs of one simulator share its server, `--jobs` at a time. A run that is done is passed over, here and
where it stands in recipes/results/tables.json, so commands add up: one after another, or, once the data are there,
side by side with other `--runs` and the same folder. Differences are from the recipe's own run ("curriculum"), paired
by seed and question. Writes tables.json, tables.md, tables.svg, and fidelity.svg: exact match against the fidelity of
the simulator trained on. Flags that are not its own go to every training.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from zerosearch.report.plots import FIDELITY, outcome_plot, rows_plot
from zerosearch.report.run import read_log
from zerosearch.simulator.server import exit_on_signals, simulator_server
from zerosearch.stages import Stages
from zerosearch.training.sentinel import first_collapse

RECIPES = Path(__file__).resolve().parent
ROOT, CONFIGS = RECIPES.parent, RECIPES / "configs"
BASE = ROOT / "data/tinyworld"
PUBLISHED = RECIPES / "results/tables.json"


@dataclass(frozen=True)
class Run:
    """A row of a table: a policy that is trained, or the base policy where `script` is empty, and how it is scored."""

    table: str
    title: str
    flags: str = ""  # what differs from recipes/configs/tinyworld.yaml; {data} is the folder of the seed's data
    script: str = "recipes/grpo.py"
    simulator: str | None = "demo"
    evaluation: str = ""  # what differs from recipes/configs/evaluate-tinyworld.yaml


# The recipe's own run is the first row of most tables, under another name in each.
REFERENCE = "curriculum"
TABLES = {
    "3": "trained on the simulator",
    "4": "simulator: the demo's",
    "5": "REINFORCE",
    "6": "curriculum, 0 to 0.5",
    "7": "observations masked",
    "defects": "none",
    "successors": "the recipe",
}
REAL = "--engine bm25 --corpus {data}/train_corpus.jsonl"
VARIANTS = "recipes/variants"
TWO_UPDATES = "--algorithm grpo --num_iterations 2 --max_steps 60"  # as many rollouts as the others
RUNS = {
    REFERENCE: Run("", ""),
    "untrained": Run("3", "untrained", script="", simulator=None),
    "direct": Run("3", "Direct", script="", simulator=None, evaluation="--agent direct"),
    "cot": Run("3", "CoT", script="", simulator=None, evaluation="--agent cot"),
    "rag": Run("3", "RAG", script="", simulator=None, evaluation="--agent rag"),
    "no-search": Run(
        "3", "R1: trained without search", f"{REAL} --max_turns 0", simulator=None, evaluation="--max_turns 0"
    ),
    "real-engine": Run("3", "trained on BM25", REAL, simulator=None),
    "untuned-simulator": Run("4", "simulator: untuned base", simulator="untuned"),
    "half-noise-simulator": Run("4", "simulator: useful or noisy by chance", simulator="half-noise"),
    "faithful-simulator": Run("4", "simulator: the faithful one", simulator="faithful"),
    "rloo": Run("5", "RLOO", "--algorithm rloo"),
    "grpo": Run("5", "GRPO", "--algorithm grpo"),
    "ppo": Run("5", "PPO", "--algorithm ppo --critic_learning_rate 1e-3"),  # of a critic as small as the policy
    "constant-half": Run("6", "constant 0.5 (the paper's random)", "--noise_start 0.5 --noise_end 0.5"),
    "constant-noise": Run("6", "constant, of the curriculum's mean", script=f"{VARIANTS}/noise.py constant"),
    "random-noise": Run("6", "random, of its mean", script=f"{VARIANTS}/noise.py random"),
    "reversed-noise": Run("6", "reversed", script=f"{VARIANTS}/noise.py reversed"),
    "closed-loop-noise": Run("6", "closed loop", script=f"{VARIANTS}/noise.py closed-loop"),
    "no-noise": Run("6", "none", "--noise_end 0"),
    "no-mask": Run("7", "not masked", "--mask_observations false"),
    "swapped-rows": Run("defects", "another row's question and answers", script=f"{VARIANTS}/defects.py swapped-rows"),
    "wrong-kl-sign": Run("defects", "KL with the wrong sign", script=f"{VARIANTS}/defects.py wrong-kl-sign"),
    "containment": Run("defects", "containment as the reward", script=f"{VARIANTS}/defects.py containment"),
    "example-for-no-answer": Run(
        "defects", "the example for no answer", script=f"{VARIANTS}/defects.py example-for-no-answer"
    ),
    "top-p": Run("defects", "top-p 0.95 in sampling", "--top_p 0.95"),
    "retokenised": Run("defects", "text decoded and encoded again", script=f"{VARIANTS}/defects.py retokenised"),
    "long-warm-up": Run("defects", "warm-up over 95 % of the steps", "--warmup_steps 0.95"),
    "gigpo": Run("successors", "GiGPO", script=f"{VARIANTS}/gigpo.py"),
    "igpo": Run("successors", "IGPO", script=f"{VARIANTS}/igpo.py"),
    "stepsearch": Run("successors", "StepSearch", script=f"{VARIANTS}/stepsearch.py"),
    "two-updates": Run("successors", "GRPO, two updates a rollout", TWO_UPDATES),
    "llds": Run("successors", "the same with LLDS", TWO_UPDATES, f"{VARIANTS}/llds.py"),
    "self-search": Run("successors", "self-search", script=f"{VARIANTS}/self_search.py", simulator=None),
    "sim-to-real": Run(
        "successors", "sim-to-real", "--corpus {data}/train_corpus.jsonl", f"{VARIANTS}/sim_to_real.py"
    ),
    "search-price": Run("successors", "F1 less 0.1 a search", script=f"{VARIANTS}/search_price.py"),
}
# As in recipes/configs/sft-tinyworld-faithful.yaml.
MANY_SEARCHES = ("--n_searches", 40_000, "--n_searched_worlds", 400, "--asked_relation_in_noise", False)
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
        self.published = read_json(PUBLISHED) if PUBLISHED.exists() else {}

    def done(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Return the records of all runs that are done, here or in what is published, by name and seed."""
        here = [read_json(path) for path in sorted(self.folder.glob("runs/*/*/run.json"))]
        return {
            (record["name"], record["seed"]): record
            for record in [*self.published.get("runs", []), *here]
            if record["name"] in RUNS and record["settings"] == self.settings(record["name"])
        }

    def settings(self, name: str) -> dict[str, Any]:
        """Return what a run is made by; what was recorded with other settings is another run."""
        made_by = {key: getattr(RUNS[name], key) for key in ("flags", "script", "simulator", "evaluation")}
        return made_by | {"train_flags": list(self.train_flags), "num_questions": self.arguments.num_questions}

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
        for simulator in dict.fromkeys(RUNS[name].simulator for name, _ in todo):
            pairs = [pair for pair in todo if RUNS[pair[0]].simulator == simulator]
            with self.served(simulator) as url, ThreadPoolExecutor(self.arguments.jobs) as pool, self.stages:
                futures = {pool.submit(self.one, *pair, url): pair for pair in pairs}
                try:
                    for future in as_completed(futures):
                        try:
                            seconds.append(future.result())
                        except UserError as error:
                            failures.append(f"{futures[future][0]} {futures[future][1]}: {error}")
                        self.write()
                        left = len(todo) - len(seconds) - len(failures)
                        wait = left * sum(seconds) / max(len(seconds), 1) / self.arguments.jobs
                        self.stages.say(f"{left} runs left, about {duration(wait)}")
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
        """Serve a simulator, tuned and measured if need be."""
        if simulator is None:
            yield ""
            return
        options: dict[str, Any] = {"max_model_len": 1024, "dtype": "float32", "num_threads": 1}
        with simulator_server(str(self.simulator(simulator)), port=0, **options) as server:
            self.stages.say(f"simulator {simulator} ready at {server.base_url}")
            card = self.folder / "fidelity" / simulator
            queries = self.make_data("held-out", "--seed", 7) / "searches.jsonl"
            how = ["--config", CONFIGS / "fidelity-tinyworld.yaml", "--queries", queries, "--output", card]
            how += ["--simulator_url", server.base_url]
            made = card.with_suffix(".json")
            self.stages.run(f"fidelity {simulator}", "recipes/measure_fidelity.py", *how, makes=made)
            yield server.base_url

    def simulator(self, name: str) -> Path:
        """Return the folder of a simulator, which is tuned if need be."""
        if name == "untuned":
            return BASE / "simulator"
        folder, config = self.folder / "simulators" / name, "sft-tinyworld"
        if name == "faithful":
            config = "sft-tinyworld-faithful"
            searches = self.make_data("many", *MANY_SEARCHES) / "searches.jsonl"
            held_out = self.make_data("held-out", "--seed", 7) / "searches.jsonl"
            more = ["--held_out", held_out, "--measure_fidelity", False]
        else:
            searches, more = self.make_data("seed-0", "--seed", 0) / "searches.jsonl", []
        searches = half_noise(searches) if name == "half-noise" else searches
        how = ["--config", CONFIGS / f"{config}.yaml", "--searches", searches, "--output_dir", folder, *more]
        how += ["--overwrite_output_dir", True]
        self.stages.run(f"simulator {name}", "recipes/sft_simulator.py", *how, makes=folder / "simulator.json")
        return folder

    def one(self, name: str, seed: int, simulator_url: str) -> float:
        """Train and score one policy, keep its record, and return the seconds it took."""
        run, settings, started = RUNS[name], self.settings(name), time.monotonic()
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
        queries = policy / "engine_queries.json"
        record = {
            "name": name,
            "seed": seed,
            "settings": settings,
            "versions": results["versions"],
            "questions_sha256": data_hash(records),
            "em": "".join(str(int(record["em"])) for record in records),  # a digit a question
            "searches": results["searches"],
            "collapsed": first_collapse(read_log(policy / "trainer_state.json") or []),
            "queries_in_training": read_json(queries) if run.script and queries.exists() else {},
            "seconds": round(seconds, 1),
        }
        write_json(folder / "run.json", record)
        return seconds

    def write(self) -> None:
        """Write tables.json, tables.md, tables.svg and fidelity.svg from all that is done."""
        done = self.done()
        simulators = dict(self.published.get("simulators", {}))
        for path in sorted(self.folder.glob("fidelity/*.json")):
            card = read_json(path)
            simulators[path.stem] = {rate: card[rate] for rate in FIDELITY}
        rows = table_rows(done, simulators)
        if not rows:
            return
        seeds = sorted({seed for _, seed in done})
        results: dict[str, Any] = {
            "what": "Policies trained and scored on TinyWorld, with 95 % intervals over seeds and questions",
            "command": " ".join(["python recipes/tables.py", *self.train_flags]),
            "machine": f"{os.cpu_count()} cores, {'a GPU' if torch.accelerator.is_available() else 'no GPU'}",
            "versions": next((record["versions"] for record in done.values()), {}),
            "seed": seeds,
            "seeds": seeds,
            "columns": COLUMNS,
            "rows": rows,
            "simulators": simulators,
            "runs": list(done.values()),
        }
        write_json(self.folder / "tables.json", results)
        write_text(self.folder / "tables.md", measured_table(results) + "\n")
        write_text(self.folder / "tables.svg", rows_plot(rows))
        if measured := [row for row in rows if row["fidelity"]]:
            write_text(self.folder / "fidelity.svg", outcome_plot(measured))


def table_rows(
    done: Mapping[tuple[str, int], Mapping[str, Any]], simulators: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Return the rows of the tables whose runs are done, each with its difference from the reference.

    Those of Table 4 have the fidelity of their simulator, where it was measured. A table of the recipe's own run alone
    is left out, but for Table 3.
    """
    found = []
    reference = {seed: record for (name, seed), record in done.items() if name == REFERENCE}
    begun = [table for table in TABLES if table == "3" or any(RUNS[name].table == table for name, _ in done)]
    for table, name in ((table, name) for table in begun for name in RUNS):
        records = {seed: record for (of_run, seed), record in done.items() if of_run == name}
        if not records or (name != REFERENCE and RUNS[name].table != table):
            continue
        em = over_seeds(bits(list(records.values())))
        run, difference = RUNS[name], None
        if name != REFERENCE and reference:
            shared = sorted(reference.keys() & records.keys() if run.script else reference)
            ours = [records[seed if run.script else 0] for seed in shared]  # what is not trained has no seeds
            if len(shared) > 1:
                difference = over_seeds(bits(ours) - bits([reference[seed] for seed in shared]))
        differs = difference is not None and not difference["low"] <= 0.0 <= difference["high"]
        worse_or_better = "better" if difference and difference["mean"] > 0 else "worse"
        found.append(
            {
                "table": table,
                "name": TABLES[table] if name == REFERENCE else run.title,
                "num_seeds": len(records),
                "em": em | {"low": max(em["low"], 0.0), "high": min(em["high"], 1.0)},
                "difference": difference,
                "verdict": None if difference is None else worse_or_better if differs else "no difference seen",
                "differs": differs,
                "searches": sum(record["searches"] for record in records.values()) / len(records),
                "collapsed": sum(record["collapsed"] is not None for record in records.values()),
                "fidelity": simulators.get(run.simulator or "") if table == "4" else None,
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
    written = "tables.json, tables.md, tables.svg, fidelity.svg"
    say(f"\n{(folder / 'tables.md').read_text(encoding='utf-8')}\n{folder}/{written}")


if __name__ == "__main__":
    main()
