"""recipes/evaluate.py as a user runs it: what it prints and leaves, and one sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jsonl_files import rows_of, write_rows
from recipe_modules import Refusal, as_flags, load_recipe

from zerosearch.data import BENCHMARKS, read_passages
from zerosearch.evaluation.matrix import model_labels
from zerosearch.files import sole_writer
from zerosearch.metrics import METRICS
from zerosearch.prompts import TINYWORLD
from zerosearch.tinyworld.world import World, question_rows

if TYPE_CHECKING:
    from chat_server import ChatServer, Messages
    from paid_search import PaidSearch

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data"


@pytest.fixture
def arguments(corpus: Path, questions: Path, random_model: Path, tmp_path: Path) -> dict[str, str]:
    """Return flags that work, with transformers and short turns."""
    return {
        "model": str(random_model),
        "dataset": str(questions),
        "corpus": str(corpus),
        "output_dir": str(tmp_path / "out"),
        "generator": "transformers",
        "max_turn_tokens": "24",
        "max_observation_tokens": "200",
    }


def test_it_prints_a_table_and_leaves_results(arguments: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    load_recipe("evaluate").main(as_flags(arguments))
    printed = capsys.readouterr().out.splitlines()
    results = json.loads((Path(arguments["output_dir"]) / "results.json").read_text())
    assert [line.split("  ")[0] for line in printed if line] == [
        "dataset",
        "nq",
        "musique",
        "mean of datasets",
        f"{arguments['output_dir']}/results.json, trajectories.jsonl, table.md",
        *(["engine", "bm25"] if results["searches"] else []),
    ]
    described = {"model": arguments["model"], "dataset": arguments["dataset"], "generator": "transformers"}
    assert results | described | {"engine": "bm25", "n": 3, "seed": 0} == results
    assert results["settings"]["temperature"] == 0.0  # greedy by default
    assert list(results["by_dataset"]) == ["nq", "musique"]


def test_a_full_folder_is_overwritten_when_asked_to(arguments: dict[str, str]) -> None:
    output_dir = Path(arguments["output_dir"])
    output_dir.mkdir()
    (output_dir / "results.json").write_text("old")
    load_recipe("evaluate").main([*as_flags(arguments), "--overwrite_output_dir"])
    assert json.loads((output_dir / "results.json").read_text())["n"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_dir": "FULL"}, "the output folder FULL is not empty; name another, or pass --overwrite_output_dir"),
        ({"model": "FULL"}, "there is no model 'FULL'"),
        ({"dataset": "FULL/none.jsonl"}, "there is no file FULL/none.jsonl"),
        ({"corpus": ""}, "--engine bm25 needs --corpus"),
        ({"agent": "nobody"}, "the agent 'nobody' is unknown; there are policy, direct, cot, rag"),
        ({"engine": "bing"}, "argument --engine: invalid choice: 'bing'"),
        ({"generator": "endpoint"}, "an endpoint needs its address: --endpoint_url"),
        ({"engine": "simulated", "simulator_url": "http://127.0.0.1:9/v1"}, "--model SIMULATOR --port 9"),
        ({"engine": "simulated", "p_noise": "1.5"}, "p_noise is 1.5: it must be at most 1"),
        ({"model": ""}, "the following arguments are required: --model"),
    ],
)
def test_a_mistake_gets_one_sentence(
    change: dict[str, str], message: str, arguments: dict[str, str], tmp_path: Path, refusal: Refusal
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    changed = {name: value.replace("FULL", str(full)) for name, value in (arguments | change).items() if value}
    assert message.replace("FULL", str(full)) in refusal("evaluate", as_flags(changed))
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.fixture
def endpoint(chat_server: ChatServer, corpus: Path, questions: Path, tmp_path: Path) -> list[str]:
    """Return flags for a scripted model behind an endpoint, which looks every question up once."""

    def write(messages: Messages) -> str:
        asked = messages[0]["content"]
        may_search = "<search>" in asked and "<information>" not in messages[-1]["content"][:20]
        return "<search> Emma author </search>" if may_search else "<answer> Jane Austen </answer>"

    chat_server.write = write
    flags = {"dataset": str(questions), "corpus": str(corpus), "output_dir": str(tmp_path / "out")}
    return as_flags(flags | {"generator": "endpoint", "endpoint_url": chat_server.url})


def test_it_goes_on_where_it_stopped_and_asks_nothing_twice(
    endpoint: list[str], chat_server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*endpoint, "--model", "m", "--agent", "direct", "policy", "--endpoint_usd_written", "1000000"]
    evaluate = load_recipe("evaluate")
    # An answer takes 3 dollars. At one request at a time two questions are under way, and the first reaches the limit.
    evaluate.main([*flags, "--max_usd", "2", "--endpoint_concurrency", "1"])
    printed = capsys.readouterr().out
    assert "direct: stopped at the limit of 2 USD: 2 of 3 trajectories are finished; --resume true goes on" in printed
    assert len(chat_server.requests) == 2
    with pytest.raises(SystemExit):
        evaluate.main(flags)
    assert "holds an evaluation: --resume true goes on, --overwrite_output_dir" in capsys.readouterr().err
    evaluate.main([*flags, "--resume", "true"])
    found = json.loads((tmp_path / "out/results.json").read_text())["evaluations"]
    assert [results["n"] for results in found.values()] == [3, 3]
    assert all(results["stopped"] is None for results in found.values())
    assert len(chat_server.requests) == 3 * 2 + 3
    evaluate.main([*flags, "--resume", "true"])
    assert len(chat_server.requests) == 9  # all was there
    with pytest.raises(SystemExit):
        evaluate.main([*flags, "--resume", "true", "--seed", "1"])
    assert "holds another evaluation, which cannot be resumed as this one: seed is 0" in capsys.readouterr().err


def test_two_commands_do_not_write_to_one_folder(refusal: Refusal, endpoint: list[str], tmp_path: Path) -> None:
    with sole_writer(tmp_path / "out"):
        assert "another run is writing to" in refusal("evaluate", [*endpoint, "--model", "m", "--resume", "true"])


def test_a_spent_budget_stops_it_and_no_query_is_paid_for_twice(
    endpoint: list[str],
    chat_server: ChatServer,
    paid_search: PaidSearch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERPAPI_API_KEY", "s3cret")

    def write(messages: Messages) -> str:
        if "<information>" in messages[-1]["content"][:20]:
            return "<answer> Jane Austen </answer>"
        return f"<search> {messages[0]['content'].rsplit('Question: ')[-1]} </search>"

    chat_server.write = write
    flags = [*endpoint, "--model", "m", "--engine", "google", "--google_url", paid_search.url]
    flags += ["--endpoint_concurrency", "1"]  # so two questions are under way, and one has ended when a third begins
    load_recipe("evaluate").main([*flags, "--google_max_queries", "2"])
    finished = json.loads((tmp_path / "out/results.json").read_text())["n"]
    assert finished in (1, 2)
    stopped = f"the limit of 2 queries to google is reached: {finished} of 3 trajectories are finished"
    assert f"policy: stopped: {stopped}; --resume true goes on" in capsys.readouterr().out
    load_recipe("evaluate").main([*flags, "--resume", "true"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["n"], results["stopped"], results["outcomes"]["answered"]) == (3, None, 3)
    assert len(paid_search.queries) == len(set(paid_search.queries)) == 3
    (bill,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("google "))
    assert bill[1] == str(3 - finished) and bill[3] == "0.01"  # one was sent, the other came from the cache
    assert all(b"s3cret" not in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_models_are_told_apart_by_as_little_of_their_paths_as_need_be(endpoint: list[str], tmp_path: Path) -> None:
    assert model_labels(["/a/one", "two"]) == ["one", "two"]
    assert model_labels(["/a/run/policy", "data/policy"]) == ["run/policy", "data/policy"]
    assert model_labels(["x/a/p", "y/a/p", "p"]) == ["x/a/p", "y/a/p", "p"]
    load_recipe("evaluate").main([*endpoint, "--model", "/a/policy", "/b/policy", "--agent", "direct"])
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == ["a-policy-direct", "b-policy-direct"]  # all of them in the output folder


def test_names_from_outside_are_shown_and_not_obeyed(
    endpoint: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_recipe("evaluate").main([*endpoint, "--model", "m\x1b[2J", "n\u202e", "--agent", "direct"])
    for text in ((tmp_path / "out/table.md").read_text(), capsys.readouterr().out):
        assert r"m\x1b[2J direct" in text and r"n\u202e direct" in text
        assert not {"\x1b", "\u202e"} & set(text)


def test_the_benchmarks_are_asked_as_many_of_each_as_wanted(endpoint: list[str], tmp_path: Path) -> None:
    for name, benchmark in BENCHMARKS.items():
        rows = [{"id": f"{n}", "question": f"what is {n}", "golden_answers": ["Jane Austen"]} for n in range(6)]
        write_rows(tmp_path / "flashrag" / benchmark.path(name), rows)
    config = tmp_path / "config.yaml"
    config.write_text(f"model: m\nagent: direct\nnum_questions: 2\nbenchmark_source: {tmp_path / 'flashrag'}\n")
    load_recipe("evaluate").main(["--config", str(config), *endpoint, "--dataset", "benchmarks"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {name: scores["n"] for name, scores in results["by_dataset"].items()} == dict.fromkeys(BENCHMARKS, 2)
    assert (results["questions_per_dataset"], results["macro_average"]["em"]["mean"]) == (2, 1.0)
    head = "| method | NQ | TriviaQA | PopQA | HotpotQA | 2Wiki | MuSiQue | Bamboogle | Avg |"
    assert head in (tmp_path / "out/table.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
def test_a_user_evaluates_with_vllm_on_real_questions(tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    load_recipe("random_model").main(["--corpus", str(SHARED / "wiki_passages.jsonl"), "--output_dir", model])
    command = [sys.executable, str(ROOT / "recipes/evaluate.py"), "--generator", "vllm", "--model", model]
    command += ["--dataset", str(SHARED / "qa_multihop.jsonl"), "--dataset_limit", "30", "--engine", "bm25"]
    command += ["--corpus", str(SHARED / "wiki_passages.jsonl"), "--output_dir", str(tmp_path / "out")]
    command += ["--temperature", "1", "--max_turn_tokens", "48"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| method | HotpotQA |" in (tmp_path / "out/table.md").read_text()
    results = json.loads((tmp_path / "out/results.json").read_text())
    records = rows_of(tmp_path / "out/trajectories.jsonl")
    assert results["n"] == len(records) == 30 and results["generator"] == "vllm"
    for name in ("em", "f1"):
        scores = [METRICS[name](record["answer"], record["golden_answers"]) for record in records]
        assert results[name]["mean"] == pytest.approx(sum(scores) / 30)
        assert [record[name] for record in records] == scores
    found = [result for record in records for result in record["search_results"]]
    assert results["searches"] * 30 == len(found) >= 5
    passages = "\n".join(" ".join(passage.text.split()) for passage in read_passages(SHARED / "wiki_passages.jsonl"))
    assert all(document[-60:] in passages for result in found for document in result["documents"])


@pytest.mark.slow
def test_tinyworlds_agents_are_compared_by_one_command(tmp_path: Path) -> None:
    world = World.draw(seed=0, n_people=60, held_out=True)
    for name, rows in (("corpus", world.passages()), ("test", question_rows(world, 60, seed=0))):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    flags = {
        "config": str(ROOT / "recipes/configs/evaluate-tinyworld.yaml"),
        "model": str(ROOT / "data/tinyworld/policy"),
        "generator": "transformers",
        "dataset": str(tmp_path / "test.jsonl"),
        "corpus": str(tmp_path / "corpus.jsonl"),
        "output_dir": str(tmp_path / "out"),
    }
    load_recipe("evaluate").main([*as_flags(flags), "--agent", *TINYWORLD.agents])
    found = json.loads((tmp_path / "out/results.json").read_text())["evaluations"]
    assert list(found) == list(TINYWORLD.agents)
    em = {name: results["em"]["mean"] for name, results in found.items()}
    # Without documents nothing is known of this world; comparisons can be guessed.
    assert max(em["direct"], em["cot"], em["closed-book"]) < 0.2 < em["policy"]
    assert found["rag"]["searches"] == 1.0 and found["direct"]["answer_rate"] > 0.9
