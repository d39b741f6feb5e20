"""The rollout against a scripted policy and a scripted engine: exact ids, own questions, budgets, failures."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_rollouts import (
    ScriptedEngine,
    ScriptedGenerator,
    ScriptedRemoteGenerator,
    questions,
    roll_out,
    runs,
    wandering_policy,
    writer_of,
)
from searching import wait_until
from transformers import PreTrainedTokenizerFast

from zerosearch.engines import BudgetSpent, SearchError, SearchRequest, SearchResult
from zerosearch.errors import UserError
from zerosearch.generation import GenerationError, SampledTurn, Sampling, TurnRequest
from zerosearch.generation.tokenization import text_token_ids
from zerosearch.noise import keyed_uniform
from zerosearch.prompts import INVALID_ACTION_HINT, PAPER
from zerosearch.protocol import Grammar, format_observation
from zerosearch.rollout import in_flight, loop
from zerosearch.rollout.in_flight import search_outcome
from zerosearch.rollout.loop import RolloutClock, RolloutSettings, Trajectory, run_rollouts
from zerosearch.rollout.watchdog import Watchdog

ONE_SEARCH = ("<search> q </search>", "<answer> x </answer>")
HOSTILE = "</information> <information> <answer> </answer> <search> </search> <think> <|im_end|> <|endoftext|>".split()


def test_budgets_and_time_limits_by_default() -> None:
    budgets = {"max_turns": 2, "max_turn_tokens": 500, "max_observation_tokens": 500, "max_trajectory_tokens": 4096}
    assert asdict(RolloutSettings()) == {
        **budgets,
        **{"temperature": 1.0, "top_p": 1.0, "search_timeout_s": 1800.0, "turn_timeout_s": 3600.0},
        **{"noise_per_group": False, "chat_template_kwargs": None},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_turns": -1}, "max_turns is -1: it must be at least 0"),
        ({"max_turn_tokens": 0}, "max_turn_tokens is 0: it must be at least 1"),
        ({"max_observation_tokens": 0}, "max_observation_tokens is 0: it must be at least 1"),
        ({"max_trajectory_tokens": 0}, "max_trajectory_tokens is 0: it must be at least 1"),
        ({"search_timeout_s": 0.0}, r"search_timeout_s is 0.0: it must be above 0"),
        ({"turn_timeout_s": 1e9 + 1}, "turn_timeout_s is 1000000001.0: it must be at most"),
    ],
)
def test_budgets_and_time_limits_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RolloutSettings(**changes)
    RolloutSettings(0, 1, 1, 1, search_timeout_s=0.5, turn_timeout_s=1e9)


def test_one_trajectory_to_the_letter(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    search, answer = "<think> Who? </think>\n<search> Emma author </search>", "<answer> Jane Austen </answer>"
    engine = ScriptedEngine(lambda request: ["Emma is by Jane Austen.", "It rains."])
    trajectory = roll_out(tiny_tokenizer, [search, answer], engine)
    assert trajectory.prompt_ids == tiny_tokenizer("Question 0?\n")["input_ids"]
    assert runs(trajectory, tiny_tokenizer) == [
        (1, search),
        (0, "\n\n<information>Doc 1: Emma is by Jane Austen.\nDoc 2: It rains.</information>\n\n"),
        (1, answer),
        (0, "<|endoftext|>"),
    ]
    assert trajectory.logprobs == [-0.5 if own else 0.0 for own in trajectory.env_mask]
    assert (trajectory.answer, trajectory.outcome, trajectory.searches) == ("Jane Austen", "answered", 1)
    assert (trajectory.policy_tokens, trajectory.reading_tokens) == (sum(trajectory.env_mask), 0)
    assert trajectory.observation_tokens == len(trajectory.env_mask) - sum(trajectory.env_mask) - 1  # but for the EOS
    assert engine.requests == [SearchRequest("Emma author", "Question 0?", ("gold 0", "g"), 0.0, (0, 0, 0, 0, 0))]


def test_every_search_carries_its_own_question_and_answers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    delays = random.Random(0)
    engine = ScriptedEngine(
        lambda request: [f"About {request.question} for {request.query}"], lambda: delays.random() * 0.02
    )
    generator = ScriptedGenerator(tiny_tokenizer, wandering_policy(0))
    rows = questions(320)
    keys = [(7, 3, 1000 + n // 5, n % 5) for n in range(320)]
    trajectories = run_rollouts(rows, generator, engine, RolloutSettings(max_turns=4), keys=keys)
    assert len(engine.requests) > 300
    for request in engine.requests:
        _, _, number, _, turn = request.query.split()  # "query of N turn T"
        assert request.question == f"Question {number}?"
        assert request.golden_answers == (f"gold {number}", "g")
        assert request.key == (*keys[int(number)], int(turn))
    for number, trajectory in enumerate(trajectories):
        for place, turn in enumerate(trajectory.turns):
            if turn.documents:
                assert turn.documents == (f"About Question {number}? for query of {number} turn {place}",)
        assert trajectory.answer in (None, f"answer {number}")
        for earlier, later in zip(generator.requests[number], generator.requests[number][1:], strict=False):
            assert list(later.context_ids[: len(earlier.context_ids)]) == list(earlier.context_ids), "ids only grow"
    seeds = [request.seed for requests in generator.requests.values() for request in requests]
    assert len(set(seeds)) == len(seeds), "each turn samples with a seed of its own, the samples of one question too"
    coins = {int(keyed_uniform(*request.key) * 2**53) for request in engine.requests}
    assert coins.isdisjoint(seeds), "what a turn samples says nothing of the noise of its search"
    assert {trajectory.outcome for trajectory in trajectories} == {"answered", "turns_exhausted"}
    assert sorted(generator.released) == list(range(320))


def test_arrival_order_changes_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def rolled_out(seed: int) -> tuple[list[Trajectory], list[list[int]]]:
        delays = random.Random(seed)
        engine = ScriptedEngine(lambda request: [f"For {request.query}"], lambda: delays.random() * 0.02)
        generator = ScriptedGenerator(tiny_tokenizer, wandering_policy(1), order_seed=seed)
        trajectories = run_rollouts(questions(60), generator, engine, RolloutSettings(max_turns=3), p_noise=0.5)
        assert engine.most_in_flight > 1
        return timeless(trajectories), [[request.seed for request in generator.requests[n]] for n in range(60)]

    first, second = rolled_out(1), rolled_out(2)
    assert first == second
    coins = [turn.noisy for trajectory in first[0] for turn in trajectory.searched_turns]
    assert 0.3 < sum(coins) / len(coins) < 0.7


def timeless(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Take out of trajectories how long they took."""
    for trajectory in trajectories:
        for turn in trajectory.turns:
            turn.latency_s, turn.generation_s = None if turn.latency_s is None else 0.0, 0.0
    return trajectories


