"""recipes/evaluate.py as a user runs it: what it prints and leaves, and one sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from zerosearch.data import load_questions, read_passages
from zerosearch.engines.bm25 import BM25Engine
from zerosearch.evaluation import load_generator
from zerosearch.metrics import exact_match, f1
from zerosearch.rollout import RolloutSettings, run_rollouts

pytest_plugins = ("recipe_modules",)  # fixtures

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared/data"

LoadRecipe = Callable[[str], ModuleType]

real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")


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


def argv(flags: dict[str, str]) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def test_it_prints_a_table_and_leaves_results(
    load_recipe: LoadRecipe, arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    load_recipe("evaluate").main(argv(arguments))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed if line] == [
        "dataset",
        "nq",
        "musique",
        "mean of datasets",
        f"{arguments['output_dir']}/results.json, trajectories.jsonl",
    ]
    results = json.loads((Path(arguments["output_dir"]) / "results.json").read_text())
    described = {"model": arguments["model"], "dataset": arguments["dataset"], "generator": "transformers"}
    assert results | described | {"engine": "bm25", "n": 3, "seed": 0} == results
    assert results["settings"]["temperature"] == 0.0  # greedy by default
    assert list(results["by_dataset"]) == ["nq", "musique"]


def test_values_come_from_a_config_file_and_flags_win(
    load_recipe: LoadRecipe, arguments: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max_turns: 1\nmax_turn_tokens: 5\ndataset_limit: 1\n")
    load_recipe("evaluate").main(["--config", str(config), *argv(arguments)])
    results = json.loads((Path(arguments["output_dir"]) / "results.json").read_text())
    assert (results["n"], results["settings"]["max_turns"], results["settings"]["max_turn_tokens"]) == (1, 1, 24)


def test_a_full_folder_is_overwritten_when_asked_to(load_recipe: LoadRecipe, arguments: dict[str, str]) -> None:
    output_dir = Path(arguments["output_dir"])
    output_dir.mkdir()
    (output_dir / "results.json").write_text("old")
    load_recipe("evaluate").main([*argv(arguments), "--overwrite_output_dir"])
    assert json.loads((output_dir / "results.json").read_text())["n"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_dir": "FULL"}, "the output folder FULL is not empty; name another, or pass --overwrite_output_dir"),
        ({"model": "FULL"}, "there is no model 'FULL'"),
        ({"dataset": "FULL/none.jsonl"}, "there is no file FULL/none.jsonl"),
        ({"dataset": "FULL/rows.jsonl"}, "FULL/rows.jsonl line 1 lacks 'golden_answers'; it has question"),
        ({"corpus": "FULL/none.jsonl"}, "there is no file FULL/none.jsonl"),
        ({"corpus": "FULL/rows.jsonl"}, 'FULL/rows.jsonl line 1 needs "contents"'),
        ({"corpus": ""}, "--engine bm25 needs --corpus"),
        ({"engine": "simulated", "p_noise": "1.5"}, "p_noise is 1.5: a probability lies in [0, 1]"),
        ({"engine": "simulated", "simulator_url": "http://127.0.0.1:9/v1"}, "--model SIMULATOR --port 9"),
        ({"max_turns": "-1"}, "max_turns is -1"),
        ({"dataset_limit": "0"}, "limit is 0"),
        ({"config": "FULL/config.yaml"}, "no_such_key"),
        ({"config": "FULL/none.yaml"}, "No such file"),
        ({"no_such_flag": "1"}, "no_such_flag"),
    ],
)
def test_a_mistake_gets_one_sentence(
    load_recipe: LoadRecipe,
    change: dict[str, str],
    message: str,
    arguments: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "rows.jsonl").write_text('{"question": "Why?"}\n')
    (full / "config.yaml").write_text("no_such_key: 1\n")
    changed = {name: value.replace("FULL", str(full)) for name, value in (arguments | change).items() if value}
    with pytest.raises(SystemExit) as caught:
        load_recipe("evaluate").main(argv(changed))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message.replace("FULL", str(full)) in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.fixture(scope="module")
def real_model(load_recipe: LoadRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("real-model")
    load_recipe("random_model").main(["--corpus", str(SHARED / "wiki_passages.jsonl"), "--output_dir", str(directory)])
    return directory


@real_data
@pytest.mark.slow
def test_trajectories_and_masks_on_real_questions_and_passages(real_model: Path) -> None:
    rows = load_questions(str(SHARED / "qa_multihop.jsonl"), limit=80).to_list()
    generator = load_generator(str(real_model), "transformers", 4096)
    engine = BM25Engine(SHARED / "wiki_passages.jsonl")
    settings = RolloutSettings(max_turns=3, max_turn_tokens=48, max_observation_tokens=1000)
    trajectories = run_rollouts(rows, generator, engine, settings)
    decode = generator.tokenizer.decode
    for row, trajectory in zip(rows, trajectories, strict=True):
        ids, mask = trajectory.completion_ids, trajectory.env_mask
        assert len(ids) == len(mask) == len(trajectory.logprobs)
        assert decode(trajectory.prompt_ids).endswith(f"Question: {row['question'].rstrip('?')}?\n")
        # What the policy wrote, and nothing else, has mask 1; the observations are what stands between its turns.
        policy_ids = [token for token, is_policy in zip(ids, mask, strict=True) if is_policy]
        assert len(policy_ids) == trajectory.policy_tokens
        place = 0
        for turn in trajectory.turns:
            assert decode(ids[place : place + turn.num_tokens]) == turn.text
            assert set(mask[place : place + turn.num_tokens]) == {1}
            place += turn.num_tokens
            assert decode(ids[place : place + turn.num_observation_tokens]) == turn.observation
            assert 1 not in mask[place : place + turn.num_observation_tokens]
            place += turn.num_observation_tokens
            assert turn.documents == (
                engine.lookup(turn.content) if turn.observation and turn.kind == "search" else ()
            )
        assert len(ids) - place == (trajectory.outcome == "answered")  # the end-of-sequence token after an answer
    assert sum(trajectory.searches for trajectory in trajectories) >= 20
    assert sum(trajectory.answer is not None for trajectory in trajectories) >= 5
    assert any(turn.documents for trajectory in trajectories for turn in trajectory.turns)
    assert {trajectory.outcome for trajectory in trajectories} <= {"answered", "turns_exhausted", "truncated"}


@real_data
@pytest.mark.slow
@pytest.mark.parametrize("generator", ["vllm", "transformers"])
def test_the_recipe_scores_real_questions(generator: str, real_model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "recipes/evaluate.py"), "--model", str(real_model), "--generator", generator),
            *("--dataset", str(SHARED / "qa_multihop.jsonl"), "--dataset_limit", "60", "--engine", "bm25"),
            *("--corpus", str(SHARED / "wiki_passages.jsonl"), "--output_dir", str(tmp_path / "out")),
            *("--temperature", "1", "--max_turn_tokens", "48"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hotpotqa" in done.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "out/trajectories.jsonl").open(encoding="utf-8")]
    assert results["n"] == len(records) == 60 and results["generator"] == generator
    for name, metric in (("em", exact_match), ("f1", f1)):
        scores = [metric(record["answer"], record["golden_answers"]) for record in records]
        assert results[name]["mean"] == pytest.approx(sum(scores) / 60)
        assert [record[name] for record in records] == scores
    assert results["searches"] * 60 == sum(record["searches"] for record in records) >= 10
    texts = {passage.text[:80] for passage in read_passages(SHARED / "wiki_passages.jsonl")}
    observations = [part["text"] for record in records for part in record["segments"] if part["source"] == "documents"]
    found = [text for text in observations if "Doc 1: " in text]
    assert found and all(any(start[:30] in text for start in texts) for text in found)
