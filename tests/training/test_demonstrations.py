"""What a policy is shown at a cold start, from real searches or from trajectories: ids and masks are the rollout's."""

from __future__ import annotations

from typing import Any

import pytest
from families import family_tokenizer
from scripted_rollouts import ScriptedEngine, ScriptedGenerator, roll_out, runs
from transformers import PreTrainedTokenizerFast

from zerosearch.generation.tokenization import prompt_token_ids
from zerosearch.prompts import PAPER
from zerosearch.rollout.loop import RolloutSettings, run_rollouts
from zerosearch.training.demonstrations import (
    Demonstration,
    Step,
    example,
    from_record,
    from_searches,
    observed_documents,
    replay,
)

SETTINGS = RolloutSettings(max_turns=2)
SEARCHES = [
    ("Emma author", ["Rain: It rains.", "Emma: Emma is a novel. Its author is Jane Austen of Steventon."]),
    ("Jane Austen born", ["Austen family: They lived in Bath.", "Jane Austen: She was the author. It was in 1775."]),
]
SHOWN = Demonstration(
    "When was the author of Emma born?",
    ("1775",),
    (
        Step("<think> I need to search. </think>\n<search> Emma author </search>", tuple(SEARCHES[0][1])),
        Step(
            "<think> Its author is Jane Austen of Steventon. I need to search. </think>\n"
            "<search> Jane Austen born </search>",
            tuple(SEARCHES[1][1]),
        ),
        Step("<think> It was in 1775. So the answer is 1775. </think>\n<answer> 1775 </answer>"),
    ),
)


def test_searches_become_turns_whose_thoughts_quote_what_was_found() -> None:
    assert from_searches(SHOWN.question, ["1775"], SEARCHES) == SHOWN


def test_searches_behind_the_answer_are_left_out_and_without_an_answer_there_is_nothing_to_show() -> None:
    shown = from_searches("Who wrote Emma?", ["Jane Austen"], SEARCHES)
    assert shown is not None and [len(step.documents) for step in shown.steps] == [2, 0]
    assert shown.steps[-1].text.endswith("\n<answer> Jane Austen </answer>")
    assert from_searches("Who wrote Emma?", ["Fanny Burney"], SEARCHES) is None


@pytest.mark.parametrize(("question", "answer"), [("Is it old?", "yes"), ("Is Emma or Bath older?", "Emma")])
def test_a_comparison_looks_both_sides_up(question: str, answer: str) -> None:
    shown = from_searches(question, [answer], SEARCHES)
    assert shown is not None and len(shown.steps) == 3


