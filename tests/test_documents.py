"""What the documents point at is there: files, pictures, sections, and the scripts of their commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for folder in (".", "recipes", "data") for path in (ROOT / folder).glob("*.md"))
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
SCRIPT = re.compile(r"(?<![\w/])((?:recipes|data|src|tests)/[\w./-]+\.(?:py|yaml|md|json))")


def sections(path: Path) -> set[str]:
    """Return the anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_scripts_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name, anchor in LINK.findall(text):
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name} links to {name}"
        assert not anchor or anchor in sections(target), f"{path.name} links to the section {name}#{anchor}"
    copies = set(re.findall(r"^cp \S+ (\S+)", text, re.MULTILINE))  # what the reader makes
    missing = [name for name in SCRIPT.findall(text) if name not in copies and not (ROOT / name).exists()]
    assert not missing, f"{path.name} names {missing}"
