"""The chat templates and tokenizers of today's families: prompts, turns and observations, exact to the id on each."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
from families import FAMILIES, family_tokenizer, nemo_tokenizer
from recipe_modules import ROOT
from scripted_rollouts import ScriptedEngine, ScriptedGenerator

from zerosearch.errors import UserError
from zerosearch.generation import SampledTurn, TurnRequest
from zerosearch.generation.chat_endpoint import PieceTokenizer
from zerosearch.generation.tokenization import decoded_text, special_ids, text_token_ids
from zerosearch.prompts import INVALID_ACTION_HINT, PAPER, Agent
from zerosearch.rollout.loop import RolloutSettings, Trajectory, run_rollouts
from zerosearch.rollout.observations import ObservationWriter

ROW = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"]}
QUERY = 'Emma "author" é'
THOUGHT = "<think>\nI look it up.\n</think>\n\n"
ANSWER = "<think>\nIt is she.\n</think>\n\n<answer> Jane Austen </answer>"
OBSERVATION = "\n\n<information>Doc 1: It rains.</information>\n\n"
TEXTS = [OBSERVATION, "x", " x", "</s><|im_end|> [INST]</tool_call>", "é\n\n  y", "\n"]
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>", "<|eot_id|>")
CALLERS = {name: family.caller for name, family in FAMILIES.items() if family.caller}

every = pytest.mark.parametrize("name", FAMILIES)
caller = pytest.mark.parametrize("name", CALLERS)


class Sampler(ScriptedGenerator):
    """Writes each text as a policy of the family samples it, added tokens included."""

    def write(self, request: TurnRequest) -> SampledTurn:
        text = self.policy(request.trajectory, len(self.requests[request.trajectory]) - 1)
        ids = text_token_ids(self.tokenizer, text, kept=TAGS)
        return SampledTurn(request.trajectory, ids, [-0.5] * len(ids), "stop")


def roll_out(
    tokenizer: Any, agent: Agent, turns: list[str], **settings: Any
) -> tuple[Trajectory, list[str], list[list[int]]]:
    """Return the trajectory of what the policy writes, the queries, and the contexts that it was given."""
    generator, engine = Sampler(tokenizer, lambda trajectory, turn: turns[turn]), ScriptedEngine()
    (trajectory,) = run_rollouts([ROW], generator, engine, RolloutSettings(max_turns=3, **settings), agent=agent)
    contexts = [list(request.context_ids) for request in generator.requests[0]]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(contexts))
    return trajectory, [request.query for request in engine.requests], contexts


@pytest.mark.parametrize("name", [*FAMILIES, "nemo"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_the_middle_of_another_is_that_text(name: str, text: str) -> None:
    tokenizer = nemo_tokenizer() if name == "nemo" else family_tokenizer(name)
    ids, around = text_token_ids(tokenizer, text), text_token_ids(tokenizer, "x")
    assert decoded_text(tokenizer, [*around, *ids, *around]) == f"x{text}x"
    assert not special_ids(tokenizer) & set(ids)


@every
def test_a_policy_s_own_tags_are_the_tokens_that_its_tokenizer_makes_of_them(name: str) -> None:
    tokenizer, text = family_tokenizer(name), f"{THOUGHT}<tool_call>x</tool_call> "
    apart = tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"]
    assert text_token_ids(tokenizer, f"\n{text}", kept=TAGS)[-8:] == apart[-8:]


@every
def test_the_paper_s_tags(name: str) -> None:
    tokenizer, agent = family_tokenizer(name), PAPER.policy
    search = f"{THOUGHT}<search> {QUERY} </search>"
    trajectory, queries, contexts = roll_out(tokenizer, agent, [search, ANSWER])
    messages = agent.messages(ROW["question"])
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert trajectory.prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert queries == [QUERY] and trajectory.answer == "Jane Austen"
    assert decoded_text(tokenizer, contexts[1]) == decoded_text(tokenizer, contexts[0]) + search + OBSERVATION
    own = [one for one, mask in zip(trajectory.completion_ids, trajectory.env_mask, strict=True) if mask]
    assert own == [*text_token_ids(tokenizer, search, kept=TAGS), *text_token_ids(tokenizer, ANSWER, kept=TAGS)]
    assert trajectory.completion_ids[-1] == tokenizer.eos_token_id and trajectory.env_mask[-1] == 0


@caller
@pytest.mark.parametrize("closes", [False, True])
def test_a_tool_s_call_and_reply_stand_in_the_context_as_the_template_writes_them(name: str, closes: bool) -> None:
    """Whether the policy samples the end of its message or a stop string cuts it off before."""
    tokenizer, agent = family_tokenizer(name), PAPER.agents[CALLERS[name]]
    closes = closes or not agent.grammar.closing
    call = agent.grammar.write_search(QUERY)
    end = tokenizer.eos_token if closes else ""
    trajectory, queries, contexts = roll_out(tokenizer, agent, [call + end, call + end, ANSWER])
    assert queries == [QUERY, QUERY] and (trajectory.answer, trajectory.searches) == ("Jane Austen", 2)
    function = {"type": "function", "function": {"name": "search", "arguments": {"query": QUERY}}}
    turn = [
        {"role": "assistant", "content": "", "tool_calls": [function]},
        {"role": "tool", "name": "search", "content": "Doc 1: It rains."},
    ]
    for number, context in enumerate(contexts):
        messages = agent.messages(ROW["question"]) + turn * number
        rendered = tokenizer.apply_chat_template(
            messages, tools=agent.grammar.tools, add_generation_prompt=True, tokenize=False
        )
        assert decoded_text(tokenizer, context) == rendered
        assert context.count(tokenizer.eos_token_id) == tokenizer(rendered)["input_ids"].count(tokenizer.eos_token_id)
    ends = [
        mask
        for one, mask in zip(trajectory.completion_ids, trajectory.env_mask, strict=True)
        if one == tokenizer.eos_token_id
    ]
    assert ends[0] == int(closes), "an end that the policy samples is its own, and trained"


@caller
def test_thoughts_stay_where_a_template_would_strip_them(name: str) -> None:
    tokenizer, agent = family_tokenizer(name), PAPER.agents[CALLERS[name]]
    turn = THOUGHT + agent.grammar.write_search(QUERY) + tokenizer.eos_token
    _, queries, contexts = roll_out(tokenizer, agent, [turn, ANSWER])
    assert queries == [QUERY] and decoded_text(tokenizer, contexts[1]).count(turn) == 1


@caller
def test_what_is_no_action_is_answered_by_a_message_of_the_user(name: str) -> None:
    tokenizer, agent = family_tokenizer(name), PAPER.agents[CALLERS[name]]
    other = agent.grammar.write_search(QUERY).replace('"search"', '"browse"')
    trajectory, queries, contexts = roll_out(tokenizer, agent, [f"{other}{tokenizer.eos_token}", ANSWER])
    assert queries == [] and trajectory.turns[0].kind == "invalid"
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": "MINE"}]
    messages.append({"role": "user", "content": agent.hint})
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert decoded_text(tokenizer, contexts[1][len(contexts[0]) :]) == other + rendered.partition("MINE")[2]
    assert trajectory.answer == "Jane Austen"


@caller
def test_documents_hold_no_special_token_and_are_shortened_to_fit(name: str) -> None:
    tokenizer, agent = family_tokenizer(name), PAPER.agents[CALLERS[name]]
    writer = ObservationWriter(tokenizer, agent, 120)
    empty = writer.documents(["", ""])
    spelled = writer.documents([f"a {tokenizer.eos_token} b </tool_call> <think>", "c" * 400])
    assert spelled.is_cut and len(empty.token_ids) < len(spelled.token_ids) <= 120
    marked = [one for one in spelled.token_ids if one in special_ids(tokenizer)]
    assert marked == [one for one in empty.token_ids if one in special_ids(tokenizer)]


@caller
def test_notes_on_documents_stand_where_the_documents_would(name: str) -> None:
    writer = ObservationWriter(family_tokenizer(name), PAPER.agents[CALLERS[name]], 120)
    documents = writer.documents(["It rains."]).text
    assert writer.notes("<think> x </think> It rains.").text == documents.replace("Doc 1: It rains.", "It rains.")


def test_qwen3_s_thinking_is_switched_off_by_its_template() -> None:
    tokenizer = family_tokenizer("qwen3")
    off = {"chat_template_kwargs": '{"enable_thinking": false}'}
    call = PAPER.agents["tools"].grammar.write_search(QUERY)
    *_, contexts = roll_out(tokenizer, PAPER.agents["tools"], [call, ANSWER], **off)
    assert all(decoded_text(tokenizer, one).endswith("assistant\n<think>\n\n</think>\n\n") for one in contexts)
    *_, contexts = roll_out(tokenizer, PAPER.policy, [f"<search> {QUERY} </search>", ANSWER], **off)
    assert decoded_text(tokenizer, contexts[0]).endswith("assistant\n<think>\n\n</think>\n\n")
    *_, contexts = roll_out(tokenizer, PAPER.policy, [ANSWER])
    assert decoded_text(tokenizer, contexts[0]).endswith("assistant\n")


@every
@pytest.mark.parametrize("agent", ["tools", "bare-tools"])
def test_a_template_that_does_not_fit_the_agent_is_one_sentence(name: str, agent: str) -> None:
    message = f"template (has no place for what a tool replies|does not write a search as the agent '{agent}' does: )"
    refused = nullcontext() if CALLERS.get(name) == agent else pytest.raises(UserError, match=message)
    with refused:
        ObservationWriter(family_tokenizer(name), PAPER.agents[agent], 100)


def test_the_table_of_families_is_what_these_tests_try() -> None:
    text = (ROOT / "recipes/README.md").read_text()
    table = text[text.index("| family | template |") :].partition("\n\n")[0]
    assert table.split("\n")[2:] == [family.row for family in FAMILIES.values()]


def test_without_a_template_there_are_no_tools_and_no_template_options() -> None:
    with pytest.raises(UserError, match="the agent 'tools' calls a tool, and the model has no chat template"):
        ObservationWriter(PieceTokenizer(), PAPER.agents["tools"], 100)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="chat_template_kwargs are given, and the model has no chat template"):
        ObservationWriter(PieceTokenizer(), PAPER.policy, 100, {"enable_thinking": False})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="chat_template_kwargs is not JSON in UTF-8"):
        RolloutSettings(chat_template_kwargs="{enable_thinking: false}")


def test_the_paper_s_hint_is_no_message() -> None:
    *_, contexts = roll_out(family_tokenizer("qwen3"), PAPER.policy, ["Hm.", ANSWER])
    assert decoded_text(family_tokenizer("qwen3"), contexts[1]).endswith(f"Hm.{INVALID_ACTION_HINT}")
