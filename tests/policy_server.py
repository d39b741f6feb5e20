"""A fake of a policy's vLLM server, which writes turns by seed and by the weights that were pushed to it last."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from http_servers import Server, response_of
from safetensors.torch import load_file

from zerosearch.generation.tokenization import text_token_ids

WORDS = "Emma Jane Austen rain novel".split()


@dataclass
class PolicyServer(Server):
    """As much of a policy's server as a trainer without a GPU talks to.

    `pushes` counts the weights that it got, whole ones or `adapters`, of which it keeps what was not removed.
    """

    tokenizer: Any = None
    weights: float = 0.0
    pushes: int = 0
    turns: int = 0  # in flight
    refused: set[int] = field(default_factory=set)  # turns asked for after so many pushes
    takes_pushes: int = 1000
    reads_weights: bool = True  # else turns depend on `pushes`
    max_lora_rank: int = 0
    adapters: list[str] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return response_of(200, {"data": [{"id": "policy", "max_model_len": 2048}]})
        if request.path == "/server_info":
            lora = {"max_lora_rank": self.max_lora_rank} if self.max_lora_rank else None
            config = {"model_config": {"logprobs_mode": "processed_logprobs"}, "lora_config": lora}
            environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": bool(lora)}
            return response_of(200, {"vllm_config": config, "vllm_env": environment})
        body = await request.json() if request.can_read_body else {}
        if request.path in ("/collective_rpc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert self.turns == 0, "weights under a trajectory"
            return self.take(request.path, body)
        if request.path != "/v1/completions":
            return response_of(200, {})
        assert body["model"] == ["policy", *self.adapters][-1]
        return self.turn(body["seed"])

    def take(self, path: str, body: dict[str, Any]) -> web.Response:
        if path == "/v1/unload_lora_adapter":
            if body["lora_name"] not in self.adapters:
                return response_of(404, "no such adapter")
            self.adapters.remove(body["lora_name"])
            return response_of(200, {})
        if self.pushes == self.takes_pushes:
            return response_of(400 if path == "/collective_rpc" else 500, "no room")
        if path == "/collective_rpc":
            changed = [load_file(body["kwargs"]["path"])["lm_head.weight"]]
        else:
            weights = load_file(f"{body['lora_path']}/adapter_model.safetensors")
            changed = [weight for name, weight in weights.items() if "lora_B" in name]
            self.adapters.append(body["lora_name"])
        assert all(weight.numel() for weight in changed), "gathered"
        self.weights = sum(weight.double().sum().item() for weight in changed)
        self.pushes += 1
        return response_of(200, {})

    def turn(self, seed: int) -> web.Response:
        if self.pushes in self.refused:
            return response_of(400, "out of memory")
        draw = random.Random(f"{seed} {self.weights if self.reads_weights else self.pushes}")
        tag = draw.choice(("search", "search", "answer"))
        ids = text_token_ids(self.tokenizer, f"<{tag}> {draw.choice(WORDS)} {draw.choice(WORDS)} </{tag}>")
        logprobs = {"token_logprobs": [-draw.random() for _ in ids]}
        choice = {"token_ids": ids, "logprobs": logprobs, "finish_reason": "stop", "stop_reason": f"</{tag}>"}
        return response_of(200, {"choices": [choice]})
