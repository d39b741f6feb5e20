"""A watch on the training log: it warns at the first signs of a collapse, and stops the run, or goes back, at more.

A sign is a value of the log that has gone astray, by the mean of its last `WINDOW` logged steps. The limits are our
choice: healthy runs stay far from them. A run has collapsed once each of its last `PATIENCE` logged steps shows two
signs or more, and one of them in what the policy does: a reward may fall for the noise alone, and an entropy rise.
Everything is read from TRL's log, so a resumed run is watched as the uninterrupted one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import TrainerCallback

from zerosearch.checkpoints import whole_checkpoints

if TYPE_CHECKING:
    from zerosearch.training.trainer import SearchTrainer

logger = logging.getLogger(__name__)

OnCollapse = Literal["stop", "rollback", "warn"]
LogEntry = Mapping[str, Any]

WINDOW = 3  # logged steps in a mean
PATIENCE = 3  # logged steps that show a collapse before it is believed

# From the lowest and the highest mean so far to the limit. A value is astray above its limit, or below it.
ABOVE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "malformed turns": lambda lowest: lowest + 0.1,  # a share; no healthy run at hand rose by more than 0.046
    "entropy": lambda lowest: lowest + 1.0,  # nats a token
    "kl": lambda lowest: lowest + 2.0,  # nats a token
    "grad_norm": lambda lowest: 10 * np.maximum(lowest, 1.0),  # gradients are clipped at 1
}
BELOW: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "reward": lambda highest: np.where(highest > 0.1, highest / 2, -np.inf),
    "search/answered": lambda highest: highest - 0.5,  # a share
    "search/logprob": lambda highest: highest - 1.0,  # nats a token
}
DONE_BY_THE_POLICY = {"malformed turns", "reward", "search/answered"}


class Collapse(Exception):
    """A run has collapsed. The message names the signs and `checkpoint`, the last whose policy showed none, if any."""

    def __init__(self, message: str, checkpoint: Path | None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class CollapseSentinel(TrainerCallback):
    """Warn of each new sign; raise `Collapse` when a run has collapsed, unless it is only to warn."""

    def __init__(self, on_collapse: OnCollapse) -> None:
        self.on_collapse = on_collapse

    def on_log(self, args: Any, state: Any, control: Any, logs: LogEntry | None = None, **kwargs: Any) -> None:
        if "reward" not in (logs or {}):  # an evaluation, or the summary at the end
            return
        log = [entry for entry in state.log_history if "reward" in entry]
        signs = signs_of_collapse(log)
        before = signs[-2] if len(signs) > 1 else {}
        for name in signs[-1].keys() - before.keys() if state.is_world_process_zero else ():
            logger.warning("step %d: a sign of collapse: %s %s", state.global_step, name, signs[-1][name])
        if self.on_collapse == "warn" or not has_collapsed(signs):
            return
        healthy = max((entry["step"] for entry, found in zip(log, signs, strict=True) if not found), default=0)
        # What a checkpoint's policy does shows in the log of the step after it; of the next but one, if sampled ahead.
        last = healthy - 1 - args.overlap_steps
        kept = {step: path for step, path in whole_checkpoints(Path(args.output_dir)).items() if step <= last}
        checkpoint = kept[max(kept)] if kept else None
        found = "; ".join(f"{name} {words}" for name, words in signs[-1].items())
        advice = (
            f"the last healthy checkpoint is {checkpoint}: --resume_from_checkpoint {checkpoint} with a lower "
            "--learning_rate goes on from there"
            if checkpoint
            else "no checkpoint is from before it: lower --learning_rate, or keep some by --save_strategy steps "
            "--save_steps N"
        )
        raise Collapse(f"the run has collapsed by step {state.global_step} ({found}); {advice}", checkpoint)


def has_collapsed(signs: Sequence[Mapping[str, str]]) -> bool:
    """Say whether the last steps show a collapse, from the signs of each logged step."""
    last = signs[-PATIENCE:]
    return len(last) == PATIENCE and all(len(found) > 1 and found.keys() & DONE_BY_THE_POLICY for found in last)


def first_collapse(log: Sequence[LogEntry]) -> int | None:
    """Return the step at which a run of this log is, or would have been, stopped."""
    signs = signs_of_collapse(log)
    return next((log[end - 1]["step"] for end in range(1, len(log) + 1) if has_collapsed(signs[:end])), None)


def signs_of_collapse(log: Sequence[LogEntry]) -> list[dict[str, str]]:
    """Return for each logged step the names of the values that are astray, and by how much in words.

    A value that was not logged is no sign; one that is logged and not finite is.
    """
    found: list[dict[str, str]] = [{} for _ in log]
    for limits, extreme, outside, worst in (
        (ABOVE, np.minimum, np.greater, np.inf),
        (BELOW, np.maximum, np.less, -np.inf),
    ):
        for name, limit in limits.items():
            values = np.array([value_of(entry, name) for entry in log], dtype=float)  # (steps,); NaN: not logged
            means = np.array([values[max(0, step - WINDOW + 1) : step + 1].mean() for step in range(len(log))])
            best = extreme.accumulate(np.where(np.isfinite(means), means, worst))
            astray = outside(means, limit(best)) | np.isinf(values)
            for step in np.flatnonzero(astray):
                found[step][name] = f"{means[step]:.3g} (best {best[step]:.3g})"
    return found


def value_of(entry: LogEntry, name: str) -> float:
    """Return a logged value, NaN if it was not logged, infinite if it is not a number."""
    if name == "malformed turns":
        return value_of(entry, "search/invalid_actions") / max(value_of(entry, "search/turns"), 1.0)
    if name not in entry:
        return np.nan
    value = entry[name]
    return float(value) if value is not None and np.isfinite(value) else np.inf


def train_watched(trainer: SearchTrainer, checkpoint: str | None) -> None:
    """Train from a checkpoint or from the start; with `on_collapse` rollback go back after a collapse.

    Each of at most `max_rollbacks` times the run goes on from the last healthy checkpoint at half the learning rate;
    later checkpoints are removed. Raises `Collapse` when there is none to go back to, or no rollback left.
    """
    args = trainer.args
    rollbacks = args.max_rollbacks if args.on_collapse == "rollback" else 0
    for left in range(rollbacks, -1, -1):
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            return
        except Collapse as collapse:
            if not left or collapse.checkpoint is None:
                raise
            checkpoint = str(collapse.checkpoint)
            args.learning_rate /= 2
            logger.warning("%s", collapse)
            logger.warning("going back to it with learning_rate %g; rollbacks left: %d", args.learning_rate, left - 1)
            trainer.begin_again(collapse.checkpoint)
