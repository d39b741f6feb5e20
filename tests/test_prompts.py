"""The prompts are an interface to published weights: each is held here to the letter."""

from __future__ import annotations

import re
from typing import Any

import pytest

from zerosearch.errors import UserError
from zerosearch.prompts import (
    INVALID_ACTION_HINT,
    PAPER,
    PROMPTED_SIMULATOR,
    SIMULATOR_FROM_QUERY,
    TINYWORLD,
    Agent,
    simulator_messages,
)

# One line, as the paper's code feeds it; "as your want" is theirs.
GOLDEN_POLICY_PROMPT = "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query </search> and it will return the top searched results between <information> and </information>. You can search as many times as your want. If you find no further external knowledge needed, you can directly provide the answer inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. Question: Who wrote Emma?\n"  # noqa: E501

GOLDEN_USEFUL_PROMPT = """You are the Google search engine.
Given a query, you need to generate five useful documents for the query.

The user is trying to answer the question: "Who wrote Emma?" whose answer is Jane Austen.
Each document should contain about 30 words, and these documents should contain useful information.

Query: Emma author
Useful Output:
"""

GOLDEN_NOISY_PROMPT = """You are the Google search engine.
Given a query, you need to generate five noisy documents for the query.

The user is trying to answer the question: "Who wrote Emma?" whose answer is Jane Austen.
Each document should contain about 30 words, and these documents should contain noisy information.

Query: Emma author
Noisy Output:
"""

GOLDEN_HINT = "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"  # noqa: E501


def simulator_prompt(**asked: Any) -> str:
    system, user = simulator_messages(**asked)
    assert system == {"role": "system", "content": ""} and user["role"] == "user"
    return user["content"]


def test_policy_prompt_to_the_letter() -> None:
    assert PAPER.policy.prompt("Who wrote Emma?") == GOLDEN_POLICY_PROMPT


@pytest.mark.parametrize("question", ["Who wrote Emma", "  Who wrote Emma?\n", "Who wrote Emma \n"])
def test_policy_prompt_strips_the_question_and_adds_a_missing_mark(question: str) -> None:
    assert PAPER.policy.prompt(question) == GOLDEN_POLICY_PROMPT


@pytest.mark.parametrize(("noisy", "golden"), [(False, GOLDEN_USEFUL_PROMPT), (True, GOLDEN_NOISY_PROMPT)])
def test_simulator_prompt_to_the_letter(noisy: bool, golden: str) -> None:
    prompt = simulator_prompt(
        question="Who wrote Emma?", golden_answers=["Jane Austen", "Austen"], query="Emma author", noisy=noisy
    )
    assert prompt == golden


def test_invalid_action_hint_to_the_letter() -> None:
    assert INVALID_ACTION_HINT == GOLDEN_HINT


def test_tinyworld_prompts_to_the_letter() -> None:
    assert TINYWORLD.policy.prompt("Where is Kipi") == (
        "Think in <think>, look things up with <search>, then give a short <answer>. Question: Where is Kipi?\n"
    )
    prompt = simulator_prompt(
        question="Where is Kipi?",
        golden_answers=("Lomu",),
        query="Kipi city",
        noisy=True,
        template=TINYWORLD.simulator,
    )
    assert prompt == (
        'Write five noisy documents. Question: "Where is Kipi?" Answer: Lomu\nQuery: Kipi city Lomu\nNoisy Output:\n'
    )


def test_braces_in_what_is_filled_in_are_text() -> None:
    assert Agent("mine", "Q: {question}\n").prompt("What is {question} in {x}?") == "Q: What is {question} in {x}?\n"
    prompt = simulator_prompt(
        question="{query}", golden_answers=["{0}"], query="{quality}", noisy=False, template="{question}|{query}"
    )
    assert prompt == "{query}|{quality}"


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(UserError, match="a question is empty"):
        PAPER.policy.prompt(" \n")


def test_a_simulator_prompt_without_golden_answer_is_refused() -> None:
    with pytest.raises(UserError, match="'Who wrote Emma\\?' has none"):
        simulator_prompt(question="Who wrote Emma?", golden_answers=[], query="Emma", noisy=False)


@pytest.mark.parametrize(
    ("golden_answers", "named"),
    [
        (["Austen " * 43, "Jane Austen", "Austen"], "Jane Austen"),
        (["a" * 300, "Austen"], "a" * 300),
        (["a" * 301, "b" * 301], "a" * 300),
    ],
)
def test_the_simulator_is_told_an_answer_that_a_document_can_hold(golden_answers: list[str], named: str) -> None:
    prompt = simulator_prompt(question="Who wrote Emma?", golden_answers=golden_answers, query="Emma", noisy=True)
    assert f'"Who wrote Emma?" whose answer is {named}.\n' in prompt


def test_a_simulator_that_is_told_the_query_alone_gets_the_prompted_form_without_the_rest() -> None:
    asked = {"question": "", "golden_answers": [], "query": "Emma author"}
    told = {"question": "Who wrote Emma?", "golden_answers": ["Austen"], "query": "Emma author"}
    for noisy in (False, True):
        alone = simulator_prompt(**asked, noisy=noisy, template=SIMULATOR_FROM_QUERY)
        prompted = simulator_prompt(**told, noisy=noisy, template=PROMPTED_SIMULATOR)
        sentence = 'The user is trying to answer the question: "Who wrote Emma?" whose answer is Austen.\n'
        assert alone == prompted.replace(sentence, "") and (noisy or alone != prompted)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Question: {problem}", r"names \{problem\}, which is none of \{documents\}, \{question\}"),
        ("Answer the question.", r"lacks \{question\}"),
        ('Answer {question} as {"answer": 1}', "double a literal brace"),
        ("{question} {", "unbalanced braces"),
    ],
)
def test_a_template_with_the_wrong_fields_is_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Agent("mine", template).prompt("Who?")


def test_a_prompted_simulators_noisy_form_names_neither_question_nor_answer() -> None:
    asked = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"], "query": "Emma author"}
    useful, noisy = (
        simulator_prompt(**asked, noisy=is_noisy, template=PROMPTED_SIMULATOR) for is_noisy in (False, True)
    )
    assert 'The user is trying to answer the question: "Who wrote Emma?" whose answer is Jane Austen.\n' in useful
    assert useful.endswith("\n\nQuery: Emma author\nUseful Output:\n")
    assert noisy.endswith("\n\nQuery: Emma author\nNoisy Output:\n")
    assert "Who wrote Emma?" not in noisy and "Austen" not in noisy


def test_a_prompted_simulators_examples_keep_their_word() -> None:
    for template, answered in zip(PROMPTED_SIMULATOR, (True, False), strict=True):
        example = template.split("Query: who discovered radium\n")[1].split("\n\n")[0]
        documents = re.split(r"^Doc \d: ", example, flags=re.MULTILINE)[1:]
        assert len(documents) == 5
        assert all(25 <= len(document.split()) <= 36 for document in documents)  # about 30 words
        assert all("Curie" in document for document in documents) is answered
        assert any("Curie" in document for document in documents) is answered