def test_the_samples_of_a_group_can_share_their_coins(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    keys = [(7, 3, 1000 + n // 5, n % 5) for n in range(60)]

    def coins(noise_per_group: bool) -> dict[tuple[int, int], set[bool | None]]:
        """Return the coins tossed by group and turn."""
        settings = RolloutSettings(max_turns=3, noise_per_group=noise_per_group)
        generator = ScriptedGenerator(tiny_tokenizer, wandering_policy(1))
        trajectories = run_rollouts(questions(60), generator, ScriptedEngine(), settings, p_noise=0.5, keys=keys)
        seeds = [request.seed for requests in generator.requests.values() for request in requests]
        assert len(set(seeds)) == len(seeds), "the policy still samples by itself"
        tossed: dict[tuple[int, int], set[bool | None]] = {}
        for n, trajectory in enumerate(trajectories):
            for place, turn in enumerate(trajectory.turns):
                if turn.kind == "search" and turn.latency_s is not None:
                    tossed.setdefault((n // 5, place), set()).add(turn.noisy)
        return tossed

    shared = coins(noise_per_group=True)
    assert all(len(tossed) == 1 for tossed in shared.values())
    assert {coin for tossed in shared.values() for coin in tossed} == {True, False}
    assert sum(len(tossed) == 2 for tossed in coins(noise_per_group=False).values()) > 5


def test_turns_sampled_elsewhere_make_the_same_trajectories(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    delays = random.Random(3)

    def rolled_out(generator: ScriptedGenerator) -> list[Trajectory]:
        engine = ScriptedEngine(lambda request: [f"For {request.query}"], lambda: delays.random() * 0.02)
        return timeless(run_rollouts(questions(60), generator, engine, RolloutSettings(max_turns=3), p_noise=0.5))

    here = ScriptedGenerator(tiny_tokenizer, wandering_policy(1))
    elsewhere = ScriptedRemoteGenerator(tiny_tokenizer, wandering_policy(1), lambda: delays.random() * 0.02, 7)
    assert rolled_out(here) == rolled_out(elsewhere)
    assert here.requests == elsewhere.requests
    assert elsewhere.most_in_flight == 7


def test_the_rollout_wakes_on_whichever_comes_first_a_turn_or_a_search(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    # Trajectory 0 is at its long search while 1 takes three short turns, and the other way round.
    turns = ["<search> q </search>", "Hm.", "Hm.", "<answer> x </answer>"]
    done: list[tuple[int, int]] = []

    def policy(trajectory: int, turn: int) -> str:
        done.append((trajectory, turn))
        return turns[turn] if trajectory else turns[3 * turn]

    class SlowForTheFirst(ScriptedEngine):
        async def search(self, request: SearchRequest) -> SearchResult:
            await asyncio.sleep(0.4 if request.question == "Question 0?" else 0.0)
            return await super().search(request)

    generator = ScriptedRemoteGenerator(tiny_tokenizer, policy, lambda: 0.02)
    clock = RolloutClock()
    run_rollouts(questions(2), generator, SlowForTheFirst(), RolloutSettings(max_turns=4), clock=clock)
    assert done[-2:] == [(1, 3), (0, 1)], "the second trajectory did not wait for the first one's search"
    assert 0.05 < clock.generating_s < 0.3 and 0.2 < clock.waiting_s < 0.4


@pytest.mark.parametrize(
    ("delay", "error", "message"),
    [
        (60.0, None, r"the scripted server sampled no turn within turn_timeout_s \(0.05 s\)"),
        (0.0, GenerationError("the server at http://x is gone; start it"), "the server at http://x is gone; start it"),
    ],
)
def test_a_generator_elsewhere_that_fails_ends_the_rollout(
    delay: float, error: Exception | None, message: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    class Failing(ScriptedRemoteGenerator):
        def write(self, request: TurnRequest) -> SampledTurn:
            if error:
                raise error
            return super().write(request)

    generator = Failing(tiny_tokenizer, lambda trajectory, turn: "<answer> x </answer>", lambda: delay)
    with pytest.raises(GenerationError, match=message):
        run_rollouts(questions(3), generator, ScriptedEngine(), RolloutSettings(turn_timeout_s=0.05))


def test_a_generator_elsewhere_that_blocks_is_named(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_flight, "GRACE_S", 0.1)
    generator = ScriptedRemoteGenerator(tiny_tokenizer, lambda trajectory, turn: "Hm.", lambda: time.sleep(0.6) or 0.0)
    settings = RolloutSettings(search_timeout_s=0.1, turn_timeout_s=0.1)
    with pytest.raises(SearchError, match=r"^the scripted server did not come back within its time limit"):
        run_rollouts(questions(1), generator, ScriptedEngine(), settings)


def test_the_time_limit_of_a_turn_runs_from_the_last_that_ended_and_not_during_searches(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow(ScriptedGenerator):
        """Ends the oldest turn at every second step, each of 4 s."""

        steps = 0

        def step(self) -> list[SampledTurn]:
            advance(4.0)
            self.steps += 1
            return [] if self.steps % 2 else [self.write(self.waiting.pop(0))]

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now))
    turns = ["Hm.", "<search> q </search>", "<answer> x </answer>"]
    engine = ScriptedEngine(lambda request: advance(100.0) or ["It rains."])
    generator = Slow(tiny_tokenizer, lambda trajectory, turn: turns[turn])
    settings = RolloutSettings(turn_timeout_s=7.0)  # at 8 s a turn has ended
    (trajectory,) = run_rollouts(questions(1), generator, engine, settings)
    assert trajectory.outcome == "answered"
    assert [turn.generation_s for turn in trajectory.turns] == [8.0, 8.0, 8.0]
    two = run_rollouts(questions(2), Slow(tiny_tokenizer, lambda *_: turns[2]), engine, settings)
    assert [trajectory.turns[0].generation_s for trajectory in two] == [8.0, 16.0]


def test_the_inference_engine_is_timed_and_watched_and_attended_while_only_searches_go_on(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[bool] = []

    class Watching(Watchdog):
        @contextmanager
        def watching(self) -> Iterator[None]:
            watched.append(True)
            yield
            watched.pop()

    class Slow(ScriptedGenerator):
        """Its engine also writes what the search engine waits for, as a simulator in the policy's engine does."""

        attended = 0

        def step(self) -> list[SampledTurn]:
            assert watched, "a step that never ends would go unnoticed"
            time.sleep(0.05)
            return super().step()

        def attend(self) -> None:
            assert watched
            self.attended += 1

    class Waiting(ScriptedEngine):
        async def search(self, request: SearchRequest) -> SearchResult:
            while generator.attended < 3:
                await asyncio.sleep(0.001)
            return await super().search(request)

    monkeypatch.setattr(loop, "Watchdog", Watching)
    clock = RolloutClock()
    generator = Slow(tiny_tokenizer, lambda trajectory, turn: ONE_SEARCH[turn])
    settings = RolloutSettings(search_timeout_s=20.0)
    (trajectory,) = run_rollouts(questions(1), generator, Waiting(), settings, clock=clock)
    assert trajectory.outcome == "answered" and not watched
    assert 0.1 <= clock.generating_s < clock.rollout_s


def test_the_generator_is_told_how_to_sample(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    generator = writer_of(tiny_tokenizer, "<answer> x </answer>")
    agent = replace(PAPER.policy, grammar=Grammar("<lookup>", "</lookup>"))
    settings = RolloutSettings(temperature=0.7, top_p=0.9)
    run_rollouts(questions(1), generator, ScriptedEngine(), settings, agent=agent)
    assert generator.sampling == Sampling(0.7, 0.9, ("</lookup>", "</answer>"))


def test_a_watcher_is_told_of_each_turn_each_observation_and_the_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[str, int]] = []

    def watch(index: int, trajectory: Trajectory, event: str) -> None:
        seen.append((event, len(trajectory.turns)))

    generator = writer_of(tiny_tokenizer, *ONE_SEARCH)
    run_rollouts(questions(1), generator, ScriptedEngine(), RolloutSettings(), watch=watch)
    assert seen == [("turn", 1), ("observation", 1), ("turn", 2), ("end", 2)]


def test_a_bar_counts_the_trajectories_that_have_ended(
    tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    for asked in ({"progress": True}, {}):
        generator = writer_of(tiny_tokenizer, *ONE_SEARCH)
        run_rollouts(questions(3), generator, ScriptedEngine(), RolloutSettings(), **asked)
        assert ("3/3" in capsys.readouterr().err) is bool(asked)


def test_a_generator_that_makes_no_progress_ends_the_rollout(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stalled(ScriptedGenerator):
        def step(self) -> list[SampledTurn]:
            return []

    # The loop's clock, not the watchdog's, which would end this process if the machine stalled for so long.
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    generator = Stalled(tiny_tokenizer, lambda trajectory, turn: "")
    with pytest.raises(GenerationError, match=r"none of 3 turns has ended within turn_timeout_s \(60 s\)"):
        run_rollouts(questions(3), generator, ScriptedEngine(), RolloutSettings(turn_timeout_s=60.0))


@settings(max_examples=40)
@given(st.lists(st.lists(st.sampled_from(HOSTILE) | st.text(max_size=5)).map("".join), max_size=3))
def test_whatever_documents_say_is_text(tiny_tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> None:
    engine = ScriptedEngine(lambda request: documents)
    turns, room = ["<search> q </search>", "<answer> Emma </answer>"], {"max_observation_tokens": 3000}
    trajectory = roll_out(tiny_tokenizer, turns, engine, **room)
    assert (trajectory.answer, trajectory.searches, len(trajectory.turns)) == ("Emma", 1, 2)
    assert set(tiny_tokenizer.all_special_ids).isdisjoint(trajectory.completion_ids[:-1])
    assert runs(trajectory, tiny_tokenizer)[1] == (0, format_observation(documents)), "it is all there"
    unanswered = roll_out(tiny_tokenizer, [turns[0]] * 2, engine, max_turns=1, **room)
    assert (unanswered.answer, unanswered.outcome) == (None, "turns_exhausted")


def test_an_invalid_action_gets_a_hint_that_is_not_trained_on(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    trajectory = roll_out(tiny_tokenizer, ["Hm.", "<search> </search>", "<answer> x </answer>"])
    assert runs(trajectory, tiny_tokenizer) == [
        (1, "Hm."),
        (0, INVALID_ACTION_HINT),
        (1, "<search> </search>"),
        (0, INVALID_ACTION_HINT),
        (1, "<answer> x </answer>"),
        (0, "<|endoftext|>"),
    ]
    assert [turn.kind for turn in trajectory.turns] == ["invalid", "invalid", "answer"]
    assert trajectory.searches == 0
    empty = roll_out(tiny_tokenizer, ["", "<answer> x </answer>"])
    assert runs(empty, tiny_tokenizer)[0] == (0, INVALID_ACTION_HINT)


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])  # of a base and of a chat model
@pytest.mark.parametrize("keeps", [False, True])
def test_an_end_of_sequence_before_a_hint_is_dropped_unless_the_agent_keeps_it(
    tiny_tokenizer: PreTrainedTokenizerFast, end: str, keeps: bool
) -> None:
    class Ending(ScriptedGenerator):
        def write(self, request: TurnRequest) -> SampledTurn:
            turn = super().write(request)
            ids = [*turn.token_ids, tiny_tokenizer.convert_tokens_to_ids(end)]
            return SampledTurn(request.trajectory, ids, [-0.5] * len(ids), "eos")

    turns = ["Hm.", "", "<answer> x </answer>"]
    generator = Ending(tiny_tokenizer, lambda trajectory, turn: turns[turn])
    agent = replace(PAPER.policy, keeps_end_of_sequence=keeps)
    (trajectory,) = run_rollouts(questions(1), generator, ScriptedEngine(), RolloutSettings(), agent=agent)
    kept = end if keeps else ""
    expected = [(1, f"Hm.{kept}"), (0, INVALID_ACTION_HINT), (1, kept), (0, INVALID_ACTION_HINT)]
    if not keeps:  # nothing of the second turn is left, so the hints stand side by side
        expected = [(1, "Hm."), (0, INVALID_ACTION_HINT * 2)]
    assert runs(trajectory, tiny_tokenizer)[: len(expected)] == expected
    assert trajectory.answer == "x"
    ended = (
        (1, f"<answer> x </answer>{end}"),
        (0, "<|endoftext|>"),
    )  # one at the end, the policy's or the environment's
    assert runs(trajectory, tiny_tokenizer)[-1] == ended[end != "<|endoftext|>"]
    assert trajectory.policy_tokens == sum(trajectory.env_mask)
    assert len(trajectory.completion_ids) == len(trajectory.env_mask) == len(trajectory.logprobs)
    assert [turn.text for turn in trajectory.turns] == [f"Hm.{kept}", kept, f"<answer> x </answer>{end}"]
    assert trajectory.turns[1].num_tokens == int(keeps)
    contexts = [list(request.context_ids) for request in generator.requests[0]]
    whole = trajectory.prompt_ids + trajectory.completion_ids
    assert all(context == whole[: len(context)] for context in contexts), "ids only grow"


def test_a_closing_tag_that_is_a_special_token_stays_in_the_context(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<search>", "</search>"], special_tokens=True)

    class Tagging(ScriptedGenerator):
        def write(self, request: TurnRequest) -> SampledTurn:
            ids = tokenizer(ONE_SEARCH[len(self.requests[0]) - 1])["input_ids"]
            return SampledTurn(request.trajectory, ids, [-0.5] * len(ids), "stop")

    generator = Tagging(tokenizer, lambda trajectory, turn: "")
    (trajectory,) = run_rollouts(questions(1), generator, ScriptedEngine(), RolloutSettings())
    assert trajectory.turns[0].text == "<search> q </search>"
    assert runs(trajectory, tokenizer)[:2] == [(1, "<search> q </search>"), (0, format_observation(["It rains."]))]


def test_the_last_turn_may_only_answer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    search = "<search> q </search>"
    engine = ScriptedEngine()
    trajectory = roll_out(tiny_tokenizer, [search] * 3, engine, max_turns=2)
    assert (len(engine.requests), trajectory.searches, len(trajectory.turns)) == (2, 2, 3)
    assert (trajectory.outcome, trajectory.answer) == ("turns_exhausted", None)
    assert runs(trajectory, tiny_tokenizer)[-1] == (1, search), "nothing follows it, not even an EOS"
    answered = roll_out(tiny_tokenizer, [search, search, "<answer> x </answer>"], max_turns=2)
    assert answered.outcome == "answered"
    at_once = roll_out(tiny_tokenizer, ["<answer> x </answer>"], max_turns=0)
    assert at_once.outcome == "answered"


def test_a_turn_cut_by_its_own_limit_is_invalid_and_one_cut_by_the_context_ends_it(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    long = "<think> " + "It rains. " * 30
    trajectory = roll_out(tiny_tokenizer, [long, "<answer> x </answer>"], max_turn_tokens=20)
    assert (trajectory.turns[0].kind, trajectory.turns[0].num_tokens) == ("invalid", 20)
    assert (trajectory.outcome, trajectory.counts()["cut_turns"]) == ("answered", 1)
    cut = roll_out(tiny_tokenizer, [long], max_trajectory_tokens=30)
    assert (cut.outcome, len(cut.prompt_ids) + len(cut.completion_ids)) == ("truncated", 30)
    generator = writer_of(tiny_tokenizer, long)
    generator.max_context_tokens = 25
    (shorter,) = run_rollouts(questions(1), generator, ScriptedEngine(), RolloutSettings())
    assert (shorter.outcome, len(shorter.prompt_ids) + len(shorter.completion_ids)) == ("truncated", 25)
    search, engine = "<search> q </search>", ScriptedEngine()
    prompt, turn = (len(text_token_ids(tiny_tokenizer, text)) for text in ("Question 0?\n", search))
    budgets = {"max_turn_tokens": turn, "max_trajectory_tokens": prompt + turn}
    full = roll_out(tiny_tokenizer, [f"{search}xxx"], engine, **budgets)
    assert (full.outcome, full.turns[0].kind, full.searches) == ("truncated", "search", 0), "there is no room to read"
    found = len(text_token_ids(tiny_tokenizer, "\n\n<information>Doc 1: It rains.</information>\n\n"))
    budgets["max_trajectory_tokens"] += found + turn
    full = roll_out(tiny_tokenizer, [search, f"{search}xxx"], engine, **budgets)
    assert (full.outcome, len(full.turns), full.searches) == ("truncated", 2, 1), "nor is there after a search"


def test_a_prompt_that_fills_the_context_is_truncated_at_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    length = len(tiny_tokenizer("Question 0?\n")["input_ids"])
    for limit in (1, length):
        trajectory = roll_out(tiny_tokenizer, [], max_trajectory_tokens=limit)
        assert (trajectory.outcome, trajectory.turns) == ("truncated", [])
        assert (trajectory.completion_ids, trajectory.env_mask) == ([tiny_tokenizer.eos_token_id], [0])
    one_token = roll_out(tiny_tokenizer, ["Hm."], max_trajectory_tokens=length + 1)
    assert (one_token.outcome, one_token.policy_tokens, one_token.env_mask) == ("truncated", 1, [1])


def test_an_observation_that_does_not_fit_the_context_ends_the_trajectory(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    search = "<search> q </search>"
    needed = len(tiny_tokenizer("Question 0?\n")["input_ids"]) + len(text_token_ids(tiny_tokenizer, search))
    observation = text_token_ids(tiny_tokenizer, "\n\n<information>Doc 1: It rains.</information>\n\n")
    short = roll_out(tiny_tokenizer, [search], max_trajectory_tokens=needed + len(observation))
    assert (short.outcome, short.turns[0].observation) == ("truncated", "") and all(short.env_mask)
    enough = roll_out(tiny_tokenizer, [search, "x"], max_trajectory_tokens=needed + len(observation) + 1)
    assert (enough.outcome, enough.turns[0].num_observation_tokens) == ("truncated", len(observation))


def test_an_observation_is_cut_to_its_budget_and_that_is_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns, engine = list(ONE_SEARCH), ScriptedEngine(lambda request: ["x" * 300, "y."])
    cut = roll_out(tiny_tokenizer, turns, engine, max_observation_tokens=120)
    assert 110 < cut.turns[0].num_observation_tokens <= 120 and cut.cut_observations == 1
    assert roll_out(tiny_tokenizer, turns, engine, max_observation_tokens=900).cut_observations == 0
    with pytest.raises(UserError, match="max_observation_tokens is 10: tags and numbers alone need"):
        roll_out(tiny_tokenizer, turns, engine, max_observation_tokens=10)


def test_a_failed_search_ends_its_own_trajectory_only(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    broken = SearchError("the engine at http://x is gone; restart it", retries=4)
    engine = ScriptedEngine(lambda request: broken if request.question == "Question 3?" else ["Fine."])
    generator = writer_of(tiny_tokenizer, *ONE_SEARCH)
    trajectories = run_rollouts(questions(8), generator, engine, RolloutSettings())
    failed = trajectories.pop(3)
    assert failed.outcome == "failed_search" and {one.outcome for one in trajectories} == {"answered"}
    assert failed.turns[0].retries == 4, "what it took in vain is counted, too"
    assert (failed.error, failed.searches, failed.answer) == (str(broken), 1, None)
    assert failed.turns[0].documents == () and failed.turns[0].observation == ""


def test_a_search_without_a_reply_is_given_up(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    engine = ScriptedEngine(delay=lambda: 60.0)
    trajectory = roll_out(tiny_tokenizer, ["<search> q </search>"], engine, search_timeout_s=0.05)
    assert (trajectory.outcome, trajectory.turns[0].latency_s) == ("failed_search", pytest.approx(0.05, abs=1.0))
    assert trajectory.error == "the engine scripted gave no reply within 0.05 s"


@pytest.mark.parametrize("spends", [False, True])
def test_nothing_is_started_once_the_rollout_may_not_go_on(
    spends: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    spent = BudgetSpent("the limit of 3 queries is reached")
    engine = ScriptedEngine(lambda request: spent if spends and len(engine.requests) >= 3 else ["Fine."])
    generator = writer_of(tiny_tokenizer, *ONE_SEARCH)
    trajectories = run_rollouts(
        questions(9), generator, engine, RolloutSettings(), max_live=1, may_go_on=lambda: len(engine.requests) < 3
    )
    outcomes = [trajectory.outcome for trajectory in trajectories]
    assert outcomes == ["answered"] * 2 + [None] * 7, "what is under way ends, and can be asked again"
    assert (len(engine.requests), len(generator.requests)) == (3, 3)
    assert trajectories[2].turns[0].documents == (() if spends else ("Fine.",))


def test_a_search_is_not_sent_once_the_rollout_may_not_go_on(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    asked: list[int] = []

    def policy(trajectory: int, turn: int) -> str:
        asked.append(turn)
        return "<search> q </search>"

    engine, generator = ScriptedEngine(), ScriptedGenerator(tiny_tokenizer, policy)
    (trajectory,) = run_rollouts(questions(1), generator, engine, RolloutSettings(), may_go_on=lambda: not asked)
    assert (engine.requests, trajectory.outcome, len(trajectory.turns)) == ([], None, 1)


def test_a_budget_that_is_spent_is_a_failed_search_where_the_rollout_goes_on(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    engine = ScriptedEngine(lambda request: BudgetSpent("the limit of 3 queries is reached"))
    assert roll_out(tiny_tokenizer, ["<search> q </search>"], engine).outcome == "failed_search"


class Odd:
    """An engine of a user's, whose search does what it should not."""

    name, max_concurrency = "mine", 4

    def __init__(self, does: Callable[[], Any]) -> None:
        self.does = does

    async def search(self, request: SearchRequest) -> Any:
        return self.does()

    async def aclose(self) -> None:
        pass


def throw(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (lambda: ["It rains."], "returned ['It rains.']; a search returns a SearchResult"),
        (lambda: None, "returned None; a search returns a SearchResult"),
        (lambda: "It rains.", "returned 'It rains.'; a search returns a SearchResult"),
        (lambda: SearchResult((1,)), "returned SearchResult(documents=(1,)"),  # type: ignore[arg-type]
        (lambda: SearchResult(("a",), titles=(1,)), "returned SearchResult(documents=('a',)"),  # type: ignore[arg-type]
        (lambda: SearchResult(None), "returned SearchResult(documents=None"),  # type: ignore[arg-type]
        (lambda: throw(KeyError("title")), "raised KeyError: 'title'; a search returns a SearchResult"),
        (lambda: throw(TimeoutError("slow")), "raised TimeoutError: slow; a search returns a SearchResult"),
        (lambda: throw(asyncio.CancelledError()), "raised CancelledError: ; a search returns a SearchResult"),
    ],
)
def test_what_an_engine_should_not_do_is_a_failed_search_that_names_it(
    tiny_tokenizer: PreTrainedTokenizerFast, does: Callable[[], Any], message: str
) -> None:
    trajectory = roll_out(tiny_tokenizer, ["<search> q </search>"], Odd(does))  # type: ignore[arg-type]
    assert trajectory.outcome == "failed_search"
    assert trajectory.error.startswith(f"the engine mine {message}")


def test_half_a_character_of_an_engine_is_replaced(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    engine: Any = Odd(lambda: SearchResult(("caf\ud83d",), titles=("\x00",)))
    trajectory = roll_out(tiny_tokenizer, list(ONE_SEARCH), engine)
    assert trajectory.turns[0].documents == ("caf\ufffd",)
    assert trajectory.outcome == "answered"
    found = search_outcome(SearchResult(("Emma: A novel.",), titles=("Em\x00ma",)), "mine", 1.0)
    assert found == SearchResult(("Emma: A novel.",), titles=("Em\ufffdma",))


def test_what_a_search_took_is_kept(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    engine: Any = Odd(lambda: SearchResult(("It rains.",), noisy=True, retries=2, short_replies=3))
    search = roll_out(tiny_tokenizer, list(ONE_SEARCH), engine).turns[0]
    assert (search.retries, search.short_replies, search.noisy) == (2, 3, True)


def test_a_rollout_that_is_left_by_an_error_ends_its_searches(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    engine = ScriptedEngine(delay=lambda: 60.0)

    def watch(index: int, trajectory: Trajectory, event: str) -> None:
        if len(trajectory.turns) == 2:
            wait_until(lambda: engine.in_flight == 1, 10)
            raise KeyError("watched")

    turns = [["<search> q </search>"], [" hm", "<answer> x </answer>"]]
    generator = ScriptedGenerator(tiny_tokenizer, lambda trajectory, turn: turns[trajectory][turn])
    with pytest.raises(KeyError, match="watched"):
        run_rollouts(questions(2), generator, engine, RolloutSettings(), watch=watch)
    wait_until(lambda: engine.in_flight == 0, 10)


def test_an_engine_that_blocks_is_named(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_flight, "GRACE_S", 0.1)
    engine: Any = Odd(lambda: time.sleep(0.6))
    with pytest.raises(
        SearchError, match=r"^the engine mine did not come back within its time limit: does it block\?"
    ):
        roll_out(tiny_tokenizer, ["<search> q </search>"], engine, search_timeout_s=0.1)


@pytest.mark.parametrize(
    ("delays", "named"),
    [
        ([0.0, 60.0], "the engine mine or the scripted server"),  # one searches while the other's turn is under way
        ([0.0, 0.0], "the engine mine"),
    ],
)
def test_what_may_block_is_named_where_turns_are_sampled_elsewhere(
    delays: list[float], named: str, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_flight, "GRACE_S", 0.1)
    left = iter(delays)
    generator = ScriptedRemoteGenerator(tiny_tokenizer, lambda *_: "<search> q </search>", lambda: next(left))
    engine: Any = Odd(lambda: time.sleep(1.5))
    settings = RolloutSettings(search_timeout_s=0.1, turn_timeout_s=0.8)
    with pytest.raises(SearchError, match=f"^{named} did not come back within its time"):
        run_rollouts(questions(2), generator, engine, settings)


def test_an_engine_is_closed_on_the_loop_of_its_searches(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    loops = []

    class Noting(ScriptedEngine):
        async def search(self, request: SearchRequest) -> SearchResult:
            loops.append(asyncio.get_running_loop())
            return await super().search(request)

        async def aclose(self) -> None:
            loops.append(asyncio.get_running_loop())

    engine = Noting()
    roll_out(tiny_tokenizer, ["<search> q </search>", "<answer> x </answer>"], engine)
    in_flight.close_engine(engine)
    searched, closed = loops
    assert searched is closed


def test_searches_run_together_within_the_limit_of_the_engine(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    engine = ScriptedEngine(delay=lambda: 0.02, max_concurrency=7)
    generator = writer_of(tiny_tokenizer, *ONE_SEARCH)
    clock = RolloutClock()
    run_rollouts(questions(40), generator, engine, RolloutSettings(), clock=clock)
    assert engine.most_in_flight == 7
    assert 0.02 < clock.waiting_s < clock.rollout_s
    assert clock.idle_s == pytest.approx(clock.rollout_s - clock.generating_s - clock.waiting_s)
    assert generator.sessions == 1


def test_a_record_holds_the_text_by_who_wrote_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    generator = writer_of(tiny_tokenizer, "Hm.", "<search> q </search>", "<answer> gold </answer>")
    rows = [{**questions(1)[0], "dataset": "nq"}]
    (trajectory,) = run_rollouts(rows, generator, ScriptedEngine(), RolloutSettings(), p_noise=1.0)
    record = trajectory.to_record(rows[0], "Question 0?\n", step=4)
    segments = record.pop("segments")
    assert [(part["source"], part["text"], part["noisy"]) for part in segments] == [
        ("prompt", "Question 0?\n", None),
        ("policy", "Hm.", None),
        ("hint", INVALID_ACTION_HINT, None),
        ("policy", "<search> q </search>", None),
        ("documents", "\n\n<information>Doc 1: It rains.</information>\n\n", True),
        ("policy", "<answer> gold </answer>", None),
    ]
    for name in ("policy_tokens", "observation_tokens", "generation_s", "search_s"):
        assert record.pop(name) > 0
    assert record == {
        "id": "0",
        "dataset": "nq",
        "question": "Question 0?",
        "golden_answers": ["gold 0", "g"],
        "step": 4,
        "answer": "gold",
        "outcome": "answered",
        "searches": 1,
        "turns": 3,
        "invalid_actions": 1,
        "cut_turns": 0,
        "cut_observations": 0,
        "retries": 0,
        "short_replies": 0,
        "p_noise": 1.0,
        "f1": pytest.approx(2 / 3),
        "em": 0.0,
    }
