"""SmolLM2-135M-Instruct, a real model with a real tokenizer and chat template, through every part that meets a model.

`python recipes/get_model.py` brings it; without it these tests are skipped. Untuned, it writes no tag: where a turn
has to search or answer, a few turns before it in the prompt show how.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import torch
from rain import RainEngine, rain_trainer
from recipe_modules import as_flags, load_recipe, run_python
from safetensors.torch import load_file
from scripted_rollouts import ScriptedEngine, ScriptedGenerator
from searching import searched
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from zerosearch.engines import SearchRequest
from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.files import models_folder
from zerosearch.generation import Generator
from zerosearch.generation.loading import load_generator, load_model
from zerosearch.generation.tokenization import decoded_text, prompt_token_ids, text_token_ids
from zerosearch.prompts import INVALID_ACTION_HINT, PAPER, PROMPTED_SIMULATOR
from zerosearch.rollout.loop import RolloutSettings, run_rollouts
from zerosearch.rollout.trajectory import Trajectory
from zerosearch.simulator.server import simulator_server

SMOLLM = models_folder() / "SmolLM2-135M-Instruct"
pytestmark = pytest.mark.skipif(not SMOLLM.is_dir(), reason=f"{SMOLLM} is missing: python recipes/get_model.py")

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
QUESTIONS = ("Who wrote Emma?", "Where is Oslo?", "When did Rome fall?")
SETTINGS = RolloutSettings(max_turns=1, max_turn_tokens=24, max_observation_tokens=64, temperature=0.0)


def shown(question: str, *turns: str) -> list[dict[str, str]]:
    """Return a prompt that shows the model how such questions are replied to."""
    pairs = zip(QUESTIONS, turns, strict=True)
    messages = [{"role": role, "content": text} for pair in pairs for role, text in zip(ROLES, pair, strict=True)]
    return [*messages, {"role": "user", "content": question}]


ROLES = ("user", "assistant")
SEARCHED = (
    "<search> Emma author </search>",
    "<search> Oslo location </search>",
    "<search> fall of Rome date </search>",
)
ANSWERED = ("<answer> Jane Austen </answer>", "<answer> Norway </answer>", "<answer> 476 </answer>")
ROWS = [
    {"question": "Capital of Peru?", "golden_answers": ["Lima"], "prompt": shown("Capital of Peru?", *SEARCHED)},
    {"question": "Capital of France?", "golden_answers": ["Paris"], "prompt": shown("Capital of France?", *ANSWERED)},
    {"question": "Hello?", "golden_answers": ["x"], "prompt": [{"role": "user", "content": "Hello"}]},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(SMOLLM)


def roll_out_real(generator: Generator) -> list[Trajectory]:
    return run_rollouts(ROWS, generator, ScriptedEngine(), SETTINGS)


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model in float32, in which the order of sums hardly ever moves a greedy choice."""
    folder = tmp_path_factory.mktemp("float32")
    load_model(str(SMOLLM)).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(SMOLLM).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def rollouts(float32: Path) -> list[Trajectory]:
    return roll_out_real(load_generator(str(float32), "transformers", 2048))


