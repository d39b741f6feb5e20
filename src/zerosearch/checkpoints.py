"""Which checkpoint a run goes on from, and what a killed run wrote behind it.

A checkpoint is written file by file, `trainer_state.json` last, and older ones are removed after that. So a run killed
at any moment leaves a whole one behind it: the last whose `trainer_state.json` can be read.
"""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path

from zerosearch.errors import UserError
from zerosearch.files import read_jsonl, write_jsonl


def checkpoint_to_resume(asked: str | None, output_dir: str) -> str | None:
    """Return the checkpoint to go on from: the folder named, or for "true" the last whole one in the output folder.

    None for None and "false". Raises `UserError` if there is none.
    """
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        if not is_whole(Path(asked)):
            raise UserError(f"there is no checkpoint to resume from: {asked}")
        return asked
    found = {folder: folder.name.removeprefix("checkpoint-") for folder in Path(output_dir).glob("checkpoint-*")}
    whole = {int(step): folder for folder, step in found.items() if step.isdigit() and is_whole(folder)}
    if not whole:
        raise UserError(f"there is no checkpoint to resume from: {output_dir}")
    return str(whole[max(whole)])


def is_whole(checkpoint: Path) -> bool:
    """Say whether a checkpoint was written to its end."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def forget_later_steps(path: Path, step: int) -> None:
    """Keep the records of a `trajectories.jsonl` up to this step: what came later will be rolled out again."""
    if path.exists():
        records = (record for _, record in read_jsonl(path, skip_half_line=True))
        write_jsonl(path, takewhile(lambda record: record["step"] <= step, records))
