"""Render the measured results beside this file into the tables of the documents, between two marker comments:

    <!-- results/NAME.json -->              or: <!-- results/tables.json: 3 5 -->, some of its tables alone
    <!-- end -->

and the runs of tables.json into recipes/pictures.

python recipes/results/render.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from zerosearch.evaluation.tables import measured_table
from zerosearch.report.plots import outcome_plot, rows_plot

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
DOCUMENTS = ("README.md", "recipes/README.md", "data/README.md")
MARKED = re.compile(r"(<!-- results/([\w-]+)\.json(?:: ([\w ]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write every table and picture anew."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name, picture in pictures().items():
        (ROOT / "recipes/pictures" / name).write_text(picture, encoding="utf-8")


def rendered(text: str) -> str:
    """Return a document with the tables between its markers made from the results they name."""
    return MARKED.sub(lambda found: f"{found[1]}{table(FOLDER / f'{found[2]}.json', found[3])}\n{found[4]}", text)


def pictures() -> dict[str, str]:
    """Return the pictures of the paper's tables, by the names of their files."""
    rows = json.loads((FOLDER / "tables.json").read_text(encoding="utf-8"))["rows"]
    return {"tables.svg": rows_plot(rows), "fidelity.svg": outcome_plot([row for row in rows if row["fidelity"]])}


def table(path: Path, chosen: str | None = None) -> str:
    """Return a file's rows as a Markdown table, and below it the machine and the command that measured them.

    `chosen` names the tables whose rows are wanted, where not all are.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    results["rows"] = [row for row in results["rows"] if chosen is None or row["table"] in chosen.split()]
    how = f"Machine: {results['machine']}. Command:\n\n```bash\n{results['command']}\n```"
    return f"{measured_table(results)}\n\n{how}"


if __name__ == "__main__":
    main()
