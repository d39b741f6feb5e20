"""The HTTP client against a real server that answers as told: well, badly, late, or not at all."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, TypeVar

import pytest
from aiohttp import web
from http_servers import Server, in_turn

from zerosearch import http
from zerosearch.errors import UserError
from zerosearch.http import (
    CallFailed,
    ChatReply,
    HTTPClient,
    ServiceError,
    read_chat,
    read_models,
    redacted_url,
    run_in_background,
)

Result = TypeVar("Result")
WELL = (200, {"well": True})


@pytest.fixture
def server(http_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(http, "LONGEST_BACK_OFF_S", 0.02)
    http_server.url += "/api"
    return http_server


def client_of(**settings: Any) -> HTTPClient:
    return HTTPClient("the oracle", remedy="ask a neighbour", **settings)


def run(client: HTTPClient, *calls: Coroutine[Any, Any, Result]) -> list[Result]:
    async def together() -> list[Result]:
        try:
            return list(await asyncio.gather(*calls))
        finally:
            await client.aclose()

    return asyncio.run(together())


def get(client: HTTPClient, url: str | list[str], read: Any = lambda reply: reply) -> Any:
    """GET once and return what came, and the number of retries."""
    (reply,) = run(client, client.request("GET", url, read=read))
    return reply


def failed(client: HTTPClient, url: str | list[str], message: str, read: Any = lambda reply: reply) -> ServiceError:
    """GET once and return the error, which says `message`."""
    with pytest.raises(ServiceError, match=message) as caught:
        get(client, url, read)
    return caught.value


def test_a_body_goes_out_as_json_and_the_reply_comes_back_read(server: Server) -> None:
    client = client_of(api_key="sk-secret")
    read = client.request("POST", server.url, json={"q": "Zürich"}, read=lambda reply: reply["place"] + 7)
    assert run(client, read) == [(7, 0)]
    assert (server.seen[0].method, server.requests) == ("POST", [{"q": "Zürich"}])
    assert server.seen[0].headers["Authorization"] == "Bearer sk-secret"
    assert client.counts == {"calls": 1, "retries": 0, "failures": 0}


def test_parameters_go_into_the_address(server: Server) -> None:
    client = client_of()
    run(client, client.request("GET", server.url, params={"q": "a b&c", "num": 5}, read=str))
    (request,) = server.seen
    assert (request.method, dict(request.query)) == ("GET", {"q": "a b&c", "num": "5"})
    assert "Authorization" not in request.headers


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504])
def test_a_failure_in_passing_is_retried_and_counted(server: Server, code: int) -> None:
    server.answer = in_turn((code, "busy"), (code, "busy"), WELL)
    client = client_of()
    entered: list[int] = []

    @asynccontextmanager
    async def around(retries: int) -> AsyncIterator[None]:
        entered.append(retries)
        yield

    (reply,) = run(client, client.request("POST", server.url, json={}, read=dict, around=around))
    assert reply == ({"well": True}, 2) and entered == [0, 1, 2]
    assert client.counts == {"calls": 3, "retries": 2, "failures": 0}


def test_a_reply_of_another_form_is_retried(server: Server) -> None:
    broken = ["<html>gateway</html>", "", '{"cut', "[1, 2", {}, [], '"x"', 5, "null", {"well": 10**400}]
    server.answer = in_turn(*((200, content) for content in broken), WELL)
    assert get(client_of(max_retries=10), server.url, lambda reply: float(reply["well"])) == (1.0, 10)


@pytest.mark.parametrize("code", [400, 401, 402, 403, 404, 422, 501])
def test_a_refusal_is_final(server: Server, code: int) -> None:
    server.answer = in_turn((code, "no"), WELL)
    error = failed(client_of(), server.url, f"attempt 1 of 6: HTTP status {code}: no; ask a neighbour")
    assert (error.status, error.retries, len(server.seen)) == (code, 0, 1)


def test_an_empty_balance_reported_as_too_many_requests_is_final(server: Server) -> None:
    server.answer = in_turn((429, {"error": {"code": "insufficient_quota"}}))
    failed(client_of(final_signs=["insufficient_quota"]), server.url, "insufficient_quota")
    assert len(server.seen) == 1


def test_retries_are_bounded_and_the_error_names_service_address_and_remedy(server: Server) -> None:
    server.answer = in_turn((503, "down"))
    client = client_of(max_retries=2)
    error = failed(client, server.url, "down")
    assert str(error) == (f"the oracle at {server.url} failed, attempt 3 of 3: HTTP status 503: down; ask a neighbour")
    assert (error.status, error.retries) == (503, 2)
    assert client.counts == {"calls": 3, "retries": 2, "failures": 1}


def test_a_late_reply_is_given_up_and_retried(server: Server) -> None:
    client = client_of(timeout_s=0.1)

    def answer(place: int) -> Any:
        client.timeout_s = 30.0  # from the second call on, so that a busy machine may take its time
        return asyncio.Event().wait() if place == 0 else WELL

    server.answer = answer
    reply, retries = get(client, server.url)
    assert reply == {"well": True} and retries == client.counts["retries"] == client.counts["calls"] - 1 >= 1
    server.answer = lambda place: asyncio.Event().wait()
    failed(client_of(timeout_s=0.1, max_retries=0), server.url, r"attempt 1 of 1: no answer within 0\.1 s")


def test_waiting_for_a_slot_does_not_use_up_the_time_limit(server: Server) -> None:
    server.answer = lambda place: asyncio.sleep(0.2, WELL)
    client = client_of(timeout_s=1.0, max_concurrency=2, max_retries=0)
    calls = [client.request("POST", server.url, json={"row": row}, read=dict) for row in range(12)]  # 1.2 s in all
    assert run(client, *calls) == [({"well": True}, 0)] * 12
    assert server.most_in_flight == 2 == len(server.connections)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", "http://no-such-host.invalid/api"])
def test_nobody_there_is_retried(server: Server, url: str) -> None:
    error = failed(client_of(max_retries=1), url, f"the oracle at {url} failed, attempt 2 of 2: Client")
    assert error.status is None


@pytest.mark.parametrize("url", ["localhost:6001", "http://localhost:port/v1", "no address", "file:///etc/passwd", ""])
def test_an_address_that_is_not_http_is_final(url: str) -> None:
    failed(client_of(), url, "attempt 1 of 6: this is not an http address")


def test_what_the_library_refuses_to_send_is_final(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.url.replace("//", "//user:p4ss@")
    failed(client_of(api_key="sk-secret"), url, "attempt 1 of 6: Cannot combine AUTHORIZATION header with")
    monkeypatch.setenv("http_proxy", "http://[::1")
    failed(client_of(trust_env=True), "http://no-such-host.invalid/api", "attempt 1 of 6: Invalid IPv6 URL")
    assert not server.seen


def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the pauses between tries instead of sleeping them."""
    slept: list[float] = []
    sleep = asyncio.sleep

    async def record(seconds: float) -> None:
        if seconds:
            slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(http.asyncio, "sleep", record)
    return slept


