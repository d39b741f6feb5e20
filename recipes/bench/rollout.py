"""How long does a rollout take, and what does it wait for? Ours against lockstep turns, TRL's tool loop and a floor.

    python recipes/bench/rollout.py                                  # a thinned matrix, about a quarter of an hour
    python recipes/bench/rollout.py --full true                      # the whole of it: hours, most of them TRL's
    python recipes/bench/rollout.py --latency lognormal --turns 3 --keep true     # a part; the rest stays on file

Arms, all on one colocated vLLM engine, in one process, one after the other:

- `lockstep10`: every trajectory generates a turn, then all search in 10 threads, then the next turn begins;
- `lockstep`: the same with as many searches at once as there are trajectories;
- `trl_tools`: `GRPOTrainer._generate` of TRL 1.16 with `tools=`, its own loop untouched;
- `ours`: `run_rollouts`, with a seed for each turn as in training, which lockstep turns have too;
- `floor`: max(longest chain of searches, engine time of ours at zero latency). No loop can be faster. The turns that
  the longest chain decodes between its searches are not in it.

All arms sample the same tokens, and that is checked. Each trajectory searches `turns` times and is cut off after one
more turn. Turns of 6 to 14 tokens stand for longer ones on a faster engine. The prefix cache is emptied before each
measurement. A run measures every cell by every arm, in an order of its own, so that a slow spell of the machine hits
all; another run has other latencies. Ratios are taken run by run. `engine_steps` counts how often the engine advanced
what was in flight by a token: time goes by it where decoding is slow, while the policy here is so small that the
work between the steps weighs as much.

Without `--full true` the matrix is a Latin square, in which each pair of values of two axes meets once, and an arm is
left out of a cell where its searches alone take longer than `max_search_s`; the output says so.

The second part measures what a trajectory costs with more and more of them in flight and searches that take no time:
with vLLM, and with an instant generator, which leaves the loop's own work.
"""

from __future__ import annotations

import json
import os
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rollout_parts.arms import ARMS, Arms, InstantGenerator, Measurement, ours
from rollout_parts.show import cell_of, plot, print_in_flight, print_rows
from rollout_parts.world import LATENCIES, Cell, World, cues_are_read, save_counting_policy
from tqdm.auto import tqdm

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import user_mistakes
from zerosearch.evaluation.evaluate import versions
from zerosearch.generation import Generator
from zerosearch.rollout.loop import RolloutClock

TURNS = (1, 3, 5)
TRAJECTORIES = (32, 128, 320)
IN_FLIGHT = (32, 64, 128, 256, 512, 1024)
TURNS_A_SECOND = 280  # of two CPU cores; a first guess, for the progress bar alone

Cells = Mapping[Cell, Mapping[str, list[Measurement]]]


