"""The simulator behind Search-R1's protocol, asked by clients that know a retriever, and told what they may tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from chat_server import ChatServer, Messages
from http_servers import free_ports
from recipe_modules import Refusal, load_recipe
from retriever_parts import ask_and_end, health, post, serving_application

from zerosearch.engines.retriever import RetrieverEngine
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.engines.simulated_retriever import QueryNoise, SimulatedRetriever
from zerosearch.noise import NoiseSchedule
from zerosearch.prompts import PAPER, TINYWORLD

EMMA = {"question": "Who wrote the novel Emma?", "golden_answers": ["Jane Austen", "Austen"]}
RADIUM = {"question": "Who discovered the element radium?", "golden_answers": ["Marie Curie"]}
QUERY = re.compile(r"^Query: (.*)$", re.MULTILINE)


def write(messages: Messages) -> str:
    """Write five documents that repeat the query last asked for, and the answer unless they are to be noisy."""
    prompt = messages[-1]["content"]
    query, quality = QUERY.findall(prompt)[-1], "noisy" if "Noisy Output" in prompt else "useful"
    told = re.search(r"whose answer is (.*)\.$", prompt, re.MULTILINE)
    answer = told.group(1) if told and quality == "useful" else "nobody"
    return "\n".join(f"Doc {number}: {query}: {quality}, {answer}, {number}." for number in range(1, 6))


@pytest.fixture
def simulator(chat_server: ChatServer) -> ChatServer:
    chat_server.write = write
    return chat_server


@contextmanager
def serving(
    simulator: ChatServer,
    noise: tuple[float, float] = (0.0, 0.0),
    total: int = 100,
    prompts: Any = PAPER,
    **options: Any,
) -> Iterator[str]:
    """Serve the simulator on a free port; yield the address of /retrieve."""
    engine = SimulatedEngine(simulator.url, template=prompts.simulator, max_retries=1)
    engine.check()
    server = SimulatedRetriever(
        engine, QueryNoise(NoiseSchedule(*noise), total), from_query=prompts.simulator_from_query, **options
    )
    with serving_application(server.application) as address:
        yield address


def prompts_of(simulator: ChatServer) -> dict[str, str]:
    """Return the prompts it got, by their query."""
    prompts = [request["messages"][-1]["content"] for request in simulator.requests]
    return {QUERY.findall(prompt)[-1]: prompt for prompt in prompts}


@dataclass
class SearchR1Client:
    """The searching half of Search-R1's `LLMGenerationManager`: the body it sends, and how it reads the reply."""

    search_url: str
    topk: int = 3

    def batch_search(self, queries: list[str]) -> list[str]:
        body = {"queries": queries, "topk": self.topk, "return_scores": True}
        return [self.text(found) for found in requests.post(self.search_url, json=body).json()["result"]]

    def text(self, found: list[dict[str, Any]]) -> str:
        text = ""
        for place, item in enumerate(found):
            title, *rest = item["document"]["contents"].split("\n")
            text += f"Doc {place + 1}(Title: {title}) " + "\n".join(rest) + "\n"
        return text


def test_search_r1_s_client_200_at_once_and_nothing_lost(simulator: ChatServer) -> None:
    with serving(simulator, questions=[EMMA, RADIUM]) as address, ThreadPoolExecutor(200) as pool:
        client = SearchR1Client(address)
        batches = [[f"who wrote Emma {number}", f"radium discovered {number}"] for number in range(200)]
        for batch, texts in zip(batches, pool.map(client.batch_search, batches), strict=True):
            expected = [
                "".join(f'Doc {n}(Title: "{query}") useful, {answer}, {n}.\n' for n in (1, 2, 3))
                for query, answer in zip(batch, ("Jane Austen", "Marie Curie"), strict=True)
            ]
            assert texts == expected
        told = health(address)
    assert (told["queries"], told["failures"], told["without_documents"]) == (400, 0, 0)
    assert len(simulator.requests) == 400 == len(prompts_of(simulator))


