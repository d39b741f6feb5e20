"""How long does a rollout take, and what does it wait for? Ours against lockstep turns, TRL's tool loop and a floor.

    python recipes/bench/rollout.py                                       # about a quarter of an hour
    python recipes/bench/rollout.py --cells lognormal-3-128 --runs 2      # a part

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

The cells are a Latin square, in which each pair of values of two axes meets once. An arm is left out of a cell where
its searches alone take longer than `max_search_s`; the output says so.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rollout_parts.arms import ARMS, Arms, Measurement
from rollout_parts.world import LATENCIES, Cell, World, cues_are_read, save_counting_policy
from tqdm.auto import tqdm

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import UserError
from zerosearch.evaluation.evaluate import versions
from zerosearch.files import claim_output_dir, write_json

CELLS = (
    "none-1-128 none-3-320 none-5-32 constant-1-320 constant-3-32 constant-5-128 lognormal-1-32 lognormal-3-128 "
    "lognormal-5-320"
)

Cells = Mapping[Cell, Mapping[str, list[Measurement]]]


@dataclass
class BenchArguments:
    """What to measure."""

    cells: list[str] = field(
        default_factory=CELLS.split, metadata={"help": f"LATENCY-SEARCHES-TRAJECTORIES; of {' '.join(LATENCIES)}."}
    )
    runs: int = field(default=5, metadata={"help": "Measurements of each arm in each cell.", "min": 1})
    max_search_s: float = field(default=25.0, metadata={"help": "Leave out arms that search longer a run."})
    output: str = field(default="outputs/bench/rollout.json", metadata={"help": "What was measured."})


def read_cell(text: str) -> Cell:
    """Read "lognormal-3-128". Raises `UserError`."""
    found = re.fullmatch(rf"({'|'.join(LATENCIES)})-([1-9]\d*)-([1-9]\d*)", text)
    if found is None:
        raise UserError(f"cells is {text!r}: it must be such as lognormal-3-128, of {', '.join(LATENCIES)}")
    return Cell(found[1], int(found[2]), int(found[3]))


def plan(cells: Sequence[Cell], max_search_s: float) -> dict[Cell, list[str]]:
    """Return the arms of each cell, and say what is left out."""
    planned = {}
    for cell in cells:
        slow = [arm for arm in ARMS if search_s(arm, cell) > max_search_s and arm != "ours"]
        if slow:
            print(f"{cell}: without {' and '.join(slow)}, whose searches would take more than max_search_s")
        planned[cell] = [arm for arm in ARMS if arm not in slow]
    return planned


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
    work += [("ours", cell) for cell in {cell.without_latency() for cell in planned} - planned.keys()]  # for the floor
    work.sort(key=str)
    with tqdm(total=runs * len(work)) as bar:
        for run in range(runs):
            random.Random(run).shuffle(work)
            taken = {}
            for arm, cell in work:
                bar.set_postfix_str(f"run {run + 1} of {runs}, {arm}: {cell}")
                taken[arm, cell] = arms.measure(arm, cell, run)
                bar.update()
            for cell, by_arm in measured.items():
                engine_s = taken["ours", cell.without_latency()].generating_s
                chain_s = World(cell.latency, run).longest_chain_s(cell)
                by_arm["floor"].append(Measurement(max(chain_s, engine_s), engine_s, 0, []))
                for arm in planned[cell]:
                    assert taken[arm, cell].completions == taken["ours", cell].completions, f"{arm} sampled others"
                    by_arm[arm].append(taken[arm, cell])
            yield measured


def rows_of(measured: Cells) -> list[dict[str, Any]]:
    """Return what the output holds of each arm in each cell."""
    rows = []
    for cell, by_arm in measured.items():
        for arm, taken in by_arm.items():
            idle_s = sum(one.seconds - one.generating_s for one in taken)
            seconds = [one.seconds for one in taken]
            rows.append(
                {
                    "arm": arm,
                    "latency": cell.latency,
                    "turns": cell.turns,
                    "trajectories": cell.trajectories,
                    "seconds": [round(one, 4) for one in seconds],
                    "ratio_to_ours": ratios(seconds, [one.seconds for one in by_arm["ours"]]),
                    "ratio_to_floor": ratios(seconds, [one.seconds for one in by_arm["floor"]]),
                    "idle_share": round(idle_s / sum(seconds), 4),
                    "engine_steps": [one.engine_steps for one in taken],
                }
            )
    return rows


def ratios(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    return [round(one / other, 4) for one, other in zip(seconds, others, strict=True)]


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each arm in each cell: median of the runs, the least and the greatest."""
    print(
        f"{'latency, searches x trajectories':<33}{'arm':<11}{'x ours':<21}{'x floor':<21}{'seconds':<21}idle  steps"
    )
    for row in rows:
        columns = (row["ratio_to_ours"], row["ratio_to_floor"], row["seconds"])
        texts = "".join(f"{f'{median(runs):.2f} [{min(runs):.2f}, {max(runs):.2f}]':<21}" for runs in columns)
        cell = Cell(row["latency"], row["turns"], row["trajectories"])
        print(f"{cell!s:<24}{row['arm']:<11}{texts}{row['idle_share']:.2f}  {median(row['engine_steps']):g}")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Make the policy, start the engine, measure, write after each run, show."""
    (arguments,) = parse(BenchArguments, argv=argv)
    planned = plan([read_cell(text) for text in arguments.cells], arguments.max_search_s)
    output = Path(arguments.output)
    claim_output_dir(output.parent, overwrite=True)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as directory, cues_are_read():
        save_counting_policy(Path(directory))
        arms = Arms(Path(directory), max([32, *(cell.trajectories for cell in planned)]))
        for arm in ARMS:
            arms.measure(arm, Cell("none", 1, 32), run=-1)  # first calls are slow
        for measured in measure_cells(arms, planned, arguments.runs):
            rows = rows_of(measured)
            write_json(output, {"versions": versions(), "rows": rows})
    print_rows(rows)
    print(output)


if __name__ == "__main__":
    main()
