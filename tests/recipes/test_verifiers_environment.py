"""recipes/verifiers_environment.py: loaded by verifiers and played by its own agent, whose model is scripted."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from chat_server import ChatServer, Messages
from recipe_modules import RECIPES
from retriever_parts import serving_application

from zerosearch.engines.simulated import SimulatedEngine
from zerosearch.engines.simulated_retriever import QueryNoise, SimulatedRetriever
from zerosearch.noise import NoiseSchedule

vf = pytest.importorskip("verifiers.v1", reason="needs verifiers: pip install verifiers==0.4.0 uv")
FIVE = "\n".join(f"Doc {number}: Emma is by Jane Austen." for number in range(1, 6))
CALL = {"name": "search", "arguments": '{"query": "Emma author"}'}


def streamed(message: dict[str, Any], finish: str) -> web.Response:
    """Return a completion as its agent asks for it: as events."""
    choices = [
        {"index": 0, "delta": message, "finish_reason": None},
        {"index": 0, "delta": {}, "finish_reason": finish},
    ]
    about = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "scripted"}
    events = [json.dumps({**about, "choices": [choice]}) for choice in choices] + ["[DONE]"]
    return web.Response(text="".join(f"data: {event}\n\n" for event in events), content_type="text/event-stream")


def write(messages: Messages) -> Any:
    """Play the simulator, or a policy that searches once and then answers."""
    if "Useful Output" in messages[-1]["content"]:
        return FIVE
    if messages[-1]["role"] == "tool":
        return streamed({"role": "assistant", "content": "<answer> Austen </answer>"}, "stop")
    call = {"index": 0, "id": "1", "type": "function", "function": CALL}
    return streamed({"role": "assistant", "tool_calls": [call]}, "tool_calls")


@pytest.mark.slow
def test_its_agent_searches_by_a_tool_and_is_rewarded(
    chat_server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verifiers.v1.utils.loaders import load_environment

    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"]}) + "\n")
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.setenv("PYTHONPATH", str(RECIPES), prepend=":")  # of the server that it starts for the tool
    chat_server.write = write
    engine = SimulatedEngine(chat_server.url)
    engine.check()
    retriever = SimulatedRetriever(engine, QueryNoise(NoiseSchedule(0.0, 0.0), 10))

    async def play(address: str) -> Any:
        taskset = {"id": "verifiers_environment", "dataset": str(questions), "tools": {"retriever_url": address}}
        agent = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}
        environment = load_environment(vf.SingleAgentEnvConfig(taskset=taskset, agent=agent))
        client = vf.EvalClientConfig(base_url=chat_server.url, api_key_var="NONE")
        async with environment.serving():
            (slot,) = environment.slots(next(iter(environment.taskset)))
            return await environment.run_slot(slot, vf.ModelContext(client=client, model="scripted"))

    with serving_application(retriever.application) as address:
        (trace,) = asyncio.run(play(address)).traces
    assert not trace.errors
    assert [message.content for message in trace.tool_messages] == [FIVE]
    assert trace.rewards["f1"].score == pytest.approx(2 / 3)
    prompts = [request["messages"][-1]["content"] for request in chat_server.requests]
    assert any("whose answer is Jane Austen." in prompt for prompt in prompts), "the tool sent the row's answers"
