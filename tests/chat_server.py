"""A local server that speaks OpenAI's chat completions as the real ones do, with a script in place of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any

import pytest
from aiohttp import web
from http_servers import Server, response_of

Messages = list[dict[str, str]]


@dataclass
class ChatServer(Server):
    """`write(messages)` is the model: a text, or an HTTP status to fail with, or a response.

    `models` and `tokenizer_info` are what it answers when it is asked for them; `requests` are the completions that
    were asked for.
    """

    write: Callable[[Messages], Any] = lambda messages: "<answer> yes </answer>"
    models: tuple[int, Any] = (200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})
    tokenizer_info: tuple[int, Any] = (404, {"detail": "Not Found"})  # of vLLM, where a flag allows it
    tells_stop_string: bool = False  # as vLLM does
    tells_usage: bool = True

    def __post_init__(self) -> None:
        self.answer = self.reply

    @property
    def keys(self) -> list[str | None]:
        return [request.headers.get("Authorization") for request in self.seen]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return response_of(*self.models)
        if request.path == "/tokenizer_info":
            return response_of(*self.tokenizer_info)
        assert request.path == "/v1/chat/completions"
        return await super().handle(request)

    async def reply(self, place: int) -> Any:
        body = self.requests[place]
        text = self.write(body["messages"])
        text = await text if isawaitable(text) else text
        if isinstance(text, int):
            return text, {"error": {"message": "out of order"}}
        if not isinstance(text, str):
            return text
        finish, stop_reason = "stop", None
        met = [(text.find(stop), stop) for stop in body.get("stop", ()) if stop in text]
        if met:
            end, stop_reason = min(met)
            text = text[:end]
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
        return 200, reply


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    with ChatServer().running() as server:
        server.url += "/v1"
        yield server
