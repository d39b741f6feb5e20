"""The cold start as a user runs it: from real searches and from trajectories, killed and resumed, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_stub import HubStub
from jsonl_files import write_rows
from recipe_modules import Refusal, as_flags, load_recipe
from transformers import AutoModelForCausalLM

from zerosearch.prompts import POLICY_PROMPT

TRACES = [
    {
        "question": f"Where was {name} born?",
        "golden_answers": [place],
        "query": f"{name} born",
        "documents": [{"title": name, "text": f"{name} was born in {place}."}, "It rains."],
    }
    for name, place in [("Emma", "Bath"), ("Jane", "Steventon"), ("Austen", "Hampshire")]
]
RECORD = {
    **{"id": "1", "dataset": None, "question": "Who?", "golden_answers": ["Jane"], "answer": "Jane", "em": 1.0},
    **{"step": 1, "outcome": "answered", "searches": 1, "turns": 2},
    "segments": [
        {"source": "prompt", "text": "..."},
        {"source": "policy", "text": "<search> who </search>"},
        {"source": "documents", "text": "\n\n<information>Doc 1: It is Jane.</information>\n\n"},
        {"source": "policy", "text": "<answer> Jane </answer>"},
    ],
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(
        tmp_path_factory.mktemp("traces") / "traces.jsonl",
        [*TRACES, {**TRACES[0], "question": "Who is Fanny?", "golden_answers": ["Burney"]}],
    )


def flags(model: Path, output_dir: Path, /, **changes: Any) -> list[str]:
    settings = {
        **{"model_name_or_path": model, "output_dir": output_dir, "max_turns": 2, "max_steps": 4},
        **{"learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_checkpointing": False},
        **changes,
    }
    return as_flags(settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.slow
def test_searches_teach_a_policy_and_a_killed_run_ends_as_one_left_alone(
    tiny_policy_dir: Path, traces: Path, tmp_path: Path
) -> None:
    recipe = load_recipe("sft_policy")
    saving = {"save_strategy": "steps", "save_steps": 1, "traces": traces}
    recipe.main(flags(tiny_policy_dir, tmp_path / "whole", **saving))
    made = json.loads((tmp_path / "whole/cold_start.json").read_text())
    assert (made["examples"], made["steps"], made["max_turns"], made["source"]) == (3, 4, 2, str(traces))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(tmp_path / "killed" / name)
    for name in ("model.safetensors", "cold_start.json"):
        (tmp_path / "killed" / name).unlink()
    recipe.main(flags(tiny_policy_dir, tmp_path / "killed", **saving, resume_from_checkpoint=True))
    before, whole, resumed = map(weights, (tiny_policy_dir, tmp_path / "whole", tmp_path / "killed"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not torch.equal(before["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])


def test_trajectories_are_learned_by_their_score_and_an_adapter_is_saved_alone(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    scored = [{**RECORD, "f1": score} for score in (1.0, 0.5, 0.4)]
    path = write_rows(tmp_path / "trajectories.jsonl", [*scored, {**RECORD, "f1": 1.0, "answer": None}])
    changes = {"trajectories": path, "min_f1": 0.5, "use_peft": True, "lora_target_modules": "all-linear"}
    load_recipe("sft_policy").main(flags(tiny_policy_dir, tmp_path / "out", **changes))
    assert json.loads((tmp_path / "out/cold_start.json").read_text())["examples"] == 2
    assert (tmp_path / "out/adapter_model.safetensors").is_file() and not (tmp_path / "out/model.safetensors").exists()


def test_a_cold_start_is_pushed_with_a_card_that_says_how_it_was_made_and_is_asked(
    tiny_policy_dir: Path, traces: Path, hub: HubStub, tmp_path: Path
) -> None:
    pushing = {"traces": traces, "push_to_hub": True, "hub_model_id": "someone/cold", "max_steps": 1}
    load_recipe("sft_policy").main(flags(tiny_policy_dir, tmp_path / "out", **pushing))
    assert {"model.safetensors", "tokenizer.json", "cold_start.json"} <= hub.committed.keys()
    assert "training_args.bin" not in hub.committed
    card = hub.committed["README.md"].decode()
    assert card == (tmp_path / "out/README.md").read_text()
    assert "so far by 3 demonstrations alone" in card and POLICY_PROMPT.strip() in card
    assert "chat.py --model someone/cold --corpus corpus.jsonl --max_turns 2 --prompt paper\n" in card
    assert json.loads(card.split("```json")[1].split("```")[0])["steps"] == 1
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["zerosearch", "trl", "sft"]


def test_what_cannot_work_is_refused(refusal: Refusal, tiny_policy_dir: Path, traces: Path, tmp_path: Path) -> None:
    assert "--traces or --trajectories, one of the two" in refusal("sft_policy", flags(tiny_policy_dir, tmp_path))
    for budget in ({"max_turn_tokens": 5}, {"max_observation_tokens": 24}):
        said = refusal("sft_policy", flags(tiny_policy_dir, tmp_path, traces=traces, **budget))
        assert "0 of 4 become demonstrations; 3 exceed the budgets" in said
    assert "line 1 is not a trajectory: it lacks id" in refusal(
        "sft_policy", flags(tiny_policy_dir, tmp_path, trajectories=traces)
    )