@dataclass
class BenchArguments:
    """What to measure. `ours` is measured always, as the others are compared with it."""

    latency: list[str] = field(default_factory=lambda: list(LATENCIES), metadata={"help": " ".join(LATENCIES)})
    turns: list[int] = field(default_factory=lambda: list(TURNS), metadata={"help": "Searches a trajectory."})
    trajectories: list[int] = field(default_factory=lambda: list(TRAJECTORIES), metadata={"help": "At once."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": " ".join(ARMS)})
    runs: int = field(default=5, metadata={"help": "Measurements of each arm in each cell."})
    full: bool = field(default=False, metadata={"help": "Measure every combination of the values above."})
    max_search_s: float = field(default=25.0, metadata={"help": "Not full: leave out arms that search longer a run."})
    parts: list[str] = field(default_factory=lambda: ["cells", "in_flight"], metadata={"help": "cells in_flight"})
    in_flight: list[int] = field(default_factory=lambda: list(IN_FLIGHT), metadata={"help": "Of the second part."})
    keep: bool = field(default=False, metadata={"help": "Keep what the output holds of cells not measured."})
    output: str = field(default="outputs/bench/rollout.json", metadata={"help": "The plot goes beside it, as PNG."})

    def __post_init__(self) -> None:
        for name, known in (("latency", LATENCIES), ("arms", ARMS), ("parts", ("cells", "in_flight"))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(known)}")
        for name in ("turns", "trajectories", "in_flight"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.runs < 1:
            raise ValueError(f"runs is {self.runs}: it must be at least 1")


def plan(arguments: BenchArguments) -> dict[Cell, list[str]]:
    """Return the cells to measure and the arms of each, and say what is left out."""
    planned = {}
    for values in product(arguments.latency, arguments.turns, arguments.trajectories):
        cell = Cell(*values)
        if not arguments.full and not in_latin_square(cell):
            continue
        arms = [arm for arm in ARMS if arm in arguments.arms or arm == "ours"]
        slow = [arm for arm in arms if search_s(arm, cell) > arguments.max_search_s and arm != "ours"]
        if slow and not arguments.full:
            print(f"{cell}: without {' and '.join(slow)}, whose searches would take more than max_search_s")
            arms = [arm for arm in arms if arm not in slow]
        planned[cell] = arms
    return planned


def in_latin_square(cell: Cell) -> bool:
    """Say whether a cell belongs to the thinned matrix. Values that are not the defaults always do."""
    if cell.turns not in TURNS or cell.trajectories not in TRAJECTORIES:
        return True
    place = LATENCIES.index(cell.latency) + TURNS.index(cell.turns) + 1
    return cell.trajectories == TRAJECTORIES[place % 3]


def search_s(arm: str, cell: Cell) -> float:
    """Return about how long an arm waits for searches in a cell, from the latencies of the first run."""
    world, rows = World(cell.latency, 0), range(cell.trajectories)
    by_turn = [[world.latency_s(row, turn) for row in rows] for turn in range(cell.turns)]
    if arm == "trl_tools":
        return sum(map(sum, by_turn))
    if arm == "lockstep10":
        return sum(max(sum(seconds) / 10, *seconds) for seconds in by_turn)
    return sum(map(max, by_turn)) if arm == "lockstep" else world.longest_chain_s(cell)


def measure_cells(arms: Arms, planned: Mapping[Cell, Sequence[str]], runs: int) -> Iterator[Cells]:
    """Measure every cell by every arm once a run, and yield all there is after each run."""
    measured: dict[Cell, dict[str, list[Measurement]]] = {
        cell: {arm: [] for arm in (*names, "floor")} for cell, names in planned.items()
    }
    work = [(arm, cell) for cell, names in planned.items() for arm in names]
    work += [("ours", cell) for cell in {without_latency(cell) for cell in planned} - planned.keys()]  # for the floor
    work.sort(key=str)
    costs = {
        (arm, cell): search_s(arm, cell) + cell.trajectories * (cell.turns + 1) / TURNS_A_SECOND for arm, cell in work
    }
    layout = "{l_bar}{bar}| {elapsed} gone, about {remaining} left{postfix}"
    with tqdm(total=runs * sum(costs.values()), bar_format=layout) as bar:
        for run in range(runs):
            random.Random(run).shuffle(work)
            taken = {}
            for arm, cell in work:
                bar.set_postfix_str(f"run {run + 1} of {runs}, {arm}: {cell}")
                taken[arm, cell] = arms.measure(arm, cell, run)
                bar.update(min(costs[arm, cell], bar.total - bar.n))
            for cell, by_arm in measured.items():
                engine_s = taken["ours", without_latency(cell)].generating_s
                chain_s = World(cell.latency, run).longest_chain_s(cell)
                by_arm["floor"].append(Measurement(max(chain_s, engine_s), engine_s, 0, []))
                for arm in planned[cell]:
                    assert taken[arm, cell].completions == taken["ours", cell].completions, f"{arm} sampled others"
                    by_arm[arm].append(taken[arm, cell])
            yield measured


def without_latency(cell: Cell) -> Cell:
    return replace(cell, latency="none")


def rows_of(measured: Cells) -> list[dict[str, Any]]:
    """Return what the output holds of each arm in each cell."""
    rows = []
    for cell, by_arm in measured.items():
        for arm, taken in by_arm.items():
            pairs = zip(taken, by_arm["ours"], strict=True)
            idle_s = sum(one.seconds - one.generating_s for one in taken)
            rows.append(
                {
                    "arm": arm,
                    "latency": cell.latency,
                    "turns": cell.turns,
                    "trajectories": cell.trajectories,
                    "seconds": [round(one.seconds, 4) for one in taken],
                    "ratio_to_ours": [round(one.seconds / our.seconds, 4) for one, our in pairs],
                    "idle_share": round(idle_s / sum(one.seconds for one in taken), 4),
                    "engine_steps": [one.engine_steps for one in taken],
                }
            )
    return rows


def measure_in_flight(arms: Arms, sizes: Sequence[int], runs: int) -> list[dict[str, Any]]:
    """Measure the time a trajectory costs, one search that takes no time, with so many in flight."""
    generators: dict[str, Generator] = {"vllm": arms.generator, "instant": InstantGenerator(arms.tokenizer)}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in product(generators, sizes)}
    work = [
        (name, size, run)
        for run in range(runs)
        for name, size in random.Random(run).sample(list(seconds), len(seconds))
    ]
    for name, size, run in tqdm(work, desc="more and more in flight"):
        arms.llm.llm_engine.reset_prefix_cache()
        start = time.perf_counter()
        ours(generators[name], Cell("none", 1, size), World("none", run), RolloutClock())
        seconds[name, size].append(round((time.perf_counter() - start) / size, 6))
    return [
        {"generator": name, "trajectories": size, "seconds_per_trajectory": values}
        for (name, size), values in seconds.items()
    ]


def machine() -> dict[str, Any]:
    """Say what was measured on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0)), "gpu": device}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Make the policy, start the engine, measure, write after each run, show."""
    (arguments,) = parse(BenchArguments, argv=argv)
    with user_mistakes():
        output = Path(arguments.output)
        output.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(output.read_text()) if arguments.keep and output.exists() else {"rows": [], "in_flight": []}
    result |= {"machine": machine(), "versions": versions()}
    planned = plan(arguments) if "cells" in arguments.parts else {}
    in_flight = arguments.in_flight if "in_flight" in arguments.parts else []
    kept = [row for row in result["rows"] if cell_of(row) not in planned]

    def write(**parts: Any) -> None:
        result.update(parts)
        output.write_text(json.dumps(result, indent=1) + "\n")

    with TemporaryDirectory() as directory, cues_are_read():
        save_counting_policy(Path(directory))
        arms = Arms(Path(directory), max([32, *in_flight, *(cell.trajectories for cell in planned)]))
        for arm in ARMS:
            arms.measure(arm, Cell("none", 1, 32), run=-1)  # first calls are slow
        for measured in measure_cells(arms, planned, arguments.runs if planned else 0):
            write(rows=[*kept, *rows_of(measured)])
        if in_flight:
            write(in_flight=measure_in_flight(arms, in_flight, arguments.runs))
    print_rows(result["rows"])
    print_in_flight(result["in_flight"])
    if result["rows"]:
        plot(result["rows"], output.with_suffix(".png"))
        print(output.with_suffix(".png"))
    print(output)


if __name__ == "__main__":
    main()
