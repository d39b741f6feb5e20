"""The simulated engine: a language model behind an OpenAI-style chat endpoint writes the documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from zerosearch.engines import SearchError, SearchRequest, SearchResult
from zerosearch.engines.account import Account
from zerosearch.errors import UserError
from zerosearch.http import HTTPClient, ServiceError, read_chat, read_models, redacted_url, run_in_background
from zerosearch.metrics import holds_answer
from zerosearch.noise import keyed_uniform
from zerosearch.prompts import SIMULATOR_PROMPT, SimulatorTemplate, simulator_messages
from zerosearch.protocol import is_well_formed, split_documents
from zerosearch.text import any_token, cut_tokens, without_thoughts

CHECK_TIMEOUT_S = 10.0
CONCURRENCY_OF_A_SERVER = 64
NO_TOKENS = any_token(())

# What servers say for a chat template that refuses a system message, as Gemma's and Mistral's do.
SYSTEM_REFUSED = re.compile(r"(?i)system (role|message)|roles must alternate|only user and assistant roles")


@dataclass
class SimulatorCounts:
    """What an engine has seen. A short reply, one with too few documents, is asked for once more."""

    replies: int = 0
    well_formed_replies: int = 0  # "Doc 1: ..." to the last, and nothing else
    short_replies: int = 0


@dataclass(eq=False, repr=False)
class SimulatedEngine:
    """Ask a simulator for documents, useful or noisy as drawn from a keyed RNG.

    `base_url` is one address or several, in a sequence or with commas between them: calls go round them, and a call
    that failed is retried at the next one. `model` None: the one that is served, an adapter before its base.
    `template` is the tuned simulator's prompt (the paper's Table 2) or the two of a prompted one,
    `PROMPTED_SIMULATOR`.

    One coin a query, as in the paper's code, so its documents are all useful or all noisy. Coin and sampling seed come
    from the request's key, so a run that is resumed asks for the same documents.

    A reply with fewer than `num_documents` documents is asked for once more, with another seed. The fuller of the two
    is used; without documents in either the search fails. With `ask_leaks_again`, which is not the paper's, so is a
    noisy reply that holds a golden answer of the question; one that leaks the second time as well is used as it is.

    Every prompt follows an empty system message (see `simulator_messages`), but for a model whose template refuses it.
    Added tokens that a prompt spells out are plain text, as in tuning, for a server that names them to `check`.

    >>> async def ask(request: SearchRequest) -> tuple[str, ...]:
    ...     engine = SimulatedEngine(simulator_url, num_documents=2)
    ...     result = await engine.search(request)
    ...     await engine.aclose()
    ...     return result.documents
    >>> asyncio.run(ask(SearchRequest("Karin Rowe", "Where does Karin Rowe hail from?", ("Port Elsford",))))
    ('Karin Rowe hails from Port Elsford.', 'Port Elsford lies in Istria.')
    """

    name = "simulated"

    base_url: str | Sequence[str] = "http://127.0.0.1:6001/v1"
    model: str | None = None
    template: SimulatorTemplate = SIMULATOR_PROMPT
    temperature: float = 0.8  # this and max_tokens as in the paper's code; its text does not say
    max_tokens: int = 600
    num_documents: int = 5
    ask_leaks_again: bool = False
    timeout_s: float = 600.0  # a CPU that writes for 64 searches at once is slow to end any
    max_retries: int = 5
    max_concurrency: int = 0  # 0: 64 for each server
    api_key: str | None = None  # for an endpoint that wants one
    added_tokens: re.Pattern[str] = NO_TOKENS  # of its tokenizer, once `check` has asked

    def __post_init__(self) -> None:
        urls = self.base_url.split(",") if isinstance(self.base_url, str) else self.base_url
        self.base_urls = tuple(dict.fromkeys(url.strip().rstrip("/") for url in urls if url.strip())) or ("",)
        self.address = redacted_url(", ".join(self.base_urls))  # for messages
        self.max_concurrency = self.max_concurrency or CONCURRENCY_OF_A_SERVER * len(self.base_urls)
        self.counts = SimulatorCounts()
        self._sends_system_message = True
        self.account = Account(self.name)
        self.client = HTTPClient(
            "the simulator",
            remedy=f"put it right (it is started with: {self.start_command()}) and resume the run",
            api_key=self.api_key,
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
            max_concurrency=self.max_concurrency,
        )

    def check(self) -> None:
        """Raise `UserError`, with the command that starts a simulator, unless every server answers and has the model.

        Settles which model is asked where none was named.
        """
        run_in_background(self._check())

    def start_command(self) -> str:
        """Return the command that starts a simulator where this engine looks for one."""
        try:
            port = urlsplit(self.base_urls[0]).port or 6001
        except ValueError:
            port = 6001
        return f"python recipes/serve_simulator.py --model {self.model or 'SIMULATOR'} --port {port}"

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return the documents the simulator writes. Raises `SearchError` when it writes none."""
        with self.account.search():
            result = await self._write(request)
            if not result.documents:
                nothing = f"wrote no documents for the query {request.query!r}, asked twice"
                question = "is the model it serves a simulator, and tuned to this prompt?"
                raise SearchError(f"the simulator at {self.address} {nothing}; {question}", result.retries)
            return result

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on, wherever it is served; `model` is `None` before `check`."""
        settings = ("model", "temperature", "max_tokens", "num_documents", "ask_leaks_again")
        template_sha256 = hashlib.sha256(repr(self.template).encode()).hexdigest()
        named = {name: getattr(self, name) for name in settings}
        return {"engine": self.name, "template_sha256": template_sha256, **named}

    async def aclose(self) -> None:
        await self.client.aclose()

    async def _write(self, request: SearchRequest) -> SearchResult:
        """Return the documents, none where neither reply held any; `retries` are the calls beyond the first."""
        messages = simulator_messages(
            question=request.question,
            golden_answers=request.golden_answers,
            query=request.query,
            noisy=request.is_noisy,
            template=self.template,
        )
        messages[-1]["content"] = " ".join(cut_tokens(self.added_tokens, messages[-1]["content"]))

        def leaks(documents: tuple[str, ...]) -> bool:
            """Say whether documents that were to be noisy answer the question, where that is looked at."""
            is_watched = request.is_noisy and self.ask_leaks_again
            return is_watched and any(holds_answer(text, request.golden_answers) for text in documents)

        documents, retries = await self._ask(messages, request.key, attempt=0)
        replies = [documents]
        if len(documents) < self.num_documents or leaks(documents):
            again, more_retries = await self._ask(messages, request.key, attempt=1)
            replies.append(again)
            retries += 1 + more_retries
        documents = min(replies, key=lambda reply: (not reply, leaks(reply), -len(reply)))
        short_replies = sum(len(reply) < self.num_documents for reply in replies)
        self.counts.short_replies += short_replies
        return SearchResult(documents, request.is_noisy, retries, short_replies=short_replies)

    async def _ask(
        self, messages: list[dict[str, str]], key: tuple[int, ...], attempt: int
    ) -> tuple[tuple[str, ...], int]:
        """Return the documents of one reply, and how often the call was retried."""
        seed = int(keyed_uniform(*key, attempt) * 2**31) if key else None
        text, retries = await self._reply(messages, seed)
        text = without_thoughts(text)
        self.counts.replies += 1
        self.counts.well_formed_replies += is_well_formed(text, self.num_documents)
        return split_documents(text, self.num_documents), retries

    async def _reply(self, messages: list[dict[str, str]], seed: int | None) -> tuple[str, int]:
        """Return the text of one reply, and how often the call was retried. Raises `ServiceError`."""
        if self.model is None:
            urls = [f"{url}/models" for url in self.base_urls]
            models, _ = await self.client.request("GET", urls, read=read_models, timeout_s=CHECK_TIMEOUT_S)
            self.model = models[0]
        sent = messages if self._sends_system_message else messages[1:]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": sent,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if seed is not None:
            body["seed"] = seed
        urls = [f"{url}/chat/completions" for url in self.base_urls]
        try:
            reply, retries = await self.client.request(
                "POST", urls, json=body, read=read_chat, around=self.account.call
            )
        except ServiceError as error:
            if sent is not messages or not SYSTEM_REFUSED.search(error.reason):
                raise
            self._sends_system_message = False
            text, retries = await self._reply(messages, seed)
            return text, retries + 1
        return reply.text, retries

    async def _check(self) -> None:
        try:
            for url in self.base_urls:
                shown = redacted_url(url)
                try:
                    models, _ = await self.client.request(
                        "GET", f"{url}/models", read=read_models, timeout_s=CHECK_TIMEOUT_S, max_retries=0
                    )
                except ServiceError as error:
                    remedy = f"start one with: {self.start_command()}"
                    raise UserError(f"no simulator answers at {shown} ({error.reason}); {remedy}") from None
                chosen = self.model or models[0]
                if chosen not in models:
                    raise UserError(f"the server at {shown} has no model {chosen!r}, but: {', '.join(models)}")
                self.model = chosen  # which the other servers need to have as well
            with suppress(ServiceError):  # only a vLLM says so, and only if told to
                self.added_tokens, _ = await self.client.request(
                    "GET",
                    f"{self.base_urls[0].removesuffix('/v1')}/tokenizer_info",
                    read=lambda info: any_token(info["added_tokens_decoder"].values()),
                    timeout_s=CHECK_TIMEOUT_S,
                    max_retries=0,
                )
        finally:
            await self.client.aclose()