def test_pauses_double_up_to_a_bound_and_jitter_is_keyed_by_the_request(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "FIRST_BACK_OFF_S", 1.0)
    monkeypatch.setattr(http, "LONGEST_BACK_OFF_S", 4.0)
    server.answer = in_turn((500, ""))
    slept = pauses(monkeypatch)
    taken = []
    for row in (1, 1, 2):
        client = client_of(max_retries=4)
        with pytest.raises(ServiceError):
            run(client, client.request("POST", server.url, json={"row": row}, read=dict))
        taken.append(slept[:])
        slept.clear()
    assert taken[0] == taken[1] != taken[2]
    for pause, nominal in zip(taken[0], [1, 2, 4, 4], strict=True):
        assert 0.5 * nominal <= pause < 1.5 * nominal


def test_a_service_that_says_when_is_not_asked_earlier(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    in_40_s = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    asked = [(429, "7"), (503, in_40_s), (429, "soon"), (429, "Fri, 99 Foo 99999 99:99:99 GMT")]
    server.answer = in_turn(*((code, "", {"Retry_After": when}) for code, when in asked), WELL)
    slept = pauses(monkeypatch)
    assert get(client_of(), server.url) == ({"well": True}, 4)
    assert slept[0] == 7.0
    assert 7.0 < slept[1] <= 40.0
    assert slept[2] < 0.1 and slept[3] < 0.2


@pytest.mark.parametrize("asked", ["3600", "inf", "9" * 400, "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_service_that_wants_a_long_pause_is_not_waited_for(server: Server, asked: str) -> None:
    server.answer = in_turn((429, "hourly limit", {"Retry_After": asked}))
    failed(client_of(), server.url, "attempt 1 of 6: HTTP status 429: hourly limit")
    assert len(server.seen) == 1


def test_no_message_or_log_holds_a_secret(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    secret, key = "se cret+/=", "sk-0123456789"
    # Echoed plainly and as in a URL, and once where the message is cut off.
    echo = f"bad key {key}, api_key=se%20cret%2B%2F%3D se+cret%2B/%3D {secret}" + "." * 150 + key * 9
    server.answer = in_turn((503, echo))
    client = client_of(api_key=key, secrets=[secret], max_retries=1)
    with caplog.at_level(logging.DEBUG, "zerosearch"), pytest.raises(ServiceError) as caught:
        run(client, client.request("GET", server.url, params={"api_key": secret}, read=dict))
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("zerosearch")]
    shown = f"{caught.value} {caught.value.__cause__} {caught.value.__context__} {logged}"
    assert "bad key ***, api_key=***" in str(caught.value)
    assert len(logged) == 1 and "retried in" in logged[0]
    for leak in (secret, key, key[:8], "cret"):
        assert leak not in shown


def test_control_characters_of_a_reply_are_shown_and_not_sent(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = in_turn((500, "\x1b]0;OWNED\x07 \x9b31m \u202egnp.exe \0"), (200, "\x1b[2J"))
    error = failed(client_of(max_retries=1), server.url, "its reply is not of the form expected")
    (warning,) = caplog.messages
    assert r"HTTP status 500: \x1b]0;OWNED\x07 \x9b31m \u202egnp.exe \x00; retried" in warning
    assert str(error).isprintable() and error.reason.isprintable() and r"\x1b[2J" in error.reason


def test_passwords_and_keys_in_addresses_are_not_shown() -> None:
    url = "http://user:p4ss@127.0.0.1:9/api?api_key=s3cret&num=5"
    failed(client_of(max_retries=0), url, r"at http://\*\*\*@127\.0\.0\.1:9/api\?api_key=\*\*\*&num=5 failed")
    assert redacted_url("https://a:b@c@host/v1, http://u:p/w@host:1/v1,http://host/v1") == (
        "https://***@host/v1, http://***@host:1/v1,http://host/v1"
    )
    assert redacted_url("see http://host/s?q=a&Access-Token=t0p#x") == "see http://host/s?q=a&Access-Token=***#x"


def test_redacting_a_long_text_takes_linear_time() -> None:
    start = time.perf_counter()
    for piece in ("://", "?key", "&token&", "://a@", "?a=b"):
        redacted_url(piece * (20_000 // len(piece)))
    assert time.perf_counter() - start < 2.0  # it takes 0.1 s; without bounds on repetitions, minutes


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_is_refused_so_that_no_other_host_is_sent_the_key(server: Server, code: int) -> None:
    server.answer = in_turn((code, "", {"Location": f"{server.url}?again=1"}))
    message = rf"HTTP status {code}: it redirects to .*again=1, which is not followed"
    failed(client_of(api_key="sk-secret"), server.url, message)
    assert len(server.seen) == 1


def test_a_reply_that_never_ends_is_given_up_at_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REPLY_BYTES", 1_000_000)

    async def endless() -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(server.seen[-1])
        with suppress(ConnectionError):
            while True:
                await response.write(b" " * 100_000)
        return response

    server.answer = lambda place: endless()
    failed(client_of(max_retries=0, timeout_s=30.0), server.url, "its reply is longer than 1,000,000 bytes")


def body_of(body: bytes, **headers: str) -> Any:
    return lambda: web.Response(body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 9_000, b"xxx"])
def test_a_hostile_reply_is_a_failed_call(server: Server, body: bytes) -> None:
    charsets = ["utf-8", "hex", "undefined", "punycode", "nonsense"]
    replies = [body_of(body, Content_Type=f"application/json; charset={charset}") for charset in charsets]
    server.answer = in_turn(*replies)
    client = client_of(max_retries=0)
    for _ in charsets:
        failed(client, server.url, "its reply is not of the form expected: ")


def test_json_is_utf_8_whatever_the_header_says(server: Server) -> None:
    body = b'\xef\xbb\xbf{"city": "Z\xc3\xbcrich"}'
    server.answer = in_turn(body_of(body, Content_Type="application/json; charset=punycode"))
    assert get(client_of(), server.url) == ({"city": "Zürich"}, 0)


def test_broken_compression_is_a_failed_call(server: Server) -> None:
    server.answer = in_turn(body_of(b"xxx", Content_Encoding="gzip"), WELL)
    assert get(client_of(), server.url) == ({"well": True}, 1)


def test_half_a_character_and_nul_are_replaced(server: Server) -> None:
    body = b'{"a": ["caf\\ud83d", {"\\udc00": "\\u0000"}], "whole": "\\ud83d\\ude00", "raw": "\xed\xa0\xbd"}'
    server.answer = in_turn(body_of(body))
    reply, _ = get(client_of(), server.url)
    assert reply == {"a": ["caf\ufffd", {"\ufffd": "\ufffd"}], "whole": "😀", "raw": "\ufffd\ufffd\ufffd"}


@pytest.mark.parametrize(
    ("key", "sent"),
    [
        ("sk-key\n", "Bearer sk-key"),
        (" sk-key\r\n", "Bearer sk-key"),
        ("\ufeffsk-key", "Bearer sk-key"),
        (" \n", None),
    ],
)
def test_white_space_around_a_key_is_stripped_and_a_blank_one_not_sent(
    server: Server, key: str, sent: str | None
) -> None:
    get(client_of(api_key=key), server.url)
    assert server.seen[0].headers.get("Authorization") == sent


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk one", "sk-\x00", "sk-\x1b[0m", "sk-ü"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(UserError, match="the key of the oracle holds a space, a line break or another") as caught:
        client_of(api_key=key)
    assert "sk" not in str(caught.value)


def test_requests_go_round_several_addresses_and_a_retry_goes_to_the_next(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = pauses(monkeypatch)
    urls = [f"{server.url}?server=0", f"{server.url}?server=1", "http://127.0.0.1:9/api"]
    client = client_of(max_concurrency=1)
    replies = run(client, *(client.request("GET", urls, read=dict) for _ in range(6)))
    assert [retries for _, retries in replies] == [0, 0, 1, 0, 0, 1]
    assert [request.query["server"] for request in server.seen].count("0") == 4
    assert slept == [], "another server is asked at once"
    server.answer = in_turn((503, "down"))
    message = r"at .*server=0, .*server=1 failed, attempt 4 of 4: HTTP status 503: down"
    failed(client_of(max_retries=3), urls[:2], message)


def test_connections_stay_open_until_the_client_is_closed_and_it_may_go_on_elsewhere(server: Server) -> None:
    client = client_of(max_concurrency=1)

    async def ask_thrice() -> None:
        await asyncio.gather(*(client.request("GET", server.url, read=dict) for _ in range(3)))
        await client.aclose()

    run_in_background(ask_thrice(), 30)
    assert len(server.connections) == 1
    asyncio.run(ask_thrice())
    assert len(server.connections) == 2


def test_work_in_the_background_stops_with_the_wait_for_it() -> None:
    stopped = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    with pytest.raises(TimeoutError):
        run_in_background(work(), 0.1)
    assert stopped.wait(10)
    assert run_in_background(asyncio.sleep(0, "done")) == "done"


def test_the_users_hub_token_and_offline_mode_stay_out_of_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    get(client_of(), server.url)
    assert "hf_secret" not in str(server.seen[0].headers)


def test_a_chat_completion_is_read() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    for content, text in (("hello", "hello"), (None, ""), (parts, "hello"), ([], "")):
        assert read_chat({"choices": [{"message": {"content": content}}]}) == ChatReply(text)
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    choice = {"message": {"content": "hm"}, "finish_reason": "stop", "stop_reason": "</search>"}
    assert read_chat({"choices": [choice], "usage": usage}) == ChatReply("hm", "stop", "</search>", 7, 3)
    odd: list[dict[str, Any]] = [{"prompt_tokens": "x", "completion_tokens": float("inf")}, {"prompt_tokens": -1}, {}]
    for usage in odd:
        assert read_chat({"choices": [choice], "usage": usage}).prompt_tokens is None


CHATS_OF_ANOTHER_FORM = [
    {},
    {"choices": []},
    {"choices": None},
    {"choices": [1]},
    {"choices": [{"message": "x"}]},
    {"choices": [{"message": {"content": [{"type": "text"}]}}]},
    {"choices": [{"message": {"content": 5}}]},
    {"choices": [{"message": {"content": "a"}}], "usage": [1]},
    {"error": "out of memory"},
    [],
    "x",
    None,
]


def test_a_chat_completion_of_another_form_is_a_failed_call(server: Server) -> None:
    server.answer = in_turn(*((200, json.dumps(reply)) for reply in CHATS_OF_ANOTHER_FORM))
    client = client_of(max_retries=0)
    for _ in CHATS_OF_ANOTHER_FORM:
        failed(client, server.url, "its reply is not of the form expected", read_chat)


def test_models_are_read_adapters_first() -> None:
    assert read_models({"data": [{"id": "a"}, {"id": "b", "parent": "a"}, {"id": "c"}]}) == ["b", "a", "c"]
    with pytest.raises(CallFailed, match="it serves no model"):
        read_models({"data": []})