def test_a_demonstration_is_the_trajectory_that_the_rollout_records(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Replay it through the loop with the generator and the engine of the rollout's own tests."""
    shown = [SHOWN, Demonstration("Who?", ("x",), (Step("<answer> <|im_end|> x </answer>"),))]
    replayed = replay(shown, tiny_tokenizer, SETTINGS, PAPER.policy)
    found = {"Emma author": SEARCHES[0][1], "Jane Austen born": SEARCHES[1][1]}
    rows = [{"question": one.question, "golden_answers": list(one.golden_answers)} for one in shown]
    generator = ScriptedGenerator(tiny_tokenizer, lambda row, turn: shown[row].steps[turn].text, order_seed=3)
    engine = ScriptedEngine(lambda request: found[request.query])
    recorded = run_rollouts(rows, generator, engine, SETTINGS)
    for mine, theirs in zip(replayed, recorded, strict=True):
        assert (mine.prompt_ids, mine.completion_ids) == (theirs.prompt_ids, theirs.completion_ids)
        assert (mine.env_mask, mine.outcome, mine.answer) == (theirs.env_mask, "answered", theirs.answer)


def test_the_loss_is_on_what_the_policy_wrote(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (trajectory,) = replay([SHOWN], tiny_tokenizer, SETTINGS, PAPER.policy)
    learned = example(trajectory)
    messages = PAPER.policy.messages(SHOWN.question)
    assert learned["input_ids"][: len(trajectory.prompt_ids)] == prompt_token_ids(tiny_tokenizer, messages)
    own = [label for label in learned["labels"] if label != -100]
    assert tiny_tokenizer.decode(own) == "".join(step.text for step in SHOWN.steps)
    masked = [label == -100 for label in learned["labels"]]
    pairs = zip(learned["input_ids"], learned["labels"], strict=True)
    assert all(label in (-100, token_id) for token_id, label in pairs) and masked[-1]
    assert [text for own, text in runs(trajectory, tiny_tokenizer) if own] == [step.text for step in SHOWN.steps]


@pytest.mark.parametrize(
    ("budget", "outcome"),
    [
        ({"max_turns": 1}, "turns_exhausted"),
        ({"max_turn_tokens": 20}, "turns_exhausted"),
        ({"max_trajectory_tokens": 500}, "truncated"),
    ],
)
def test_what_exceeds_the_budgets_ends_without_an_answer(
    tiny_tokenizer: PreTrainedTokenizerFast, budget: dict[str, int], outcome: str
) -> None:
    (trajectory,) = replay([SHOWN], tiny_tokenizer, RolloutSettings(**{"max_turns": 2, **budget}), PAPER.policy)
    assert trajectory.outcome == outcome


def record(tokenizer: PreTrainedTokenizerFast, turns: list[str]) -> dict[str, Any]:
    row = {"question": "Who?", "golden_answers": ["Jane Austen"]}
    engine = ScriptedEngine(lambda request: ["Emma: Doc 2: is a\nnovel.", "It rains."])
    return roll_out(tokenizer, turns, engine).to_record(row, "prompt")


def test_a_trajectory_on_file_is_shown_as_it_went(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = ["<think> a </think><search> Emma </search>", "<answer> Jane Austen </answer>"]
    shown = from_record(record(tiny_tokenizer, turns))
    documents = ("Emma: Doc 2: is a novel.", "It rains.")
    assert shown == Demonstration("Who?", ("Jane Austen",), (Step(turns[0], documents), Step(turns[1])))


@pytest.mark.parametrize("turns", [["no action", "<answer> x </answer>"], ["<search> a </search>"] * 5])
def test_a_trajectory_with_an_invalid_turn_or_no_answer_is_not_shown(
    tiny_tokenizer: PreTrainedTokenizerFast, turns: list[str]
) -> None:
    assert from_record(record(tiny_tokenizer, turns)) is None


def test_an_observation_in_another_form_or_a_search_before_the_first_turn_is_not_shown(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert observed_documents("\n\n<information></information>\n\n") == ()
    assert observed_documents("\n\n<information>notes on it</information>\n\n") is None
    assert observed_documents('\n\n<information>Doc 1(Title: "Emma") A: b</information>\n\n') is None
    found = record(tiny_tokenizer, ["<answer> x </answer>"])
    assert from_record(found) is not None and from_record({**found, "searches": 1}) is None


@pytest.mark.parametrize(("family", "name"), [("qwen3", "tools"), ("llama3.2", "bare-tools")])
def test_a_demonstration_of_calls_is_written_as_its_policy_would_sample_it(family: str, name: str) -> None:
    tokenizer, agent = family_tokenizer(family), PAPER.agents[name]
    shown = from_searches(SHOWN.question, ["1775"], SEARCHES, agent.grammar)
    assert shown is not None
    (trajectory,) = replay([shown], tokenizer, SETTINGS, agent)
    assert (trajectory.outcome, trajectory.answer, trajectory.searches) == ("answered", "1775", 2)
    labels = [one for one in example(trajectory)["labels"] if one != -100]
    written = [step.text for step in shown.steps]
    if not agent.grammar.closing:  # its end of sequence ends a call, and is learned
        written[:2] = [text + tokenizer.eos_token for text in written[:2]]
    assert labels == [one for text in written for one in tokenizer(text, add_special_tokens=False)["input_ids"]]
