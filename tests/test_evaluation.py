"""Scores, intervals and tables on written-out records; the evaluation itself on a random model with a real engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zerosearch import evaluation
from zerosearch.data import load_questions, read_passages
from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.bm25 import BM25Engine
from zerosearch.errors import UserError
from zerosearch.evaluation import evaluate, load_generator, results_table, summarize
from zerosearch.rollout import RolloutSettings

pytest_plugins = ("recipe_modules",)  # fixtures

SETTINGS = RolloutSettings(max_turns=3, max_turn_tokens=48, max_observation_tokens=200, max_trajectory_tokens=2048)


def record(
    dataset: str, answer: str | None, golden: str, searches: int = 1, outcome: str = "answered"
) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "answer": answer,
        "golden_answers": [golden],
        "searches": searches,
        "turns": searches + 1,
        "outcome": outcome,
    }


RECORDS = [
    record("nq", "the Jane Austen", "Jane Austen"),  # EM 1, F1 1, cover 1
    record("nq", "Jane Austen of Steventon", "Jane Austen", searches=3),  # EM 0, F1 2/3, cover 1
    record("nq", None, "Emma", searches=0, outcome="turns_exhausted"),  # all 0
    record("musique", "London", "Paris", searches=2),  # all 0
]


def test_scores_are_means_over_questions_by_dataset_and_over_datasets() -> None:
    scores = summarize(RECORDS)
    means = {name: scores[name]["mean"] for name in ("em", "f1", "cover_em")}
    assert means == pytest.approx({"em": 0.25, "f1": 5 / 12, "cover_em": 0.5})
    assert (scores["n"], scores["answer_rate"], scores["searches"], scores["turns"]) == (4, 0.75, 1.5, 2.5)
    assert scores["outcomes"] == {"answered": 3, "turns_exhausted": 1, "truncated": 0, "failed_search": 0}
    nq, musique = scores["by_dataset"]["nq"], scores["by_dataset"]["musique"]
    assert (nq["n"], nq["em"]["mean"], nq["answer_rate"]) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (musique["n"], musique["em"]["mean"], musique["searches"]) == (1, 0.0, 2.0)
    assert scores["macro_average"]["em"]["mean"] == pytest.approx(1 / 6)  # (1/3 + 0) / 2
    assert scores["macro_average"]["cover_em"]["mean"] == pytest.approx(1 / 3)


def test_an_interval_holds_95_percent() -> None:
    # 200 right of 400: the normal approximation gives 0.5 +- 1.96 sqrt(0.25 / 400) = 0.5 +- 0.049.
    scores = summarize([record("nq", "a1" if place % 2 else "a2", "a1") for place in range(400)])
    assert scores["em"]["low"] == pytest.approx(0.451, abs=0.006)
    assert scores["em"]["high"] == pytest.approx(0.549, abs=0.006)


def test_the_macro_interval_is_that_of_the_mean_of_the_datasets() -> None:
    # 100 of a set at 0.5, and one of a set that is always right: 0.75 +- 1.96 sqrt(0.25 / 100) / 2 = 0.75 +- 0.049.
    halves = [record("half", "a1" if place % 2 else "a2", "a1") for place in range(100)]
    macro = summarize([*halves, record("right", "a1", "a1")])["macro_average"]["em"]
    assert macro["mean"] == 0.75
    assert macro["low"] == pytest.approx(0.701, abs=0.011)
    assert macro["high"] == pytest.approx(0.799, abs=0.011)


def test_intervals_repeat_with_the_seed_and_vanish_without_variation() -> None:
    assert summarize(RECORDS, seed=1) == summarize(RECORDS, seed=1)
    records = [record("nq", "right" + " wrong" * place, "right") for place in range(50)]
    assert summarize(records, seed=1)["f1"] != summarize(records, seed=2)["f1"]
    assert summarize([record("nq", "x", "x")] * 5)["em"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_the_table_has_a_line_a_dataset_and_their_mean() -> None:
    assert results_table(summarize([record("nq", "x", "x")] * 5 + [record("musique", None, "x", searches=2)])) == (
        "dataset                 n  EM [95 %]            F1 [95 %]            cover-EM answered searches\n"
        "nq                      5  1.000 [1.000, 1.000] 1.000 [1.000, 1.000]    1.000    1.000     1.00\n"
        "musique                 1  0.000 [0.000, 0.000] 0.000 [0.000, 0.000]    0.000    0.000     2.00\n"
        "mean of datasets           0.500 [0.500, 0.500] 0.500 [0.500, 0.500]    0.500"
    )
    assert "mean of datasets" not in results_table(summarize([record("nq", "x", "x")]))


def rows_of(path: Path, copies: int = 1) -> list[dict[str, Any]]:
    return load_questions(str(path)).to_list() * copies


def test_an_evaluation_leaves_scores_and_every_trajectory(
    corpus: Path,
    questions: Path,
    random_model: Path,
    tmp_path: Path,
) -> None:
    generator = load_generator(str(random_model), "transformers", 2048)
    about = {"model": "m", "dataset": "d", "generator": "transformers"}
    rows = rows_of(questions, copies=8)
    results = evaluate(rows, generator, BM25Engine(corpus), SETTINGS, tmp_path, p_noise=0.25, seed=3, about=about)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results | about | {"engine": "bm25", "n": 24, "seed": 3, "p_noise": 0.25} == results
    assert results["settings"]["max_turns"] == 3 and results["seconds"] > 0
    assert {"python", "torch", "transformers"} <= set(results["versions"])

    records = [json.loads(line) for line in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    assert [(row["id"], row["dataset"]) for row in records] == [(row["id"], row["dataset"]) for row in rows]
    assert results["searches"] == sum(row["searches"] for row in records) / 24
    assert results["answer_rate"] == sum(row["answer"] is not None for row in records) / 24
    assert sum(results["outcomes"].values()) == 24
    assert records[0]["segments"][0]["text"].endswith("Question: Who wrote Emma?\n")
    found = [part["text"] for row in records for part in row["segments"] if part["source"] == "documents"]
    assert any(
        passage.text in observation for passage in read_passages(corpus) for observation in found
    )  # real passages were read


def test_greedy_evaluation_repeats_itself(
    corpus: Path,
    questions: Path,
    random_model: Path,
    tmp_path: Path,
) -> None:
    greedy = RolloutSettings(max_turn_tokens=16, max_observation_tokens=200, temperature=0.0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        generator = load_generator(str(random_model), "transformers", 2048)
        evaluate(rows_of(questions), generator, BM25Engine(corpus), greedy, tmp_path / name)
    assert (tmp_path / "a/trajectories.jsonl").read_bytes() == (tmp_path / "b/trajectories.jsonl").read_bytes()


class BrokenEngine:
    """Fails every third search for good, and remembers what it was asked."""

    name = "broken"
    max_concurrency = 4

    def __init__(self) -> None:
        self.requests: list[SearchRequest] = []

    async def search(self, request: SearchRequest) -> SearchResult:
        self.requests.append(request)
        if len(self.requests) % 3 == 0:
            raise SearchError("the broken engine is broken")
        return SearchResult(("a document",))

    async def aclose(self) -> None:
        pass


def test_a_lost_search_leaves_trajectories_and_no_scores(questions: Path, random_model: Path, tmp_path: Path) -> None:
    generator = load_generator(str(random_model), "transformers", 2048)
    engine = BrokenEngine()
    with pytest.raises(
        SearchError, match="of 24 questions lost a search, so there are no scores: the broken engine is"
    ):
        evaluate(rows_of(questions, copies=8), generator, engine, SETTINGS, tmp_path, p_noise=0.5, seed=9)
    assert len((tmp_path / "trajectories.jsonl").read_text().splitlines()) == 24
    assert not (tmp_path / "results.json").exists()
    assert {request.p_noise for request in engine.requests} == {0.5}
    keys = [request.key for request in engine.requests]
    assert len(set(keys)) == len(keys) and {(key[0], key[1]) for key in keys} == {
        (9, 0)
    }  # (seed, step, row, sample, turn)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model"):
        load_generator(str(tmp_path / "nothing"), "transformers", 512)


def test_vllm_that_is_not_installed_is_named_with_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vLLM is not installed.*--generator transformers"):
        load_generator("any", "vllm", 512)
