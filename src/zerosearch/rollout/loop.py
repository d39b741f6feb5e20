"""The one loop for training, evaluation and chat: each trajectory goes its own way, turn by turn, search by search.

A trajectory generates a turn; an answer ends it; a search goes to the engine with the trajectory's own question and
answers while the others decode on; the documents are appended and the next turn starts the moment they arrive.

1. Token ids in, token ids out: what was sampled is kept as sampled; what the environment adds is tokenised on its own.
2. `env_mask` is 1 for ids the policy sampled and 0 for ids the environment added.
3. Only the policy's text of the current turn is read for an action. Tags in documents are text, and special tokens in
   questions, queries and documents become plain text.
4. Randomness is keyed by (seed, step, row, sample, turn), so arrival order changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tqdm.auto import tqdm

from zerosearch.engines import BudgetSpent, SearchEngine, SearchError, SearchRequest, SearchResult
from zerosearch.errors import UserError
from zerosearch.generation import (
    CollectiveGenerator,
    GenerationError,
    Generator,
    RemoteGenerator,
    SampledTurn,
    Sampling,
    TurnRequest,
)
from zerosearch.generation.tokenization import (
    decoded_text,
    fit_observation,
    plain_text,
    prompt_token_ids,
    special_ids,
    text_token_ids,
)
from zerosearch.noise import keyed_uniform
from zerosearch.prompts import PAPER, Agent, reading_prompt
from zerosearch.protocol import format_documents, parse_action
from zerosearch.rollout.in_flight import Arrival, InFlight, TimedOut
from zerosearch.rollout.trajectory import Outcome, RolloutClock, Trajectory, Turn, noisy_share
from zerosearch.rollout.watchdog import Watchdog
from zerosearch.text import without_thoughts

# Ends the key of a turn's sampling, so that it is another number than the coin of the same turn's search.
SAMPLING_STREAM, READING_STREAM = 1_000_003, 1_000_033
LOOKUP_TURN = 1_000_037  # stands for the turn in the key of the search for the question itself

Event = Literal["turn", "observation", "end"]


@dataclass(frozen=True)
class RolloutSettings:
    """Budgets and sampling of a rollout. Token counts are the policy's tokens.

    `max_turns` turns may search; one last turn that may only answer follows. `max_trajectory_tokens` counts the prompt
    too. `search_timeout_s` bounds one search with all its retries, whatever the engine does. A turn elsewhere may take
    `turn_timeout_s`, retries included, and here some turn must end within it; else the rollout fails.
    """

    max_turns: int = 2  # the released scripts of the paper's time, and the authors in issue 29 of their repository
    max_turn_tokens: int = 500  # max_response_length of the released scripts
    max_observation_tokens: int = 500  # max_obs_length of the released scripts of the paper's time
    max_trajectory_tokens: int = 4096  # max_prompt_length of the released scripts
    temperature: float = 1.0
    top_p: float = 1.0  # below 1, log-probabilities are no longer those of the policy
    search_timeout_s: float = 1800.0
    turn_timeout_s: float = 3600.0
    noise_per_group: bool = False  # the samples of a group toss the same coin, so that they differ by the policy only

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_turn_tokens", "max_observation_tokens", "max_trajectory_tokens"):
            minimum = 0 if name == "max_turns" else 1
            if getattr(self, name) < minimum:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {minimum}")
        for name in ("search_timeout_s", "turn_timeout_s"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}: it must be a number of seconds above 0")


def run_rollouts(
    rows: Sequence[Mapping[str, Any]],
    generator: Generator | RemoteGenerator,
    engine: SearchEngine,
    settings: RolloutSettings,
    *,
    p_noise: float = 0.0,
    keys: Sequence[tuple[int, ...]] | None = None,
    clock: RolloutClock | None = None,
    progress: bool = False,
    agent: Agent = PAPER.policy,
    max_live: int | None = None,
    watch: Callable[[int, Trajectory, Event], None] | None = None,
    may_go_on: Callable[[], bool] | None = None,
) -> list[Trajectory]:
    """Roll out one trajectory per row `{question, golden_answers}` and return them in the rows' order.

    `agent` says how the model is asked and its turns go; a row with a `prompt` of its own is asked that. `keys` holds
    (seed, step, row, sample) for each row; by default (0, 0, place in `rows`, 0). `p_noise` is the probability that a
    search is asked for noisy documents. `clock` collects where the time went. At most `max_live` trajectories run at
    once, the first rows first. `watch` is told of each turn, observation and end; its errors end the rollout. Once
    `may_go_on` returns false nothing more is started: what is under way comes to its end, and a trajectory that would
    need another turn stays without an outcome; so does one whose search exceeded the engine's budget by then.
    A search that fails for good ends its own trajectory, whatever the engine raised or returned instead.
    Raises `SearchError` if an engine blocks.
    Raises `GenerationError` if the generator fails, or makes no progress within the time limits of `settings`.
    """
    keys = keys or [(0, 0, index, 0) for index in range(len(rows))]
    clock = clock or RolloutClock()
    with clock.timing("rollout_s"), generator.session(Sampling(settings.temperature, settings.top_p)):
        rollout = _Rollout(rows, keys, generator, engine, settings, p_noise, clock, agent, max_live, watch, may_go_on)
        try:
            rollout.run(progress)
        finally:
            rollout.in_flight.cancel()
    return rollout.trajectories


class _Rollout:
    """The state of one call of `run_rollouts`; a trajectory is known by its index."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        keys: Sequence[tuple[int, ...]],
        generator: Generator | RemoteGenerator,
        engine: SearchEngine,
        settings: RolloutSettings,
        p_noise: float,
        clock: RolloutClock,
        agent: Agent,
        max_live: int | None,
        watch: Callable[[int, Trajectory, Event], None] | None,
        may_go_on: Callable[[], bool] | None,
    ) -> None:
        assert len(keys) == len(rows), "one key a row"
        self.rows, self.keys = rows, keys
        self.engine, self.settings, self.p_noise, self.clock = engine, settings, p_noise, clock
        self.tokenizer = generator.tokenizer
        self.special_ids = special_ids(generator.tokenizer)
        self.agent, self.watch, self.may_go_on = agent, watch, may_go_on or (lambda: True)
        self.max_turns = settings.max_turns if agent.max_turns is None else agent.max_turns
        self.max_live = max_live or len(rows)
        self.num_begun = self.num_ended = 0
        self.context_limit = min(settings.max_trajectory_tokens, generator.max_context_tokens)
        # One of the two is there: turns are sampled here or elsewhere.
        self.local = None if isinstance(generator, RemoteGenerator) else generator
        self.remote = generator if isinstance(generator, RemoteGenerator) else None
        self.in_flight = InFlight()
        self.watchdog = Watchdog(
            settings.turn_timeout_s,
            f"the inference engine did not end a step within turn_timeout_s ({settings.turn_timeout_s:g} s); "
            "see below where it stood, and resume the run from its last checkpoint",
        )
        self.search_limit = asyncio.Semaphore(engine.max_concurrency)
        self.turn_limit = asyncio.Semaphore(self.remote.max_concurrency if self.remote else 1)
        self.trajectories = [Trajectory(self._prompt_ids(row), p_noise) for row in rows]
        self.to_submit: list[TurnRequest] = []  # of turns sampled here: the next step begins with them
        self.turn_starts: dict[int, float] = {}
        # When a turn that is sampled here last ended, or was submitted while no other was in flight.
        self.last_progress = time.perf_counter()
        self.num_generating = 0
        self.num_searching = 0

    def _prompt_ids(self, row: Mapping[str, Any], documents: str | None = None) -> list[int]:
        """Tokenise the agent's prompt, in which question and documents are plain text, or the row's own, all of it."""
        if documents is None and "prompt" in row and row["prompt"] != self.agent.messages(row["question"]):
            return prompt_token_ids(self.tokenizer, row["prompt"])
        messages = self.agent.messages(self._plain(row["question"]), documents or "")
        return prompt_token_ids(self.tokenizer, messages, is_plain=True)

    def run(self, progress: bool) -> None:
        """Advance every trajectory to its end."""
        with tqdm(total=len(self.rows), desc="trajectories", disable=not progress) as bar, self.watchdog:
            self._begin_more()
            while self.num_generating or self.num_searching:
                for arrival in self._arrivals():
                    if arrival.kind == "search":
                        self._observe(arrival)
                    else:
                        self._receive(arrival)
                if self.local and self.num_generating:
                    self._step(self.local)
                self._begin_more()
                bar.update(self.num_ended - bar.n)

    def _begin_more(self) -> None:
        """Begin as many trajectories as may be under way."""
        while self.num_begun < len(self.rows) and self.num_begun - self.num_ended < self.max_live and self.may_go_on():
            self.num_begun += 1
            if self.agent.looks_up_question:
                self._search(self.num_begun - 1, self.rows[self.num_begun - 1]["question"])
            else:
                self._begin(self.num_begun - 1)

    def _begin(self, index: int) -> None:
        """Start the first turn."""
        if self.max_turns == 0:
            self.trajectories[index].prompt_ids += self._encode(self.agent.last_turn_opening)
        self._start_turn(index)

    def _arrivals(self) -> list[Arrival]:
        """Send off what is queued, and return what has arrived; wait for it only when there is nothing to do here."""
        self.in_flight.send_off()
        if self.local and self.num_generating:
            return self.in_flight.done()
        with self.clock.timing("generating_s" if self.num_generating else "waiting_s"):
            if isinstance(self.local, CollectiveGenerator):
                with self.watchdog.watching():
                    self.local.attend()
                return self.in_flight.done()
            try:
                return self.in_flight.wait()
            except TimedOut:
                name = self.remote.name if self.remote and self.num_generating else f"the engine {self.engine.name}"
                raise SearchError(
                    f"{name} did not come back within its time limit: does it block? A search must await what it "
                    "waits for (asyncio.to_thread runs what blocks)"
                ) from None

    def _start_turn(self, index: int) -> None:
        trajectory = self.trajectories[index]
        used = len(trajectory.prompt_ids) + len(trajectory.completion_ids)
        room = min(self.settings.max_turn_tokens, self.context_limit - used)
        if room < 1:
            self._end(index, "truncated")
            return
        self._sample(index, trajectory.prompt_ids + trajectory.completion_ids, room, SAMPLING_STREAM)

    def _sample(self, index: int, context_ids: list[int], room: int, stream: int) -> None:
        """Have a turn sampled, or notes on documents, which go by the number of their trajectory plus that of rows."""
        if not self.may_go_on():
            return
        key = (*self.keys[index], len(self.trajectories[index].turns), stream)
        number = index + len(self.rows) * (stream == READING_STREAM)
        request = TurnRequest(number, context_ids, room, seed=int(keyed_uniform(*key) * 2**53))
        self.num_generating += 1
        if self.remote:
            sample = partial(self.remote.sample, request)
            self.in_flight.start("turn", number, sample, self.turn_limit, self.settings.turn_timeout_s)
        else:
            self.to_submit.append(request)
            self.turn_starts[number] = time.perf_counter()
            if self.num_generating == 1:
                self.last_progress = self.turn_starts[number]

    def _step(self, generator: Generator) -> None:
        """Advance the turns that are sampled here, and do what those say that ended.

        All new turns are submitted together, after all observations are tokenised: tokenising between submissions
        takes a fifth longer, for cold caches alone.
        """
        with self.clock.timing("generating_s"), self.watchdog.watching():
            for request in self.to_submit:
                generator.submit(request)
            self.to_submit.clear()
            finished = generator.step()
        now = time.perf_counter()
        limit_s = self.settings.turn_timeout_s
        if not finished and now - self.last_progress > limit_s:
            raise GenerationError(
                f"none of {self.num_generating} turns has ended within turn_timeout_s ({limit_s:g} s): the inference "
                "engine makes no progress (too little memory for keys and values?), or turn_timeout_s is too low"
            )
        for sampled in finished:
            self.last_progress = now
            self._act(sampled, now - self.turn_starts.pop(sampled.trajectory))

    def _receive(self, arrival: Arrival) -> None:
        """Take a turn that was sampled elsewhere."""
        assert self.remote is not None
        if isinstance(arrival.outcome, TimedOut):
            limit_s = self.settings.turn_timeout_s
            raise GenerationError(f"{self.remote.name} sampled no turn within turn_timeout_s ({limit_s:g} s)")
        if isinstance(arrival.outcome, BaseException):
            raise arrival.outcome
        self._act(arrival.outcome, arrival.seconds)

    def _act(self, sampled: SampledTurn, generation_s: float) -> None:
        """Read the action of a finished turn and do what it says."""
        self.num_generating -= 1
        index = sampled.trajectory
        text = decoded_text(self.tokenizer, sampled.token_ids)
        if index >= len(self.rows):
            self._take_notes(index - len(self.rows), text, len(sampled.token_ids))
            return
        trajectory = self.trajectories[index]
        is_last = len(trajectory.turns) == self.max_turns
        used = len(trajectory.prompt_ids) + len(trajectory.completion_ids)
        action = parse_action(self.agent.last_turn_opening + text if is_last else text)
        trajectory.append_sampled(sampled)
        is_cut = sampled.finish == "length"
        turn = Turn(text, action.kind, action.content, len(sampled.token_ids), is_cut, generation_s)
        trajectory.turns.append(turn)
        self._tell(index, "turn")
        cut_by_context = is_cut and self.context_limit - used < self.settings.max_turn_tokens
        if action.kind == "answer":
            trajectory.answer = action.content
            self._end(index, "answered")
        elif cut_by_context:
            self._end(index, "truncated")
        elif is_last:
            self._end(index, "turns_exhausted")
        elif action.kind == "search" and self.agent.gets_documents:
            self._search(index, action.content)
        elif action.kind == "search":
            nothing_found = self.agent.write_observation(())
            self._append_observation(index, nothing_found, self._encode(nothing_found))
        else:
            self._append_observation(index, self.agent.hint, self._encode(self.agent.hint))

    def _search(self, index: int, query: str) -> None:
        if not self.may_go_on():
            return
        row, trajectory = self.rows[index], self.trajectories[index]
        if not trajectory.turns:
            trajectory.lookup = Turn("", "search", query, 0)
        *group_key, sample = self.keys[index]
        turn = len(trajectory.turns) - 1 if trajectory.turns else LOOKUP_TURN
        request = SearchRequest(
            query=self._plain(query),
            question=row["question"],
            golden_answers=tuple(row["golden_answers"]),
            p_noise=self.p_noise,
            key=(*group_key, 0 if self.settings.noise_per_group else sample, turn),
        )
        search = partial(self.engine.search, request)
        self.in_flight.start("search", index, search, self.search_limit, self.settings.search_timeout_s)
        self.num_searching += 1

    def _observe(self, arrival: Arrival) -> None:
        """Append the documents of a search and go on, or end the trajectory whose search failed."""
        self.num_searching -= 1
        index, outcome = arrival.trajectory, self._search_outcome(arrival.outcome)
        trajectory = self.trajectories[index]
        turn = trajectory.turns[-1] if trajectory.turns else trajectory.lookup
        assert turn is not None
        turn.latency_s = arrival.seconds
        if isinstance(outcome, BudgetSpent) and not self.may_go_on():
            return
        if isinstance(outcome, SearchError):
            turn.retries = outcome.retries
            trajectory.error = str(outcome)
            self._end(index, "failed_search")
        else:
            turn.documents = self.agent.show_documents(outcome.documents, outcome.titles)
            turn.noisy, turn.retries = outcome.noisy, outcome.retries
            turn.noisy_share, turn.short_replies = noisy_share(outcome), outcome.short_replies
            if turn is trajectory.lookup:
                self._begin_with_documents(index, turn.documents)
            elif self.agent.reading_template:
                self._read(index, turn, self.agent.reading_template)
            else:
                text, token_ids, turn.is_observation_cut = self._fit(turn.documents, self.agent.write_observation)
                self._append_observation(index, text, token_ids)

    def _search_outcome(self, outcome: Any) -> SearchResult | SearchError:
        """Return what came of a search; whatever an engine should not have done is a failed search that says so."""
        name = f"the engine {self.engine.name}"
        if isinstance(outcome, SearchError):
            return outcome
        if isinstance(outcome, TimedOut):
            return SearchError(f"{name} gave no reply within {self.settings.search_timeout_s:g} s")
        if isinstance(outcome, BaseException):
            return SearchError(
                f"{name} raised {type(outcome).__name__}: {outcome}; a search returns a SearchResult, or raises "
                "SearchError once it has failed for good"
            )
        if isinstance(outcome, SearchResult) and all(isinstance(text, str) for text in outcome.documents):
            return outcome
        returned = "documents that are not all texts" if isinstance(outcome, SearchResult) else f"{outcome!r:.60}"
        return SearchError(f"{name} returned {returned}; a search returns a SearchResult")

    def _fit(self, documents: Sequence[str], write: Callable[[Sequence[str]], str]) -> tuple[str, list[int], bool]:
        return fit_observation(documents, self.settings.max_observation_tokens, self._encode, write)

    def _begin_with_documents(self, index: int, documents: Sequence[str]) -> None:
        """Write the documents into the prompt and start the first turn."""
        text, *_ = self._fit([self._plain(document) for document in documents], format_documents)
        self.trajectories[index].prompt_ids = self._prompt_ids(self.rows[index], text)
        self._tell(index, "observation")
        self._begin(index)

    def _read(self, index: int, turn: Turn, template: str) -> None:
        """Ask the model, apart from the trajectory, for notes on the documents of a search."""
        prompt = reading_prompt(
            question=self._plain(self.rows[index]["question"]),
            reasoning=self._plain(" ".join(" ".join(turn.text.split()) for turn in self.trajectories[index].turns)),
            query=self._plain(turn.content),
            documents=self._fit([self._plain(document) for document in turn.documents], format_documents)[0],
            template=template,
        )
        context_ids = prompt_token_ids(self.tokenizer, [{"role": "user", "content": prompt}], is_plain=True)
        room = min(self.settings.max_turn_tokens, self.context_limit - len(context_ids))
        if room < 1:
            self._end(index, "truncated")
        else:
            self._sample(index, context_ids, room, READING_STREAM)

    def _take_notes(self, index: int, text: str, num_tokens: int) -> None:
        """Append notes on documents where the documents would stand. They are text: no tag in them is an action."""
        if self.local:
            self.local.release(index + len(self.rows))
        trajectory = self.trajectories[index]
        trajectory.reading_tokens += num_tokens
        trajectory.turns[-1].was_read = True
        notes = self._plain(without_thoughts(text))
        text, token_ids, _ = self._fit([notes], lambda notes: f"\n\n<information>{notes[0]}</information>\n\n")
        self._append_observation(index, text, token_ids)

    def _append_observation(self, index: int, text: str, token_ids: Sequence[int]) -> None:
        trajectory = self.trajectories[index]
        if len(trajectory.turns) == self.max_turns and self.agent.last_turn_opening:
            text += self.agent.last_turn_opening
            token_ids = [*token_ids, *self._encode(self.agent.last_turn_opening)]
        used = len(trajectory.prompt_ids) + len(trajectory.completion_ids)
        if used + len(token_ids) >= self.context_limit:  # no token of the next turn would fit behind it
            self._end(index, "truncated")
            return
        turn = trajectory.turns[-1]
        keeps_end = self.agent.keeps_end_of_sequence or not turn.num_tokens
        if not keeps_end and trajectory.completion_ids[-1] in self.special_ids:
            own_ids = trajectory.completion_ids[-turn.num_tokens : -1]
            trajectory.drop_last_sampled(decoded_text(self.tokenizer, own_ids))
        turn.observation, turn.num_observation_tokens = text, len(token_ids)
        trajectory.append_environment(token_ids)
        self._tell(index, "observation")
        self._start_turn(index)

    def _end(self, index: int, outcome: Outcome) -> None:
        trajectory = self.trajectories[index]
        trajectory.outcome = outcome
        # TRL tells a finished trajectory from a cut one by its last id; and it needs at least one id.
        finished = outcome == "answered" and trajectory.completion_ids[-1] != self.tokenizer.eos_token_id
        if finished or not trajectory.completion_ids:
            trajectory.append_environment([self.tokenizer.eos_token_id])
        if self.local:
            self.local.release(index)
        self.num_ended += 1
        self._tell(index, "end")

    def _tell(self, index: int, event: Event) -> None:
        if self.watch:
            self.watch(index, self.trajectories[index], event)

    def _plain(self, text: str) -> str:
        return plain_text(text, self.tokenizer)

    def _encode(self, text: str) -> list[int]:
        return text_token_ids(self.tokenizer, text)
