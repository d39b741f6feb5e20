"""A model behind an OpenAI-style chat endpoint, as a generator for the rollout: text there, token ids here.

The rollout counts in token ids, and an endpoint neither takes nor gives any. `PieceTokenizer` stands in for the
tokenizer nobody has: it cuts text into pieces of up to four characters, about what a BPE makes of English, and loses
nothing. So `max_turn_tokens` bounds a reply in the endpoint's own tokens, and every other budget counts pieces.

A trajectory is a conversation: the prompt is the user's, a turn the assistant's, each observation the user's again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from os import environ
from typing import Any

from zerosearch.command_line import check_bounds
from zerosearch.errors import UserError
from zerosearch.generation import FinishReason, GenerationError, SampledTurn, Sampling, TurnRequest
from zerosearch.http import ChatReply, HTTPClient, ServiceError, checked_key, read_chat, read_models, redacted_url
from zerosearch.protocol import STOP_STRINGS, without_closed_thoughts

PIECE = re.compile(r"[\x00-\x7f]{1,4}|[^\x00-\x7f]")
TIMEOUT_S = 600.0  # of one call
END_OF_TURN = re.compile("|".join(STOP_STRINGS))
OPENING_TAG = re.compile("|".join(stop.replace("/", "") for stop in STOP_STRINGS))


class PieceTokenizer:
    """Text to ids and back without loss: a piece is up to four ASCII characters, or one other; its id, its bytes."""

    eos_token_id = 0  # stands for no text
    chat_template = None
    all_special_tokens: tuple[str, ...] = ()

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Return `{"input_ids": ids}`. There are no special tokens, so a tokenizer's options mean nothing here."""
        pieces = (piece.encode("utf-8", "surrogatepass") for piece in PIECE.findall(text))
        return {"input_ids": [int.from_bytes(b"\x01" + piece, "big") for piece in pieces]}  # the 1 keeps zeros

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        pieces = (token_id.to_bytes(5, "big").lstrip(b"\x00")[1:] for token_id in token_ids)
        return b"".join(pieces).decode("utf-8", "surrogatepass")


@dataclass
class Usage:
    """What was asked of an endpoint: replies, and the tokens it read and wrote, by its own account.

    `estimated` counts the replies without such an account, whose tokens are counted in pieces.
    """

    replies: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    estimated: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Conversation:
    """One trajectory as the endpoint sees it. `num_ids` says how many of the trajectory's ids its messages hold."""

    messages: list[dict[str, str]] = field(default_factory=list)
    num_ids: int = 0
    usage: Usage = field(default_factory=Usage)


@dataclass
class EndpointOptions:
    """An endpoint on the command line. A recipe's parser takes this class beside its own."""

    endpoint_url: str | None = field(default=None, metadata={"help": 'Its address, up to "/v1".'})
    endpoint_key_env: str | None = field(
        default=None, metadata={"help": "The environment variable that holds its key. Default: no key is sent."}
    )
    endpoint_usd_read: float = field(
        default=0.0, metadata={"help": "Price of a million tokens read, in dollars.", "min": 0, "max": 1e9}
    )
    endpoint_usd_written: float = field(
        default=0.0, metadata={"help": "Price of a million tokens written.", "min": 0, "max": 1e9}
    )
    endpoint_body: str | None = field(
        default=None, metadata={"help": 'JSON to put over each request; a null leaves a field out: {"stop": null}.'}
    )
    endpoint_concurrency: int = field(default=16, metadata={"help": "Requests in flight at once.", "min": 1})