def test_a_request_tells_question_and_answers_or_they_are_looked_up_or_the_query_stands_alone(
    simulator: ChatServer,
) -> None:
    body = {
        "queries": ["a composer", "the author of Emma", "zebra"],
        "questions": ["Who composed Fidelio?", "", ""],
        "golden_answers": [["Beethoven"], [], [" "]],
        "topk": 1,
        "return_scores": True,
    }
    with serving(simulator, questions=[EMMA, RADIUM]) as address:
        status, reply = post(address, body)
        told = health(address)
    contents = [[found["document"]["contents"] for found in best] for best in reply["result"]]
    assert (status, contents) == (
        200,
        [
            ['"a composer"\nuseful, Beethoven, 1.'],
            ['"the author of Emma"\nuseful, Jane Austen, 1.'],
            ['"zebra"\nuseful, nobody, 1.'],
        ],
    )
    assert told["questions_from"] == {"request": 1, "lookup": 1, "query": 1}
    by_query = prompts_of(simulator)
    assert by_query["a composer"].startswith(
        "You are the Google search engine.\nGiven a query, you need to generate five"
    )
    assert 'the question: "Who composed Fidelio?" whose answer is Beethoven.' in by_query["a composer"]
    assert "question" not in by_query["zebra"] and "Useful Output:\nDoc 1: Radium" in by_query["zebra"]


def test_a_question_that_does_not_stand_out_is_not_taken_where_the_query_alone_will_do(simulator: ChatServer) -> None:
    rows = [EMMA, EMMA, {"question": "Who filmed the novel Emma?", "golden_answers": ["Autumn de Wilde"]}]
    queries = ["the novel Emma", "who wrote Emma"]
    with serving(simulator, questions=rows) as address:
        post(address, {"queries": queries})
        assert health(address)["questions_from"] == {"query": 1, "lookup": 1}
    with serving(simulator, questions=rows, prompts=TINYWORLD) as address:
        post(address, {"queries": queries})
        assert health(address)["questions_from"] == {"lookup": 2}


def test_the_request_of_the_paper_s_code(simulator: ChatServer) -> None:
    with serving(simulator) as address:
        assert post(address, {"query": "q", "top_k": 1}) == (200, [{"text": "q: useful, nobody, 1."}])
        assert len(post(address, {"query": "q"})[1]) == 3
        assert len(post(address, {"query": "q", "top_k": 50})[1]) == 5, "a simulator writes five"


def test_documents_without_scores(simulator: ChatServer) -> None:
    with serving(simulator) as address:
        plain = post(address, {"queries": ["q"], "topk": 2})[1]["result"][0]
        scored = post(address, {"queries": ["q"], "topk": 2, "return_scores": True})[1]["result"][0]
    assert [found["document"] for found in scored] == plain
    assert [found["score"] for found in scored] == [1.0, 0.5]
    assert [row["contents"] for row in plain] == ['"q"\nuseful, nobody, 1.', '"q"\nuseful, nobody, 2.']


def test_a_document_without_a_title_keeps_its_text(simulator: ChatServer) -> None:
    simulator.write = lambda messages: "\n".join(f"Doc {number}: It rains." for number in range(1, 6))
    with serving(simulator) as address:
        assert post(address, {"queries": ["q"], "topk": 1})[1]["result"][0][0]["contents"] == '""\nIt rains.'


def noisy(address: str, **told: Any) -> list[bool]:
    """Say of 200 queries whose documents were noisy."""
    queries = [f"query {number}" for number in range(200)]
    _, reply = post(address, {"queries": queries, "topk": 1, **told})
    return ["noisy" in row["contents"] for (row,) in reply["result"]]


def test_the_noise_is_the_request_s_or_rises_with_the_queries(simulator: ChatServer) -> None:
    with serving(simulator, noise=(0.0, 1.0), total=200) as address:
        first, now = noisy(address), requests.get(address.replace("retrieve", "schedule"), timeout=60).json()
        assert now == {"start": 0.0, "end": 1.0, "base": 4.0, "total_queries": 200, "queries": 200, "p_noise": 1.0}
        assert sum(first) < 10, "all queries of one request have the noise it came at"
        assert all(noisy(address))
        half, more = noisy(address, p_noise=0.5), noisy(address, p_noise=0.7)
        assert 70 < sum(half) < 130
        assert all(after for before, after in zip(half, more, strict=True) if before), "noise is only added"
        assert not any(noisy(address, p_noise=0))
        assert noisy(address, step=50, total_steps=100) == noisy(address, p_noise=1 / 3), "(4^0.5 - 1) / 3, Eq. 1"
        assert health(address)["queries"] == 1400


