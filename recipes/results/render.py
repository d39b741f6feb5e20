"""Render the measured results beside this file into the tables of the documents, between two marker comments:

    <!-- results/NAME.json -->
    <!-- end -->

python recipes/results/render.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from zerosearch.evaluation.tables import markdown, number, with_interval

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
DOCUMENTS = ("README.md", "recipes/README.md", "data/README.md")
MARKED = re.compile(r"(<!-- results/([\w-]+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write every table anew."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")


def rendered(text: str) -> str:
    """Return a document with the tables between its markers made from the results they name."""
    return MARKED.sub(lambda found: f"{found[1]}{table(FOLDER / f'{found[2]}.json')}\n{found[3]}", text)


def table(path: Path) -> str:
    """Return a file's rows as a Markdown table, and below it the machine and the command that measured them."""
    results = json.loads(path.read_text(encoding="utf-8"))
    columns = results["columns"]
    rows = [[cell(row[one["key"]], one.get("digits", 3)) for one in columns] for row in results["rows"]]
    shown = markdown([[one["title"] for one in columns], *rows])
    return f"{shown}\n\nMachine: {results['machine']}. Command:\n\n```bash\n{results['command']}\n```"


def cell(value: Any, digits: int) -> str:
    """Write a number with its digits, `{mean, low, high}` with its interval, text as it is, and "-" for null."""
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int):
        return f"{value:,}"
    return with_interval(value, digits) if isinstance(value, dict) else number(value, digits)


if __name__ == "__main__":
    main()
