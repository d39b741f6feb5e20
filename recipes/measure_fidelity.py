"""Measure how faithful a simulator is, on queries that it was not tuned on; or a real engine, as the yardstick.

    python recipes/measure_fidelity.py --queries test.jsonl --simulator_url http://127.0.0.1:6001/v1
    python recipes/measure_fidelity.py --queries test.jsonl --model outputs/simulator     # serves it for the while
    python recipes/measure_fidelity.py --queries traces.jsonl --engine recorded           # the documents in the file

`--queries` are searches, rows `{question, golden_answers, query, documents}`: the documents are what a real engine
found, compared with the simulator's, and may be empty. Any OpenAI-style endpoint will do; an untuned model takes
`--prompt prompted`. TinyWorld, with searches of another world than the simulator was tuned on:

    python data/make_tinyworld.py --output_dir outputs/tinyworld-held-out --seed 7
    python recipes/measure_fidelity.py --config recipes/configs/fidelity-tinyworld.yaml --model outputs/demo/simulator

Writes OUTPUT.json, OUTPUT.md and OUTPUT.svg.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.files import claim_output_dir
from zerosearch.http import redacted_url
from zerosearch.prompts import PROMPT_SETS, PromptSetName
from zerosearch.report.plots import write_fidelity_plot
from zerosearch.simulator.fidelity import FidelityOptions, measure_recorded, measure_simulator
from zerosearch.simulator.fidelity_card import card_markdown, write_card
from zerosearch.simulator.held_out import read_held_out
from zerosearch.simulator.server import exit_on_signals, simulator_server


@dataclass
class RecipeArguments:
    """What to measure, and with what."""

    queries: str = field(metadata={"help": "Held-out searches, JSONL."})
    engine: Literal["simulated", "recorded"] = field(
        default="simulated", metadata={"help": "A simulator, or the documents in the file."}
    )
    simulator_url: str = field(
        default="http://127.0.0.1:6001/v1", metadata={"help": "Its address; several with commas between them."}
    )
    simulator_model: str | None = field(
        default=None, metadata={"help": "The model to ask for. Default: the one that is served."}
    )
    api_key_variable: str | None = field(
        default=None, metadata={"help": "Environment variable with the endpoint's key, where it wants one."}
    )
    model: str | None = field(default=None, metadata={"help": "Serve this folder or Hub id for the while."})
    port: int = field(default=6001, metadata={"help": "For model: the port to serve it on."})
    max_model_len: int = field(
        default=4096, metadata={"min": 1, "help": "For model: longest prompt plus reply, in tokens."}
    )
    dtype: str = field(default="auto", metadata={"help": "For model: its number format."})
    prompt: PromptSetName = field(default="paper", metadata={"help": "The prompt set: see zerosearch.prompts."})
    temperature: float = field(default=0.8, metadata={"min": 0, "help": "The simulator's."})
    max_tokens: int = field(default=600, metadata={"min": 1, "help": "Longest reply, in tokens."})
    num_documents: int = field(default=5, metadata={"min": 1, "help": "Documents a search."})
    ask_leaks_again: bool = field(
        default=False, metadata={"help": "Ask once more for noisy documents that hold a golden answer."}
    )
    output: str = field(default="outputs/fidelity/simulator", metadata={"help": "Where to write, without suffix."})

    def __post_init__(self) -> None:
        if self.api_key_variable and not os.environ.get(self.api_key_variable):
            raise UserError(f"--api_key_variable names {self.api_key_variable}, which the environment lacks")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Measure, write the card, print it."""
    recipe, options = parse(RecipeArguments, FidelityOptions, argv=argv)
    prompts = PROMPT_SETS[recipe.prompt]
    queries = read_held_out(recipe.queries, prompts.rule)
    output = Path(recipe.output)
    claim_output_dir(output.parent, overwrite=True)
    about = {"queries": recipe.queries, "engine": recipe.engine}
    with ExitStack() as stack:
        if recipe.engine == "recorded":
            card = measure_recorded(queries, options, about)
        else:
            url = recipe.simulator_url
            if recipe.model is not None:
                exit_on_signals()
                say(f"starting {recipe.model} ...")
                settings = {name: getattr(recipe, name) for name in ("max_model_len", "dtype")}
                url = stack.enter_context(simulator_server(recipe.model, recipe.port, **settings)).base_url
            asked = {name: getattr(recipe, name) for name in ("temperature", "max_tokens", "num_documents")}
            asked |= {"ask_leaks_again": recipe.ask_leaks_again}
            key = os.environ[recipe.api_key_variable] if recipe.api_key_variable else None
            engine = SimulatedEngine(url, recipe.simulator_model, prompts.simulator, api_key=key, **asked)
            about |= {"model": recipe.model or recipe.simulator_model or redacted_url(url)}
            about |= {"prompt": recipe.prompt, "seed": options.seed, **asked}
            card = measure_simulator(engine, queries, options, about)
    paths = [*write_card(card, output), write_fidelity_plot(card, output)]
    print(f"\n{card_markdown(card)}\n\n{', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