def test_the_schedule_is_changed_while_it_serves(simulator: ChatServer) -> None:
    with serving(simulator) as address:
        schedule = address.replace("retrieve", "schedule")
        assert post(schedule, {"end": 0.5, "base": 1, "total_queries": 10, "queries": 4}) == (
            200,
            {"start": 0.0, "end": 0.5, "base": 1.0, "total_queries": 10, "queries": 4, "p_noise": 0.25},
        )
        assert post(schedule, {"end": 2}) == (422, {"detail": "noise end is 2.0: a probability lies in [0, 1]"})
        assert post(schedule, {"stop": 1})[0] == 422
        assert requests.get(schedule, timeout=60).json()["end"] == 0.5


def test_the_same_search_gets_the_same_whatever_its_order_and_another_key_another(simulator: ChatServer) -> None:
    def asked(**told: Any) -> dict[str, tuple[int, bool]]:
        """Return the seed and the quality that each query came with."""
        simulator.requests.clear()
        simulator.seen.clear()
        with serving(simulator) as address:
            assert post(address, {"p_noise": 0.5, **told})[0] == 200
        prompts = [request["messages"][-1]["content"] for request in simulator.requests]
        kinds = [
            (request["seed"], "Noisy Output" in request["messages"][-1]["content"]) for request in simulator.requests
        ]
        return dict(zip((QUERY.findall(prompt)[-1] for prompt in prompts), kinds, strict=True))

    queries = [f"query {number}" for number in range(20)]
    keys = [[0, 1, row, 0, 0] for row in range(20)]
    first = asked(queries=queries)
    assert len(set(first.values())) == 20 and {is_noisy for _, is_noisy in first.values()} == {False, True}
    assert asked(queries=queries[::-1]) == first
    keyed = asked(queries=queries, keys=keys)
    assert keyed != first and keyed == asked(queries=queries[::-1], keys=keys[::-1])


def test_a_simulator_that_fails_fails_the_request_and_serves_the_next(simulator: ChatServer) -> None:
    with serving(simulator) as address:
        simulator.write = lambda messages: 500
        status, reply = post(address, {"queries": ["a", "b"]})
        assert status == 503 and "the simulator at" in reply["detail"] and "attempt 2 of 2" in reply["detail"]
        simulator.write = write
        assert post(address, {"queries": ["a", "b"]})[0] == 200
        assert health(address)["failures"] >= 1


def test_a_reply_without_documents_is_counted_and_none_are_made_up(simulator: ChatServer) -> None:
    simulator.write = lambda messages: "..." if "Query: a\n" in messages[-1]["content"] else write(messages)
    with serving(simulator) as address:
        status, reply = post(address, {"queries": ["a", "b"], "topk": 2})
        told = health(address)
    assert (status, [len(found) for found in reply["result"]]) == (200, [0, 2])
    assert (told["without_documents"], told["failures"], told["queries"]) == (1, 0, 2)
    assert (told["valid_format_rate"], told["short_reply_rate"]) == (1 / 3, 2 / 3)


