"""A local server that speaks OpenAI's chat completions as the real ones do, with a script in place of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from http_servers import serving

Messages = list[dict[str, str]]


@dataclass
class ChatServer:
    """`write(messages)` is the model: a text, or an HTTP status to fail with. `requests` is what it was sent."""

    url: str = ""
    write: Callable[[Messages], str | int] = lambda messages: "<answer> yes </answer>"
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    tells_stop_string: bool = False  # as vLLM does
    tells_usage: bool = True

    def reply(self, body: dict[str, Any]) -> web.Response:
        text = self.write(body["messages"])
        if isinstance(text, int):
            return web.json_response({"error": {"message": "out of order"}}, status=text)
        finish, stop_reason = "stop", None
        met = [(text.find(stop), stop) for stop in body.get("stop", ()) if stop in text]
        if met:
            place, stop_reason = min(met)
            text = text[:place]
        words = text.split(" ")
        if len(words) > body["max_tokens"]:
            text, finish, stop_reason = " ".join(words[: body["max_tokens"]]), "length", None
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = finish
        if self.tells_stop_string:
            choice["stop_reason"] = stop_reason
        reply: dict[str, Any] = {"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice]}
        if self.tells_usage:
            read = sum(len(message["content"].split()) for message in body["messages"])
            reply["usage"] = {"prompt_tokens": read, "completion_tokens": len(text.split()), "total_tokens": 0}
        return web.json_response(reply)


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    state = ChatServer()

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        state.requests.append(body)
        state.keys.append(request.headers.get("Authorization"))
        return state.reply(body)

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    with serving(app) as address:
        state.url = f"{address}/v1"
        yield state
