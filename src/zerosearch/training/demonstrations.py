"""Demonstrations for a cold start: what a policy should write, turned into ids by the rollout itself.

A demonstration is the turns of a trajectory with what each of its searches found. `replay` sends it through the loop
of training and evaluation with a generator that writes those turns and an engine that finds those documents, so that
prompt, observations, ids and masks are those of the rollout, by construction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from zerosearch.engines import SearchRequest, SearchResult
from zerosearch.generation import SampledTurn, Sampling, TurnRequest
from zerosearch.generation.tokenization import text_token_ids
from zerosearch.metrics import holds_answer, normalize_answer
from zerosearch.prompts import Agent
from zerosearch.protocol import TAGS, Grammar, format_observation, parse_action
from zerosearch.rollout.loop import RolloutSettings, run_rollouts
from zerosearch.rollout.trajectory import Trajectory

# The paper has no cold start: thoughts and their wording are our choice.
SEARCH_TURN = "<think> {thought}I need to search. </think>\n{search}"
ANSWER_TURN = "<think> {thought}So the answer is {answer}. </think>\n<answer> {answer} </answer>"
END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
YES_OR_NO = ("yes", "no")


@dataclass(frozen=True)
class Step:
    """One turn of the policy, and the documents of its search; none where it answers."""

    text: str
    documents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Demonstration:
    """How to answer one question; the last step holds the answer."""

    question: str
    golden_answers: tuple[str, ...]
    steps: tuple[Step, ...]


def from_traces(traces: Sequence[Mapping[str, Any]], grammar: Grammar = TAGS) -> list[Demonstration | None]:
    """Return one demonstration of each question, of the searches made for it; `None` where they give none."""
    by_question: dict[str, list[Mapping[str, Any]]] = {}
    for trace in traces:
        by_question.setdefault(trace["question"], []).append(trace)
    return [
        from_searches(
            question,
            group[0]["golden_answers"],
            [(trace["query"], trace["documents"]) for trace in group],
            grammar,
        )
        for question, group in by_question.items()
    ]


def from_searches(
    question: str,
    golden_answers: Sequence[str],
    searches: Sequence[tuple[str, Sequence[str]]],
    grammar: Grammar = TAGS,
) -> Demonstration | None:
    """Write turns around real searches, pairs of query and documents; `None` where no document holds the answer.

    Searches behind the first that finds the answer are left out, unless the question names it already (a comparison)
    or it is a yes or a no: then both sides have to be looked up. A thought quotes the sentence it goes by.
    """
    answer = golden_answers[0]
    is_told = normalize_answer(answer) in YES_OR_NO or holds_answer(question, golden_answers)
    finds = [any(holds_answer(document, golden_answers) for document in documents) for _, documents in searches]
    if not is_told:
        if True not in finds:
            return None
        searches = searches[: finds.index(True) + 1]
    steps: list[Step] = []
    thought = ""
    for place, (query, documents) in enumerate(searches):
        steps.append(Step(SEARCH_TURN.format(thought=thought, search=grammar.write_search(query)), tuple(documents)))
        is_last = place + 1 == len(searches)
        wanted = question if is_last else searches[place + 1][0]
        thought = quote(documents, wanted, golden_answers if is_last and not is_told else ())
    steps.append(Step(ANSWER_TURN.format(thought=thought, answer=answer)))
    return Demonstration(question, tuple(golden_answers), tuple(steps))


def quote(documents: Sequence[str], wanted: str, answers: Sequence[str]) -> str:
    """Return the sentence that holds an answer and shares most words with what is wanted, and a space; "" for none."""
    words = set(normalize_answer(wanted).split())

    def fit(sentence: str) -> tuple[bool, int]:
        return bool(answers) and holds_answer(sentence, answers), len(words & set(normalize_answer(sentence).split()))

    sentences = [sentence for document in documents for sentence in END_OF_SENTENCE.split(document)]
    return f"{max(sentences, key=fit)} " if sentences else ""


def from_record(record: Mapping[str, Any]) -> Demonstration | None:
    """Return the trajectory of a record of trajectories.jsonl; `None` where it cannot be shown as it went.

    That is so for turns without an action, and for observations that are not documents as the policy gets them: notes,
    titles apart, documents in the prompt.
    """
    steps: list[Step] = []
    for segment in record["segments"][1:]:
        if segment["source"] == "policy":
            steps.append(Step(segment["text"]))
        else:
            documents = observed_documents(segment["text"])
            if documents is None:
                return None
            steps[-1] = Step(steps[-1].text, documents)
    if record["searches"] != len(steps) - 1 or record["answer"] is None:
        return None
    return Demonstration(record["question"], tuple(record["golden_answers"]), tuple(steps))


def observed_documents(observation: str) -> tuple[str, ...] | None:
    """Return the documents of an observation that `format_observation` wrote; `None` for any other text."""
    lines = observation.strip().removeprefix("<information>").removesuffix("</information>").split("\n")
    documents = tuple(line.partition(": ")[2] for line in lines if line)
    return documents if format_observation(documents) == observation else None


def replay(
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    settings: RolloutSettings,
    agent: Agent,
) -> list[Trajectory]:
    """Return the trajectory of each demonstration, as a rollout would have recorded it had the policy sampled it.

    One that needs more turns or tokens than the settings allow ends in another outcome than "answered".
    """
    rows = [{"question": one.question, "golden_answers": list(one.golden_answers)} for one in demonstrations]
    script = _Script(demonstrations, tokenizer, agent.grammar)
    return run_rollouts(rows, script, _Recorded(demonstrations), settings, agent=agent)


def example(trajectory: Trajectory) -> dict[str, list[int]]:
    """Return what TRL's SFTTrainer learns from: the ids (T,), and as labels (T,) those that the policy wrote."""
    own = zip(trajectory.completion_ids, trajectory.env_mask, strict=True)
    return {
        "input_ids": trajectory.prompt_ids + trajectory.completion_ids,
        "labels": [-100] * len(trajectory.prompt_ids) + [token_id if mask else -100 for token_id, mask in own],
    }


