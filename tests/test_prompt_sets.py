"""One edit of a prompt set changes what a simulator is tuned on, measured with and asked in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer
from jsonl_files import rows_of, write_rows
from recipe_modules import load_recipe

from zerosearch.engines import SearchRequest
from zerosearch.http import run_in_background
from zerosearch.prompts import PROMPT_SETS

BASE = Path(__file__).parents[1] / "data/tinyworld/simulator"
EDITED = "Be a library. {Quality} books on {query}, for {question} ({golden_answer})"
EXPECTED = {
    "Be a library. Useful books on Emma author, for Who wrote Emma? (Jane Austen)",
    "Be a library. Noisy books on Emma author, for Who wrote Emma? (Jane Austen)",
}
FIVE = "\n".join(f"Doc {number}: It rains." for number in range(1, 6))


@pytest.fixture
def searches(tmp_path: Path) -> Path:
    search = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"], "query": "Emma author"}
    rows = [search | {"documents": ["Emma is by Jane Austen."], "useful": useful} for useful in (True, False)]
    return write_rows(tmp_path / "searches.jsonl", rows)


@pytest.fixture(autouse=True)
def edit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROMPT_SETS, "paper", replace(PROMPT_SETS["paper"], simulator=EDITED))


def asked(server: ChatServer) -> set[str]:
    return {request["messages"][-1]["content"] for request in server.requests}


def test_the_edit_reaches_what_a_simulator_is_tuned_on(
    searches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, tuned_on = load_recipe("sft_simulator"), []

    def tune(model: Any, training: Any, tokenizer: Any, examples: Any, *others: Any) -> dict[str, Any]:
        tuned_on.extend(example["prompt"][-1]["content"] for example in examples)
        return {}

    monkeypatch.setattr(recipe, "tune", tune)
    command = ["--model_name_or_path", str(BASE), "--searches", str(searches), "--output_dir", str(tmp_path / "out")]
    recipe.main([*command, "--measure_fidelity", "false"])
    assert set(tuned_on) == EXPECTED
    assert EDITED in (tmp_path / "out/README.md").read_text()


def test_the_edit_reaches_what_a_simulator_is_measured_with(
    searches: Path, tmp_path: Path, chat_server: ChatServer
) -> None:
    chat_server.write = lambda messages: FIVE
    rows = rows_of(searches)
    write_rows(searches, [*rows, rows[0] | {"query": "Emma year"}])
    command = ["--queries", str(searches), "--simulator_url", chat_server.url, "--num_queries", "2"]
    load_recipe("measure_fidelity").main([*command, "--output", str(tmp_path / "fidelity")])
    assert asked(chat_server) == EXPECTED | {text.replace("author", "year") for text in EXPECTED}


def test_the_edit_reaches_what_a_simulator_is_asked_in_training(
    questions: Path, tiny_policy_dir: Path, tmp_path: Path, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer:
        """Searches twice with the engine that it is given, and trains nothing."""

        def __init__(self, engine: Any, args: Any, **others: Any) -> None:
            self.engine, self.args = engine, args

        def train(self, **others: Any) -> None:
            for p_noise in (0.0, 1.0):
                request = SearchRequest("Emma author", "Who wrote Emma?", ("Jane Austen",), p_noise, (0,))
                run_in_background(self.engine.search(request))

        def save_model(self, folder: str) -> None: ...

        def save_state(self) -> None: ...

    chat_server.write = lambda messages: FIVE
    recipe = load_recipe("grpo")
    monkeypatch.setattr(recipe, "SearchTrainer", Trainer)
    command = ["--model_name_or_path", str(tiny_policy_dir), "--dataset", str(questions)]
    command += ["--simulator_url", chat_server.url, "--output_dir", str(tmp_path / "policy"), "--report_to", "none"]
    recipe.main(command)
    assert asked(chat_server) == EXPECTED
