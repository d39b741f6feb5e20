"""Write the report of a demo, or of recipes/smollm.py, again, from what it left in its folder:

python recipes/report.py --run_dir outputs/demo
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.report import summary_table, write_report


@dataclass
class ReportArguments:
    """Which run to report on."""

    run_dir: str = field(default="outputs/demo", metadata={"help": "Folder that the run wrote."})


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Print the table, write the page."""
    (arguments,) = parse(ReportArguments, argv=argv)
    run_dir = Path(arguments.run_dir)
    say(summary_table(run_dir))
    say(str(write_report(run_dir)))


if __name__ == "__main__":
    main()
