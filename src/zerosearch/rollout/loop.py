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

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from tqdm.auto import tqdm

from zerosearch.command_line import check_bounds
from zerosearch.engines import BudgetSpent, SearchEngine, SearchError, SearchRequest
from zerosearch.files import json_object
from zerosearch.generation import (
    GenerationError,
    Generator,
    RemoteGenerator,
    SampledTurn,
    Sampling,
    SharedGenerator,
    TurnRequest,
)
from zerosearch.generation.tokenization import decoded_text, special_ids
from zerosearch.noise import keyed_uniform
from zerosearch.prompts import PAPER, Agent
from zerosearch.protocol import parse_action
from zerosearch.rollout.in_flight import Arrival, ArrivalKind, InFlight, TimedOut, search_outcome
from zerosearch.rollout.observations import Observation, ObservationWriter
from zerosearch.rollout.trajectory import Outcome, RolloutClock, Trajectory, Turn
from zerosearch.rollout.watchdog import Watchdog

# Ends the key of a turn's sampling, so that it is another number than the coin of the same turn's search.
SAMPLING_STREAM, READING_STREAM = 1_000_003, 1_000_033
LOOKUP_TURN = 1_000_037  # stands for the turn in the key of the search for the question itself

SECONDS = {"above": 0, "max": 1e9}

Event = Literal["turn", "observation", "end"]


