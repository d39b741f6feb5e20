"""Draw the training curves of several runs into one picture: an ablation beside the run it changes.

    python recipes/curves.py --runs outputs/f1 outputs/price --keys rewards/f1_reward/mean search/searches \
        --output outputs/price.svg
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.errors import UserError
from zerosearch.evaluation.matrix import model_labels
from zerosearch.files import claim_output_dir, write_text
from zerosearch.report.plots import curves_plot, values_of
from zerosearch.report.run import read_log


@dataclass
class CurvesArguments:
    """Which runs and which of their logged values."""

    runs: list[str] = field(metadata={"help": "Output folders of recipes/grpo.py or of a copy of it."})
    keys: list[str] = field(
        default_factory=lambda: ["reward", "search/searches"],
        metadata={"help": "Names in the training log, as trainer_state.json has them."},
    )
    output: str = field(default="outputs/curves.svg", metadata={"help": "The SVG file to write."})


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Read the logs, draw and write."""
    (arguments,) = parse(CurvesArguments, argv=argv)
    logs = {}
    for run, name in zip(arguments.runs, model_labels(arguments.runs), strict=True):
        log = read_log(Path(run, "trainer_state.json"))
        if not log:
            raise UserError(f"{run} holds no finished training run: trainer_state.json is missing or empty")
        for key in arguments.keys:
            if np.isnan(values_of(log, key)).all():
                raise UserError(f"the log of {run} has no numbers under {key}; it has {', '.join(sorted(log[0]))}")
        logs[name] = log
    output = Path(arguments.output)
    claim_output_dir(output.parent, overwrite=True)
    write_text(output, curves_plot(logs, arguments.keys))
    say(str(output))


if __name__ == "__main__":
    main()
