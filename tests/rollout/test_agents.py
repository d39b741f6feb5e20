"""Each agent on the one rollout loop: what it is asked, what it may do, what it reads, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from jsonl_files import rows_of
from scripted import Library, Writer
from scripted_rollouts import ScriptedEngine

from zerosearch.data import Passage, passage_of
from zerosearch.engines import result_of
from zerosearch.errors import UserError
from zerosearch.prompts import PAPER, POLICY_PROMPT, TINYWORLD, TINYWORLD_POLICY_PROMPT, Agent, reading_prompt
from zerosearch.protocol import format_titled_observation, titled_documents
from zerosearch.rollout.loop import RolloutSettings, Trajectory, run_rollouts

PASSAGES = Path(__file__).parents[3] / "shared/data/wiki_passages.jsonl"
SETTINGS = RolloutSettings(max_turns=2, temperature=0.0)
QUESTION = "Who wrote Emma?"
ROW = {"id": "q", "question": QUESTION, "golden_answers": ["Jane Austen"]}


def found_of(passages: Sequence[Passage]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    result = result_of(passages)
    return result.documents, result.titles


def roll_out(
    agent: Agent, write: Callable[[str], str], engine: Library | None = None
) -> tuple[Trajectory, Writer, Library]:
    writer, engine = Writer(write), engine or Library()
    (trajectory,) = run_rollouts([ROW], writer, engine, SETTINGS, agent=agent, p_noise=0.5)
    return trajectory, writer, engine


def texts(trajectory: Trajectory) -> list[tuple[str, str]]:
    return [(part["source"], part["text"]) for part in trajectory.to_record(ROW, "PROMPT")["segments"]]


@pytest.mark.parametrize("name", ["direct", "cot", "r1"])
def test_an_agent_without_engine_has_one_turn_and_its_search_is_not_sent(name: str) -> None:
    agent = PAPER.agents[name]
    assert not agent.searches
    trajectory, writer, engine = roll_out(agent, lambda context: "<search> Emma </search>")
    assert (trajectory.outcome, trajectory.answer, len(trajectory.turns)) == ("turns_exhausted", None, 1)
    assert engine.requests == [] and trajectory.searches == 0
    assert writer.contexts == [agent.template.format(question=QUESTION)]
    trajectory, *_ = roll_out(agent, lambda context: "<think> Hm. </think> <answer> Jane Austen </answer>")
    assert (trajectory.outcome, trajectory.answer) == ("answered", "Jane Austen")


def test_rag_reads_what_a_search_for_the_question_finds() -> None:
    trajectory, writer, engine = roll_out(PAPER.agents["rag"], lambda context: "<answer> Jane Austen </answer>")
    (request,) = engine.requests
    assert (request.query, request.question, request.golden_answers) == (QUESTION, QUESTION, ("Jane Austen",))
    assert request.key == (0, 0, 0, 0, 1_000_037), "no turn's"
    (prompt,) = writer.contexts
    assert prompt.endswith(
        "<information>Doc 1: Emma: Found for Who wrote Emma?\nDoc 2: Rain: It rains.</information>\n\n"
        "Question: Who wrote Emma?\n"
    )
    assert (trajectory.answer, trajectory.searches, len(trajectory.turns)) == ("Jane Austen", 1, 1)
    assert trajectory.lookup is not None and trajectory.lookup.documents[1] == "Rain: It rains."
    assert trajectory.prompt_ids == writer.tokenizer(prompt)["input_ids"]  # what the record shows as the prompt


def test_documents_are_shown_where_a_row_has_a_prompt_of_its_own() -> None:
    writer = Writer(lambda context: "<answer> x </answer>")
    run_rollouts([ROW | {"prompt": "Mine."}], writer, Library(), SETTINGS, agent=PAPER.agents["rag"])
    assert "Doc 2: Rain: It rains." in writer.contexts[0]


def test_rag_may_not_search_again() -> None:
    trajectory, _, engine = roll_out(PAPER.agents["rag"], lambda context: "<search> Emma </search>")
    assert (trajectory.outcome, len(engine.requests)) == ("turns_exhausted", 1)


def test_a_lookup_that_fails_ends_the_trajectory() -> None:
    trajectory, writer, _ = roll_out(PAPER.agents["rag"], lambda context: "x", Library(broken=True))
    assert (trajectory.outcome, trajectory.error, trajectory.searches) == ("failed_search", "the library is closed", 1)
    assert writer.contexts == []


def write_two_searches(context: str) -> str:
    return "<answer> Jane Austen </answer>" if context.count("</search>") > 2 else "<search> Emma author </search>"


def test_search_o1_goes_on_with_notes_on_the_documents() -> None:
    thought = "<think> Hm. </think> <search> Emma </search>"
    note = "<think> Which? </think> Emma is by <answer> Jane Austen </answer>"
    said = iter([thought, note, "<search> her </search>", note, "<answer> Jane Austen </answer>"])
    trajectory, writer, _ = roll_out(PAPER.agents["search-o1"], lambda context: next(said))
    first, reading, _, last_reading, last = writer.contexts
    for context, reasoning, query in ((reading, "", "Emma"), (last_reading, " <search> her </search>", "her")):
        assert context == reading_prompt(
            question=QUESTION,
            reasoning=thought + reasoning,
            query=query,
            documents=f"Doc 1: Emma: Found for {query}\nDoc 2: Rain: It rains.",
            template=PAPER.agents["search-o1"].reading_template or "",
        )
    notes = "\n\n<information>Emma is by <answer> Jane Austen </answer></information>\n\n"
    assert last == f"{first}{thought}{notes}<search> her </search>{notes}"
    # The notes are the environment's: their tags are no action, their tokens are masked, their seed is another.
    assert [turn.kind for turn in trajectory.turns] == ["search", "search", "answer"]
    turns, readings = [7316830281901135, 7720267294254014, 5860429783425141], [977068998311436, 2896372005411039]
    assert writer.seeds == [turns[0], readings[0], turns[1], readings[1], turns[2]]
    sampled = [
        token for token, is_policy in zip(trajectory.completion_ids, trajectory.env_mask, strict=True) if is_policy
    ]
    assert writer.tokenizer.decode(sampled) == "".join(turn.text for turn in trajectory.turns)
    assert trajectory.reading_tokens == 2 * len(writer.tokenizer(note)["input_ids"]) and writer.released == [1, 1, 0]
    record = trajectory.to_record(ROW, "PROMPT")["segments"]
    assert record[2]["text"] == notes and record[2]["documents"] == ["Emma: Found for Emma", "Rain: It rains."]
    assert record[4]["text"] == notes and record[4]["documents"] == ["Emma: Found for her", "Rain: It rains."]


def test_notes_go_to_the_trajectory_whose_documents_were_read() -> None:
    def write(context: str) -> str:
        number = context.partition("Question: Q")[2][0]
        if "Query:" in context:
            return f"Notes on {number}."
        return f"<answer> {number} </answer>" if "Notes" in context else f"<search> about {number} </search>"

    writer, rows = Writer(write), [{"question": f"Q{n}?", "golden_answers": ["x"]} for n in range(3)]
    trajectories = run_rollouts(rows, writer, Library(), SETTINGS, agent=PAPER.agents["search-o1"])
    assert [trajectory.answer for trajectory in trajectories] == ["0", "1", "2"]
    notes = [trajectory.turns[0].observation for trajectory in trajectories]
    assert notes == [f"\n\n<information>Notes on {n}.</information>\n\n" for n in range(3)]
    assert sorted(writer.released) == [0, 1, 2, 3, 4, 5]


def test_documents_that_leave_no_room_to_read_them_end_the_trajectory() -> None:
    writer = Writer(lambda context: "<search> Emma </search>")
    settings = RolloutSettings(max_trajectory_tokens=250, temperature=0.0)
    engine = ScriptedEngine(lambda request: ["x" * 1000])
    (trajectory,) = run_rollouts([ROW], writer, engine, settings, agent=PAPER.agents["search-o1"])
    assert (trajectory.outcome, len(trajectory.turns), len(writer.contexts)) == ("truncated", 1, 1)


def test_search_r1_shows_titles() -> None:
    trajectory, writer, _ = roll_out(PAPER.agents["search-r1"], write_two_searches)
    assert trajectory.cut_observations == 0
    assert writer.contexts[0] == POLICY_PROMPT.format(question=QUESTION)
    assert writer.contexts[1].endswith(
        '\n\n<information>Doc 1(Title: "Emma") Found for Emma author\nDoc 2(Title: "Rain") It rains.</information>\n\n'
    )


def test_titles_that_an_engine_tells_apart_are_shown_as_they_are() -> None:
    passages = [
        Passage("Emma", "Emma is a novel.\nBy Jane Austen."),
        Passage("Three Colours: Red", "Three Colors: Red (French: Rouge) is a film."),
        Passage("", "Note: it rains."),
    ]
    documents = PAPER.agents["search-r1"].show_documents(*found_of(passages))
    assert PAPER.agents["search-r1"].write_observation(documents) == (
        '\n\n<information>Doc 1(Title: "Emma") Emma is a novel. By Jane Austen.\n'
        'Doc 2(Title: "Three Colours: Red") Three Colors: Red (French: Rouge) is a film.\n'
        "Doc 3: Note: it rains.</information>\n\n"
    )
    assert PAPER.agents["policy"].show_documents(*found_of(passages))[0] == "Emma is a novel.\nBy Jane Austen."


def test_a_document_without_a_title_is_shown_without_one() -> None:
    long = "This sentence goes on for quite a while before it ends: here"
    assert format_titled_observation(titled_documents(["No title", long, "Emma: A novel."], ())) == (
        f'\n\n<information>Doc 1: No title\nDoc 2: {long}\nDoc 3(Title: "Emma") A novel.</information>\n\n'
    )


@pytest.mark.skipif(not PASSAGES.is_file(), reason=f"{PASSAGES} is not here")
def test_real_passages_look_as_search_r1_shows_them() -> None:
    rows = rows_of(PASSAGES)
    others = []
    for row in rows:
        title, _, text = row["contents"].partition("\n")
        documents = PAPER.agents["search-r1"].show_documents(*found_of([passage_of(row, "here")]))
        expected = f"\n\n<information>Doc 1(Title: {title}) {' '.join(text.split())}</information>\n\n"
        if PAPER.agents["search-r1"].write_observation(documents) != expected:
            others.append((title.strip('"'), text))
    assert len(rows) > 10_000 and len(others) < 10
    assert all(text.startswith(f"{title}: ") for title, text in others)  # once is enough


def test_closed_book_is_the_policy_whose_searches_find_nothing() -> None:
    trajectory, writer, engine = roll_out(PAPER.agents["closed-book"], write_two_searches)
    assert engine.requests == [] and trajectory.searches == 0
    assert writer.contexts[0] == POLICY_PROMPT.format(question=QUESTION)
    assert writer.contexts[1].endswith("<search> Emma author </search>\n\n<information></information>\n\n")
    assert [turn.kind for turn in trajectory.turns] == ["search", "search", "answer"]


def test_tinyworlds_direct_agent_begins_with_its_answer() -> None:
    trajectory, writer, _ = roll_out(TINYWORLD.agents["direct"], lambda context: " Jane Austen </answer>")
    prompt = TINYWORLD_POLICY_PROMPT.format(question=QUESTION)
    assert writer.contexts == [f"{prompt}<think> Look up. </think> <answer>"]
    assert (trajectory.answer, trajectory.outcome, len(trajectory.turns)) == ("Jane Austen", "answered", 1)


def test_tinyworlds_cot_agent_thinks_once_and_must_answer_then() -> None:
    def write(context: str) -> str:
        return (
            " Jane Austen </answer>"
            if context.endswith("<answer>")
            else "<think> Emma. </think> <search> Emma </search>"
        )

    trajectory, _, engine = roll_out(TINYWORLD.agents["cot"], write)
    assert trajectory.answer == "Jane Austen" and engine.requests == []
    assert texts(trajectory)[1:] == [
        ("policy", "<think> Emma. </think> <search> Emma </search>"),
        ("documents", "\n\n<information></information>\n\n<think> unknown. </think> <answer>"),
        ("policy", " Jane Austen </answer>"),
    ]
    policy_tokens = sum(trajectory.env_mask)
    assert policy_tokens == trajectory.policy_tokens  # the opening is the environment's
    trajectory, *_ = roll_out(replace(TINYWORLD.agents["cot"], max_turns=2), write)
    openings = [text.endswith("<answer>") for source, text in texts(trajectory) if source == "documents"]
    assert openings == [False, True], "of the last turn alone"


def test_agents_do_not_mix_under_a_limit_of_live_trajectories() -> None:
    engine, most, ended = Library(), 0, 0

    def watch(index: int, trajectory: Trajectory, event: str) -> None:
        nonlocal most, ended
        most = max(most, len(engine.requests) - ended)
        ended += event == "end"

    rows = [{"question": f"Q{n}?", "golden_answers": ["x"]} for n in range(30)]
    writer = Writer(lambda context: f"<answer> {context.rsplit('Question: ', 1)[1].strip()} </answer>")
    trajectories = run_rollouts(rows, writer, engine, SETTINGS, agent=PAPER.agents["rag"], max_live=4, watch=watch)
    assert [trajectory.answer for trajectory in trajectories] == [f"Q{n}?" for n in range(30)]
    assert 1 < most <= 4 and ended == 30


def test_all_baselines_of_table_3_are_there() -> None:
    names = "policy direct cot rag ra-agent search-o1 r1 search-r1 closed-book tools bare-tools"
    assert " ".join(PAPER.agents) == names
    assert [agent.name for agent in PAPER.choose(["rag", "cot"])] == ["rag", "cot"]
    with pytest.raises(UserError, match="the agent 'rga' is unknown; there are policy, direct"):
        PAPER.choose(["rga"])


def test_a_template_with_other_fields_is_refused() -> None:
    with pytest.raises(UserError, match=r"names \{answer\}"):
        Agent("mine", "{question} {answer}").prompt("Who?")
    with pytest.raises(UserError, match=r"lacks \{documents\}"):
        reading_prompt(question="q", reasoning="r", query="q", documents="d", template="{query}")


# Each agent's prompt to the letter: results say nothing when a word of it has changed.
GOLDEN_PROMPTS = {
    "direct": "Answer the given question from what you know. Give only the answer, as short as possible, inside <answer> and </answer>. For example, <answer> Beijing </answer>. Question: Who wrote Emma?\n",  # noqa: E501
    "cot": "Answer the given question from what you know. Think step by step inside <think> and </think> first. Then give only the answer, as short as possible, inside <answer> and </answer>. For example, <answer> Beijing </answer>. Question: Who wrote Emma?\n",  # noqa: E501
    "rag": "Answer the given question with the help of the documents between <information> and </information>, some of which may not matter. Give only the answer, as short as possible, inside <answer> and </answer>. For example, <answer> Beijing </answer>.\n\n<information>Doc 1: x</information>\n\nQuestion: Who wrote Emma?\n",  # noqa: E501
    "ra-agent": "Answer the given question by searching. Work out inside <think> and </think> what has to be looked up, one thing at a time. To look something up, write a short query inside <search> and </search>, and stop: the documents found are returned between <information> and </information>. Search again, with other words or for the next thing, until the documents hold the answer. Then give only the answer, as short as possible, inside <answer> and </answer>. For example, <answer> Beijing </answer>. Question: Who wrote Emma?\n",  # noqa: E501
    "search-o1": "Answer the given question by reasoning step by step inside <think> and </think>. Whenever you are not sure of something, write a short query inside <search> and </search>, and stop: a reader goes through the documents found, and returns what matters for your reasoning between <information> and </information>. Go on from there, and search again whenever you need to. At the end give only the answer, as short as possible, inside <answer> and </answer>. For example, <answer> Beijing </answer>. Question: Who wrote Emma?\n",  # noqa: E501
    "r1": "Answer the given question. You must conduct reasoning inside <think> and </think> first. After reasoning, provide the answer inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. Question: Who wrote Emma?\n",  # noqa: E501
}
GOLDEN_PROMPTS["tools"] = GOLDEN_PROMPTS["bare-tools"] = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new information. After reasoning, if you find you lack some knowledge, you can call the search tool, and it will return the top searched results. You can search as many times as you want. If you find no further external knowledge needed, you can directly provide the answer inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. Question: Who wrote Emma?\n"  # noqa: E501
)
GOLDEN_READING_PROMPT = 'Somebody works on the question below and has searched for something. Read the documents found and write down, in a few sentences, what they say that helps to take the next step; add nothing that they do not say, and do not answer the question itself. If nothing in them helps, write "Nothing helpful was found."\n\nQuestion: Who wrote Emma?\nReasoning so far: R.\nQuery: Emma\nDocuments:\nDoc 1: x\nWhat helps:\n'  # noqa: E501


def test_the_agents_prompts_to_the_letter() -> None:
    for name, golden in GOLDEN_PROMPTS.items():
        assert PAPER.agents[name].messages("Who wrote Emma", "Doc 1: x") == [{"role": "user", "content": golden}]
    template = PAPER.agents["search-o1"].reading_template or ""
    fields = {"question": "Who wrote Emma?", "reasoning": "R.", "query": "Emma", "documents": "Doc 1: x"}
    assert reading_prompt(template=template, **fields) == GOLDEN_READING_PROMPT
    assert TINYWORLD.agents["rag"].messages("Who wrote Emma?", "Doc 1: x")[0]["content"] == (
        "Think in <think>, look things up with <search>, then give a short <answer>. Question: Who wrote Emma?\n"
        "\n\n<information>Doc 1: x</information>\n\n"
    )