@dataclass
class Budgets:
    """How long a trajectory may get. Token counts are the policy's tokens.

    Not frozen: `SearchConfig`, which transformers changes, is one of these, too.
    """

    # As in the released scripts of the paper's time, and max_turns in issue 29 of their repository.
    max_turns: int = field(
        default=2, metadata={"min": 0, "help": "Turns that may search; one last turn that may only answer follows."}
    )
    # Theirs are max_response_length, max_obs_length and max_prompt_length.
    max_turn_tokens: int = field(default=500, metadata={"min": 1, "help": "Longest turn."})
    max_observation_tokens: int = field(
        default=500, metadata={"min": 1, "help": "Longest observation, tags included."}
    )
    max_trajectory_tokens: int = field(
        default=4096, metadata={"min": 1, "help": "Longest trajectory, prompt included."}
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass
class RolloutSettings(Budgets):
    """Budgets and sampling of a rollout.

    `search_timeout_s` bounds one search with all its retries, whatever the engine does. A turn elsewhere may take
    `turn_timeout_s`, retries included, and here some turn must end within it; else the rollout fails.
    """

    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 takes the likeliest token."})
    top_p: float = field(
        default=1.0, metadata={"help": "Below 1, log-probabilities are no longer those of the policy."}
    )
    search_timeout_s: float = field(
        default=1800.0,
        metadata={**SECONDS, "help": "Longest search, with all its retries; then it has failed (our choice)."},
    )
    turn_timeout_s: float = field(
        default=3600.0,
        metadata={**SECONDS, "help": "Longest turn; if none ends within it, the rollout fails (our choice)."},
    )
    noise_per_group: bool = field(
        default=False,
        metadata={"help": "One coin a turn for all samples of a prompt, so that they differ by the policy only."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'JSON for the chat template, such as {"enable_thinking": false}.'}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json_object(self.chat_template_kwargs.encode(), "chat_template_kwargs")


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

    >>> from zerosearch.generation.loading import load_generator
    >>> policy = load_generator("data/tinyworld/policy", "transformers", max_context_tokens=640)
    >>> rows = [{"question": "Where does Karin Rowe hail from?", "golden_answers": ["Port Elsford"]}]
    >>> settings, agent = RolloutSettings(temperature=0.0), PROMPT_SETS["tinyworld"].agents["rag"]
    >>> (trajectory,) = run_rollouts(rows, policy, BM25Engine("corpus.jsonl"), settings, agent=agent)
    >>> trajectory.searches, trajectory.outcome, trajectory.answer
    (1, 'answered', 'Port Elsford')
    """
    keys = keys or [(0, 0, index, 0) for index in range(len(rows))]
    clock = clock or RolloutClock()
    sampling = Sampling(settings.temperature, settings.top_p, agent.grammar.stop_strings)
    with clock.timing("rollout_s"), generator.session(sampling):
        rollout = _Rollout(
            rows,
            keys,
            generator,
            engine,
            settings,
            p_noise,
            clock,
            agent,
            max_live or len(rows),
            watch or (lambda index, trajectory, event: None),
            may_go_on or (lambda: True),
        )
        try:
            rollout.run(progress)
        finally:
            rollout.in_flight.cancel()
    return rollout.trajectories


@dataclass
class _Rollout:
    """The state of one call of `run_rollouts`; a trajectory is known by its index."""

    rows: Sequence[Mapping[str, Any]]
    keys: Sequence[tuple[int, ...]]
    generator: Generator | RemoteGenerator
    engine: SearchEngine
    settings: RolloutSettings
    p_noise: float
    clock: RolloutClock
    agent: Agent
    max_live: int
    watch: Callable[[int, Trajectory, Event], None]
    may_go_on: Callable[[], bool]

    def __post_init__(self) -> None:
        assert len(self.keys) == len(self.rows), "one key a row"
        generator, settings = self.generator, self.settings
        self.tokenizer = generator.tokenizer
        tags = self.agent.grammar.tags  # which a tokenizer may have as special tokens, too
        self.end_ids = {one for one in special_ids(self.tokenizer) if decoded_text(self.tokenizer, [one]) not in tags}
        template_kwargs = settings.chat_template_kwargs
        assert not isinstance(template_kwargs, str), "read from JSON when the settings were made"
        self.writer = ObservationWriter(
            generator.tokenizer, self.agent, settings.max_observation_tokens, template_kwargs
        )
        self.max_turns = self.agent.turns(settings.max_turns)
        self.num_begun = self.num_ended = 0
        self.context_limit = min(settings.max_trajectory_tokens, generator.max_context_tokens)
        # One of the two is there: turns are sampled here or elsewhere.
        self.local = None if isinstance(generator, RemoteGenerator) else generator
        self.remote = generator if isinstance(generator, RemoteGenerator) else None
        limits: dict[ArrivalKind, tuple[int, float]] = {
            "search": (self.engine.max_concurrency, settings.search_timeout_s)
        }
        if self.remote:
            limits["turn"] = (self.remote.max_concurrency, settings.turn_timeout_s)
        self.in_flight = InFlight(limits)
        self.watchdog = Watchdog(
            settings.turn_timeout_s,
            f"the inference engine did not end a step within turn_timeout_s ({settings.turn_timeout_s:g} s); "
            "see below where it stood, and resume the run from its last checkpoint",
        )
        self.trajectories = [Trajectory(self.writer.prompt_ids(row), self.p_noise) for row in self.rows]
        self.to_submit: list[TurnRequest] = []  # of turns sampled here: the next step begins with them
        self.turn_starts: dict[int, float] = {}
        # When a turn that is sampled here last ended, or was submitted while no other was in flight.
        self.last_progress = time.perf_counter()
        self.num_generating = 0
        self.num_searching = 0

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
            index = self.num_begun
            self.num_begun += 1
            if self.agent.looks_up_question:
                question = self.rows[index]["question"]
                self.trajectories[index].lookup = Turn("", "search", question, 0)
                self._search(index, question, LOOKUP_TURN)
            else:
                self._begin(index)

    def _begin(self, index: int) -> None:
        if self.max_turns == 0:
            self.trajectories[index].prompt_ids += self.writer.encode(self.agent.last_turn_opening)
        self._start_turn(index)

    def _arrivals(self) -> list[Arrival]:
        """Send off what is queued, and return what has arrived; wait for it only when there is nothing to do here."""
        self.in_flight.send_off()
        if self.local and self.num_generating:
            return self.in_flight.done()
        with self.clock.timing("generating_s" if self.num_generating else "waiting_s"):
            if isinstance(self.local, SharedGenerator):
                with self.watchdog.watching():
                    self.local.attend()
                return self.in_flight.done()
            try:
                return self.in_flight.wait()
            except TimedOut:
                asked = [f"the engine {self.engine.name}"] if self.num_searching else []
                if self.remote and self.num_generating:
                    asked.append(self.remote.name)
                raise SearchError(
                    f"{' or '.join(asked)} did not come back within its time limit: does it block? A search must "
                    "await what it waits for (asyncio.to_thread runs what blocks)"
                ) from None

    def _start_turn(self, index: int) -> None:
        trajectory = self.trajectories[index]
        self._sample(index, trajectory.prompt_ids + trajectory.completion_ids, SAMPLING_STREAM)

    def _sample(self, index: int, context_ids: list[int], stream: int) -> None:
        """Have a turn sampled, or notes on documents, which go by the number of their trajectory plus that of rows."""
        room = min(self.settings.max_turn_tokens, self.context_limit - len(context_ids))
        if room < 1:
            self._end(index, "truncated")
            return
        if not self.may_go_on():
            return
        key = (*self.keys[index], len(self.trajectories[index].turns), stream)
        number = index + len(self.rows) * (stream == READING_STREAM)
        request = TurnRequest(number, context_ids, room, seed=int(keyed_uniform(*key) * 2**53))
        self.num_generating += 1
        if self.remote:
            self.in_flight.start("turn", number, partial(self.remote.sample, request))
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
        action = parse_action(self.agent.last_turn_opening + text if is_last else text, self.agent.grammar)
        trajectory.append_sampled(sampled)
        is_cut = sampled.finish == "length"
        turn = Turn(text, action.kind, action.content, len(sampled.token_ids), is_cut, generation_s)
        trajectory.turns.append(turn)
        self.watch(index, trajectory, "turn")
        cut_by_context = is_cut and self.context_limit - used <= self.settings.max_turn_tokens
        if action.kind == "answer":
            trajectory.answer = action.content
            self._end(index, "answered")
        elif cut_by_context:
            self._end(index, "truncated")
        elif is_last:
            self._end(index, "turns_exhausted")
        elif action.kind == "invalid":
            self._append(index, self.writer.hint())
        elif self.agent.gets_documents:
            self._search(index, action.content, len(trajectory.turns) - 1)
        else:
            self._append(index, self.writer.documents(()))

    def _search(self, index: int, query: str, turn: int) -> None:
        if not self.may_go_on():
            return
        row = self.rows[index]
        *group_key, sample = self.keys[index]
        request = SearchRequest(
            query=self.writer.plain(query),
            question=row["question"],
            golden_answers=tuple(row["golden_answers"]),
            p_noise=self.p_noise,
            key=(*group_key, 0 if self.settings.noise_per_group else sample, turn),
        )
        self.in_flight.start("search", index, partial(self.engine.search, request))
        self.num_searching += 1

    def _observe(self, arrival: Arrival) -> None:
        """Append the documents of a search and go on, or end the trajectory whose search failed."""
        self.num_searching -= 1
        index = arrival.trajectory
        outcome = search_outcome(arrival.outcome, self.engine.name, self.settings.search_timeout_s)
        trajectory = self.trajectories[index]
        turn = trajectory.turns[-1] if trajectory.turns else trajectory.lookup
        assert turn is not None
        turn.latency_s = arrival.seconds
        if isinstance(outcome, BudgetSpent) and not self.may_go_on():
            return
        turn.retries = outcome.retries
        if isinstance(outcome, SearchError):
            trajectory.error = str(outcome)
            self._end(index, "failed_search")
            return
        turn.documents = self.agent.show_documents(outcome.documents, outcome.titles)
        turn.noisy, turn.short_replies = outcome.noisy, outcome.short_replies
        if turn is trajectory.lookup:
            trajectory.prompt_ids = self.writer.prompt_ids(self.rows[index], turn.documents)
            self.watch(index, trajectory, "observation")
            self._begin(index)
        elif template := self.agent.reading_template:
            question = self.rows[index]["question"]
            context_ids = self.writer.reading_prompt_ids(question, trajectory.turns, template)
            self._sample(index, context_ids, READING_STREAM)
        else:
            observation = self.writer.documents(turn.documents)
            turn.is_observation_cut = observation.is_cut
            self._append(index, observation)

    def _take_notes(self, index: int, text: str, num_tokens: int) -> None:
        """Append notes on documents, sampled apart from the trajectory."""
        if self.local:
            self.local.release(index + len(self.rows))
        trajectory = self.trajectories[index]
        trajectory.reading_tokens += num_tokens
        trajectory.turns[-1].was_read = True
        self._append(index, self.writer.notes(text))

    def _append(self, index: int, observation: Observation) -> None:
        """Append an observation, and start the next turn."""
        trajectory = self.trajectories[index]
        text, token_ids = observation.text, observation.token_ids
        if len(trajectory.turns) == self.max_turns:
            text += self.agent.last_turn_opening
            token_ids = token_ids + self.writer.encode(self.agent.last_turn_opening)
        used = len(trajectory.prompt_ids) + len(trajectory.completion_ids)
        if used + len(token_ids) >= self.context_limit:  # no token of the next turn would fit behind it
            self._end(index, "truncated")
            return
        turn = trajectory.turns[-1]
        if turn.num_tokens and (last_id := trajectory.completion_ids[-1]) in self.end_ids:
            if not self.agent.keeps_end_of_sequence:
                own_ids = trajectory.completion_ids[-turn.num_tokens : -1]
                trajectory.drop_last_sampled(decoded_text(self.tokenizer, own_ids))
            elif token_ids[0] == last_id:  # the policy has closed its message itself
                text, token_ids = text.removeprefix(decoded_text(self.tokenizer, [last_id])), token_ids[1:]
        turn.observation, turn.num_observation_tokens = text, len(token_ids)
        trajectory.append_environment(token_ids)
        self.watch(index, trajectory, "observation")
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
        self.watch(index, trajectory, "end")