def test_a_turn_of_the_model_ends_at_its_tag_or_at_the_end_of_its_turn(
    rollouts: list[Trajectory], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Untouched by dequantising: it knows the capital of France, and greets."""
    search, answer, greeting = rollouts
    assert search.turns[0].kind == "search" and search.turns[0].text.endswith(" </search>")
    assert "Peru" in search.turns[0].content
    assert (answer.answer, answer.outcome) == ("Paris", "answered")
    assert answer.completion_ids[-1] == tokenizer.eos_token_id and answer.env_mask[-1] == 0  # appended
    # A greeting is no action: its end of turn goes, and the hint follows its text.
    turn = greeting.turns[0]
    assert turn.kind == "invalid" and not turn.text.endswith("<|im_end|>")
    hint = text_token_ids(tokenizer, INVALID_ACTION_HINT)
    assert greeting.completion_ids[turn.num_tokens :][: len(hint)] == hint
    assert tokenizer.eos_token_id not in greeting.completion_ids[: turn.num_tokens]


def test_the_prompt_is_the_chat_template_and_what_a_question_spells_is_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = prompt_token_ids(tokenizer, PAPER.policy.messages("Who wrote Emma"))
    user = f"<|im_start|>user\n{PAPER.policy.prompt('Who wrote Emma')}<|im_end|>\n"
    assert decoded_text(tokenizer, ids) == f"{SYSTEM}{user}<|im_start|>assistant\n"
    row = {"question": "What is <|im_end|>?", "golden_answers": ["x"]}
    generator = ScriptedGenerator(tokenizer, lambda row, turn: "<answer> x </answer>")
    (trajectory,) = run_rollouts([row], generator, ScriptedEngine(), SETTINGS)
    assert trajectory.prompt_ids.count(tokenizer.eos_token_id) == ids.count(tokenizer.eos_token_id) == 2
    assert "What is < |im_end|>?" in decoded_text(tokenizer, trajectory.prompt_ids)


VLLM_SCRIPT = """
import json
import sys
from dataclasses import asdict
from pathlib import Path

from test_real_model import roll_out_real
from zerosearch.generation.loading import load_generator

trajectories = roll_out_real(load_generator(sys.argv[1], "vllm", 1024))
Path(sys.argv[2]).write_text(json.dumps([asdict(trajectory) for trajectory in trajectories]))
"""


@pytest.mark.slow
def test_vllm_samples_the_ids_that_transformers_samples(
    rollouts: list[Trajectory], float32: Path, tmp_path: Path
) -> None:
    """In a process of its own: vLLM leaves its mark on torch and the environment."""
    pytest.importorskip("vllm")
    run_python("-c", VLLM_SCRIPT, float32, tmp_path / "result.json", PYTHONPATH=os.pathsep.join(sys.path))
    compared = ("prompt_ids", "completion_ids", "env_mask", "outcome", "answer")
    for theirs, ours in zip(json.loads((tmp_path / "result.json").read_text()), rollouts, strict=True):
        assert {name: theirs[name] for name in compared} == {name: asdict(ours)[name] for name in compared}


@pytest.mark.slow
def test_a_step_of_rl_moves_the_policy(tmp_path: Path) -> None:
    rows = [{**row, "id": str(place), "dataset": "d"} for place, row in enumerate(ROWS[:2])]
    engine = RainEngine()
    settings = {"num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 1, "max_turns": 1}
    trainer = rain_trainer(
        SMOLLM,
        tmp_path,
        engine,
        {"train_dataset": datasets.Dataset.from_list(rows)},
        model_init_kwargs={"dtype": "float32"},
        **settings,
    )
    before = trainer.model.model.layers[-1].mlp.down_proj.weight.detach().clone()
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["reward"] > 0 and engine.requests and logged["grad_norm"] > 0
    assert not torch.equal(trainer.model.model.layers[-1].mlp.down_proj.weight, before)


@pytest.mark.slow
def test_a_step_of_the_cold_start_saves_a_policy_that_can_be_rolled_out(tmp_path: Path) -> None:
    trace = {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"], "query": "Emma", "documents": [""]}
    trace["documents"] = ["Emma: Emma is a novel by Jane Austen."]
    (tmp_path / "traces.jsonl").write_text(json.dumps(trace) + "\n")
    flags = {"model_name_or_path": SMOLLM, "dtype": "float32", "traces": tmp_path / "traces.jsonl", "max_steps": 1}
    flags |= {"output_dir": tmp_path / "policy", "gradient_checkpointing": False}
    load_recipe("sft_policy").main(as_flags(flags))
    made = json.loads((tmp_path / "policy/cold_start.json").read_text())
    assert made["examples"] == 1 and 0.5 < made["last_loss"] < 5
    name = "model.layers.29.mlp.down_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (SMOLLM, tmp_path / "policy"))
    assert not torch.equal(before.float(), after)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "<|im_end|>"
    shutil.rmtree(tmp_path / "policy")


@pytest.mark.slow
def test_the_model_plays_the_search_engine_when_prompted() -> None:
    pytest.importorskip("vllm")
    request = SearchRequest("capital of France", "What is the capital of France?", ("Paris",))
    with simulator_server(str(SMOLLM), port=0, max_model_len=2048, num_threads=1) as server:
        engine = SimulatedEngine(server.base_url, template=PROMPTED_SIMULATOR, temperature=0.0, max_tokens=200)
        (result,) = searched(engine, request)
    assert any("France" in document for document in result.documents)
    assert not any("<|im_" in document for document in result.documents)
