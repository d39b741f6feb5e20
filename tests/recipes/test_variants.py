"""Each variant of the recipe runs for a step, and does what its paper says, worked out by hand."""

from __future__ import annotations

import ast
import asyncio
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from chat_server import ChatServer
from recipe_modules import RECIPES, TINYWORLD_RUN, Refusal, as_flags, load_recipe
from scripted_rollouts import ScriptedEngine

from zerosearch.engines import SearchRequest, SearchResult
from zerosearch.errors import UserError
from zerosearch.rollout.trajectory import Trajectory, Turn

VARIANTS = RECIPES / "variants"
FLAGS = as_flags(TINYWORLD_RUN | {"max_steps": 1})

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return what imports a variant, with a recipe of its own to change."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "grpo", raising=False)

    return lambda name: load_recipe(f"variants/{name}")


RUNS: dict[str, list[str]] = {
    "gigpo": [],
    "igpo": [],
    "stepsearch": [],
    "self_search": [],
    "sim_to_real": [],
    "search_price": [],
    "llds": ["--num_iterations", "2"],
    **{f"noise {name}": [name] for name in ("constant", "random", "reversed", "closed-loop")},
    **{
        f"defects {name}": [name]
        for name in ("swapped-rows", "wrong-kl-sign", "containment", "example-for-no-answer", "retokenised")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_variant_runs_for_a_step(
    run: str, load: Load, tinyworld_data: Path, chat_server: ChatServer, tmp_path: Path
) -> None:
    documents = "\n".join(f"Doc {n}: Nina lives for the day." for n in range(1, 6))
    chat_server.write = lambda messages: documents
    engine = ["--engine", "bm25"] if run != "sim_to_real" else ["--simulator_url", chat_server.url]
    where = ["--dataset", str(tinyworld_data / "train.jsonl"), "--corpus", str(tinyworld_data / "corpus.jsonl")]
    variant = load(run.split()[0])
    main = getattr(variant, "main", variant.grpo.main)
    main([*RUNS[run], *FLAGS, *engine, *where, "--output_dir", str(tmp_path / "policy")])
    (entry, _) = json.loads((tmp_path / "policy/trainer_state.json").read_text())["log_history"]
    assert entry["search/searches"] > 0 and math.isfinite(entry["loss"])
    assert entry["grad_norm"] > 0 or run == "self_search", "its policy knows no fact by heart"
    queries = json.loads((tmp_path / "policy/engine_queries.json").read_text())
    names = {"sim_to_real": {"simulated", "bm25"}, "self_search": {"none: the policy itself"}}
    assert queries.keys() == names.get(run, {"bm25"})
    if run == "self_search":
        record = json.loads((tmp_path / "policy/trajectories.jsonl").read_text().splitlines()[0])
        assert any(segment["source"] == "documents" and segment["text"] for segment in record["segments"])


@pytest.mark.parametrize("path", sorted(VARIANTS.glob("*.py")), ids=lambda path: path.stem)
def test_a_successor_is_short_and_names_its_paper(path: Path) -> None:
    text = path.read_text()
    module = ast.parse(text)
    docstring = module.body[0].end_lineno
    code = [line for line in text.splitlines()[docstring:] if line.strip() and not line.strip().startswith("#")]
    if path.stem not in ("defects", "noise"):  # which are several
        assert len(code) <= 60 and "arXiv" in (ast.get_docstring(module) or "")
    assert f"recipes/variants/{path.name}" in (ast.get_docstring(module) or "")


def trajectory(*observations: str, documents: tuple[tuple[str, ...], ...] = ()) -> Trajectory:
    """Return one of a turn more than observations, three tokens a turn and two an observation."""
    turns = [Turn("", "search", "q", 3, observation=text, num_observation_tokens=2) for text in observations]
    turns.append(Turn("", "answer", "x", 3))
    for turn, found in zip(turns, documents, strict=False):
        turn.documents = found
    return Trajectory([7, 8], 0.0, list(range(5 * len(observations) + 3)), turns=turns, outcome="answered")


def test_gigpo_compares_the_turns_that_start_from_the_same_observation(load: Load) -> None:
    gigpo = load("gigpo")
    rain, snow = "Doc 1: It rains in Kelso all day long.", "Doc 1: Snow."
    group = [trajectory(rain), trajectory(f"{rain} "), trajectory(snow), trajectory()]
    assert gigpo.states(group) == [[(0, 0), (1, 0), (2, 0), (3, 0)], [(0, 1), (1, 1)], [(2, 1)]]
    found = gigpo.advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), group, 4)
    # Episodes: (1 - 1/2) / 0.57735. First turns: 0.95, 0, 0.95, 0, mean 0.475, deviation 0.54848. Second turns after
    # rain: 1 and 0, deviation 0.70711; after snow there is nothing to compare.
    episode, first, second = 0.86588, 0.86588, 0.70701
    expected = [[episode + first, episode + second], [-episode - first, -episode - second]]
    expected += [[episode + first, episode], [-episode - first]]
    assert [turns == pytest.approx(wanted, abs=1e-3) for turns, wanted in zip(found, expected, strict=True)] == [
        True
    ] * 4


