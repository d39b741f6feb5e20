"""The agents of the evaluation: how a model is asked, and what it may do, as data for the one rollout loop.

Table 3 of the paper compares the trained policy with seven ways to use a model. Each is an `Agent` here; what they
are asked is in `prompts.py`. They all speak the tags of `protocol.py`, so one loop, one parser and one set of metrics
serve them all.

1. `policy`: the trained policy, asked as in training. An untrained model under the same name is Table 4's first row.
2. `direct`, `cot`: one turn without documents, plainly and step by step.
3. `rag`: one turn, with the documents that a search for the question itself finds.
4. `ra-agent`: searches as it sees fit, without training.
5. `search-o1`: the same, but reads the documents apart and goes on with its notes alone (Reason-in-Documents).
6. `r1`: the prompt of a policy that was trained to reason without searching.
7. `search-r1`: Search-R1's template, which asks as ours does and shows documents with their titles.
8. `closed-book`: a control. The policy as it is, whose searches all find nothing: what it still knows is memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zerosearch.engines import SearchResult
from zerosearch.errors import UserError
from zerosearch.prompts import (
    COT_PROMPT,
    DIRECT_PROMPT,
    POLICY_PROMPT,
    R1_PROMPT,
    RA_AGENT_PROMPT,
    RAG_PROMPT,
    SEARCH_O1_PROMPT,
    SEARCH_O1_READING_PROMPT,
    TINYWORLD_POLICY_PROMPT,
    TINYWORLD_RAG_PROMPT,
    agent_prompt,
)
from zerosearch.protocol import format_observation, format_titled_observation, titled_documents


@dataclass(frozen=True)
class Agent:
    """How a model is asked to answer, and how its turns go.

    `template` holds `{question}`; one that holds `{documents}`, too, gets what a search for the question finds before
    the first turn. `max_turns` None: as many turns that may search as the settings allow; 0: one turn, which may only
    answer. With `gets_documents` false its searches are not sent, and find nothing. `last_turn_opening` is written for
    it at the start of the turn that may only answer, and read as its own. `reading_template` asks the same model,
    apart from the trajectory, for notes on the documents of a search; it then goes on with the notes in their place.
    With `shows_titles` it reads each document behind its title, as Search-R1's policies do.
    """

    name: str
    template: str
    max_turns: int | None = None
    gets_documents: bool = True
    last_turn_opening: str = ""
    reading_template: str | None = None
    shows_titles: bool = False

    @property
    def looks_up_question(self) -> bool:
        """Say whether the question itself is searched for before the first turn."""
        return "{documents}" in self.template

    @property
    def searches(self) -> bool:
        """Say whether a search engine is ever asked."""
        return self.looks_up_question or (self.gets_documents and self.max_turns != 0)

    def documents_of(self, result: SearchResult) -> tuple[str, ...]:
        """Return what a search has found, as it is written for this agent."""
        return titled_documents(result.documents, result.titles) if self.shows_titles else result.documents

    def write_observation(self, documents: Sequence[str]) -> str:
        """Write such documents as what the environment appends after a search."""
        return format_titled_observation(documents) if self.shows_titles else format_observation(documents)

    def messages(self, question: str, documents: str = "") -> list[dict[str, str]]:
        """Return the prompt as chat messages."""
        return [{"role": "user", "content": agent_prompt(question, self.template, documents)}]


def _by_name(*agents: Agent) -> dict[str, Agent]:
    return {agent.name: agent for agent in agents}


POLICY = Agent("policy", POLICY_PROMPT)

AGENTS = _by_name(
    POLICY,
    Agent("direct", DIRECT_PROMPT, max_turns=0, gets_documents=False),
    Agent("cot", COT_PROMPT, max_turns=0, gets_documents=False),
    Agent("rag", RAG_PROMPT, max_turns=0),
    Agent("ra-agent", RA_AGENT_PROMPT),
    Agent("search-o1", SEARCH_O1_PROMPT, reading_template=SEARCH_O1_READING_PROMPT),
    Agent("r1", R1_PROMPT, max_turns=0, gets_documents=False),
    Agent("search-r1", POLICY_PROMPT, shows_titles=True),
    Agent("closed-book", POLICY_PROMPT, gets_documents=False),
)

# TinyWorld's models read their own prompt's words and nothing else, so here an agent is a way to let the same prompt
# go on: straight to the answer; to the answer after a turn whose search finds nothing; with documents put first. The
# thoughts in front of a forced answer are such as stand before their own guesses.
TINYWORLD_AGENTS = _by_name(
    Agent("policy", TINYWORLD_POLICY_PROMPT),
    Agent(
        "direct",
        TINYWORLD_POLICY_PROMPT,
        max_turns=0,
        gets_documents=False,
        last_turn_opening="<think> Look up. </think> <answer>",
    ),
    Agent(
        "cot",
        TINYWORLD_POLICY_PROMPT,
        max_turns=1,
        gets_documents=False,
        last_turn_opening="<think> unknown. </think> <answer>",
    ),
    Agent("rag", TINYWORLD_RAG_PROMPT, max_turns=0),
    Agent("closed-book", TINYWORLD_POLICY_PROMPT, gets_documents=False),
)


def choose_agents(names: Sequence[str], agents: dict[str, Agent]) -> list[Agent]:
    """Return the agents of these names. Raises `UserError` for a name that is none."""
    for name in names:
        if name not in agents:
            raise UserError(f"there is no agent {name!r}, but: {', '.join(agents)}")
    return [agents[name] for name in names]
