"""The fidelity card of simulators whose faithfulness is known, because the test plays them; and of real traces."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from http_servers import serving

from zerosearch import http
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.protocol import format_documents
from zerosearch.simulator.fidelity import FidelityOptions, measure_recorded, measure_simulator
from zerosearch.simulator.fidelity_card import card_markdown, write_card
from zerosearch.simulator.held_out import HeldOutQuery, read_held_out

pytest_plugins = ("recipe_modules",)  # fixtures

TRACES = Path(__file__).parents[3] / "shared/data/search_traces.jsonl"
QUERIES = [
    HeldOutQuery(
        question=f"Who built tower {row}?",
        golden_answers=(f"Builder{row}", f"B{row}"),
        query=f"tower {row} builder",
        answers=(f"Builder{row}", f"B{row}"),
        real={"all": (f"Tower {row} was built by Builder{row}.", "It is tall.")},
    )
    for row in range(120)
]


class Simulator:
    """An OpenAI-style endpoint that plays a simulator: `p_useful` and `p_leak` of its replies hold the answer."""

    def __init__(self) -> None:
        self.url = ""
        self.p_useful, self.p_leak = 1.0, 0.0
        self.write: Callable[[int, bool, bool, int], str] = self.documents
        self.status = 200

    def documents(self, row: int, noisy: bool, holds: bool, seed: int) -> str:
        names = [f"Builder{row}" if holds else f"Nobody{seed}", *(f"Somebody{number}" for number in range(4))]
        return format_documents([f"Tower {row} was built by {name}." for name in names])

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        row = int(re.search(r"Query: tower (\d+)", prompt)[1])  # type: ignore[index]
        noisy = "Noisy Output" in prompt
        chance = zlib.crc32(str(body["seed"]).encode()) / 2**32  # the seed alone decides, as of a real sampler
        holds = chance < (self.p_leak if noisy else self.p_useful)
        content = self.write(row, noisy, holds, body["seed"])
        return web.json_response({"choices": [{"message": {"content": content}}]}, status=self.status)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "sim"}]})


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    monkeypatch.setattr(http, "FIRST_BACK_OFF_S", 0.01)
    played = Simulator()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", played.chat)
    app.router.add_get("/v1/models", played.models)
    with serving(app) as address:
        played.url = f"{address}/v1"
        yield played


def test_a_faithful_simulator_is_found_faithful(simulator: Simulator) -> None:
    card = measure_simulator(SimulatedEngine(simulator.url), QUERIES, FidelityOptions(noise_points=5), {"who": "me"})
    assert (card["useful_answer_rate"], card["noisy_leak_rate"]) == (1.0, 0.0)
    assert card["useful_answer_rate_interval"] == [1.0, 1.0]
    for point in card["noise"]:  # nothing but the coin decides
        assert [point["realised"], *point["realised_interval"]] == pytest.approx([point["coin"]] * 3)
        assert abs(point["observed"] - point["requested"]) < 0.15  # 120 tosses
        assert point["searches"] == 120
    assert card["noise"][-1]["requested"] == card["noise"][-1]["coin"] == 1.0
    assert 0.0 < card["max_noise_error"] < 0.01  # 64,000 tosses
    assert card["max_noise_error"] == pytest.approx(card["max_coin_error"])
    assert card["format"]["valid_format_rate"] == 1.0
    assert card["format"]["replies"] == 120 * 4 + 5 * 120
    assert card["about"] == {"who": "me"}
    assert (card["queries"], card["decidable"]) == (120, 120)


def test_an_unfaithful_simulator_is_found_out(simulator: Simulator) -> None:
    simulator.p_useful, simulator.p_leak = 0.8, 0.25
    options = FidelityOptions(num_samples=4, noise_start=0.5, noise_end=0.5)
    card = measure_simulator(SimulatedEngine(simulator.url), QUERIES, options)
    low, high = card["useful_answer_rate_interval"]
    assert low < 0.8 < high and high - low < 0.12
    low, high = card["noisy_leak_rate_interval"]
    assert low < 0.25 < high and high - low < 0.12
    for name in ("realised", "observed"):
        shares = [point[name] for point in card["noise"]]
        assert sum(shares) / len(shares) == pytest.approx(0.5 * 0.2 + 0.5 * 0.75, abs=0.04)
    realised = [point["realised"] for point in card["noise"]]
    assert card["max_noise_error"] == pytest.approx(max(abs(value - 0.5) for value in realised))
    for point in card["noise"]:
        assert point["realised_interval"][0] < point["realised"] < point["realised_interval"][1]


def test_the_same_seed_gives_the_same_card(simulator: Simulator) -> None:
    simulator.p_useful = 0.7
    options = FidelityOptions(num_queries=20, noise_points=3)
    cards = [measure_simulator(SimulatedEngine(simulator.url), QUERIES, options) for _ in range(2)]
    assert cards[0] == cards[1]
    other = measure_simulator(
        SimulatedEngine(simulator.url), QUERIES, FidelityOptions(num_queries=20, noise_points=3, seed=1)
    )
    assert other != cards[0]


def test_queries_that_say_nothing_are_counted_and_left_out(simulator: Simulator) -> None:
    silent = [
        HeldOutQuery(query.question, ("yes",), query.query, ("yes",), left_out="yes_no") for query in QUERIES[:30]
    ]
    options = FidelityOptions(noise_points=2)
    card = measure_simulator(SimulatedEngine(simulator.url), silent + QUERIES[30:], options)
    assert (card["queries"], card["decidable"]) == (120, 90)
    assert card["left_out"] == {"yes_no": 30, "answer_in_question": 0, "another_fact": 0}
    assert card["useful_answer_rate"] == 1.0
    assert card["noise"][0]["searches"] == 90
    assert "30 (yes-or-no answer)" in card_markdown(card)
    with pytest.raises(UserError, match="of 30 held-out queries 0 can tell"):
        measure_simulator(SimulatedEngine(simulator.url), silent, options)


def test_formats_and_lengths_are_measured(simulator: Simulator) -> None:
    def write(row: int, noisy: bool, holds: bool, seed: int) -> str:
        if noisy:
            return "Doc 1: Nothing here."
        return format_documents([f"Tower {row} was built by Builder{row}.", "It is tall.", "a b", "a b", "c"])

    simulator.write = write
    options = FidelityOptions(noise_end=0.0, noise_points=2)
    card = measure_simulator(SimulatedEngine(simulator.url), QUERIES, options)
    useful, noisy, real = (card["documents"][name] for name in ("useful", "noisy", "real all"))
    replies = 120 * 2 * (1 + 2) + 2 * 120  # a short one is asked for again
    assert card["format"]["replies"] == replies
    assert card["format"]["short_reply_rate"] == pytest.approx(480 / replies)
    assert card["format"]["valid_format_rate"] == pytest.approx((replies - 480) / replies)
    assert (useful["documents"], noisy["documents"], real["documents"]) == (5.0, 1.0, 2.0)
    assert useful["words"] == pytest.approx((6 + 3 + 2 + 2 + 1) / 5)
    assert noisy["words"] == 2.0 and noisy["word_percentiles"] == {"5": 2.0, "50": 2.0, "95": 2.0}
    assert real["word_percentiles"]["95"] == 6.0


def test_an_endpoint_that_fails_for_good_stops_the_measurement(simulator: Simulator) -> None:
    simulator.status = 401
    with pytest.raises(UserError, match=r"the measurement stopped: the simulator at .* HTTP status 401"):
        measure_simulator(SimulatedEngine(simulator.url), QUERIES, FidelityOptions(noise_points=2))


def test_a_simulator_that_writes_nothing_has_failed_searches(simulator: Simulator) -> None:
    simulator.write = lambda row, noisy, holds, seed: "" if noisy else simulator.documents(row, noisy, holds, seed)
    card = measure_simulator(SimulatedEngine(simulator.url), QUERIES, FidelityOptions(noise_end=0.0, noise_points=2))
    assert card["format"]["failed_searches"] == 240
    assert card["documents"]["noisy"] == {"documents": 0.0, "documents_interval": [0.0, 0.0]}
    assert card["noisy_leak_rate"] == 0.0


@pytest.mark.parametrize(
    "options", [{"num_samples": 0}, {"noise_start": 1.5}, {"num_queries": 1}, {"noise_samples": 0}]
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options)).replace("_", "[_ ]")):
        FidelityOptions(**options)


def test_recorded_documents_are_the_yardstick() -> None:
    rows = [
        HeldOutQuery("Q?", ("a1",), f"q{row}", ("a1",), real={"all": ("it is a1" if row % 4 else "it is not",)})
        for row in range(40)
    ]
    card = measure_recorded(rows)
    assert card["answer_rate"] == 0.75
    assert card["answer_rate_interval"][0] < 0.75 < card["answer_rate_interval"][1]
    assert "noise" not in card and "useful_answer_rate" not in card
    judged = [
        HeldOutQuery("Q?", ("a1",), "q", ("a1",), real={"useful": ("it is a1",), "noisy": ("no",)}) for _ in range(4)
    ]
    card = measure_recorded(judged)
    assert (card["useful_answer_rate"], card["noisy_leak_rate"]) == (1.0, 0.0)
    with pytest.raises(UserError, match="of 0 held-out queries"):
        measure_recorded([HeldOutQuery("Q?", ("a1",), "q", ("a1",))])


@pytest.mark.skipif(not TRACES.is_file(), reason="the recorded searches are not here")
def test_the_card_of_a_real_engine() -> None:
    queries = read_held_out(TRACES)
    assert len(queries) > 2000
    card = measure_recorded(queries, FidelityOptions(num_queries=400))
    assert 0.4 < card["answer_rate"] < 0.6
    assert card["documents"]["real all"]["documents"] == 5.0


def test_the_card_is_written_whole(simulator: Simulator, tmp_path: Path) -> None:
    options = FidelityOptions(num_queries=20, noise_points=3)
    card = measure_simulator(SimulatedEngine(simulator.url), QUERIES, options)
    paths = write_card(card, tmp_path / "new" / "sim-3b.v2")
    assert [path.name for path in paths] == ["sim-3b.v2.json", "sim-3b.v2.md"]
    assert json.loads(paths[0].read_text()) == card
    markdown = paths[1].read_text()
    assert "| useful replies that answer the query | 1.000 [1.000, 1.000] |" in markdown
    assert markdown.count("\n| 200 | 1.000 | 1.000 | 1.000 ") == 1


def test_the_recipe_measures_any_endpoint(simulator: Simulator, tmp_path: Path, load_recipe: Any, capsys: Any) -> None:
    rows = [
        {"question": one.question, "golden_answers": one.golden_answers, "query": one.query, "documents": []}
        for one in QUERIES
    ]
    queries, output = tmp_path / "queries.jsonl", tmp_path / "card"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--queries", str(queries), "--output", str(output), "--num_queries", "20", "--noise_points", "2"]
    load_recipe("measure_fidelity").main([*flags, "--simulator_url", simulator.url])
    assert json.loads((tmp_path / "card.json").read_text())["useful_answer_rate"] == 1.0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["noisy_leak_rate"] == 0.0
    with pytest.raises(SystemExit) as caught:
        load_recipe("measure_fidelity").main([*flags, "--simulator_url", "http://127.0.0.1:9/v1"])
    assert caught.value.code == 2
    assert "start one with: python recipes/serve_simulator.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load_recipe("measure_fidelity").main([*flags, "--engine", "recorded"])
    assert "of 0 held-out queries" in capsys.readouterr().err
