"""An evaluation on a random model with a real engine: what it leaves, how it stops, and how it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from jsonl_files import rows_of
from scripted import Library, Writer

from zerosearch.data import load_questions, read_passages
from zerosearch.engines import SearchError, account
from zerosearch.engines.account import LimitReached, Limits
from zerosearch.engines.bm25 import BM25Engine
from zerosearch.errors import UserError
from zerosearch.evaluation.evaluate import evaluate
from zerosearch.generation import loading
from zerosearch.generation.chat_endpoint import EndpointGenerator, EndpointOptions
from zerosearch.generation.loading import load_generator, model_identity
from zerosearch.http import run_in_background
from zerosearch.prompts import PAPER
from zerosearch.rollout.loop import RolloutSettings

if TYPE_CHECKING:
    from chat_server import ChatServer
    from paid_search import PaidSearch

SETTINGS = RolloutSettings(max_turns=3, max_turn_tokens=48, max_observation_tokens=200, max_trajectory_tokens=2048)


def trajectories(folder: Path) -> list[dict[str, Any]]:
    """Read the trajectories of a folder without their times."""
    records = rows_of(folder / "trajectories.jsonl")
    return [{name: value for name, value in record.items() if not name.endswith("_s")} for record in records]


def test_an_evaluation_leaves_scores_and_every_trajectory(
    corpus: Path, questions: Path, random_model: Path, tmp_path: Path
) -> None:
    generator = load_generator(str(random_model), "transformers", 2048)
    about = {"model": "m", "dataset": "d", "generator": "transformers"}
    rows = load_questions(str(questions)).to_list() * 8
    folder = tmp_path / "new/folder"
    results = evaluate(rows, generator, BM25Engine(corpus), SETTINGS, folder, p_noise=0.25, seed=3, about=about)
    assert json.loads((folder / "results.json").read_text()) == results
    assert results | about | {"engine": "bm25", "n": 24, "seed": 3, "p_noise": 0.25} == results
    assert results["settings"]["max_turns"] == 3 and results["seconds"] > 0
    assert {"python", "torch", "transformers"} <= set(results["versions"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert results | manifest == results and len(manifest["data_sha256"]) == 64
    assert manifest | about | {"agent": "policy", "num_questions": 24, "num_samples": 1} == manifest
    assert manifest["engine_identity"]["corpus_sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()

    records = rows_of(folder / "trajectories.jsonl")
    assert [(row["id"], row["dataset"]) for row in records] == [(row["id"], row["dataset"]) for row in rows]
    searches = sum(row["searches"] for row in records)
    assert results["searches"] == searches / 24
    bill = {"queries": searches, "sent": searches, "replayed": 0, "retries": 0, "failures": 0}
    assert results["this_command"]["engine"] == bill
    assert results["this_command"]["usd_at_google"] == pytest.approx(searches * 275 / 30_000, abs=1e-6)
    assert results["answer_rate"] == sum(row["answer"] is not None for row in records) / 24
    assert sum(results["outcomes"].values()) == 24
    assert records[0]["segments"][0]["text"].endswith("Question: Who wrote Emma?\n")
    found = [part["text"] for row in records for part in row["segments"] if part["source"] == "documents"]
    assert any(
        passage.text in observation for passage in read_passages(corpus) for observation in found
    )  # real passages were read


def test_vllm_that_is_not_installed_is_named_with_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vLLM is not installed.*--generator transformers"):
        load_generator("any", "vllm", 512)


def asked(count: int) -> list[dict[str, Any]]:
    """Return questions whose answer is their number, of two datasets."""
    return [
        {"id": f"q{n}", "dataset": "nq" if n % 2 else "popqa", "question": f"What is {n}?", "golden_answers": [f"{n}"]}
        for n in range(count)
    ]


def number_in(context: str) -> str:
    return context.rsplit("What is ", 1)[1].split("?")[0]


def search_then_answer(context: str) -> str:
    """Search for the number, then answer with it; every third answer is wrong."""
    number = number_in(context.split("<information>Doc")[0])
    if "<information>Doc" not in context:
        return f"<search> {number} </search>"
    return f"<answer> {'no' if int(number) % 3 == 0 else number} </answer>"


RAG_LIKE = PAPER.agents["ra-agent"]


class Killed(BaseException):
    """Stands for a signal."""


def dying(write: Callable[[str], str], after: int) -> Callable[[str], str]:
    """Return a writer that dies at its turn number `after`."""
    turns = iter(range(after))

    def one(context: str) -> str:
        if next(turns, None) is None:
            raise Killed
        return write(context)

    return one


def the_same(results: dict[str, Any]) -> dict[str, Any]:
    """Return what must not depend on interruptions: all but the time and the bill of the last command."""
    return {name: value for name, value in results.items() if name not in ("seconds", "this_command")}


def run(output_dir: Path, write: Callable[[str], str] = search_then_answer, **options: Any) -> dict[str, Any]:
    """Evaluate on twelve questions with a scripted policy; `options` are those of `evaluate`, and what differs."""
    output_dir.mkdir(exist_ok=True)
    options = {"agent": RAG_LIKE, "max_live": 4} | options
    engine, generator = options.pop("engine", Library()), options.pop("generator", None) or Writer(write)
    settings = RolloutSettings(**{"temperature": 0.0} | options.pop("settings", {}))
    return evaluate(asked(options.pop("count", 12)), generator, engine, settings, output_dir, **options)


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    asked = Library()
    whole = run(tmp_path / "whole", engine=asked)
    assert (whole["em"]["mean"], whole["searches"], whole["n"], whole["stopped"]) == (8 / 12, 1.0, 12, None)
    for after in (1, 4, 5, 3):
        with pytest.raises(Killed):
            run(tmp_path / "killed", dying(search_then_answer, after), resume=True)
        assert not (tmp_path / "killed/results.json").exists()
    engine = Library()
    finished = len((tmp_path / "killed/trajectories.jsonl").read_text().splitlines())
    assert 0 < finished < 12
    resumed = run(tmp_path / "killed", engine=engine, resume=True)
    assert len(engine.requests) == resumed["this_command"]["trajectories"] == 12 - finished  # nothing is asked twice
    keys = {request.query: request.key for request in asked.requests}
    assert all(request.key == keys[request.query] for request in engine.requests), (
        "the coins and seeds of their places"
    )
    assert the_same(resumed) == the_same(whole)
    assert trajectories(tmp_path / "killed") == trajectories(tmp_path / "whole")
    assert (tmp_path / "killed/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_a_line_that_a_kill_cut_short_is_rolled_out_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(tmp_path)
    path = tmp_path / "trajectories.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    engine = Library()
    assert the_same(run(tmp_path, engine=engine, resume=True)) == the_same(whole)
    assert [request.query for request in engine.requests] == ["11"] and "ended in half a line" in caplog.text
    path.write_bytes(b"broken\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"trajectories\.jsonl line 1 is not JSON"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there, and 1 here"),
        ({"agent": PAPER.agents["search-r1"]}, "agent is 'ra-agent' there, and 'search-r1' here"),
        ({"about": {"model": "m"}}, "model is None there, and 'm' here"),
        ({"p_noise": 0.5}, "p_noise is 0.0 there, and 0.5 here"),
        ({"count": 11}, "data_sha256 is"),
        ({"settings": {"max_turn_tokens": 9}}, "settings.max_turn_tokens is 500 there, and 9 here"),
    ],
)
def test_another_evaluation_is_not_resumed(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run(tmp_path)
    before = (tmp_path / "trajectories.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"holds another evaluation, which cannot be resumed as this one: {message}"):
        run(tmp_path, resume=True, **change)
    assert (tmp_path / "trajectories.jsonl").read_bytes() == before


def test_trajectories_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "trajectories.jsonl").write_text("of a training run\n")
    with pytest.raises(UserError, match=r"trajectories\.jsonl is not an evaluation's"):
        run(tmp_path, resume=True)
    assert (tmp_path / "trajectories.jsonl").read_text() == "of a training run\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 5}, "its answer is '5'"),
        ({"golden_answers": []}, "its golden_answers are not texts, one at least"),
        ({"golden_answers": [1]}, "its golden_answers are not texts, one at least"),
        ({"row": "0"}, "its row is '0'"),
        (None, "it lacks id"),
    ],
)
def test_a_line_that_is_no_trajectory_is_named(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    run(tmp_path)
    path = tmp_path / "trajectories.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    with path.open("a") as file:
        file.write(json.dumps({} if change is None else last | change) + "\n")
    with pytest.raises(UserError, match=f"line 13 is not a trajectory: {message}"):
        run(tmp_path, resume=True)


def test_a_resume_may_have_other_time_limits(tmp_path: Path) -> None:
    whole = run(tmp_path)
    resumed = run(tmp_path, str, settings={"search_timeout_s": 9.0, "turn_timeout_s": 9.0}, resume=True)
    assert resumed["by_dataset"] == whole["by_dataset"]


def test_a_lost_search_leaves_trajectories_and_no_scores_until_a_resume(tmp_path: Path) -> None:
    engine = Library(broken=True)
    with pytest.raises(SearchError, match="12 of 12 questions lost a search, so there are no scores: the library is"):
        run(tmp_path, engine=engine, p_noise=0.5, seed=9)
    assert len(trajectories(tmp_path)) == 12 and not (tmp_path / "results.json").exists()
    assert {request.p_noise for request in engine.requests} == {0.5}
    keys = [request.key for request in engine.requests]  # (seed, step, row, sample, turn)
    assert len(set(keys)) == 12 and {key[:2] for key in keys} == {(9, 0)}
    with pytest.raises(SearchError, match="12 of 12 questions lost a search"):  # nothing is left that might be scored
        run(tmp_path, engine=engine, p_noise=0.5, seed=9, resume=True, max_failed=20)
    resumed = run(tmp_path, resume=True, p_noise=0.5, seed=9)
    assert the_same(resumed) == the_same(run(tmp_path, p_noise=0.5, seed=9))


def test_prompts_that_leave_no_room_for_a_turn_are_no_result(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompt leaves room for a turn: max_trajectory_tokens"):
        run(tmp_path, settings={"max_trajectory_tokens": 10})


def test_an_agent_that_never_searches_needs_no_engine(tmp_path: Path) -> None:
    results = run(
        tmp_path, lambda context: f"<answer> {number_in(context)} </answer>", engine=None, agent=PAPER.agents["direct"]
    )
    assert (results["engine"], results["em"]["mean"], results["searches"]) == ("none", 1.0, 0.0)


def test_time_that_runs_out_leaves_scores_of_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0  # a clock that only turns advance
    monkeypatch.setattr(account, "time", SimpleNamespace(perf_counter=lambda: now))

    def slow(context: str) -> str:
        nonlocal now
        now += 1.0
        return search_then_answer(context)

    results = run(tmp_path, slow, limits=Limits(seconds=10.0), max_live=2)
    assert 0 < results["n"] < 12
    assert results["stopped"] == f"stopped at the limit of 10 s: {results['n']} of 12 trajectories are finished"
    whole = run(tmp_path, resume=True)
    assert (whole["n"], whole["stopped"]) == (12, None)
    with pytest.raises(LimitReached, match="0 of 12 trajectories are finished"):
        run(tmp_path, slow, limits=Limits(seconds=0.5))


def test_money_that_runs_out_stops_and_what_was_paid_for_is_kept(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.write = lambda messages: search_then_answer("".join(message["content"] for message in messages))
    made = []

    def pay(limit: float | None) -> dict[str, Any]:
        options = EndpointOptions(chat_server.url, endpoint_usd_written=1e6, endpoint_concurrency=1)
        made.append(EndpointGenerator(options, "m"))
        return run(tmp_path, generator=made[-1], resume=True, limits=Limits(usd=limit), max_live=2)

    stopped = pay(20.0)  # a dollar a word written: 2 for a search, 2 for an answer
    assert 0 < stopped["n"] < 12 and "stopped at the limit of 20 USD" in stopped["stopped"]
    assert 20 <= stopped["this_command"]["usd"] <= 22  # what was under way is finished
    finished, replies = stopped["n"], len(chat_server.requests)
    whole = pay(None)
    assert len(chat_server.requests) - replies == 2 * (12 - finished)
    assert (whole["usage"]["replies"], whole["usage"]["tokens_written"]) == (24, 48)  # over both commands
    for one in made:
        run_in_background(one.aclose(), 30)


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"max_queries": 5}, "stopped: the limit of 5 queries to google is reached"),
        ({"max_usd": 0.005, "usd_per_query": 0.001}, "stopped: the limit of 0.005 USD for google is reached: 0.0050"),
    ],
)
def test_a_budget_that_is_spent_stops_and_is_no_failure(
    paid_search: PaidSearch, tmp_path: Path, budget: dict[str, Any], reason: str
) -> None:
    stopped = run(tmp_path, engine=paid_search.engine(**budget))
    # Whatever comes back first: five searches are paid for, the sixth stops it, and two had to end before that one.
    assert len(paid_search.queries) == 5 and 2 <= stopped["n"] <= 5
    assert stopped["stopped"].startswith(reason)
    assert stopped["stopped"].endswith(f": {stopped['n']} of 12 trajectories are finished")
    assert stopped["outcomes"]["answered"] == stopped["n"] == len(trajectories(tmp_path))
    counts = {"queries": 5, "sent": 5, "replayed": 0, "retries": 0, "failures": 0}
    assert stopped["this_command"]["engine"] == counts
    resumed = run(tmp_path, engine=paid_search.engine(), resume=True)
    assert resumed["this_command"]["trajectories"] == 12 - stopped["n"]
    (tmp_path / "whole").mkdir()
    assert the_same(resumed) == the_same(run(tmp_path / "whole", engine=paid_search.engine()))
    assert trajectories(tmp_path) == trajectories(tmp_path / "whole")


def test_a_failure_before_the_budget_is_spent_stays_a_failure(paid_search: PaidSearch, tmp_path: Path) -> None:
    paid_search.refuses = lambda query: 400 if query == "0" else 200
    with pytest.raises(SearchError, match="1 of 12 questions lost a search, so there are no scores: Google through"):
        run(tmp_path, engine=paid_search.engine(max_queries=5))
    outcomes = [record["outcome"] for record in trajectories(tmp_path)]
    assert outcomes.count("failed_search") == 1 and outcomes.count("answered") == len(outcomes) - 1


def test_several_samples_of_a_question_have_seeds_of_their_own(tmp_path: Path) -> None:
    writer = Writer(lambda context: f"<answer> {number_in(context)} </answer>")
    direct = {"generator": writer, "agent": PAPER.agents["direct"], "count": 3, "settings": {"temperature": 1.0}}
    results = run(tmp_path, num_samples=4, **direct)
    assert len(set(writer.seeds)) == 12
    assert (results["n"], results["pass_at_k"]["4"]["mean"]) == (3, 1.0)
    places = [(record["row"], record["sample"]) for record in trajectories(tmp_path)]
    assert places == [(n, k) for n in range(3) for k in range(4)]


def test_samples_that_would_all_be_the_same_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_samples above 1 needs a temperature above 0"):
        run(tmp_path, num_samples=2)
    with pytest.raises(UserError, match="num_samples is 0"):
        run(tmp_path, num_samples=0)


def test_a_model_is_told_from_another_by_its_weights(tmp_path: Path) -> None:
    for name, weights in (("a", b"1" * 3_000_000), ("b", b"1" * 2_999_999 + b"2"), ("c", b"1" * 3_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    (tmp_path / "c/training_args.bin").write_bytes(b"x")
    a, b, c = (model_identity(str(tmp_path / name))["weights_fingerprint"] for name in "abc")
    assert a == c != b
