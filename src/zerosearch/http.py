"""JSON over HTTP, for every service this project calls: simulators, search APIs, retrievers, judges, policies.

A call fails in two ways. What may pass (no connection, no reply in time, a reply of another form, a status of
`PASSING_STATUSES`) is repeated, at most `max_retries` times; anything else, such as a wrong key, is final at once.

    client = HTTPClient("the judge", remedy="check --judge_url and the key in OPENAI_API_KEY", api_key=key)
    verdict, retries = await client.post(url, body, read=read_verdict, key=(seed, row))
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus, urlsplit

# Not huggingface_hub's client: it computes for 2 ms a query where this takes 0.2 (at 64 in flight, beside a trainer
# that needs the core), refuses even localhost when HF_HUB_OFFLINE=1, and sends the user's Hub token by default.
import aiohttp

from zerosearch.noise import keyed_uniform

logger = logging.getLogger(__name__)

Content = TypeVar("Content")

PASSING_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # worth another try; any other one is final
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
LONGEST_RETRY_AFTER_S = 120.0  # a service that wants a longer pause is not waited for
KEEP_ALIVE_S = 3.0  # less than the 5 s after which vLLM closes an idle connection, so that none is used as it closes
SHOWN_CHARACTERS = 300  # of what a service said, in a message
URL_PASSWORD = re.compile(r"://[^/@\s]+@")


class CallFailed(Exception):
    """One call came to nothing.

    `may_pass` says whether the same call can succeed later, `retry_after_s` when the service wants it. `status` is the
    HTTP status, `None` when there was no reply.
    """

    def __init__(
        self, message: str, may_pass: bool = True, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(" ".join(message.split()))
        self.may_pass = may_pass
        self.status = status
        self.retry_after_s = retry_after_s


class ServiceError(RuntimeError):
    """A service failed for good. The message names it, its address and the remedy; `status` is the last one seen."""

    def __init__(self, message: str, status: int | None, retries: int) -> None:
        super().__init__(message)
        self.status = status
        self.retries = retries


@dataclass
class CallCounts:
    """What a client did: calls made, those of them that repeated another, and requests that failed for good."""

    calls: int = 0
    retries: int = 0
    failures: int = 0


class HTTPClient:
    """Call one service, with at most `max_concurrency` requests in flight; a call may take `timeout_s`.

    `service` ("the simulator") and `remedy` are for messages. `api_key` is sent as a bearer token. It and `secrets`,
    such as a key that goes into the query string, are blotted out of every message. A reply with a status that may
    pass and one of `final_signs` in its text is final all the same: some services report an empty balance as 429.
    Safe to use from several event loops, as each gets connections of its own.
    """

    def __init__(
        self,
        service: str,
        *,
        remedy: str,
        api_key: str | None = None,
        secrets: Sequence[str] = (),
        final_signs: Sequence[str] = (),
        timeout_s: float = 120.0,
        max_retries: int = 5,
        max_concurrency: int = 64,
        trust_env: bool = False,
    ) -> None:
        """`trust_env`: go through the proxies that the environment names, which is right for the world outside."""
        self.service = service
        self.remedy = remedy
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.secret_forms = _forms(secret for secret in (api_key, *secrets) if secret)
        self.final_signs = tuple(final_signs)
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.max_concurrency = max_concurrency
        self.trust_env = trust_env
        self.counts = CallCounts()
        self._connections: dict[asyncio.AbstractEventLoop, _Connections] = {}

    async def get(
        self,
        url: str,
        params: Mapping[str, str | int] | None = None,
        *,
        read: Callable[[Any], Content],
        key: tuple[int, ...] = (),
    ) -> tuple[Content, int]:
        """GET `url`; return what `read` makes of the JSON reply, and how often the call was repeated.

        `read` raises `CallFailed` for a reply of another form. `key` is that of the request's randomness, for the
        jitter. Raises `ServiceError`.
        """
        return await self.with_retries(
            lambda: self.call("GET", url, params=params, read=read), url, key or _key_of(params)
        )

    async def post(
        self, url: str, body: Any, *, read: Callable[[Any], Content], key: tuple[int, ...] = ()
    ) -> tuple[Content, int]:
        """POST `body` as JSON to `url`; otherwise as `get`."""
        return await self.with_retries(lambda: self.call("POST", url, body=body, read=read), url, key or _key_of(body))

    async def with_retries(
        self, call: Callable[[], Awaitable[Content]], address: str, key: tuple[int, ...] = ()
    ) -> tuple[Content, int]:
        """Await `call()` until it does not raise `CallFailed`; return its result and how often it was repeated.

        Waits for one of the `max_concurrency` slots first, which uses up no time limit. `address` is for messages.
        Raises `ServiceError` once the failure is final or the retries are spent.
        """
        for retries in range(self.max_retries + 1):
            try:
                async with (await self._connected()).slots:  # not held during a pause
                    return await call(), retries
            except CallFailed as error:
                failure = error
            wait_s = self._back_off_s(failure, retries, key)
            if not failure.may_pass or retries == self.max_retries or wait_s > LONGEST_RETRY_AFTER_S:
                break
            shown = self.without_secrets(f"{self.service} at {address}: {failure}")
            logger.warning("%s; asking again in %.1f s", shown, wait_s)
            self.counts.retries += 1
            await asyncio.sleep(wait_s)
        self.counts.failures += 1
        raise ServiceError(
            self.without_secrets(
                f"{self.service} at {address} failed, attempt {retries + 1} of {self.max_retries + 1}: {failure}; "
                f"{self.remedy}"
            ),
            failure.status,
            retries,
        ) from failure

    async def call(
        self,
        method: str,
        url: str,
        *,
        params: Mapping[str, str | int] | None = None,
        body: Any = None,
        read: Callable[[Any], Content],
        timeout_s: float | None = None,
    ) -> Content:
        """Make one call at once, and return what `read` makes of the JSON reply. Raises `CallFailed` otherwise."""
        try:
            return read(await self._json(method, url, params, body, timeout_s or self.timeout_s))
        except CallFailed as error:
            shown = self.without_secrets(str(error))[:SHOWN_CHARACTERS]  # in this order: half a secret is one too
            # Not "from error": a traceback would show what the message must not.
            raise CallFailed(shown, error.may_pass, error.status, error.retry_after_s) from None

    def without_secrets(self, text: str) -> str:
        """Return `text` with every secret blotted out, as it is or as it stands in a URL, and a URL's password."""
        text = URL_PASSWORD.sub("://***@", text)
        for form in self.secret_forms:
            text = text.replace(form, "***")
        return text

    async def aclose(self) -> None:
        """Close the connections of this event loop, and drop those of loops that have ended."""
        here = self._connections.pop(asyncio.get_running_loop(), None)
        if here is not None:
            await here.session.close()
        await self._drop_ended()

    async def _json(
        self, method: str, url: str, params: Mapping[str, str | int] | None, body: Any, timeout_s: float
    ) -> Any:
        check_url(url)
        session = (await self._connected()).session
        self.counts.calls += 1
        try:
            async with session.request(
                method, url, params=params, json=body, headers=self.headers, timeout=aiohttp.ClientTimeout(timeout_s)
            ) as response:
                text = await response.text(errors="replace")
        except TimeoutError:
            raise CallFailed(f"no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            may_pass = not isinstance(error, aiohttp.InvalidURL)
            raise CallFailed(f"{type(error).__name__} {error}", may_pass) from None
        if response.status != 200:
            may_pass = response.status in PASSING_STATUSES and not any(sign in text for sign in self.final_signs)
            pause_s = retry_after_s(response.headers.get("Retry-After"))
            raise CallFailed(f"HTTP status {response.status}: {text}", may_pass, response.status, pause_s)
        try:
            return json.loads(text)
        except ValueError:
            raise CallFailed(f"its reply is not JSON: {text}", status=200) from None

    def _back_off_s(self, failure: CallFailed, retries: int, key: tuple[int, ...]) -> float:
        """Return the pause before the next try: it doubles, is spread by jitter, and as long as the service asks."""
        back_off_s = min(FIRST_BACK_OFF_S * 2**retries, LONGEST_BACK_OFF_S)
        back_off_s *= 0.5 + keyed_uniform(*key, retries)  # many calls fail at the same moment
        return max(back_off_s, failure.retry_after_s or 0.0)

    async def _connected(self) -> _Connections:
        """Return this event loop's session, whose connections stay open."""
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),  # the slots are the limit
                trust_env=self.trust_env,
            )
            self._connections[loop] = _Connections(session, asyncio.Semaphore(self.max_concurrency))
            await self._drop_ended()
        return self._connections[loop]

    async def _drop_ended(self) -> None:
        for loop in list(self._connections):
            if loop.is_closed():
                await self._connections.pop(loop).session.close()