class EndpointGenerator:
    """Have turns written by a model behind an address, any server that speaks OpenAI's chat completions.

    `model` None: the first that the server lists. Log-probabilities are NaN, as the endpoint gives none, so this
    generator cannot be trained with. Raises `UserError` for an option that cannot work.
    """

    max_context_tokens = 1_000_000

    def __init__(self, options: EndpointOptions, model: str | None = None) -> None:
        if options.endpoint_url is None:
            raise UserError('an endpoint needs its address: --endpoint_url, up to "/v1"')
        check_bounds(options)
        variable = options.endpoint_key_env
        api_key = checked_key(environ.get(variable), variable) if variable else None
        if api_key == "":
            raise UserError(f"there is no key: the environment variable {variable} is not set")
        try:
            self.body = json.loads(options.endpoint_body or "{}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"endpoint_body is not JSON: {error}") from None
        if not isinstance(self.body, dict):
            raise UserError(f"endpoint_body is {options.endpoint_body}: it must be a JSON object")
        self.options, self.model = options, model
        self.base_url = options.endpoint_url.rstrip("/")
        self.address = redacted_url(self.base_url)
        self.name = f"the endpoint {self.address}"
        self.max_concurrency = options.endpoint_concurrency
        self.tokenizer: Any = PieceTokenizer()
        self.client = HTTPClient(
            "the endpoint",
            remedy="check its address, model and key, and resume the run",
            api_key=api_key,
            timeout_s=TIMEOUT_S,
            max_concurrency=self.max_concurrency,
            trust_env=True,
        )
        self.usage = Usage()
        self.conversations: dict[int, Conversation] = {}

    @property
    def cost_usd(self) -> float:
        """Return what this generator's replies have cost."""
        read, written = self.options.endpoint_usd_read, self.options.endpoint_usd_written
        return (self.usage.tokens_read * read + self.usage.tokens_written * written) / 1e6

    @contextmanager
    def session(self, sampling: Sampling) -> Iterator[None]:
        """Start from no conversations. `usage` goes on from rollout to rollout."""
        self.sampling = sampling
        self.conversations = {}
        yield

    async def sample(self, request: TurnRequest) -> SampledTurn:
        """Have the assistant's next message written, as far as the first closing tag."""
        conversation = self.conversations.setdefault(request.trajectory, Conversation())
        said = self.tokenizer.decode(request.context_ids[conversation.num_ids :])
        messages = [*conversation.messages, {"role": "user", "content": said}]
        reply = await self._reply(messages, request)
        text, finish = as_turn(reply)
        token_ids = self.tokenizer(text)["input_ids"]
        used = Usage(
            replies=1,
            tokens_read=len(request.context_ids) if reply.prompt_tokens is None else reply.prompt_tokens,
            tokens_written=len(token_ids) if reply.completion_tokens is None else reply.completion_tokens,
            estimated=int(reply.completion_tokens is None),
        )
        self.usage += used
        conversation.usage += used
        conversation.messages = [*messages, {"role": "assistant", "content": text}]
        conversation.num_ids = len(request.context_ids) + len(token_ids)
        return SampledTurn(request.trajectory, token_ids, [math.nan] * len(token_ids), finish)

    def usage_of(self, trajectories: Sequence[int]) -> Usage:
        """Return what these trajectories of the rollout under way have used so far."""
        usages = [self.conversations[number].usage for number in trajectories if number in self.conversations]
        return sum(usages, Usage())

    async def _reply(self, messages: list[dict[str, str]], request: TurnRequest) -> ChatReply:
        try:
            if self.model is None:
                models, _ = await self.client.request("GET", f"{self.base_url}/models", read=read_models)
                self.model = models[0]
            body: dict[str, Any] = {
                "model": self.model,
                "messages": messages,
                "max_tokens": request.max_new_tokens,
                "temperature": self.sampling.temperature,
                "stop": list(STOP_STRINGS),
            }
            if self.sampling.temperature > 0.0:
                body |= {"top_p": self.sampling.top_p, "seed": request.seed % 2**31}
            body = {name: value for name, value in {**body, **self.body}.items() if value is not None}
            url = f"{self.base_url}/chat/completions"
            reply, _ = await self.client.request("POST", url, json=body, read=read_chat)
        except ServiceError as error:
            raise GenerationError(str(error)) from error
        return reply

    async def aclose(self) -> None:
        await self.client.aclose()


def as_turn(reply: ChatReply) -> tuple[str, FinishReason]:
    """Return a reply as a turn: up to its first closing tag, which endpoints cut off, and why it ended.

    An endpoint that stops at a stop string keeps it to itself. Where it does not say which one, it is the one of the
    last tag left open; a model that ended of itself right there looks the same.
    """
    text = reply.text
    end = END_OF_TURN.search(text)
    if end is not None:  # the endpoint left the stop string in, or did not stop
        return text[: end.end()], "stop"
    if reply.finish_reason == "length":
        return text, "length"
    if reply.finish_reason == "stop":
        opened = OPENING_TAG.findall(without_closed_thoughts(text))
        said = reply.stop_reason if reply.stop_reason in STOP_STRINGS else None
        stop = said or (opened[-1].replace("<", "</") if opened else None)
        if stop is not None:
            return text + stop, "stop"
    return text, "eos"
