"""The record of one question's rollout: its ids, its turns, how it ended, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from zerosearch.generation import SampledTurn
from zerosearch.metrics import exact_match, f1
from zerosearch.protocol import ActionKind

Outcome = Literal["answered", "turns_exhausted", "truncated", "failed_search"]
OUTCOMES: tuple[Outcome, ...] = ("answered", "turns_exhausted", "truncated", "failed_search")


@dataclass
class Turn:
    """One policy generation and what the environment replied to it."""

    text: str
    kind: ActionKind
    content: str
    num_tokens: int
    is_cut: bool = False  # by the limit of tokens, its own or the trajectory's
    generation_s: float = 0.0  # from the moment it could start to its end
    documents: tuple[str, ...] = ()
    noisy: bool | None = None  # whether its documents were to be; None where the engine has no such notion
    retries: int = 0
    short_replies: int = 0  # of a simulator, with too few documents
    latency_s: float | None = None  # of the search, from request to documents; None without one
    observation: str = ""
    num_observation_tokens: int = 0
    is_observation_cut: bool = False  # documents lost text to fit the limit of tokens
    was_read: bool = False  # the observation holds notes on the documents, and not the documents


@dataclass
class Trajectory:
    """The record of one question's rollout. `completion_ids`, `env_mask` and `logprobs` have the same length.

    `logprobs` is 0.0 where the environment added the id. `outcome` is set once the trajectory has ended.

    >>> def brevity_reward(trajectories: list[Trajectory], **columns: object) -> list[float]:
    ...     return [1.0 - 0.1 * trajectory.searches for trajectory in trajectories]
    >>> brevity_reward([Trajectory(prompt_ids=[5, 8], p_noise=0.0)])
    [1.0]
    """

    prompt_ids: list[int]
    p_noise: float
    completion_ids: list[int] = field(default_factory=list)
    env_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    outcome: Outcome | None = None
    error: str = ""  # what the failed search said
    lookup: Turn | None = None  # the search for the question itself, before the first turn; no turn of the policy
    reading_tokens: int = 0  # sampled apart, for notes on documents; in no list of ids

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Trajectory:
        """Return the trajectory of which `dataclasses.asdict` made a dictionary, also by way of JSON."""

        def turn(values: Mapping[str, Any]) -> Turn:
            return Turn(**{**values, "documents": tuple(values["documents"])})

        lookup = record["lookup"] and turn(record["lookup"])
        return cls(**{**record, "turns": [turn(values) for values in record["turns"]], "lookup": lookup})

    @property
    def policy_tokens(self) -> int:
        return sum(turn.num_tokens for turn in self.turns)

    @property
    def observation_tokens(self) -> int:
        """Return the tokens of documents and hints; an end-of-sequence token added after the answer is not counted."""
        return sum(turn.num_observation_tokens for turn in self.turns)

    @property
    def cut_observations(self) -> int:
        return sum(turn.is_observation_cut for turn in self.turns)

    @property
    def searched_turns(self) -> list[Turn]:
        """Return the turns whose search was executed, the failed one included."""
        turns = [self.lookup, *self.turns] if self.lookup else self.turns
        return [turn for turn in turns if turn.latency_s is not None]

    @property
    def searches(self) -> int:
        return len(self.searched_turns)

    def counts(self) -> dict[str, int]:
        """Return what is counted of a trajectory, for its record and for the means in the training log."""
        return {
            "searches": self.searches,
            "turns": len(self.turns),
            "policy_tokens": self.policy_tokens,
            "observation_tokens": self.observation_tokens,
            "invalid_actions": sum(turn.kind == "invalid" for turn in self.turns),
            "cut_turns": sum(turn.is_cut for turn in self.turns),
            "cut_observations": self.cut_observations,
            "retries": sum(turn.retries for turn in self.searched_turns),
            "short_replies": sum(turn.short_replies for turn in self.searched_turns),
        }

    def append_sampled(self, sampled: SampledTurn) -> None:
        """Append what the policy sampled."""
        self.completion_ids += sampled.token_ids
        self.logprobs += sampled.logprobs
        self.env_mask += [1] * len(sampled.token_ids)

    def drop_last_sampled(self, text: str) -> None:
        """Take out the id that was sampled last; `text` is that of its turn without it."""
        for kept in (self.completion_ids, self.env_mask, self.logprobs):
            kept.pop()
        self.turns[-1].num_tokens -= 1
        self.turns[-1].text = text

    def append_environment(self, token_ids: Sequence[int]) -> None:
        """Append what the environment says."""
        self.completion_ids += token_ids
        self.logprobs += [0.0] * len(token_ids)
        self.env_mask += [0] * len(token_ids)

    def to_record(self, row: Mapping[str, Any], prompt: str, step: int | None = None) -> dict[str, Any]:
        """Return what `trajectories.jsonl` holds: the row, what came of it, and its text by who wrote it."""
        segments: list[dict[str, Any]] = [{"source": "prompt", "text": prompt, "noisy": None}]
        for turn in self.turns:
            segments.append({"source": "policy", "text": turn.text, "noisy": None})
            if turn.observation:
                source = "documents" if turn.kind == "search" else "hint"
                segments.append({"source": source, "text": turn.observation, "noisy": turn.noisy})
                if turn.was_read:
                    segments[-1]["documents"] = list(turn.documents)
        return {
            "id": row.get("id"),
            "dataset": row.get("dataset"),
            "question": row["question"],
            "golden_answers": list(row["golden_answers"]),
            "step": step,
            "answer": self.answer,
            "outcome": self.outcome,
            **self.counts(),
            "generation_s": sum(turn.generation_s for turn in self.turns),
            "search_s": sum(turn.latency_s or 0.0 for turn in self.searched_turns),
            "p_noise": self.p_noise,
            "f1": f1(self.answer, row["golden_answers"]),
            "em": exact_match(self.answer, row["golden_answers"]),
            "segments": segments,
        }


@dataclass
class RolloutClock:
    """Where a rollout's wall time went, in seconds; rollouts that share a clock add up."""

    rollout_s: float = 0.0
    generating_s: float = 0.0  # inside the generator
    waiting_s: float = 0.0  # nothing to generate: every live trajectory waits for documents

    @property
    def idle_s(self) -> float:
        """Return the time in which the engine stood still for our own bookkeeping."""
        return self.rollout_s - self.generating_s - self.waiting_s

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)
