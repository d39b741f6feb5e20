"""The simulated engine: a language model behind an OpenAI-style chat endpoint writes the documents."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import urlsplit

# Not huggingface_hub's client: it computes for 2 ms a query where this takes 0.2 (at 64 in flight, beside a trainer
# that needs the core), refuses even localhost when HF_HUB_OFFLINE=1, and sends the user's Hub token by default.
import aiohttp

from zerosearch.curriculum import keyed_uniform
from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.errors import UserError
from zerosearch.prompts import SIMULATOR_PROMPT, simulator_messages
from zerosearch.protocol import split_documents

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]

PASSING_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # worth another try; any other one is final
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
CHECK_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 3.0  # less than the 5 s after which vLLM closes an idle connection, so that none is used as it closes


class CallFailed(Exception):
    """One call came to nothing. `may_pass` says whether the same call can succeed later."""

    def __init__(self, message: str, may_pass: bool = True) -> None:
        super().__init__(" ".join(message.split())[:300])
        self.may_pass = may_pass


class SimulatedEngine:
    """Ask a simulator for documents, useful or noisy by the toss of a coin.

    One coin a query, so its documents are all useful or all noisy, as in the paper's code. The coin and the seed come
    from the request's key, so a run that is resumed asks for the same documents. A reply with fewer than
    `num_documents` documents is asked for once more, with another seed; the fuller of the two is used, and if neither
    holds any the search fails. A call that fails on its way (no connection, `timeout_s` passed, a reply that is no
    JSON, a status that may pass) is repeated at most `max_retries` times.
    `model` None: the first one that the server lists.
    """

    name = "simulated"

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:6001/v1",
        model: str | None = None,
        template: str = SIMULATOR_PROMPT,
        *,
        temperature: float = 0.8,  # this and max_tokens as in the paper's code; its text does not say
        max_tokens: int = 600,
        num_documents: int = 5,
        timeout_s: float = 120.0,
        max_retries: int = 5,
        max_concurrency: int = 64,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.template = template
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.num_documents = num_documents
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.max_concurrency = max_concurrency
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self) -> None:
        """Raise `UserError`, with the command that starts a simulator, unless the server answers and has the model."""
        asyncio.run(self._check())

    def start_command(self) -> str:
        """Return the command that starts a simulator where this engine looks for one."""
        try:
            port = urlsplit(self.base_url).port or 6001
        except ValueError:  # the address names a port that is none
            port = 6001
        return f"python recipes/serve_simulator.py --model {self.model or 'SIMULATOR'} --port {port}"

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the documents the simulator writes. Raises `SearchError` when it cannot be had to."""
        noisy = keyed_uniform(*request.key) < request.p_noise
        messages = simulator_messages(
            question=request.question,
            golden_answers=request.golden_answers,
            query=request.query,
            noisy=noisy,
            template=self.template,
        )
        documents, retries = await self._ask(messages, request.key, attempt=0)
        if len(documents) < self.num_documents:
            again, more_retries = await self._ask(messages, request.key, attempt=1)
            documents = max(documents, again, key=len)
            retries += 1 + more_retries
        if not documents:
            raise SearchError(
                f"the simulator at {self.base_url} wrote no documents for the query {request.query!r}, asked twice; "
                "is the model it serves a simulator, and tuned to this prompt?"
            )
        return SearchResult(documents, noisy, retries)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None and self._loop is asyncio.get_running_loop():
            await self._session.close()
        self._session = None

    async def _check(self) -> None:
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(CHECK_TIMEOUT_S)) as session:
                reply = await _read(session.get(f"{self.base_url}/models"))
            models = [model["id"] for model in reply["data"]]
        except (CallFailed, KeyError, TypeError) as error:
            raise UserError(
                f"no simulator answers at {self.base_url} ({error}); start one with: {self.start_command()}"
            ) from error
        if not models or (self.model is not None and self.model not in models):
            served = ", ".join(models) or "none"
            raise UserError(f"the server at {self.base_url} has no model {self.model!r}, but: {served}")
        self.model = self.model or models[0]

    async def _ask(self, messages: Messages, key: tuple[int, ...], attempt: int) -> tuple[tuple[str, ...], int]:
        """Return the documents of one reply, and how often the call had to be repeated."""
        seed = int(keyed_uniform(*key, attempt) * 2**31) if key else None
        for retries in range(self.max_retries + 1):
            try:
                return split_documents(await self._complete(messages, seed), self.num_documents), retries
            except CallFailed as error:
                failure = error
            if not failure.may_pass or retries == self.max_retries:
                break
            back_off_s = min(FIRST_BACK_OFF_S * 2**retries, LONGEST_BACK_OFF_S)
            back_off_s *= 0.5 + keyed_uniform(*key, attempt, retries)  # jitter: many searches fail at the same moment
            logger.warning("simulator at %s: %s; asking again in %.1f s", self.base_url, failure, back_off_s)
            await asyncio.sleep(back_off_s)
        raise SearchError(
            f"the simulator at {self.base_url} failed, attempt {retries + 1} of {self.max_retries + 1}: {failure}; "
            f"put it right (it is started with: {self.start_command()}) and resume the run"
        ) from failure

    async def _complete(self, messages: Messages, seed: int | None) -> str:
        """Return the text of one reply, "" if it holds none."""
        if self.model is None:
            await self._check()
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if seed is not None:
            body["seed"] = seed
        reply = await _read(self._connected().post(f"{self.base_url}/chat/completions", json=body))
        try:
            content = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise CallFailed(f"its reply is no chat completion: {json.dumps(reply)}") from None
        return content if isinstance(content, str) else ""

    def _connected(self) -> aiohttp.ClientSession:
        """Return the session, whose connections stay open; another event loop gets its own, as they belong to one."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(self.timeout_s),
                connector=aiohttp.TCPConnector(limit=self.max_concurrency, keepalive_timeout=KEEP_ALIVE_S),
            )
            self._loop = loop
        return self._session


async def _read(call: AbstractAsyncContextManager[aiohttp.ClientResponse]) -> Any:
    """Make a call and return its JSON. Raises `CallFailed` for anything else."""
    try:
        async with call as response:
            text = await response.text(errors="replace")
    except TimeoutError:
        raise CallFailed("no answer within the time limit") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: an address that is none
        may_pass = not isinstance(error, (aiohttp.InvalidURL, ValueError))
        raise CallFailed(f"{type(error).__name__} {error}", may_pass) from error
    if response.status != 200:
        raise CallFailed(f"HTTP status {response.status}: {text}", response.status in PASSING_STATUSES)
    try:
        return json.loads(text)
    except ValueError:
        raise CallFailed(f"its reply is not JSON: {text}") from None
