"""The sentinel stops runs that collapse, lets healthy ones be, and goes back at half the learning rate."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zerosearch.errors import UserError
from zerosearch.training import sentinel
from zerosearch.training.sentinel import Collapse, first_collapse, signs_of_collapse, train_watched
from zerosearch.training.trainer import SearchTrainer

MakeTrainer = Callable[..., SearchTrainer]


def entry(step: int, **changed: float | None) -> dict[str, Any]:
    """Return what a healthy step of the demo logs, as far as it is watched."""
    healthy = {
        "reward": 0.5,
        "entropy": 0.1,
        "kl": 0.05,
        "grad_norm": 0.2,
        "search/answered": 0.97,
        "search/invalid_actions": 0.01,
        "search/turns": 2.8,
        "search/logprob": -0.1,
    }
    return {"step": step} | healthy | {name.replace("__", "/"): value for name, value in changed.items()}


def test_a_run_that_falls_silent_is_stopped_a_few_steps_later() -> None:
    log = [entry(step) for step in range(1, 11)]
    log += [entry(step, reward=0.0, search__answered=0.0, kl=8.6) for step in range(11, 20)]
    assert first_collapse(log) == 14
    signs = signs_of_collapse(log)
    assert signs[9] == {}
    assert signs[13] == {
        "kl": "8.6 (best 0.05)",
        "reward": "0 (best 0.5)",
        "search/answered": "0 (best 0.97)",
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"search__invalid_actions": 2.5, "grad_norm": 50.0},
        {"reward": 0.1, "entropy": 3.0},
        {"search__answered": 0.2, "search__logprob": -3.0},
        {"reward": 0.1, "grad_norm": math.nan},
        {"reward": None, "kl": math.inf},
    ],
)
def test_two_signs_of_which_one_is_done_by_the_policy_are_a_collapse(changed: dict[str, float]) -> None:
    log = [entry(step) for step in range(1, 11)] + [entry(step, **changed) for step in range(11, 20)]
    assert first_collapse(log) in (13, 14)
    (behaviour,) = changed.keys() & {"search__invalid_actions", "reward", "search__answered"}
    alone = {behaviour: changed[behaviour]}
    for one in (alone, {name: value for name, value in changed.items() if name not in alone}):
        log = [entry(step) for step in range(1, 11)] + [entry(step, **one) for step in range(11, 20)]
        assert first_collapse(log) is None and signs_of_collapse(log)[-1], f"{one} alone is a sign, and no more"


def test_a_thought_that_some_turns_repeat_until_they_are_cut_is_a_sign() -> None:
    """One malformed turn in eight, as in a run of SmolLM2 that came apart; healthy runs rise by 0.03."""
    log = [entry(step) for step in range(1, 11)]
    rising = [entry(step, search__invalid_actions=0.12 * 2.8) for step in range(11, 20)]
    assert signs_of_collapse(log + rising)[12].keys() == {"malformed turns"}
    healthy = [entry(step, search__invalid_actions=0.031 * 2.8) for step in range(11, 20)]
    assert not any(signs_of_collapse(log + healthy))


def test_a_short_fall_and_what_was_not_logged_are_no_collapse() -> None:
    log = [entry(step) for step in range(1, 11)]
    log[4:6] = [entry(step, reward=0.0, search__answered=0.0, kl=9.0) for step in (5, 6)]
    assert first_collapse(log) is None
    bare = [{"step": step, "reward": 0.5 if step < 5 else 0.0} for step in range(1, 20)]
    assert first_collapse(bare) is None and signs_of_collapse(bare)[-1].keys() == {"reward"}
    never = [entry(step, reward=0.0) for step in range(1, 20)]
    assert signs_of_collapse(never)[-1] == {}, "a reward that never rose has not fallen"


def collapse_from(monkeypatch: pytest.MonkeyPatch, step: int, above: float) -> None:
    """Make the sentinel see a collapse from this step on, as long as the learning rate is above this."""

    def signs(log: list[dict[str, Any]]) -> list[dict[str, str]]:
        bad = {"reward": "0 (best 1)", "kl": "9 (best 0)"}
        return [bad if one["step"] >= step and one["learning_rate"] > above else {} for one in log]

    monkeypatch.setattr(sentinel, "signs_of_collapse", signs)
    monkeypatch.setattr(sentinel, "PATIENCE", 2)


SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "learning_rate": 4e-3}


def test_a_collapse_stops_the_run_and_names_the_last_healthy_checkpoint(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collapse_from(monkeypatch, 3, above=0)
    trainer = make_trainer(**SAVES)
    with caplog.at_level(logging.WARNING), pytest.raises(Collapse) as caught:
        train_watched(trainer, None)
    healthy = tmp_path / "policy/checkpoint-1"  # the signs of step 3 are what the policy of checkpoint-2 did
    assert caught.value.checkpoint == healthy
    assert str(caught.value).startswith("the run has collapsed by step 4 (reward 0 (best 1); kl 9 (best 0)); ")
    assert f"--resume_from_checkpoint {healthy} with a lower --learning_rate" in str(caught.value)
    assert "step 3: a sign of collapse: kl 9 (best 0)" in caplog.messages
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(("steps", "save_steps"), [(1, 3), (3, 3), (2, 1)])
def test_without_a_checkpoint_from_before_there_is_nothing_to_go_back_to(
    steps: int, save_steps: int, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapse_from(monkeypatch, steps, above=0)
    saves = SAVES | {"save_steps": save_steps, "on_collapse": "rollback"}
    with pytest.raises(
        Collapse, match="no checkpoint is from before it: lower --learning_rate, or keep some by --save_strategy"
    ):
        train_watched(make_trainer(**saves), None)


def test_only_to_warn_goes_on_to_the_end(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    collapse_from(monkeypatch, 1, above=0)
    trainer = make_trainer(on_collapse="warn", max_steps=3)
    train_watched(trainer, None)
    assert trainer.state.global_step == 3


def test_a_rollback_goes_on_as_a_resume_with_half_the_learning_rate_would(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    collapse_from(monkeypatch, 3, above=1e-3)
    trainer = make_trainer(on_collapse="rollback", algorithm="ppo", **SAVES)
    train_watched(trainer, None)
    log = [one for one in trainer.state.log_history if "reward" in one]
    rates = {one["step"]: one["learning_rate"] for one in log}
    assert rates == {1: 4e-3, 2: 1e-3, 3: 1e-3, 4: 1e-3, 5: 1e-3, 6: 1e-3}, "it went back twice"
    state = json.loads((tmp_path / "policy/checkpoint-4/trainer_state.json").read_text())
    assert state["log_history"][3]["learning_rate"] == 1e-3, "the collapsed checkpoint is written anew"

    monkeypatch.undo()
    resumed = make_trainer(algorithm="ppo", output_dir=str(tmp_path / "by-hand"), **SAVES | {"learning_rate": 1e-3})
    resumed.train(resume_from_checkpoint=str(tmp_path / "policy/checkpoint-1"))
    by_hand = [(one["step"], one["loss"]) for one in resumed.state.log_history if "reward" in one]
    assert by_hand == [(one["step"], one["loss"]) for one in log]


def test_rollbacks_are_bounded_and_need_checkpoints(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="rollback goes back to a checkpoint; --save_strategy steps keeps some"):
        make_trainer(on_collapse="rollback")
    collapse_from(monkeypatch, 3, above=0)
    trainer = make_trainer(on_collapse="rollback", max_rollbacks=2, **SAVES)
    with pytest.raises(Collapse):
        train_watched(trainer, None)
    assert trainer.args.learning_rate == 1e-3, "halved twice"
