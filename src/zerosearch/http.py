"""JSON over HTTP, for every service that this package calls: simulators, search APIs, retrievers, judges, policies.

A call that fails in passing (no connection, no reply in time, a reply of another form, a status of
`RETRIED_STATUSES`) is retried, at most `max_retries` times; any other failure, such as a wrong key, is final at once.

    client = HTTPClient("the judge", remedy="check --judge_url and the key in OPENAI_API_KEY", api_key=key)
    reply, retries = await client.request("POST", url, json=body, read=read_chat)
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, partial
from itertools import count
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

# Not huggingface_hub's client: it takes 2 ms of computing a query where this takes 0.2 (at 64 in flight, beside a
# trainer that needs the core), refuses even localhost when HF_HUB_OFFLINE=1, and sends the user's Hub token.
import aiohttp

from zerosearch.errors import UserError
from zerosearch.text import clean_json, printable

logger = logging.getLogger(__name__)

Content = TypeVar("Content")

RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
LONGEST_RETRY_AFTER_S = 120.0  # a service that asks for a longer pause fails
KEEP_ALIVE_S = 3.0  # less than the 5 s after which vLLM closes an idle connection, so that none is used as it closes
CLOSE_TIMEOUT_S = 30.0
MAX_REPLY_BYTES = 16 * 2**20
KEPT_CHARACTERS, SHOWN_CHARACTERS = 20_000, 300  # of what a service said: in an exception, in a message
# Every repetition is bounded: a text from outside may be thousands of "://".
URL_PASSWORD = re.compile(r"(?<=://)(?:[^\s,@]{0,2000}@)+")
URL_KEY = re.compile(r"(?i)(?<=[?&])([^=&?\s]{0,40}(?:key|token|secret|password|auth)[^=&?\s]{0,40})=[^&\s#,]+")


@cache
def background_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of this process, on which all calls run; it has a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="calls", daemon=True).start()
    return loop


def run_in_background(work: Coroutine[Any, Any, Content], timeout_s: float | None = None) -> Content:
    """Run a coroutine on the background loop, and wait for it. Raises `TimeoutError` after `timeout_s`."""
    future = asyncio.run_coroutine_threadsafe(work, background_loop())
    try:
        return future.result(timeout_s)
    except BaseException:  # KeyboardInterrupt included: the work stops with the wait for it
        future.cancel()
        raise


def redacted_url(text: str) -> str:
    """Return an address, or a text with addresses in it, with passwords and keys replaced by ***."""
    return URL_KEY.sub(r"\1=***", URL_PASSWORD.sub("***@", text))


def checked_key(key: str | None, owner: str) -> str:
    """Return an API key without white space around it, "" for none.

    Raises `UserError` for one that no header can hold, such as two lines.
    """
    key = (key or "").strip().removeprefix("\ufeff")  # the byte order mark that some editors write
    if not all("!" <= character <= "~" for character in key):
        raise UserError(f"the key of {owner} holds a space, a line break or another character that no key has")
    return key


class CallFailed(Exception):
    """One call failed. `is_final`: a retry is of no use. `status`: the HTTP status, `None` if there was no reply."""

    def __init__(
        self, message: str, status: int | None = 200, *, is_final: bool = False, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(printable(" ".join(message[:KEPT_CHARACTERS].split())))
        self.status, self.is_final, self.retry_after_s = status, is_final, retry_after_s


class ServiceError(RuntimeError):
    """A service failed for good. The message names it, its address and the remedy; `reason` says how the last call
    failed, `status` is its HTTP status."""

    def __init__(self, message: str, reason: str, status: int | None, retries: int) -> None:
        super().__init__(message)
        self.reason, self.status, self.retries = reason, status, retries


@dataclass(eq=False, repr=False)
class HTTPClient:
    """Call one service, with at most `max_concurrency` calls in flight; a call may take `timeout_s`.

    `service` ("the simulator") and `remedy` are for messages. `api_key` is sent as a bearer token. It and `secrets`
    are redacted in every message. A reply with one of `final_signs` in its text is a final failure whatever its
    status: some services report an empty balance as 429. `trust_env` goes through the proxies that the environment
    names. `counts` says what was done. A client belongs to one event loop until `aclose`.
    """

    service: str
    remedy: str
    api_key: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    final_signs: Sequence[str] = ()
    timeout_s: float = 120.0
    max_retries: int = 5
    max_concurrency: int = 64
    trust_env: bool = False

    def __post_init__(self) -> None:
        key = checked_key(self.api_key, self.service)
        if key:
            self.headers = {**self.headers, "Authorization": f"Bearer {key}"}
        # As it is, and as it may stand in a URL; longest first.
        forms = (str, quote, quote_plus, partial(quote, safe=""), partial(quote_plus, safe="/"))
        secrets = {form(secret) for secret in (key, *self.secrets) if secret for form in forms}
        self._secrets = sorted(secrets, key=len, reverse=True)
        self.counts = {"calls": 0, "retries": 0, "failures": 0}
        self._turns = count()
        self._session: aiohttp.ClientSession | None = None

    async def request(
        self,
        method: str,
        url: str | Sequence[str],
        *,
        read: Callable[[Any], Content],
        timeout_s: float | None = None,
        max_retries: int | None = None,
        around: Callable[[int], AbstractAsyncContextManager[Any]] = nullcontext,
        **content: Any,
    ) -> tuple[Content, int]:
        """Return what `read` makes of the JSON reply, and how often the call was retried.

        Several addresses do the same work: requests go round them, and a retry goes to the next one. `read` fails a
        reply of another form by `CallFailed`, or by the error that indexing or converting it raises. `around(retries)`
        is entered around each call. `content` is aiohttp's: `json`, a body, or `params`. Waiting for one of the
        `max_concurrency` slots uses up no time limit. Raises `ServiceError`.
        """
        urls = [url] if isinstance(url, str) else url
        max_retries = self.max_retries if max_retries is None else max_retries
        turn = next(self._turns)
        for retries in range(max_retries + 1):
            url = urls[(turn + retries) % len(urls)]
            try:
                async with self._slots(), around(retries):  # not held during a pause
                    return await self._call(method, url, read, timeout_s or self.timeout_s, content), retries
            except CallFailed as error:
                failure = error
            reason = self.redacted(str(failure))[:SHOWN_CHARACTERS]  # in this order: half a secret is one too
            jitter = random.Random(f"{url} {content} {retries}").uniform(0.5, 1.5)  # many fail at once
            pause_s = max(min(FIRST_BACK_OFF_S * 2**retries, LONGEST_BACK_OFF_S) * jitter, failure.retry_after_s)
            if retries + 1 < len(urls):
                pause_s = 0.0  # another server is asked
            if failure.is_final or retries == max_retries or pause_s > LONGEST_RETRY_AFTER_S:
                break
            logger.warning("%s at %s: %s; retried in %.1f s", self.service, self.redacted(url), reason, pause_s)
            self.counts["retries"] += 1
            await asyncio.sleep(pause_s)
        self.counts["failures"] += 1
        address = self.redacted(", ".join(urls))
        attempts = f"attempt {retries + 1} of {max_retries + 1}"
        raise ServiceError(
            f"{self.service} at {address} failed, {attempts}: {reason}; {self.remedy}", reason, failure.status, retries
        )

    def redacted(self, text: str) -> str:
        """Return `text` with secrets redacted, as they are and as they stand in a URL."""
        text = redacted_url(text)
        for form in self._secrets:
            text = text.replace(form, "***")
        return text

    async def aclose(self) -> None:
        """Close the connections; the client may be used again, on another event loop too."""
        session, self._session = self._session, None
        if session:
            await session.close()

    def _slots(self) -> asyncio.Semaphore:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)  # the slots are the limit
            self._session = aiohttp.ClientSession(connector=connector, trust_env=self.trust_env)
            self._semaphore = asyncio.Semaphore(self.max_concurrency)
        return self._semaphore

    async def _call(
        self, method: str, url: str, read: Callable[[Any], Content], timeout_s: float, content: dict[str, Any]
    ) -> Content:
        self.counts["calls"] += 1
        limit = aiohttp.ClientTimeout(timeout_s)
        reply = bytearray()
        try:
            async with self._session.request(  # type: ignore[union-attr]
                method, url, headers=self.headers, timeout=limit, allow_redirects=False, **content
            ) as response:
                async for chunk in response.content.iter_any():
                    reply += chunk
                    if len(reply) > MAX_REPLY_BYTES:
                        raise CallFailed(f"its reply is longer than {MAX_REPLY_BYTES:,} bytes")
        except TimeoutError:
            raise CallFailed(f"no answer within {timeout_s:g} s", None) from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise CallFailed("this is not an http address", None, is_final=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise CallFailed(f"{type(error).__name__} {error}", None) from None
        except ValueError as error:  # a key beside a password, a proxy that is no address
            raise CallFailed(str(error), None, is_final=True) from None
        text = reply.decode("utf-8-sig", errors="replace")  # JSON is UTF-8, whatever a header says
        if response.status != 200:
            if where := response.headers.get("Location"):  # another host would be sent the key
                text = f"it redirects to {where}, which is not followed"
            raise CallFailed(
                f"HTTP status {response.status}: {text}",
                response.status,
                is_final=response.status not in RETRIED_STATUSES or any(sign in text for sign in self.final_signs),
                retry_after_s=retry_after_s(response.headers.get("Retry-After")),
            )
        try:
            return read(clean_json(json.loads(text)))
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, UserError):
            raise CallFailed(f"its reply is not of the form expected: {text}") from None


@dataclass(frozen=True)
class ChatReply:
    """A chat completion: its text, why it ended, the stop string that was met, and its tokens, where it says so."""

    text: str
    finish_reason: Any = None
    stop_reason: Any = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def read_chat(reply: Any) -> ChatReply:
    """Read an OpenAI-style chat completion; its content is a text, a list of parts, or missing."""
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    content = choice["message"].get("content") or ""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return ChatReply(
        content,
        choice.get("finish_reason"),
        choice.get("stop_reason"),  # of vLLM and SGLang
        *(number if type(number) is int and number >= 0 else None for number in tokens),
    )


def read_models(reply: Any) -> list[str]:
    """Read an OpenAI-style list of models; vLLM's adapters, which have a parent, come before their base."""
    models = [str(model["id"]) for model in sorted(reply["data"], key=lambda model: not model.get("parent"))]
    if not models:
        raise CallFailed("it serves no model")
    return models


def retry_after_s(header: str | None) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date; 0 if it says nothing."""
    for read in (float, _seconds_until):
        with suppress(TypeError, ValueError, OverflowError):
            return max(read(header), 0.0)  # type: ignore[arg-type]
    return 0.0


def _seconds_until(date: str) -> float:
    moment = parsedate_to_datetime(date)
    return (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