@dataclass(frozen=True)
class _Connections:
    session: aiohttp.ClientSession
    slots: asyncio.Semaphore


def read_chat_text(reply: Any) -> str:
    """Return the text of an OpenAI-style chat completion, "" for none. Raises `CallFailed` for another form."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise CallFailed(f"its reply is no chat completion: {json.dumps(reply)}", status=200) from None
    return content if isinstance(content, str) else ""


def read_models(reply: Any) -> list[str]:
    """Return the ids of an OpenAI-style list of models. Raises `CallFailed` for another form."""
    try:
        return [str(model["id"]) for model in reply["data"]]
    except (KeyError, TypeError):
        raise CallFailed(f"its reply is no list of models: {json.dumps(reply)}", status=200) from None


def retry_after_s(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or a date; `None` if it says nothing."""
    if header is None:
        return None
    with suppress(ValueError):
        seconds = float(header)
        return max(seconds, 0.0) if seconds == seconds else None
    with suppress(ValueError):
        moment = parsedate_to_datetime(header)
        return max((moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)
    return None


def check_url(url: str) -> None:
    """Raise a final `CallFailed` unless this is a whole http or https URL."""
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number, or a bracket is open
        is_whole = False
    if not is_whole:
        raise CallFailed("this is no http address", may_pass=False)


def _forms(secrets: Iterable[str]) -> list[str]:
    """Return every form in which a secret may stand in a text or a URL, longest first."""
    forms = {
        form
        for secret in secrets
        for form in (secret, quote(secret), quote(secret, safe=""), quote_plus(secret), quote_plus(secret, safe="/"))
    }
    return sorted(forms, key=len, reverse=True)


def _key_of(content: Any) -> tuple[int, ...]:
    """Return a key for the jitter of a request that has none."""
    return (zlib.crc32(json.dumps(content, sort_keys=True, default=str).encode()),)
