"""The training recipe as a user runs it: a few steps of everything, and one clear sentence for each mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import ChatServer
from generation_parts import save_adapter
from hub_stub import HubStub
from rain import RainEngine
from recipe_modules import Refusal, as_flags, load_recipe, run_python

from zerosearch.prompts import POLICY_PROMPT


def run(settings: dict[str, Any], tmp_path: Path, *flags: str, launcher: tuple[str, ...] = ()) -> None:
    """Run the recipe as a user does."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    run_python(*launcher, "recipes/grpo.py", "--config", config, *flags, OMP_NUM_THREADS="1")


def log_of(settings: dict[str, Any]) -> list[dict[str, Any]]:
    return json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "--model_name_or_path"),
        ({"model_name_or_path": "/no/such/model"}, "there is no model '/no/such/model'"),
        ({"model_name_or_path": "CUT"}, "cut/model.safetensors cannot be read: "),
        ({"dataset": "/no/such/qa.jsonl"}, "there is no file /no/such/qa.jsonl"),
        ({"engine": "simulated", "simulator_url": "http://127.0.0.1:9/v1"}, "--model SIMULATOR --port 9"),
        ({"output_dir": "CUT"}, "is not empty; name another, or pass --overwrite_output_dir"),
        ({"resume_from_checkpoint": True}, "there is no checkpoint to resume from: /"),
        ({"load_in_4bit": True}, "a quantized policy cannot learn"),
        (
            {"engine": "simulated", "simulator": "colocated", "simulator_model": "CUT"},
            "lives in the vLLM engine of a policy whose LoRA adapter vLLM serves",
        ),
        ({"eval_strategy": "steps"}, "needs both: --eval_dataset, and"),
        ({"eval_dataset": "qa.jsonl"}, "--eval_strategy steps or epoch"),
        ({"eval_engine": "bm25"}, "which need --eval_dataset"),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"report_to": "wandb"}, "wandb"),
        ({"use_peft": True, "lora_target_modules": "nowhere"}, "nowhere"),
        ({"per_device_train_batch_size": 80}, "has 12 questions, and a step takes 20"),
    ],
)
def test_a_mistake_gets_one_sentence(
    changes: dict[str, Any], message: str, settings: dict[str, Any], tmp_path: Path, refusal: Refusal
) -> None:
    cut = shutil.copytree(settings["model_name_or_path"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"cut")
    changes = {name: str(cut) if value == "CUT" else value for name, value in changes.items()}
    given = {name: value for name, value in (settings | changes).items() if value is not None}
    assert message in refusal("grpo", as_flags(given))


def test_a_run_whose_searches_fail_ends_in_one_sentence_and_closes_its_engine(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, engine, closed = load_recipe("grpo"), RainEngine(fails=lambda request: True), []
    monkeypatch.setattr(recipe, "choose_engine", lambda options, prompts: engine)
    monkeypatch.setattr(recipe, "close_engine", closed.append)
    with pytest.raises(SystemExit):
        recipe.main(as_flags(settings))
    assert "lost a search, more than max_failed_search_share" in capsys.readouterr().err.splitlines()[-1]
    assert closed == [engine]


@pytest.mark.slow
def test_a_run_by_plain_python_is_pushed_overwritten_and_resumed(
    settings: dict[str, Any], hub: HubStub, tmp_path: Path
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": "checkpoint"}
    run(settings | saves | {"push_to_hub": True, "hub_model_id": "someone/policy"}, tmp_path, "--max_steps", "3")
    output = Path(settings["output_dir"])
    assert [entry["step"] for entry in log_of(settings)[:-1]] == [1, 2, 3], "a flag wins over the file"
    assert log_of(settings)[-2]["search/p_noise"] == 0.5, "the curriculum ends with the run"
    record = json.loads((output / "trajectories.jsonl").read_text().splitlines()[0])
    assert POLICY_PROMPT.format(question=record["question"]) in record["segments"][0]["text"]
    queries = json.loads((output / "engine_queries.json").read_text())
    assert list(queries) == ["bm25"] and queries["bm25"] > 0

    pushed = hub.committed
    assert {"tokenizer.json", "trajectories.jsonl", "last-checkpoint/model.safetensors"} <= pushed.keys()
    assert pushed["model.safetensors"] == (output / "model.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert card == (output / "README.md").read_text() and yaml.safe_load(card.split("---")[1])["tags"]
    assert "by reinforce, with bm25 to answer" in card and "GRPO" not in card
    assert "chat.py --model someone/policy --corpus corpus.jsonl --max_turns 2 --prompt paper\n" in card
    assert POLICY_PROMPT.strip() in card
    made = json.loads(card.split("```json")[1].split("```")[0])
    assert made["steps"] == 3 and made["search/p_noise"]["last"] == 0.5 and made["searches"] == queries
    assert made["rewards"] == ["f1_reward"] and str(tmp_path) not in card
    assert not [name for name in pushed if "training_args" in name or "lock" in name]

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    flags = ["--config", str(config), "--save_strategy", "steps"]
    load_recipe("grpo").main([*flags, "--overwrite_output_dir", "--max_steps", "1"])
    assert {json.loads(line)["step"] for line in (output / "trajectories.jsonl").open()} == {1}
    load_recipe("grpo").main([*flags, "--resume_from_checkpoint", "true", "--max_steps", "2"])
    assert {json.loads(line)["step"] for line in (output / "trajectories.jsonl").open()} == {1, 2}


@pytest.mark.slow
def test_a_run_is_evaluated_with_another_engine_and_keeps_the_best(
    settings: dict[str, Any], chat_server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = "\n".join(f"Doc {n}: It rains for {n} days." for n in range(1, 6))
    chat_server.write = lambda messages: documents
    settings |= {"engine": "simulated", "simulator_url": chat_server.url, "max_steps": 3, "learning_rate": 3e-3}
    settings |= {"eval_dataset": settings["dataset"], "eval_dataset_limit": 5, "eval_engine": "bm25", "eval_steps": 1}
    settings |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "metric_for_best_model": "f1"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"load_best_model_at_end": True}))
    load_recipe("grpo").main(["--config", str(config)])
    scores = {entry["step"]: entry["eval_f1"] for entry in log_of(settings) if "eval_f1" in entry}
    assert list(scores) == [1, 2, 3]
    best, output = max(scores, key=lambda step: scores[step]), Path(settings["output_dir"])
    saved = {step: (output / f"checkpoint-{step}/model.safetensors").read_bytes() for step in scores}
    assert (output / "model.safetensors").read_bytes() == saved[best]
    assert len(set(saved.values())) == 3
    trained = json.loads((output / "engine_queries.json").read_text())
    evaluated = json.loads((output / "evaluation_queries.json").read_text())
    assert trained == {"simulated": len(chat_server.requests)}
    assert list(evaluated) == ["bm25"]
    assert "bm25, evaluation" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_a_colocated_vllm_and_a_simulator(
    settings: dict[str, Any], chat_server: ChatServer, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml")
    documents = "\n".join(f"Doc {n}: It rains for {n} days." for n in range(1, 6))
    chat_server.write = lambda messages: 503 if len(chat_server.requests) % 5 == 0 else documents
    settings |= {"engine": "simulated", "simulator_url": chat_server.url, "noise_start": 0.5}
    settings |= {"use_vllm": True, "max_steps": 3}
    run(settings, tmp_path, launcher=launcher)
    first, _, third, _ = log_of(settings)
    assert third["kl"] > 1e-4, "the policy has moved"
    # vLLM samples by the weights that the trainer has, before and after they moved: the sync reaches all of them.
    assert first["sampling/sampling_logp_difference/max"] < 1e-3
    assert third["sampling/sampling_logp_difference/max"] < 1e-3
    assert first["search/failed_search"] == 0 and sum(entry.get("search/retries", 0) for entry in log_of(settings)) > 0
    assert first["search/p_noise"] == 0.5 and 0 < first["search/noisy_share"] < 1
    queries = json.loads((Path(settings["output_dir"]) / "engine_queries.json").read_text())
    assert queries == {"simulated": len(chat_server.requests)}
    for prompt in (request["messages"][-1]["content"] for request in chat_server.requests):
        number = re.search(r'question: "Who wrote (\d+)\?" whose answer is gold (\d+)\.', prompt)
        assert number is not None and number[1] == number[2], "each search has its own question and answer"


@pytest.mark.slow
def test_a_run_by_lora_with_its_simulator_in_the_policys_engine(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    simulator = save_adapter(Path(settings["model_name_or_path"]), tmp_path / "simulator")
    settings |= {"engine": "simulated", "simulator": "colocated", "simulator_model": str(simulator)}
    settings |= {"simulator_max_tokens": 30, "num_documents": 2, "noise_start": 0.5, "vllm_max_model_length": 1024}
    settings |= {"use_vllm": True, "use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 0.01}
    run(settings | {"max_steps": 3}, tmp_path)
    first, _, third, _ = log_of(settings)
    assert third["kl"] > 1e-4, "the policy has moved"
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in (first, third)) < 1e-3
    assert first["search/failed_search"] == 0 and 0 < first["search/noisy_share"] < 1
    queries = json.loads((Path(settings["output_dir"]) / "engine_queries.json").read_text())
    assert queries["simulated"] > 10
    assert (Path(settings["output_dir"]) / "adapter_model.safetensors").is_file()