class _Script:
    """A generator that writes the turns of the demonstrations."""

    max_context_tokens = 1 << 30  # the settings alone limit a trajectory

    def __init__(
        self, demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, grammar: Grammar
    ) -> None:
        self.tokenizer, self.grammar = tokenizer, grammar
        self.turns = [iter(one.steps) for one in demonstrations]
        self.ended: list[SampledTurn] = []

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        yield

    def submit(self, request: TurnRequest) -> None:
        text = next(self.turns[request.trajectory], Step("")).text
        token_ids = text_token_ids(self.tokenizer, text, kept=self.grammar.tags)
        if not self.grammar.closing and parse_action(text, self.grammar).kind == "search":
            token_ids.append(self.tokenizer.eos_token_id)  # which ends a call there
        is_cut = len(token_ids) > request.max_new_tokens
        token_ids = token_ids[: request.max_new_tokens]
        logprobs = [0.0] * len(token_ids)
        self.ended.append(SampledTurn(request.trajectory, token_ids, logprobs, "length" if is_cut else "stop"))

    def step(self) -> list[SampledTurn]:
        ended, self.ended = self.ended, []
        return ended

    def release(self, trajectory: int) -> None:
        """Do nothing."""


class _Recorded:
    """An engine that finds what the search of that turn has found."""

    name = "recorded"
    max_concurrency = 64

    def __init__(self, demonstrations: Sequence[Demonstration]) -> None:
        self.demonstrations = demonstrations

    async def search(self, request: SearchRequest) -> SearchResult:
        *_, row, _, turn = request.key
        return SearchResult(self.demonstrations[row].steps[turn].documents)

    async def aclose(self) -> None:
        """Do nothing."""
