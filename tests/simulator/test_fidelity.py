"""The fidelity card of simulators whose faithfulness is known, because the test plays them; and of real traces."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Messages
from jsonl_files import write_rows
from recipe_modules import Refusal, load_recipe

from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.errors import UserError
from zerosearch.protocol import format_documents
from zerosearch.simulator.fidelity import Card, FidelityOptions, measure_recorded, measure_simulator
from zerosearch.simulator.fidelity_card import card_markdown, write_card
from zerosearch.simulator.held_out import HeldOutQuery, read_held_out

TRACES = Path(__file__).parents[3] / "shared/data/search_traces.jsonl"
QUERIES = [
    HeldOutQuery(
        question=f"Who built tower {row}?",
        golden_answers=(f"Builder{row}", f"B{row}"),
        query=f"tower {row} builder",
        answers=(f"Builder{row}", f"B{row}"),
        real={"all": (f"Tower {row} was built by Builder{row}.", "It is tall.")},
    )
    for row in range(60)
]


def play(server: ChatServer, p_useful: float = 1.0, p_leak: float = 0.0) -> None:
    """Play a simulator: `p_useful` and `p_leak` of its replies hold the answer, as the sampling seed decides."""

    def write(messages: Messages) -> str:
        prompt, seed = messages[-1]["content"], server.requests[-1]["seed"]
        (row,) = re.findall(r"Query: tower (\d+)", prompt)
        holds = zlib.crc32(str(seed).encode()) / 2**32 < (p_leak if "Noisy Output" in prompt else p_useful)
        names = [f"Builder{row}" if holds else f"Nobody{seed}", *(f"Somebody{number}" for number in range(4))]
        return format_documents([f"Tower {row} was built by {name}." for name in names])

    server.write = write


def measure(server: ChatServer, queries: list[HeldOutQuery] = QUERIES, **options: Any) -> Card:
    return measure_simulator(SimulatedEngine(server.url), queries, FidelityOptions(**options), {"who": "me"})


def test_a_faithful_simulator_is_found_faithful(chat_server: ChatServer, tmp_path: Path) -> None:
    play(chat_server)
    card = measure(chat_server)
    assert (card["useful_answer_rate"], card["noisy_leak_rate"]) == (1.0, 0.0)
    assert card["useful_answer_rate_interval"] == [1.0, 1.0]
    assert [point["requested"] for point in card["noise"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert all([point["realised"], *point["realised_interval"]] == [point["requested"]] * 3 for point in card["noise"])
    assert (card["max_noise_error"], card["max_noise_error_interval"]) == (0.0, [0.0, 0.0])
    assert (card["format"]["valid_format_rate"], card["format"]["replies"]) == (1.0, 60 * 4)
    assert (card["about"], card["queries"], card["decidable"]) == ({"who": "me"}, 60, 60)
    paths = write_card(card, tmp_path / "new" / "sim-3b.v2")
    assert [path.name for path in paths] == ["sim-3b.v2.json", "sim-3b.v2.md"]
    assert json.loads(paths[0].read_text()) == card
    markdown = paths[1].read_text()
    assert "| useful replies that answer the query | 1.000 [1.000, 1.000] |" in markdown
    assert "| 0.25 | 0.250 [0.250, 0.250] |" in markdown
    assert "| real all | 2.00 [2.00, 2.00] | 4.50 [4.50, 4.50] |" in markdown


@pytest.mark.slow
def test_an_unfaithful_simulator_is_found_out_the_same_way_each_time(chat_server: ChatServer) -> None:
    play(chat_server, p_useful=0.8, p_leak=0.25)
    card = measure(chat_server, num_samples=8)
    useful, leak = card["useful_answer_rate"], card["noisy_leak_rate"]
    for name, truth in (("useful_answer_rate", 0.8), ("noisy_leak_rate", 0.25)):
        low, high = card[f"{name}_interval"]
        assert card[name] == pytest.approx(truth, abs=0.05) and low < card[name] < high < low + 0.12
    realised = [point["realised"] for point in card["noise"]]
    assert realised == pytest.approx([(1 - p) * (1 - useful) + p * (1 - leak) for p in (0.0, 0.25, 0.5, 0.75, 1.0)])
    assert card["max_noise_error"] == pytest.approx(max(1 - useful, leak))
    assert all(
        point["realised_interval"][0] < point["realised"] < point["realised_interval"][1] for point in card["noise"]
    )
    one, again, other = (measure(chat_server, num_queries=20, seed=seed) for seed in (0, 0, 1))
    assert one == again != other


def test_queries_that_say_nothing_are_counted_and_left_out(chat_server: ChatServer) -> None:
    play(chat_server)
    silent = [HeldOutQuery(one.question, ("yes",), one.query, ("yes",), left_out="yes_no") for one in QUERIES[:20]]
    card = measure(chat_server, silent + QUERIES[20:])
    assert (card["queries"], card["decidable"], card["useful_answer_rate"]) == (60, 40, 1.0)
    assert card["left_out"] == {"yes_no": 20, "answer_in_question": 0, "another_fact": 0}
    assert card["noise"][0]["realised"] == 0.0
    assert "20 (yes-or-no answer)" in card_markdown(card)
    with pytest.raises(UserError, match="of 20 held-out queries 0 can tell"):
        measure(chat_server, silent)


def test_formats_lengths_and_failed_searches_are_measured(chat_server: ChatServer) -> None:
    def write(messages: Messages) -> str:
        if "tower 59 " in messages[-1]["content"]:
            return ""
        if "Noisy Output" in messages[-1]["content"]:
            return "Doc 1: Nothing here."
        return format_documents(["Tower 1 was built by Builder1.", "It is tall.", "a b", "a b", "c"])

    chat_server.write = write
    card = measure(chat_server)
    useful, noisy, real = (card["documents"][name] for name in ("useful", "noisy", "real all"))
    replies = 59 * 2 * (1 + 2) + 2 * 2 * 2  # a short one is asked for again
    assert (card["format"]["replies"], card["format"]["failed_searches"]) == (replies, 4)
    assert card["format"]["short_reply_rate"] == pytest.approx((59 * 2 * 2 + 8) / replies)
    assert card["format"]["valid_format_rate"] == pytest.approx(59 * 2 / replies)
    assert (useful["documents"], noisy["documents"], real["documents"]) == (5 * 59 / 60, 59 / 60, 2.0)
    assert useful["words"] == pytest.approx((6 + 3 + 2 + 2 + 1) / 5) and noisy["words"] == 2.0
    assert card["noisy_leak_rate"] == 0.0


def test_an_endpoint_that_fails_for_good_stops_the_measurement(chat_server: ChatServer) -> None:
    chat_server.write = lambda messages: 401
    with pytest.raises(UserError, match=r"the measurement stopped: the simulator at .* HTTP status 401"):
        measure(chat_server)


def test_recorded_documents_are_the_yardstick() -> None:
    def query(**real: tuple[str, ...]) -> HeldOutQuery:
        return HeldOutQuery("Q?", ("a1",), "q", ("a1",), real=real)

    card = measure_recorded([query(all=("it is a1" if row % 4 else "it is not",)) for row in range(40)])
    assert card["answer_rate"] == 0.75
    assert card["answer_rate_interval"][0] < 0.75 < card["answer_rate_interval"][1]
    assert "noise" not in card and "useful_answer_rate" not in card
    card = measure_recorded([query(useful=("it is a1",), noisy=("no",))] * 4)
    assert (card["useful_answer_rate"], card["noisy_leak_rate"]) == (1.0, 0.0)
    with pytest.raises(UserError, match="of 0 held-out queries"):
        measure_recorded([query()])


@pytest.mark.skipif(not TRACES.is_file(), reason="the recorded searches are not here")
def test_the_card_of_a_real_engine() -> None:
    card = measure_recorded(read_held_out(TRACES), FidelityOptions(num_queries=400))
    assert 0.4 < card["answer_rate"] < 0.6
    assert card["documents"]["real all"]["documents"] == 5.0


def test_the_recipe_measures_any_endpoint(
    chat_server: ChatServer, tmp_path: Path, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    play(chat_server)
    rows = [{"question": one.question, "golden_answers": one.answers, "query": one.query} for one in QUERIES]
    queries = write_rows(tmp_path / "queries.jsonl", ({**row, "documents": []} for row in rows))
    flags = ["--queries", str(queries), "--output", str(tmp_path / "card"), "--num_queries", "20"]
    load_recipe("measure_fidelity").main([*flags, "--simulator_url", chat_server.url])
    assert json.loads((tmp_path / "card.json").read_text())["useful_answer_rate"] == 1.0
    assert "| noisy replies that leak the answer | 0.000 [0.000, 0.000] |" in capsys.readouterr().out
    error = refusal("measure_fidelity", [*flags, "--simulator_url", "http://127.0.0.1:9/v1"])
    assert "start one with: python recipes/serve_simulator.py" in error
    in_a_file = ["--queries", str(queries), "--output", str(queries / "card")]
    assert "queries.jsonl is a file" in refusal(
        "measure_fidelity", [*in_a_file, "--simulator_url", "http://127.0.0.1:9"]
    )
    assert "of 0 held-out queries" in refusal("measure_fidelity", [*flags, "--engine", "recorded"])
    assert "num_samples is 0: it must be at least 1" in refusal("measure_fidelity", [*flags, "--num_samples", "0"])
