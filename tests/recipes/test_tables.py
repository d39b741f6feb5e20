"""The tables' runs are chosen, passed over when done, and set beside the recipe's own; two tiny ones run for real."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jsonl_files import rows_of, write_rows
from recipe_modules import Refusal, load_recipe

from zerosearch.command_line import parse
from zerosearch.errors import UserError


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("tables")


@pytest.fixture(autouse=True)
def nothing_published(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PUBLISHED", tmp_path / "published.json")


def record(recipe: ModuleType, name: str, seed: int, em: str, **changed: Any) -> dict[str, Any]:
    """Return what a run leaves."""
    run = recipe.RUNS[name]
    settings = {key: getattr(run, key) for key in ("flags", "script", "simulator", "evaluation")}
    settings |= {"train_flags": [], "num_questions": 4}
    made = {"name": name, "seed": seed, "settings": settings, "em": em, "searches": 1.5}
    return made | {"collapsed": None, "questions_sha256": "a", "versions": {}, "seconds": 1.0} | changed


def test_every_row_has_a_run_and_every_run_a_row(recipe: ModuleType) -> None:
    runs = [record(recipe, name, 0, "10") for name in recipe.RUNS]
    rows = recipe.table_rows({(run["name"], 0): run for run in runs}, {})
    assert len(rows) == len(recipe.TABLES) + len(recipe.RUNS) - 1, "the recipe's own is in each table"
    assert len({(row["table"], row["name"]) for row in rows}) == len(rows)
    for run in recipe.RUNS.values():
        assert not run.script or (recipe.ROOT / run.script.split()[0]).is_file()


def test_differences_are_paired_by_seed_and_question(recipe: ModuleType) -> None:
    runs = [
        *(record(recipe, "curriculum", seed, em) for seed, em in enumerate(("1100", "1100", "1101"))),
        *(record(recipe, "no-mask", seed, "0000", collapsed=7) for seed in (0, 1)),
        *(record(recipe, "grpo", seed, em) for seed, em in enumerate(("1100", "0110", "1101"))),
        record(recipe, "untrained", 0, "0000"),
        record(recipe, "rloo", 0, "1111"),
    ]
    done = {(run["name"], run["seed"]): run for run in runs}
    rows = {(row["table"], row["name"]): row for row in recipe.table_rows(done, {})}
    own = rows["5", "REINFORCE"]
    assert own["em"]["mean"] == pytest.approx(7 / 12) and own["difference"] is own["verdict"] is None
    assert (own["em"]["low"], own["em"]["high"]) == (0.0, 1.0), "a t interval of so few would pass both"
    assert own["num_seeds"] == 3 and rows["7", "observations masked"]["em"] == own["em"]
    grpo = rows["5", "GRPO"]
    assert grpo["difference"]["mean"] == 0.0 and grpo["verdict"] == "no difference seen" and not grpo["differs"]
    unmasked = rows["7", "not masked"]
    assert unmasked["difference"]["mean"] == -0.5, "over the two seeds that both have"
    assert (unmasked["num_seeds"], unmasked["collapsed"]) == (2, 2)
    untrained = rows["3", "untrained"]
    assert untrained["difference"]["mean"] == pytest.approx(-7 / 12), "one evaluation stands for all seeds"
    assert rows["5", "RLOO"]["verdict"] is None, "one seed says nothing about others"
    with pytest.raises(UserError, match="runs of different test questions cannot be compared"):
        recipe.bits([record(recipe, "grpo", 0, "1100"), record(recipe, "grpo", 1, "1100", questions_sha256="b")])


def test_a_clear_difference_is_called_one(recipe: ModuleType) -> None:
    runs = [record(recipe, "curriculum", seed, "1" * 99 + "0") for seed in range(5)]
    runs += [record(recipe, "no-mask", seed, "0" * 99 + "1") for seed in range(5)]
    rows = recipe.table_rows({(run["name"], run["seed"]): run for run in runs}, {})
    (row,) = (row for row in rows if row["name"] == "not masked")
    assert (row["verdict"], row["differs"]) == ("worse", True)


def test_rows_of_table_4_have_the_fidelity_of_their_simulator(recipe: ModuleType) -> None:
    runs = [record(recipe, name, 0, "1100") for name in ("curriculum", "faithful-simulator", "untuned-simulator")]
    cards = {
        "demo": {"useful_answer_rate": 0.98, "noisy_leak_rate": 0.26},
        "faithful": {"useful_answer_rate": 0.99, "noisy_leak_rate": 0.01},
    }
    rows = recipe.table_rows({(run["name"], 0): run for run in runs}, cards)
    assert [row["fidelity"] for row in rows if row["table"] == "4"] == [cards["demo"], None, cards["faithful"]]
    assert not any(row["fidelity"] for row in rows if row["table"] != "4")


def test_what_is_done_is_passed_over_here_and_where_it_is_published(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, changed in ((0, {}), (1, {"settings": {"flags": "others"}})):
        (tmp_path / f"out/runs/grpo/seed-{seed}").mkdir(parents=True)
        made = record(recipe, "grpo", seed, "1100", **changed)
        (tmp_path / f"out/runs/grpo/seed-{seed}/run.json").write_text(json.dumps(made))
    published = [record(recipe, name, 0, "1100") for name in ("curriculum", "untuned-simulator")]
    published += [{"name": "gone", "seed": 0, "settings": {"flags": ""}}]
    cards = {"demo": {"useful_answer_rate": 0.98, "noisy_leak_rate": 0.26}}
    (tmp_path / "published.json").write_text(json.dumps({"runs": published, "simulators": cards}))
    arguments = recipe.TablesArguments(runs=["grpo", "curriculum", "untrained"], seeds=2, jobs=1, num_questions=4)
    tables = recipe.Tables(arguments, [], tmp_path / "out")
    assert tables.done().keys() == {("grpo", 0), ("curriculum", 0), ("untuned-simulator", 0)}
    began: list[Any] = []
    monkeypatch.setattr(tables, "make_data", lambda *flags: None)
    monkeypatch.setattr(tables, "one", lambda *run: began.append(run) or 2.0)
    monkeypatch.setattr(tables, "served", recipe.contextmanager(lambda simulator: iter([f"at {simulator}"])))
    tables.run()
    assert began == [("untrained", 0, "at None"), ("grpo", 1, "at demo"), ("curriculum", 1, "at demo")]
    results = json.loads((tmp_path / "out/tables.json").read_text())
    assert {row["name"] for row in results["rows"]} >= {"GRPO", "REINFORCE", "simulator: the demo's"}
    assert {row["table"] for row in results["rows"]} == {"3", "4", "5"}, "the others have no run beside the recipe's"
    assert results["simulators"] == cards and "the demo's" in (tmp_path / "out/fidelity.svg").read_text()
    assert "| 5 | GRPO | 1 | 0.500 [" in (tmp_path / "out/tables.md").read_text()
    assert "5: GRPO" in (tmp_path / "out/tables.svg").read_text()


def test_a_run_that_fails_is_named_at_the_end_and_the_others_are_done(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = recipe.TablesArguments(runs=["no-search", "real-engine"], seeds=1, jobs=1)
    tables, began = recipe.Tables(arguments, [], tmp_path), []

    def one(name: str, *_: Any) -> float:
        began.append(name)
        if name == "no-search":
            raise UserError("no-search 0 training failed")
        return 1.0

    monkeypatch.setattr(tables, "make_data", lambda *flags: None)
    monkeypatch.setattr(tables, "one", one)
    with pytest.raises(UserError, match=r"^1 runs failed, the others are done: no-search 0: no-search 0 training"):
        tables.run()
    assert began == ["no-search", "real-engine"]


def test_every_command_is_one_that_its_recipe_takes(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Taken(Exception):
        pass

    def parse_only(*asked: Any, **options: Any) -> None:
        parse(*asked, **options)
        raise Taken

    taken: list[str] = []

    def run(title: str, script: object, *command: object, makes: Path) -> None:
        flags = list(map(str, command))
        is_variant = "variants" in str(script)
        module = modules["recipes/grpo.py" if is_variant else str(script)]
        with pytest.raises(Taken):
            module.main(flags[flags.index("--config") :] if is_variant else flags)
        taken.append(title)
        if title.endswith(" evaluation"):
            raise Taken  # and left no results

    scripts = ("data/make_tinyworld.py", "recipes/sft_simulator.py", "recipes/grpo.py", "recipes/evaluate.py")
    modules = {script: load_recipe(f"../{script.removesuffix('.py')}") for script in scripts}
    for module in modules.values():
        monkeypatch.setattr(module, "parse", parse_only)
    tables = recipe.Tables(recipe.TablesArguments(jobs=1), [], tmp_path)
    monkeypatch.setattr(tables.stages, "run", run)
    monkeypatch.setattr(recipe, "half_noise", lambda searches: searches)
    simulators = {run.simulator for run in recipe.RUNS.values()} - {None}
    for name in simulators:
        tables.simulator(name)
    for name in recipe.RUNS:
        with pytest.raises(Taken):
            tables.one(name, 0, "http://127.0.0.1:1/v1")
    assert sum(title.startswith("simulator") for title in taken) == len(simulators) - 1, "the untuned one is there"
    assert sum(title.endswith("evaluation") for title in taken) == len(recipe.RUNS)
    assert sum(title.endswith("training") for title in taken) == sum(bool(run.script) for run in recipe.RUNS.values())


def test_labels_by_chance_keep_everything_else(recipe: ModuleType, tmp_path: Path) -> None:
    rows = [{"query": str(n), "useful": True} for n in range(200)]
    made = rows_of(recipe.half_noise(write_rows(tmp_path / "searches.jsonl", rows)))
    assert [row["query"] for row in made] == [row["query"] for row in rows]
    assert 80 < sum(row["useful"] for row in made) < 120


def test_a_run_that_there_is_not_is_refused(refusal: Refusal) -> None:
    assert "there is no run masking; there are curriculum, untrained, " in refusal("tables", ["--runs", "masking"])


@pytest.mark.slow
def test_two_tiny_runs_from_end_to_end(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--max_steps 1 --gradient_accumulation_steps 1 --per_device_train_batch_size 10 --num_questions 4 --jobs 2"
    command = ["--runs", "untrained", "real-engine", "--seeds", "1", "--output_dir", str(tmp_path), *flags.split()]
    recipe.main(command)
    made = json.loads((tmp_path / "runs/real-engine/seed-0/run.json").read_text())
    assert len(made["em"]) == 4 and made["queries_in_training"]["bm25"] > 0 and made["collapsed"] is None
    results = json.loads((tmp_path / "tables.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["untrained", "trained on BM25"]
    assert "0 of 2 runs to do" not in capsys.readouterr().out
    recipe.main(command)
    assert "0 of 2 runs to do" in capsys.readouterr().out