def test_igpo_pays_a_turn_for_what_it_adds_to_the_probability_of_the_answer(load: Load) -> None:
    igpo = load("igpo")
    asked: list[Any] = []

    def log_likelihoods(texts: list[Any]) -> list[float]:
        asked.extend(texts)
        return [math.log(p) for p in (0.1, 0.4, 0.3, 0.2)]

    group = [trajectory("rain"), trajectory(), trajectory()]
    answers = [["Kelso", "Mount Kelso"], ["Kelso"], ["Arken"]]
    found = igpo.advantages(
        torch.tensor([1.0, 0.0, torch.nan]), group, 3, golden_answers=answers, log_likelihoods=log_likelihoods
    )
    assert asked == [
        ([7, 8], "<answer>", " Kelso"),
        ([7, 8, 0, 1, 2, 3, 4], "<answer>", " Kelso"),
        ([7, 8], "<answer>", " Kelso"),
        ([7, 8], "<answer>", " Arken"),
    ]
    # 0.4 - 0.1 and the rewards 1, 0: mean 0.43333, deviation 0.51316; a turn gets its own and those that follow.
    assert found[0] == pytest.approx([-0.25984 + 1.10427, 1.10427], abs=1e-3)
    assert found[1] == pytest.approx([-0.84443], abs=1e-3) and found[2] == [0.0]


def test_stepsearch_pays_for_what_is_new_and_fines_what_is_not(load: Load) -> None:
    stepsearch = load("stepsearch")
    golden = ["Emma is by Jane Austen.", "Jane Austen hails from Steventon."]
    rain = "It rains."
    first = trajectory("a", "b", documents=((golden[0], rain), (golden[0], golden[1])))
    # Word for word the first golden document, and 2 of 5 words of the second: (1 + 2 / 5) / 2; then what is missing of
    # the second, 3 of 5, less the half that was there before.
    assert stepsearch.worth_of_searches(first, golden) == pytest.approx([0.7, 0.3 - 0.5, 0.0])
    second = trajectory(documents=())
    found = stepsearch.advantages(torch.tensor([1.0, 0.0]), [first, second], 1, golden_documents=[golden, golden])
    # 1 + 0.7 - 0.2, 1 - 0.2, 1 and 0: mean 0.825, deviation 0.62383.
    assert [*found[0], *found[1]] == pytest.approx([1.08186, -0.04007, 0.28050, -1.32228], abs=1e-3)
    for missing in (None, [golden, None]):
        with pytest.raises(UserError, match="StepSearch needs golden_documents in every row"):
            stepsearch.advantages(torch.zeros(2), [first, second], 1, golden_documents=missing)


