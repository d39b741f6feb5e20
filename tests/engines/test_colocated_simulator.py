"""The colocated simulator asks as the served one does, by a function of this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from searching import searched

from zerosearch.command_line import parse
from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.cache import CachedEngine
from zerosearch.engines.colocated_simulator import ColocatedSimulator, colocated_simulators
from zerosearch.engines.options import TrainingEngineOptions, make_engine
from zerosearch.engines.simulated import SimulatorCounts
from zerosearch.errors import UserError
from zerosearch.noise import keyed_uniform
from zerosearch.prompts import simulator_messages

REQUEST = SearchRequest("Emma author", "Who wrote Emma?", ("Jane Austen",), p_noise=1.0, key=(0, 1, 2, 3, 4))
Asked = tuple[list[dict[str, str]], float, int, int | None]


class Answers:
    """Answers in turn, and remembers what was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = iter(texts), list[Asked]()

    async def __call__(
        self, messages: list[dict[str, str]], temperature: float, max_tokens: int, seed: int | None
    ) -> str:
        self.asked.append((messages, temperature, max_tokens, seed))
        return next(self.texts)


def test_a_search_asks_what_the_served_simulator_is_asked_and_counts_what_it_says() -> None:
    engine = ColocatedSimulator(model="adapter", num_documents=2, max_tokens=70)
    engine.reply = answers = Answers("Doc 1: one", "<think> so </think>Doc 1: one\nDoc 2: two")
    (result,) = searched(engine, REQUEST)
    assert result == SearchResult(("one", "two"), noisy=True, retries=1, short_replies=1)
    messages = simulator_messages(
        question="Who wrote Emma?", golden_answers=["Jane Austen"], query="Emma author", noisy=True
    )
    seeds = [int(keyed_uniform(0, 1, 2, 3, 4, attempt) * 2**31) for attempt in (0, 1)]
    assert answers.asked == [(messages, 0.8, 70, seed) for seed in seeds]
    assert engine.counts == SimulatorCounts(replies=2, well_formed_replies=1, short_replies=1)
    assert (engine.account.queries, engine.account.sent, engine.account.retries) == (1, 2, 0)


def test_a_prompt_without_room_is_a_failed_search() -> None:
    async def full(*asked: object) -> str:
        raise ValueError("a prompt of 90 tokens and a reply of up to 70 do not fit")

    with pytest.raises(SearchError, match="the simulator at adapter, in the policy's engine, was not asked: a prompt"):
        searched(ColocatedSimulator(model="adapter", reply=full), REQUEST)


def test_it_works_in_training_alone() -> None:
    with pytest.raises(UserError, match="a colocated simulator works in training alone, in the vLLM engine of a"):
        searched(ColocatedSimulator(model="adapter"), REQUEST)


def test_by_its_flags_and_behind_a_cache(tmp_path: Path) -> None:
    flags = ("--simulator", "colocated", "--simulator_model", "adapter", "--simulator_max_tokens", "70")
    options = parse(TrainingEngineOptions, argv=(*flags, "--search_cache", str(tmp_path / "c.sqlite")))[0]
    engine = make_engine(options, "{query}")
    assert isinstance(engine, CachedEngine)
    (simulator,) = colocated_simulators([engine, engine])
    assert (simulator.model, simulator.max_tokens, simulator.template) == ("adapter", 70, "{query}")
    assert colocated_simulators([simulator]) == [simulator]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--simulator", "colocated"), "--simulator colocated needs --simulator_model, the folder or Hub id of the"),
        (("--simulator", "near"), "argument --simulator: invalid choice: 'near'"),
    ],
)
def test_flags_that_cannot_work(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_engine(parse(TrainingEngineOptions, argv=flags)[0], "{query}")
