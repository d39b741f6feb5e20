"""How many searches a second a simulator answers, with few and many in flight, with prefix caching and without.

    python recipes/bench/simulator.py --model outputs/demo/simulator

Two servers of the same model run side by side, one of them with prefix caching. Every round asks both the same
searches, one server after the other, in turns; what counts is the ratio within a round, as other work on the machine
changes both. Searches are TinyWorld's, five to a question, each a prompt of its own: as short as TinyWorld's is, and
behind a long example that all prompts share, as a prompted simulator's are. Replies are cut at `--max_tokens`.
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from trl import TrlParser

from zerosearch.engines import SearchError, SearchRequest
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import exit_on_user_error, user_mistakes
from zerosearch.prompts import TINYWORLD_SIMULATOR_PROMPT
from zerosearch.simulator.server import SimulatorServer, exit_on_signals, simulator_server
from zerosearch.tinyworld.world import World

SEARCHES_PER_QUESTION = 5  # as many as there are trajectories of a question in training
SEARCHES = {1: 16, 8: 64, 32: 192, 128: 384}  # in flight -> searches a round
EXAMPLE_STATEMENTS = 60
ROUNDS = 3


@dataclass
class BenchArguments:
    """What to serve, and where the numbers go."""

    model: str = field(default="data/tinyworld/simulator", metadata={"help": "Folder or Hub id of the simulator."})
    port: int = field(default=6021, metadata={"help": "Port of the first server; the second takes the next."})
    max_tokens: int = field(default=60, metadata={"help": "Longest reply, in tokens; five documents take 50."})
    num_threads: int | None = field(default=1, metadata={"help": "On a CPU: threads of each server."})
    dtype: str = field(default="float32", metadata={"help": "Number format."})
    output: str = field(default="outputs/bench/simulator.json", metadata={"help": "The plot goes beside it, as SVG."})

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: it must be at least 1")


def templates(world: World) -> dict[str, str]:
    """Return the two prompts: TinyWorld's own, and the same behind an example that all searches share."""
    facts = random.Random("example").sample(world.facts, EXAMPLE_STATEMENTS)
    example = "\n".join(fact.sentence for fact in facts)
    return {"short": TINYWORLD_SIMULATOR_PROMPT, "shared example": f"{example}\n{TINYWORLD_SIMULATOR_PROMPT}"}


def searches(world: World, count: int, round_number: int) -> list[SearchRequest]:
    """Return the searches of a round, in a row for each question; no round repeats another's."""
    rng = random.Random(f"searches-{count}-{round_number}")
    requests = []
    for row, question in enumerate(islice(world.questions(rng), -(-count // SEARCHES_PER_QUESTION))):
        for sample in range(SEARCHES_PER_QUESTION):
            query = rng.choice(question.path).query if sample else question.path[-1].query
            key = (round_number, count, row, sample, 0)
            requests.append(SearchRequest(query, question.text, question.golden_answers, 0.5, key))
    return requests[:count]


def time_searches(engine: SimulatedEngine, requests: Sequence[SearchRequest]) -> float:
    """Return the seconds that all the searches take; an empty reply is a reply, too."""

    async def one(request: SearchRequest) -> None:
        try:
            await engine.search(request)
        except SearchError as error:
            if "wrote no documents" not in str(error):
                raise

    async def together() -> float:
        start = time.perf_counter()
        await asyncio.gather(*map(one, requests))
        seconds = time.perf_counter() - start
        await engine.aclose()
        return seconds

    return asyncio.run(together())


def measure(servers: dict[str, SimulatorServer], arguments: BenchArguments) -> list[dict[str, Any]]:
    """Return a row for each prompt and number in flight."""
    world = World.draw(1)
    rates: dict[tuple[str, int, str], list[float]] = {}
    plan = [
        (round_number, prompt, in_flight)
        for round_number in range(ROUNDS + 1)
        for prompt in templates(world)
        for in_flight in SEARCHES
    ]
    for round_number, prompt, in_flight in tqdm(plan, desc="measuring"):
        count = SEARCHES[in_flight] if round_number else min(SEARCHES[in_flight], 32)  # round 0 warms up
        requests = searches(world, count, round_number)
        names = sorted(servers, reverse=bool(round_number % 2))
        for name in names:
            engine = SimulatedEngine(
                servers[name].base_url,
                template=templates(world)[prompt],
                max_tokens=arguments.max_tokens,
                num_documents=1,  # so that none is asked for twice
                max_concurrency=in_flight,
            )
            engine.check()
            rate = len(requests) / time_searches(engine, requests)
            if round_number:
                rates.setdefault((prompt, in_flight, name), []).append(rate)
    rows = []
    for prompt in templates(world):
        for in_flight in SEARCHES:
            on, off = rates[prompt, in_flight, "on"], rates[prompt, in_flight, "off"]
            ratios = [with_it / without for with_it, without in zip(on, off, strict=True)]
            rows.append(
                {
                    "prompt": prompt,
                    "in_flight": in_flight,
                    "queries_per_s_prefix_caching": statistics.median(on),
                    "queries_per_s_no_prefix_caching": statistics.median(off),
                    "ratio": statistics.median(ratios),
                    "ratio_spread": [min(ratios), max(ratios)],
                    "rounds": ROUNDS,
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| prompt | in flight | queries/s, prefix caching | without | ratio [min, max] |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ratio_spread"]
        lines.append(
            f"| {row['prompt']} | {row['in_flight']} | {row['queries_per_s_prefix_caching']:.1f} "
            f"| {row['queries_per_s_no_prefix_caching']:.1f} | {row['ratio']:.2f} [{low:.2f}, {high:.2f}] |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw queries per second over queries in flight."""
    from matplotlib.figure import Figure

    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, len(prompts), sharey=True, squeeze=False)
    for axes, prompt in zip(panels.flat, prompts, strict=True):
        chosen = [row for row in rows if row["prompt"] == prompt]
        in_flight = [row["in_flight"] for row in chosen]
        on, off = "queries_per_s_prefix_caching", "queries_per_s_no_prefix_caching"
        axes.plot(in_flight, [row[on] for row in chosen], marker="o", color="#2a6f97", label="prefix caching")
        axes.plot(in_flight, [row[off] for row in chosen], marker="s", color="#b9480b", label="without")
        axes.set_xscale("log", base=2)
        axes.set_xticks(in_flight, [str(count) for count in in_flight])
        axes.set_title(f"{prompt} prompt", fontsize=10)
        axes.set_xlabel("searches in flight")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("searches a second")
    panels[0, 0].set_ylim(bottom=0)
    panels[0, 0].legend(frameon=False)
    figure.savefig(path)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Serve twice, measure, write, print."""
    with user_mistakes():
        (arguments,) = TrlParser(BenchArguments).parse_args_and_config(argv)
        output = Path(arguments.output)
        output.parent.mkdir(parents=True, exist_ok=True)
    exit_on_signals()
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                simulator_server(
                    arguments.model,
                    arguments.port + place,
                    prefix_caching=name == "on",
                    max_model_len=1024,
                    dtype=arguments.dtype,
                    num_threads=arguments.num_threads,
                )
            )
            for place, name in enumerate(("on", "off"))
        }
        rows = measure(servers, arguments)
    machine = {"machine": platform.machine(), "model": arguments.model, "max_tokens": arguments.max_tokens}
    output.write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")
    plot(rows, output.with_suffix(".svg"))
    print(f"\n{table(rows)}\n\n{output}, {output.with_suffix('.svg').name}")


if __name__ == "__main__":
    main()
