"""Searches as an environment of TRL's: a stock `GRPOTrainer` with a model that calls tools trains on any engine here.

    curriculum = Curriculum(NoiseSchedule(0.0, 0.5))
    GRPOTrainer(..., environment_factory=partial(SearchEnvironment, engine, curriculum), callbacks=[curriculum],
                reward_funcs=answer_reward)

TRL 1.16 makes an instance for each trajectory of a batch and runs their searches one after another: where a search
takes a second, 320 trajectories wait more than five minutes a turn. `SearchTrainer` keeps all of them in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zerosearch.data import row_number
from zerosearch.engines import SearchEngine, SearchError, SearchRequest
from zerosearch.http import run_in_background
from zerosearch.metrics import f1
from zerosearch.noise import NoiseSchedule
from zerosearch.protocol import INVALID, format_documents, parse_action

# For `tokenizer.response_template`: TRL takes a search in the paper's tags for a call of the tool `search`. Where a
# turn starts, `start_anchor_pattern`, is the prompt's affair.
TAGS_AS_CALLS = {
    "defaults": {"role": "assistant"},
    "fields": {
        "tool_calls": {
            "open": "<search>",
            "close": "</search>",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "search", "arguments": {"query": "{content}"}}},
        },
        "content": {"content": "text"},
    },
}


@dataclass(eq=False)
class Curriculum(TrainerCallback):
    """Tell the environments which step they are in, and so how likely a search is noisy."""

    schedule: NoiseSchedule
    seed: int = 0
    step: int = 1
    total_steps: int = 1

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step, self.total_steps = state.global_step + 1, state.max_steps

    def p_noise(self) -> float:
        """Return the probability of noisy documents in this step."""
        return self.schedule.p_noise(self.step, self.total_steps)


class SearchEnvironment:
    """One trajectory: a question, and the searches made for it. Its one tool is `search`.

    Noise and sampling are keyed by seed, step, question, instance and turn. A search that fails for good is kept in
    `failure`: TRL shows the policy its message and goes on, until `answer_reward` raises it.

    >>> from zerosearch.environment import Curriculum, NoiseSchedule, SearchEnvironment, answer_reward
    >>> environment = SearchEnvironment(BM25Engine("corpus.jsonl", 1), Curriculum(NoiseSchedule(0.0, 0.5)))
    >>> environment.reset(question="Where does Karin Rowe hail from?", golden_answers=["Port Elsford"])
    >>> environment.search("Karin Rowe hails from")
    'Doc 1: Karin Rowe hails from Port Elsford.'
    >>> last = {"role": "assistant", "content": "<answer> Port Elsford </answer>"}
    >>> answer_reward([[last]], [["Port Elsford"]], [environment])
    [1.0]
    """

    _numbers = count()

    def __init__(self, engine: SearchEngine, curriculum: Curriculum) -> None:
        self._engine, self._curriculum, self._number = engine, curriculum, next(self._numbers)

    def reset(self, **row: Any) -> None:
        """Begin with a row `{id, question, golden_answers}`."""
        self._row, self._turn = row, 0
        self.failure: SearchError | None = None

    def search(self, query: str) -> str:
        """Search for documents.

        Args:
            query: What to search for.

        Returns:
            The documents found.
        """
        where = self._curriculum
        key = (
            where.seed,
            where.step,
            row_number({"id": self._row["question"], **self._row}),
            self._number,
            self._turn,
        )
        self._turn += 1
        request = SearchRequest(query, self._row["question"], tuple(self._row["golden_answers"]), where.p_noise(), key)
        try:
            return format_documents(run_in_background(self._engine.search(request)).documents)
        except SearchError as error:
            self.failure = error
            raise


def answer_reward(
    completions: Sequence[Sequence[dict[str, Any]]],
    golden_answers: Sequence[Sequence[str]],
    environments: Sequence[SearchEnvironment],
    **kwargs: Any,
) -> list[float]:
    """Score what stands between <answer> and </answer> in the policy's last message by F1 (Section 3.5).

    Raises the `SearchError` of a trajectory whose search has failed, and so ends the run.
    """
    scores = []
    for completion, golden, environment in zip(completions, golden_answers, environments, strict=True):
        if environment.failure:
            raise environment.failure
        last = completion[-1]  # what a tool said, where the trajectory was cut off behind it
        action = parse_action(last.get("content") or "") if last["role"] == "assistant" else INVALID
        scores.append(f1(action.content if action.kind == "answer" else None, golden))
    return scores
