"""The worked ablation of recipes/README.md: the recipe is copied, edited as the page says, run, and compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from recipe_modules import ROOT, TINYWORLD_RUN, Refusal, as_flags, load_recipe


def edited_recipe(folder: Path) -> ModuleType:
    """Copy recipes/grpo.py, make the edit that the page shows, and import the copy."""
    (edit,) = re.findall(
        r"<!-- ablation -->\n```python\n(.*?)```", (ROOT / "recipes/README.md").read_text(), re.DOTALL
    )
    recipe = (ROOT / "recipes/grpo.py").read_text()
    assert recipe.count("REWARDS = [f1_reward]\n") == 1
    (folder / "grpo_price.py").write_text(recipe.replace("REWARDS = [f1_reward]\n", edit))
    return load_recipe(str(folder / "grpo_price"))


@pytest.mark.slow
def test_the_page_s_ablation_runs_and_is_drawn_beside_the_recipe(tinyworld_data: Path, tmp_path: Path) -> None:
    data = {"engine": "bm25", "dataset": tinyworld_data / "train.jsonl", "corpus": tinyworld_data / "corpus.jsonl"}
    flags = as_flags(TINYWORLD_RUN | data)
    f1, price = tmp_path / "f1", tmp_path / "price"
    load_recipe("grpo").main([*flags, "--output_dir", str(f1)])
    edited_recipe(tmp_path).main([*flags, "--output_dir", str(price)])
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (f1, price)]
    first, priced = (log[0] for log in logs)
    assert first["search/searches"] == priced["search/searches"] > 0, "the first rollout is the same"
    cost = 0.1 * first["search/searches"]
    assert priced["reward"] == pytest.approx(first["reward"] - cost, abs=1e-4)
    assert priced["rewards/f1_reward/mean"] == first["reward"]
    picture, keys = tmp_path / "curves.svg", ["rewards/f1_reward/mean", "search/searches"]  # as the page has it
    assert f"--keys {' '.join(keys)}" in (ROOT / "recipes/README.md").read_text()
    load_recipe("curves").main(["--runs", str(f1), str(price), "--keys", *keys, "--output", str(picture)])
    assert all(word in picture.read_text() for word in ("<svg", "f1", "price", *keys))


def test_curves_refuse_what_is_not_logged(refusal: Refusal, tmp_path: Path) -> None:
    assert "holds no finished training run" in refusal("curves", ["--runs", str(tmp_path)])
    state = {"log_history": [{"step": 1, "reward": 0.5, "loss": 0.1}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    refused = refusal("curves", ["--runs", str(tmp_path), "--keys", "rewrd"])
    assert f"the log of {tmp_path} has no numbers under rewrd; it has loss, reward, step" in refused
    below_a_file = ["--runs", str(tmp_path), "--keys", "reward", "--output", f"{__file__}/x.svg"]
    assert f"the output folder {__file__} is a file" in refusal("curves", below_a_file)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("f1", "price"):
        (tmp_path / name / "policy").mkdir(parents=True)
        (tmp_path / name / "policy/trainer_state.json").write_text('{"log_history": [{"step": 1, "reward": 0.5}]}')
    runs = [str(tmp_path / name / "policy") for name in ("f1", "price")]
    load_recipe("curves").main(["--runs", *runs, "--keys", "reward", "--output", str(tmp_path / "new/a.svg")])
    assert all(f">{name}/policy<" in (tmp_path / "new/a.svg").read_text() for name in ("f1", "price"))
