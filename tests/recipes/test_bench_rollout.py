"""recipes/bench/rollout.py: a policy that searches as told, a matrix that covers what it should, true ratios."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest
import torch
from recipe_modules import Refusal, run_python
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerosearch.generation.tokenization import prompt_token_ids, text_token_ids
from zerosearch.protocol import format_observation, parse_action

BENCH = Path(__file__).parents[2] / "recipes" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("rollout")


@pytest.fixture
def world(bench: ModuleType) -> ModuleType:
    return importlib.import_module("rollout_parts.world")


@pytest.mark.parametrize("latency", ["none", "constant", "lognormal"])
def test_each_search_takes_its_keyed_time(world: ModuleType, latency: str) -> None:
    seconds = [world.World(latency, 1).latency_s(row, 2) for row in range(2000)]
    assert seconds == [world.World(latency, 1).latency_s(row, 2) for row in range(2000)]
    assert median(seconds) == pytest.approx({"none": 0.0, "constant": 0.05, "lognormal": 0.3}[latency], rel=0.1)
    long_tail = sorted(seconds)[int(0.99 * len(seconds))]
    assert long_tail == pytest.approx({"none": 0.0, "constant": 0.05, "lognormal": 1.9}[latency], rel=0.25)


def test_the_policy_samples_as_many_tokens_as_its_cue_says_and_searches(world: ModuleType, tmp_path: Path) -> None:
    world.save_counting_policy(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    run = world.World("none", 3)
    with world.cues_are_read():
        for row in range(6):
            ids = prompt_token_ids(tokenizer, run.row(row)["prompt"])
            for turn in range(2):
                wanted = run.turn_tokens(row, turn)
                torch.manual_seed(row)
                sampled = model.generate(
                    torch.tensor([ids]), max_new_tokens=wanted, do_sample=True, pad_token_id=tokenizer.eos_token_id
                )[0, len(ids) :].tolist()
                action = parse_action(tokenizer.decode(sampled))
                assert (action.kind, action.content) == ("search", "query")
                assert parse_action(tokenizer.decode(sampled[:-1])).kind == "invalid"  # it ends with its last token
                ids += sampled + text_token_ids(tokenizer, format_observation(run.documents(row, turn)))


def test_arms_that_are_too_slow_are_left_out_and_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    planned = bench.plan([bench.Cell("constant", 1, 320)], max_search_s=10.0)
    assert list(planned.values()) == [["lockstep10", "lockstep", "ours"]]  # TRL's searches: 320 x 50 ms
    assert "constant, 1 x 320: without trl_tools" in capsys.readouterr().out


def test_ratios_are_taken_run_by_run_and_idle_time_is_that_outside_the_engine(bench: ModuleType) -> None:
    taken = {
        "lockstep": [bench.Measurement(4.0, 1.0, 7, []), bench.Measurement(6.0, 1.5, 9, [])],
        "ours": [bench.Measurement(2.0, 1.0, 5, []), bench.Measurement(4.0, 2.0, 5, [])],
        "floor": [bench.Measurement(1.0, 1.0, 0, []), bench.Measurement(2.0, 2.0, 0, [])],
    }
    rows = bench.rows_of({bench.Cell("none", 3, 32): taken})
    assert rows[0] == {
        "arm": "lockstep",
        "latency": "none",
        "turns": 3,
        "trajectories": 32,
        "seconds": [4.0, 6.0],
        "ratio_to_ours": [2.0, 1.5],
        "ratio_to_floor": [4.0, 3.0],
        "idle_share": 0.75,
        "engine_steps": [7, 9],
    }
    assert (rows[1]["ratio_to_ours"], rows[1]["idle_share"]) == ([1.0, 1.0], 0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cells", "gamma-1-32"], "cells is 'gamma-1-32': it must be such as lognormal-3-128"),
        (["--cells", "none-0-32"], "cells is 'none-0-32'"),
        (["--cells", "none"], "cells is 'none'"),
    ],
)
def test_a_mistake_gets_one_sentence(bench: ModuleType, flags: list[str], message: str, refusal: Refusal) -> None:
    assert message in refusal("bench/rollout", flags)


@pytest.mark.slow
def test_the_recipe_measures_every_arm(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    output = tmp_path / "rollout.json"
    # A process of its own: vLLM leaves its mark on torch and on the environment.
    run_python("recipes/bench/rollout.py", "--cells", "constant-2-3", "--runs", 1, "--output", output)
    rows = {row["arm"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows.keys() == {"lockstep10", "lockstep", "trl_tools", "ours", "floor"}
    for row in rows.values():
        assert (row["latency"], row["turns"], row["trajectories"]) == ("constant", 2, 3)
        assert len(row["seconds"]) == len(row["ratio_to_ours"]) == 1
        assert 0.0 <= row["idle_share"] < 1.0
    assert all(rows[arm]["engine_steps"][0] >= 3 * 6 for arm in ("lockstep10", "lockstep", "trl_tools", "ours"))
    # Two searches of 50 ms cannot overlap in a trajectory; TRL's do not even overlap between trajectories.
    assert rows["floor"]["seconds"][0] >= 0.1
    assert all(rows[arm]["seconds"][0] > 0.1 for arm in ("lockstep10", "lockstep", "ours"))
    assert rows["trl_tools"]["seconds"][0] > 0.3
