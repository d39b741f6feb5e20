"""What a run writes beside its weights: after a kill, a resume goes on where the checkpoint was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from zerosearch.engines.account import Account
from zerosearch.training.runs import (
    EVALUATION_QUERIES,
    QUERIES,
    append_trajectories,
    costs,
    count_queries,
    forget_later_steps,
)


def test_trajectories_of_later_steps_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.jsonl"
    question = "Où\u2028est\u2029le\x85livre?"  # characters that str.splitlines takes for line ends
    lines = [json.dumps({"step": step, "question": question}, ensure_ascii=False) + "\n" for step in (1, 1, 2, 3)]
    for killed_at in ("".join(lines) + '{"step": 3, "que', "".join(lines[:3]) + '{"st'):
        path.write_text(killed_at, encoding="utf-8")
        forget_later_steps(tmp_path, 2)
        assert path.read_text(encoding="utf-8") == "".join(lines[:3]), "a line ends at its line feed only"
    forget_later_steps(tmp_path / "none", 2)
    assert not (tmp_path / "none").exists()


def test_half_a_line_of_a_killed_run_is_dropped_before_the_next_step(tmp_path: Path) -> None:
    append_trajectories(tmp_path, [{"step": 1}])
    with (tmp_path / "trajectories.jsonl").open("a") as file:
        file.write('{"step": 2, "que')
    append_trajectories(tmp_path, [{"step": 2}, {"step": 2}])
    assert (tmp_path / "trajectories.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'


def test_queries_add_up_by_engine(tmp_path: Path) -> None:
    for ranks in ([{"bm25": 2, "simulated": 3}, {"bm25": 3}], [{}, {"bm25": 1}]):
        count_queries(tmp_path / QUERIES, ranks)
    assert json.loads((tmp_path / "engine_queries.json").read_text()) == {"bm25": 6, "simulated": 3}


def test_the_queries_of_evaluations_stand_apart_at_the_price_of_their_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 3600.0)
    accounts = [Account("simulated", usd_per_hour=2.0), Account("google", sent=10, usd=0.1)]
    trained, evaluated = (SimpleNamespace(name=account.engine, account=account) for account in accounts)
    accounts[0].opened = 0.0
    assert costs(tmp_path, trained, evaluated) == "", "no search was made"
    count_queries(tmp_path / EVALUATION_QUERIES, [{"google": 300}])
    assert [line.split() for line in costs(tmp_path, trained, evaluated).splitlines()[1:]] == [
        ["google,", "evaluation", "300", "2.75", "3.00"]
    ]
    count_queries(tmp_path / QUERIES, [{"simulated": 30}])
    assert [line.split() for line in costs(tmp_path, trained, evaluated).splitlines()[1:]] == [
        ["simulated", "30", "0.28", "2.00"],
        ["google,", "evaluation", "300", "2.75", "3.00"],
    ]
