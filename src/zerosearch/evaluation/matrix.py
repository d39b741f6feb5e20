"""Several evaluations by one command: every agent with every model and every engine it can use, a folder each."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from zerosearch.engines import SearchEngine
from zerosearch.engines.account import LimitReached, Limits
from zerosearch.errors import UserError, user_mistakes
from zerosearch.evaluation.evaluate import evaluate
from zerosearch.files import claim_output_dir
from zerosearch.generation.loading import LoadedModel
from zerosearch.prompts import Agent
from zerosearch.rollout.loop import RolloutSettings

WRITTEN = ("manifest.json", "trajectories.jsonl", "results.json", "table.md")


@dataclass(frozen=True)
class Evaluation:
    """One of the evaluations asked for: its name says what differs, its folder holds what it writes."""

    name: str
    folder: Path
    model: str
    agent: Agent
    engine: SearchEngine | None  # None: the agent never searches


def plan_evaluations(
    models: Sequence[str], agents: Sequence[Agent], engines: Sequence[SearchEngine], output_dir: Path
) -> list[Evaluation]:
    """Return what is to be evaluated, model by model. One evaluation has the output folder for itself."""
    found = []
    for model, label in zip(models, model_labels(models), strict=True):
        for agent in agents:
            for engine in engines if agent.searches else [None]:
                parts = [label] if len(models) > 1 else []
                parts += [agent.name]
                parts += [engine.name] if engine and len(engines) > 1 else []
                name = " ".join(parts)
                folder = output_dir / re.sub(r"[^\w.-]+", "-", name).strip("-.")
                found.append(Evaluation(name, folder, model, agent, engine))
    if len({one.folder for one in found}) < len(found):
        raise UserError(
            f"two evaluations would share a folder: name each model ({', '.join(models)}), agent and engine once, and "
            "models that differ in more than signs"
        )
    return found if len(found) > 1 else [replace(one, folder=output_dir) for one in found]


def model_labels(models: Sequence[str]) -> list[str]:
    """Return a short name for each model: as few of the last parts of its path as tell all apart."""
    parts = [Path(model).parts for model in models]
    for count in range(1, max(map(len, parts))):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(models)


def claim_evaluation_dir(path: Path, resume: bool, overwrite: bool) -> Path:
    """Return the output folder: a new one, or with `resume` that of the evaluation to go on with.

    Raises `UserError` if it holds something, unless `overwrite` is set.
    """
    claim_output_dir(path, overwrite=True)
    found = (path / "manifest.json").exists() or any(path.glob("*/manifest.json"))
    if found and not resume and not overwrite:
        raise UserError(f"{path} holds an evaluation: --resume true goes on, --overwrite_output_dir starts afresh")
    return claim_output_dir(path, overwrite or resume)


def run_evaluations(
    todo: Sequence[Evaluation],
    questions: Sequence[Mapping[str, Any]],
    load: Callable[[str], AbstractContextManager[LoadedModel]],
    settings: RolloutSettings,
    output_dir: Path,
    *,
    limits: Limits,
    announce: Callable[[str], None],
    about: Mapping[str, Any],
    resume: bool,
    **options: Any,
) -> dict[str, Any]:
    """Run the evaluations one after another, each model loaded once by `load`, and return the results by name.

    What an earlier command wrote for them is removed first, unless `resume` is set; nothing else is.
    `options` are those of `evaluate`. A limit ends them with what there is by then; raises `LimitReached` if that is
    nothing.
    """
    folders = [one.folder for one in todo if one.folder != output_dir]
    for link in filter(Path.is_symlink, folders):
        raise UserError(f"{link} is a link: an evaluation is written into a folder; remove the link")
    if not resume:
        with user_mistakes():
            for path in (folder / name for folder in (output_dir, *folders) for name in WRITTEN):
                path.unlink(missing_ok=True)
    found: dict[str, Any] = {}
    for model, of_model in groupby(todo, key=lambda one: one.model):
        with load(model) as (generator, identity):
            for one in of_model:
                if len(todo) > 1:
                    announce(f"{one.name} ({len(found) + 1} of {len(todo)})")
                claim_output_dir(one.folder, overwrite=True)
                try:
                    results = evaluate(
                        questions,
                        generator,
                        one.engine,
                        settings,
                        one.folder,
                        agent=one.agent,
                        about={**about, **identity},
                        resume=resume,
                        limits=limits,
                        **options,
                    )
                    found[one.name] = results
                    if results["stopped"]:
                        return found
                    if len(found) < len(todo):
                        limits = limits.less(results["this_command"]["usd"], results["seconds"])
                except LimitReached as limit:
                    if not found:
                        raise
                    announce(f"{limit}; --resume true goes on")
                    return found
        del generator
        gc.collect()  # before the next one is loaded: both might not fit
    return found
