"""TRL's own trainer on our engines: a chat model with its template's calls, and TinyWorld's policy with its tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer
from families import family_tokenizer, save_small_model
from recipe_modules import Refusal, as_flags, load_recipe
from scripted_rollouts import ScriptedEngine
from transformers import AutoTokenizer

from zerosearch.engines import SearchError
from zerosearch.environment import Curriculum, SearchEnvironment, answer_reward
from zerosearch.noise import NoiseSchedule

ROW = {"id": "1", "question": "Who wrote Emma?", "golden_answers": ["Jane Austen"]}


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "tool", "content": "<answer> no </answer>"}, {"role": "assistant", "content": text}]


def test_a_search_carries_its_row_and_the_noise_of_its_step() -> None:
    engine = ScriptedEngine(lambda request: ["It rains.", "Emma is by Jane Austen."])
    curriculum = Curriculum(NoiseSchedule(0.0, 1.0), seed=7)
    curriculum.on_step_begin(None, type("State", (), {"global_step": 4, "max_steps": 10})(), None)  # type: ignore[arg-type]
    first, second = SearchEnvironment(engine, curriculum), SearchEnvironment(engine, curriculum)
    for environment in (first, second):
        environment.reset(**ROW, prompt=[])
    assert first.search("Emma author") == "Doc 1: It rains.\nDoc 2: Emma is by Jane Austen."
    for environment in (first, second):
        environment.search("Emma author")
    request = engine.requests[0]
    assert (request.query, request.question) == ("Emma author", "Who wrote Emma?")
    assert request.golden_answers == ("Jane Austen",)
    assert request.p_noise == pytest.approx(1 / 3)  # step 5 of 10: (4^0.5 - 1) / 3
    assert len({request.key for request in engine.requests}) == 3 and request.key[:2] == (7, 5)
    first.reset(**ROW)
    first.search("again")
    assert engine.requests[3].key == request.key


def test_the_reward_reads_the_last_message_alone_and_stops_the_run_after_a_failed_search() -> None:
    engines = ScriptedEngine(), ScriptedEngine(lambda request: SearchError("the engine is gone"))
    environments = [SearchEnvironment(engine, Curriculum(NoiseSchedule(0.0, 0.0))) for engine in engines]
    for environment in environments:
        environment.reset(**ROW)
    good = environments[:1]
    for text, score in [
        ("<answer> Jane Austen </answer>", 1.0),
        ("<answer> Jane </answer>", 2 / 3),
        ("Jane Austen", 0.0),
    ]:
        assert answer_reward([said(text)], [["Jane Austen"]], good) == [pytest.approx(score)]
    assert answer_reward([said("x")[:1]], [["no"]], good) == [0.0], "what a tool says is no answer"
    with pytest.raises(SearchError, match="the engine is gone"):
        environments[1].search("Emma")
    with pytest.raises(SearchError, match="the engine is gone"):
        answer_reward([said("x")] * 2, [["a"]] * 2, environments)


FIVE = "\n".join(f"Doc {number}: Emma is by Jane Austen." for number in range(1, 6))


def flags(model: Path, questions: Path, url: str, output_dir: Path, *more: str) -> list[str]:
    given = {"model_name_or_path": model, "dataset": questions, "simulator_url": url, "output_dir": output_dir}
    given |= {"max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 4, "report_to": "none"}
    given |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
    given |= {"dtype": "float32"}
    return [*as_flags(given), *more]


class FailingTrainer:
    def __init__(self, **options: Any) -> None:
        pass

    def train(self) -> None:
        raise SearchError("the engine is gone")


def test_a_search_that_fails_for_good_ends_the_run_in_one_sentence(
    tiny_policy_dir: Path,
    questions: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Refusal,
) -> None:
    monkeypatch.setattr("trl.GRPOTrainer", FailingTrainer)
    more = ("--engine", "bm25", "--corpus", str(corpus))
    said = refusal("trl_environment", flags(tiny_policy_dir, questions, "", tmp_path / "policy", *more))
    assert said == "error: the engine is gone"


@pytest.mark.slow
def test_a_stock_trainer_runs_two_steps_with_a_chat_model(
    chat_server: ChatServer, questions: Path, tmp_path: Path
) -> None:
    tokenizer, model = family_tokenizer("qwen3"), tmp_path / "model"
    save_small_model("llama", tokenizer, model)
    tokenizer.save_pretrained(model)
    output_dir = tmp_path / "policy"
    more = ("--max_completion_length", "48")
    load_recipe("trl_environment").main(flags(model, questions, chat_server.url, output_dir, *more))
    assert (output_dir / "model.safetensors").is_file()


@pytest.mark.slow
def test_tinyworld_s_policy_searches_by_its_tags_in_trl_s_own_loop(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.write = lambda messages: FIVE
    questions = tmp_path / "questions.jsonl"
    asked = "Where does the author of The Silent Harbor hail from?"
    questions.write_text(json.dumps({"question": asked, "golden_answers": ["Mount Kelso"]}) + "\n")
    load_recipe("tinyworld_tools").main(["--output_dir", str(tmp_path / "tools")])
    more = ("--prompt", "tinyworld", "--agent", "policy", "--max_completion_length", "200")
    more += ("--max_tool_calling_iterations", "2")
    given = flags(tmp_path / "tools", questions, chat_server.url, tmp_path / "policy", *more)
    load_recipe("trl_environment").main(given)
    prompts = [request["messages"][-1]["content"] for request in chat_server.requests]
    assert len(prompts) >= 4, "most of the eight trajectories search"
    assert all(f'Question: "{asked}" Answer: Mount Kelso' in prompt for prompt in prompts)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert tokenizer.response_template["fields"]["tool_calls"]["open"] == "<search>"
