"""Imports go down only: a room uses the floors below it, and no other room on its own floor."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src/zerosearch"
FLOORS = [
    {"errors", "text", "metrics", "intervals", "noise", "protocol", "files", "prompts", "data", "checkpoints"},
    {"command_line", "http", "stages"},
    {"engines", "generation"},
    {"hub", "rollout", "tinyworld", "environment"},
    {"training", "simulator", "evaluation"},
    {"report"},
]


def imports(path: Path) -> set[str]:
    """Return the rooms and modules of this package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "zerosearch":
            names = [f"zerosearch.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("zerosearch.")}
    return found


def test_imports_go_down_only() -> None:
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":  # the package's own front door, which imports lazily
            continue
        assert room in floor_of, f"{path} is on no floor: name its room in FLOORS"
        for used in imports(path) - {room, "__version__"}:
            if floor_of[room] and floor_of[used] >= floor_of[room]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {used}")
    assert not wrong


def test_the_ground_floor_has_no_cycles_and_imports_nothing_above() -> None:
    ground = FLOORS[0]
    uses = {name: imports(PACKAGE / f"{name}.py") for name in ground}
    assert all(used <= ground for used in uses.values())
    while uses:
        free = {name for name, used in uses.items() if not used & uses.keys()}
        assert free, f"a cycle among {sorted(uses)}"
        uses = {name: used for name, used in uses.items() if name not in free}
