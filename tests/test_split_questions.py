"""No question is in two of cold start, simulator tuning, RL and test, in made-up files and in the real ones."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from jsonl_files import rows_of, write_rows
from recipe_modules import Refusal, load_recipe

SHARED = Path(__file__).parents[2] / "shared/data"
PARTS = ("cold_start", "simulator", "rl", "test")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_recipe("../data/split_questions")


def words(text: str) -> str:
    """Return what two spellings of a question share."""
    return " ".join("".join(sign if sign.isalnum() else " " for sign in text.lower()).split())


def questions_of(folder: Path) -> dict[str, set[str]]:
    rows = {path.stem: rows_of(path) for path in folder.glob("*.jsonl")}
    return {name: {words(row["question"]) for row in found} for name, found in rows.items()}


def check(parts: dict[str, set[str]], given: set[str]) -> None:
    """Hold that each question is in exactly one part."""
    assert sum(len(parts[name]) for name in PARTS) == len(set().union(*(parts[name] for name in PARTS)))
    assert parts["rl"] | parts["test"] <= given and parts["rl_with_passages"] <= parts["rl"]


def test_a_question_is_in_one_part_however_it_is_spelled_and_in_whatever_file(
    script: ModuleType, tmp_path: Path
) -> None:
    questions = [{"question": f"Who wrote book {number}?", "golden_answers": ["x"]} for number in range(200)]
    traces = [
        {"question": f"who wrote  book {number}", "golden_answers": ["x"], "query": "book", "documents": ["It is x."]}
        for number in range(220)
        for _ in range(2)
    ]
    train = [{"question": f"WHO wrote book {number}?", "golden_answers": ["x"]} for number in range(150, 400)]
    flags = ["--questions", str(write_rows(tmp_path / "qa.jsonl", questions))]
    flags += ["--traces", str(write_rows(tmp_path / "traces.jsonl", traces))]
    flags += ["--train_questions", str(write_rows(tmp_path / "train.jsonl", train)), "--output_dir"]
    script.main([*flags, str(tmp_path / "out")])
    parts = questions_of(tmp_path / "out")
    check(parts, {f"who wrote book {number}" for number in range(400)})
    assert {f"who wrote book {number}" for number in range(220, 400)} <= parts["rl"]
    sizes = {name: len(parts[name]) for name in PARTS}
    assert sizes["test"] > sizes["cold_start"] > 20 and sizes["simulator"] > 15
    script.main([*flags, str(tmp_path / "again")])
    assert questions_of(tmp_path / "again") == parts


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data beside the repository: ../shared/data")
def test_the_real_questions(script: ModuleType, tmp_path: Path) -> None:
    flags = ["--questions", str(SHARED / "qa_multihop.jsonl"), "--traces", str(SHARED / "search_traces.jsonl")]
    script.main([*flags, "--train_questions", str(SHARED / "qa_train.jsonl"), "--output_dir", str(tmp_path / "out")])
    parts = questions_of(tmp_path / "out")
    given = [row for name in ("qa_multihop", "qa_train") for row in rows_of(SHARED / f"{name}.jsonl")]
    check(parts, {words(row["question"]) for row in given})
    assert len(parts["test"]) >= 500 and len(parts["rl"]) >= 1500
    assert len(parts["cold_start"]) >= 200 and len(parts["simulator"]) >= 140


def test_files_that_leave_a_part_empty_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    questions = write_rows(tmp_path / "qa.jsonl", [{"question": "Who?", "golden_answers": ["x"]}])
    trace = {"question": "Who?", "golden_answers": ["x"], "query": "who", "documents": []}
    traces = write_rows(tmp_path / "traces.jsonl", [trace])
    flags = ["--questions", str(questions), "--traces", str(traces), "--output_dir", str(tmp_path / "out")]
    assert "no question is left for" in refusal("../data/split_questions", flags)
    assert not (tmp_path / "out").exists()