def test_llds_counts_what_good_actions_have_lost(load: Load) -> None:
    llds = load("llds")
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    old = torch.tensor([[-1.0, -2.0, -9.0, -1.0, -1.0], [0.0, -1.0, -1.0, -1.0, 0.0]])
    new = torch.tensor([[-1.5, -1.8, 0.0, -1.5, -0.4], [0.0, -3.0, -1.0, -1.0, 0.0]], requires_grad=True)
    lost = llds.lost_likelihood(old, new, torch.tensor([[0.0], [-0.1]]), mask)
    # The first action lost 0.5 - 0.2, the second 0.5 - 0.6: nothing; the action of the second row is no good one.
    assert lost.tolist() == [[0.5, 0.0, 0.0, 0.0, 0.0], [0.0] * 5]
    lost.sum().backward()
    assert new.grad is not None and new.grad.tolist() == [[-1.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 5]


def test_llds_needs_a_second_update(load: Load) -> None:
    llds = load("llds")
    with pytest.raises(UserError, match="needs --num_iterations 2 or more"):
        llds.grpo.SearchTrainer(args=llds.grpo.SearchConfig(num_iterations=1, output_dir="unused", report_to="none"))


def test_the_schedules_have_the_mean_of_the_curriculum(load: Load) -> None:
    noise = load("noise")
    curriculum = [noise.CURRICULUM.p_noise(step, 30) for step in range(1, 31)]
    means = {
        name: sum(schedule(step, 30, []) for step in range(1, 31)) / 30 for name, schedule in noise.SCHEDULES.items()
    }
    mean = sum(curriculum) / 30
    assert means["constant"] == pytest.approx(mean) and means["reversed"] == pytest.approx(mean)
    assert means["random"] == pytest.approx(mean, rel=0.2)
    assert [noise.SCHEDULES["reversed"](step, 30, []) for step in (1, 30)] == [curriculum[-1], curriculum[0]]
    log = [{"reward": 0.0}, *({"reward": value} for value in (0.2, 0.4, None, 0.6, 0.8)), {"eval_em": 1.0}]
    assert noise.SCHEDULES["closed-loop"](6, 30, log) == pytest.approx(0.5 * 0.4), "half the mean of the last five"
    assert noise.SCHEDULES["closed-loop"](1, 30, []) == 0.0


def test_from_simulated_to_real_each_engine_has_its_own_limit(load: Load) -> None:
    variant = load("sim_to_real")
    simulated, real = (ScriptedEngine(delay=lambda: 0.001, max_concurrency=limit) for limit in (5, 1))
    engine = variant.SimulatedThenReal(simulated, real)

    async def search(*steps: int) -> None:
        requests = [SearchRequest("q", "Q", ("a",), 0.0, (0, step, row, 0, 0)) for step in steps for row in range(8)]
        await asyncio.gather(*map(engine.search, requests))

    asyncio.run(search(variant.LAST_SIMULATED_STEP, variant.LAST_SIMULATED_STEP + 1))
    assert (engine.max_concurrency, simulated.most_in_flight, real.most_in_flight) == (5, 5, 1)
    assert [request.key[1] for request in real.requests] == [variant.LAST_SIMULATED_STEP + 1] * 8


def test_swapped_rows_ask_with_the_question_of_another_row(load: Load) -> None:
    class Engine:
        name, max_concurrency = "rain", 1

        async def search(self, request: SearchRequest) -> SearchResult:
            return SearchResult((request.question, *request.golden_answers, request.query))

    engine = load("defects").SwappedRows(Engine())
    asked = [SearchRequest(f"q{n}", f"Who is {row}?", (row,)) for n, row in enumerate("aabab")]
    found = [asyncio.run(engine.search(request)).documents for request in asked]
    assert [documents[1] for documents in found] == ["a", "a", "a", "b", "a"]
    assert found[3] == ("Who is b?", "b", "q3")


def test_rewards_of_the_released_code(load: Load) -> None:
    defects = load("defects")
    rows = {"golden_answers": [["Beijing"], ["Dan"], ["Zemblia"], ["Emma"]], "outcome": ["answered"] * 4}
    answers = ["Paris or London or Beijing", "Sudan", None, "Jane"]
    assert defects.containment_reward(answers, **rows) == [1.0, 1.0, 0.0, 0.0]
    assert defects.example_reward(answers, **rows) == [pytest.approx(1 / 3), 0.0, 1.0, 0.0]
    rows["outcome"] = ["failed_search"] * 4
    assert defects.containment_reward(answers, **rows) == defects.example_reward(answers, **rows) == [None] * 4


def test_a_defect_and_a_schedule_are_named_first(load: Load, refusal: Refusal) -> None:
    assert "name a defect first: swapped-rows, " in refusal("variants/defects", ["none"])
    assert "name a schedule first: constant, " in refusal("variants/noise", [])