def test_health_says_how_well_it_writes(simulator: ChatServer) -> None:
    with serving(simulator) as address:
        assert health(address)["useful_answer_rate"] is None
        known = {"questions": ["Q?", "Q?"], "golden_answers": [["nobody"], ["Ada"]]}
        post(address, {"queries": ["a", "b"], **known})
        post(address, {"queries": ["a", "b"], **known, "p_noise": 1})
        post(address, {"queries": ["alone"]})
        told = health(address)
    assert (told["useful_answer_rate"], told["noisy_leak_rate"], told["noisy"]) == (1.0, 0.5, 2)
    assert told["index"]["model"] == "scripted"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another count": ({"questions": ["Q?"], "golden_answers": [["a"]]}, "questions has 1 entries for 2 queries"),
    "no answers": ({"questions": ["Q?", "R?"]}, "questions and golden_answers belong together"),
    "keys": ({"keys": [[1], []]}, "List should have at least 1 item"),
    "noise": ({"p_noise": 1.5}, "Input should be less than or equal to 1"),
    "a step alone": ({"step": 5}, "step and total_steps belong together, and step is at most total_steps"),
    "past the end": ({"step": 5, "total_steps": 4}, "step is at most total_steps"),
    "both": ({"step": 1, "total_steps": 4, "p_noise": 0.0}, "the noise comes from p_noise, or from step and total"),
    "a slip": ({"golden_answer": ["a", "b"]}, "Extra inputs are not permitted"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_what_is_wrong(simulator: ChatServer, case: str) -> None:
    told, message = BAD[case]
    with serving(simulator) as address:
        status, reply = post(address, {"queries": ["a", "b"], **told})
    assert status == 422 and message in reply["detail"][0]["msg"]
    assert simulator.requests == []


def test_for_a_simulator_that_only_copies_an_unknown_query_finds_nothing_among_registered_questions(
    simulator: ChatServer,
) -> None:
    with serving(simulator, prompts=TINYWORLD, questions=[EMMA]) as address:
        RetrieverEngine(address).check()  # of a client that asks "test" first
        status, reply = post(address, {"queries": ["Emma", "zebra"]})
        assert (status, [len(found) for found in reply["result"]]) == (200, [3, 0])
        told = health(address)
    assert (told["without_documents"], told["questions_from"]) == (2, {"lookup": 1, "query": 2})
    with serving(simulator, prompts=TINYWORLD) as address:
        status, reply = post(address, {"queries": ["zebra"]})
        assert status == 422 and "golden answers of the query 'zebra'; send questions" in reply["detail"]


def test_added_tokens_are_plain_text_in_either_prompt(simulator: ChatServer) -> None:
    simulator.tokenizer_info = (200, {"added_tokens_decoder": {"7": "<|im_end|>"}})
    with serving(simulator) as address:
        for told in ({}, {"questions": [EMMA["question"]], "golden_answers": [EMMA["golden_answers"]]}):
            post(address, {"queries": ["Emma<|im_end|>"], **told})
    prompts = [request["messages"][-1]["content"] for request in simulator.requests]
    assert len(prompts) == 2 and all("Query: Emma< |im_end|>\n" in prompt for prompt in prompts)


def test_the_recipe_serves_a_simulator(
    simulator: ChatServer, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_ports()
    address = f"http://127.0.0.1:{port}/retrieve"
    flags = ["--engine", "simulated", "--simulator_url", simulator.url, "--questions", str(questions)]
    flags += ["--noise_start", "1", "--noise_end", "1", "--port", str(port)]
    serve = partial(load_recipe("serve_retriever").main, flags)
    status, reply = ask_and_end(serve, address, {"queries": ["Emma author"]})
    assert status == 200 and [row["contents"] for row in reply["result"][0]] == [
        f'"Emma author"\nnoisy, nobody, {number}.' for number in (1, 2, 3)
    ]
    prompt = prompts_of(simulator)["Emma author"]
    assert 'the question: "Who wrote Emma?" whose answer is Jane Austen.' in prompt and "noisy documents" in prompt
    said = capsys.readouterr().out
    assert said == f"retriever ready at {address}: scripted writes, for 3 questions (Ctrl-C ends it)\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--simulator_url", "http://127.0.0.1:9/v1"], "no simulator answers at http://127.0.0.1:9/v1"),
        (["--noise_end", "2"], "noise end is 2.0: a probability lies in"),
        (["--questions", "none.jsonl"], "there is no file none.jsonl"),
    ],
)
def test_a_mistake_gets_one_sentence(flags: list[str], message: str, refusal: Refusal) -> None:
    assert message in refusal("serve_retriever", ["--engine", "simulated", *flags])
