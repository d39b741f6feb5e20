"""The HTTP client against a real server that answers as told: well, badly, late, or not at all."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from typing import Any, TypeVar

import pytest
from aiohttp import web
from http_servers import serving

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
Answer = Callable[[int], web.Response | Coroutine[Any, Any, web.Response]]


@dataclass
class Server:
    """What the test tells the server, and what it saw: `answer(place)` is the reply to the place-th request."""

    url: str = ""
    answer: Answer = lambda place: web.json_response({"place": place})
    requests: list[dict[str, Any]] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    request: Any = None  # the one under way
    in_flight: int = 0
    most_in_flight: int = 0


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    async def handle(request: web.Request) -> web.Response:
        place = len(state.requests)
        body = await request.json() if request.can_read_body else None
        state.requests.append(
            {"method": request.method, "query": dict(request.query), "body": body, "headers": dict(request.headers)}
        )
        assert request.transport is not None
        state.request = request
        state.connections.add(request.transport.get_extra_info("peername"))
        state.in_flight += 1
        state.most_in_flight = max(state.most_in_flight, state.in_flight)
        try:
            reply = state.answer(place)
            return reply if isinstance(reply, web.Response) else await reply
        finally:
            state.in_flight -= 1

    app = web.Application()
    app.router.add_route("*", "/api", handle)
    with serving(app, shutdown_timeout=0.1) as address:
        state.url = f"{address}/api"
        yield state


@pytest.fixture(autouse=True)
def short_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_BACK_OFF_S", 0.01)


def client_of(**settings: Any) -> HTTPClient:
    return HTTPClient("the oracle", remedy="ask a neighbour", **settings)


def run(client: HTTPClient, *calls: Coroutine[Any, Any, Result]) -> list[Result]:
    async def together() -> list[Result]:
        try:
            return list(await asyncio.gather(*calls))
        finally:
            await client.aclose()

    return asyncio.run(together())


def whole(reply: Any) -> Any:
    return reply


def in_turn(*answers: Callable[[], web.Response]) -> Answer:
    """Answer the first request with the first, and so on; the last one answers all that follow."""
    return lambda place: answers[min(place, len(answers) - 1)]()


def status(code: int, text: str = "", **headers: str) -> Callable[[], web.Response]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda: web.Response(status=code, text=text, headers=named)


def well() -> web.Response:
    return web.json_response({"well": True})


def test_a_body_goes_out_as_json_and_the_reply_comes_back_read(server: Server) -> None:
    client = client_of(api_key="sk-secret")
    assert run(
        client, client.request("POST", server.url, json={"q": "Zürich"}, read=lambda reply: reply["place"] + 7)
    ) == [(7, 0)]
    (request,) = server.requests
    assert (request["method"], request["body"]) == ("POST", {"q": "Zürich"})
    assert request["headers"]["Authorization"] == "Bearer sk-secret"
    assert (client.counts["calls"], client.counts["retries"], client.counts["failures"]) == (1, 0, 0)


def test_parameters_go_into_the_address(server: Server) -> None:
    client = client_of()
    run(client, client.request("GET", server.url, params={"q": "a b&c", "num": 5}, read=whole))
    (request,) = server.requests
    assert (request["method"], request["query"]) == ("GET", {"q": "a b&c", "num": "5"})
    assert "Authorization" not in request["headers"]


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504])
def test_a_failure_in_passing_is_retried_and_counted(server: Server, code: int) -> None:
    server.answer = in_turn(status(code, "busy"), status(code, "busy"), well)
    client = client_of()
    assert run(client, client.request("POST", server.url, json={}, read=whole)) == [({"well": True}, 2)]
    assert (client.counts["calls"], client.counts["retries"], client.counts["failures"]) == (3, 2, 0)


@pytest.mark.parametrize("reply", ["<html>gateway</html>", "", '{"cut', "[1, 2"])
def test_a_reply_that_is_not_json_is_retried(server: Server, reply: str) -> None:
    server.answer = in_turn(status(200, reply), well)
    client = client_of()
    assert run(client, client.request("GET", server.url, read=whole)) == [({"well": True}, 1)]


def test_a_reply_of_another_form_is_retried(server: Server) -> None:
    others: list[Any] = [{}, [], "x", 5, None]
    server.answer = in_turn(*(partial(web.json_response, other) for other in others), well)
    client = client_of()
    assert run(client, client.request("GET", server.url, read=lambda reply: reply["well"])) == [(True, 5)]


@pytest.mark.parametrize("code", [400, 401, 402, 403, 404, 422, 501])
def test_a_refusal_is_final(server: Server, code: int) -> None:
    server.answer = in_turn(status(code, "no"), well)
    client = client_of()
    with pytest.raises(ServiceError, match=f"attempt 1 of 6: HTTP status {code}: no; ask a neighbour") as caught:
        run(client, client.request("POST", server.url, json={}, read=whole))
    assert (caught.value.status, caught.value.retries) == (code, 0)
    assert len(server.requests) == 1


def test_an_empty_balance_reported_as_too_many_requests_is_final(server: Server) -> None:
    server.answer = in_turn(status(429, '{"error": {"code": "insufficient_quota"}}'))
    client = client_of(final_signs=["insufficient_quota"])
    with pytest.raises(ServiceError, match="insufficient_quota"):
        run(client, client.request("POST", server.url, json={}, read=whole))
    assert len(server.requests) == 1


def test_retries_are_bounded_and_the_error_names_service_address_and_remedy(server: Server) -> None:
    server.answer = in_turn(status(503, "down"))
    client = client_of(max_retries=2)
    with pytest.raises(ServiceError) as caught:
        run(client, client.request("POST", server.url, json={}, read=whole))
    assert str(caught.value) == (
        f"the oracle at {server.url} failed, attempt 3 of 3: HTTP status 503: down; ask a neighbour"
    )
    assert (caught.value.status, caught.value.retries) == (503, 2)
    assert (client.counts["calls"], client.counts["retries"], client.counts["failures"]) == (3, 2, 1)


def test_a_late_reply_is_given_up_and_retried(server: Server) -> None:
    async def never() -> web.Response:
        await asyncio.Event().wait()
        return well()

    client = client_of(timeout_s=0.2)

    def answer(place: int) -> web.Response | Coroutine[Any, Any, web.Response]:
        client.timeout_s = 30.0  # from the second call on, so that a busy machine may take its time
        return never() if place == 0 else well()

    server.answer = answer
    ((reply, retries),) = run(client, client.request("GET", server.url, read=whole))
    assert reply == {"well": True} and retries == client.counts["retries"] == client.counts["calls"] - 1 >= 1
    server.answer = lambda place: never()
    client = client_of(timeout_s=0.1, max_retries=0)
    with pytest.raises(ServiceError, match=r"attempt 1 of 1: no answer within 0\.1 s"):
        run(client, client.request("GET", server.url, read=whole))


def test_waiting_for_a_slot_does_not_use_up_the_time_limit(server: Server) -> None:
    async def slow() -> web.Response:
        await asyncio.sleep(0.4)
        return well()

    server.answer = lambda place: slow()
    client = client_of(timeout_s=2.0, max_concurrency=2, max_retries=0)
    replies = run(
        client, *(client.request("POST", server.url, json={"row": row}, read=whole) for row in range(12))
    )  # 2.4 s in all
    assert replies == [({"well": True}, 0)] * 12
    assert server.most_in_flight == 2
    assert len(server.connections) == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", "http://no-such-host.invalid/api"])
def test_nobody_there_is_retried(url: str) -> None:
    client = client_of(max_retries=1)
    with pytest.raises(ServiceError, match=f"the oracle at {url} failed, attempt 2 of 2: Client") as caught:
        run(client, client.request("GET", url, read=whole))
    assert caught.value.status is None


@pytest.mark.parametrize("url", ["localhost:6001", "http://localhost:port/v1", "no address", "file:///etc/passwd", ""])
def test_an_address_that_is_not_http_is_final(url: str) -> None:
    client = client_of()
    with pytest.raises(ServiceError, match="attempt 1 of 6: this is not an http address"):
        run(client, client.request("GET", url, read=whole))


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
    server.answer = in_turn(status(500))
    slept = pauses(monkeypatch)
    taken = []
    for row in (1, 1, 2):
        client = client_of(max_retries=4)
        with pytest.raises(ServiceError):
            run(client, client.request("POST", server.url, json={"row": row}, read=whole))
        taken.append(slept[:])
        slept.clear()
    assert taken[0] == taken[1] != taken[2]
    for pause, nominal in zip(taken[0], [1, 2, 4, 4], strict=True):
        assert 0.5 * nominal <= pause < 1.5 * nominal


def test_a_service_that_says_when_is_not_asked_earlier(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    in_40_s = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    answers = [status(429, Retry_After="7"), status(503, Retry_After=in_40_s), status(429, Retry_After="soon"), well]
    server.answer = in_turn(*answers)
    slept = pauses(monkeypatch)
    client = client_of()
    assert run(client, client.request("GET", server.url, read=whole)) == [({"well": True}, 3)]
    assert slept[0] == 7.0
    assert 7.0 < slept[1] <= 40.0
    assert slept[2] < 0.1


@pytest.mark.parametrize("asked", ["3600", "inf", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_service_that_wants_a_long_pause_is_not_waited_for(server: Server, asked: str) -> None:
    server.answer = in_turn(status(429, "hourly limit", Retry_After=asked))
    client = client_of()
    with pytest.raises(ServiceError, match="attempt 1 of 6: HTTP status 429: hourly limit"):
        run(client, client.request("GET", server.url, read=whole))
    assert len(server.requests) == 1


def test_no_message_or_log_holds_a_secret(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    secret, key = "se cret+/=", "sk-0123456789"
    # Echoed plainly and as in a URL, and once where the message is cut off.
    echo = f"bad key {key}, api_key=se%20cret%2B%2F%3D se+cret%2B/%3D {secret}" + "." * 150 + key * 9
    server.answer = in_turn(status(503, echo))
    client = client_of(api_key=key, secrets=[secret], max_retries=1)
    with caplog.at_level(logging.DEBUG, "zerosearch"), pytest.raises(ServiceError) as caught:
        run(client, client.request("GET", server.url, params={"api_key": secret}, read=whole))
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("zerosearch")]
    shown = f"{caught.value} {caught.value.__cause__} {caught.value.__context__} {logged}"
    assert "bad key ***, api_key=***" in str(caught.value)
    assert len(logged) == 1 and "retried in" in logged[0]
    for leak in (secret, key, key[:8], "cret"):
        assert leak not in shown


def test_passwords_and_keys_in_addresses_are_not_shown() -> None:
    client = client_of(max_retries=0)
    url = "http://user:p4ss@127.0.0.1:9/api?api_key=s3cret&num=5"
    with pytest.raises(ServiceError, match=r"at http://\*\*\*@127\.0\.0\.1:9/api\?api_key=\*\*\*&num=5 failed"):
        run(client, client.request("GET", url, read=whole))
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
    server.answer = lambda place: web.Response(status=code, headers={"Location": f"{server.url}?again=1"})
    client = client_of(api_key="sk-secret")
    with pytest.raises(ServiceError, match=rf"HTTP status {code}: it redirects to .*again=1, which is not followed"):
        run(client, client.request("POST", server.url, json={}, read=whole))
    assert len(server.requests) == 1


def test_a_reply_that_never_ends_is_given_up_at_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REPLY_BYTES", 1_000_000)

    async def endless() -> Any:
        response = web.StreamResponse()
        await response.prepare(server.request)
        with suppress(ConnectionError):
            while True:
                await response.write(b" " * 100_000)
        return response

    server.answer = lambda place: endless()
    client = client_of(max_retries=0, timeout_s=30.0)
    with pytest.raises(ServiceError, match="its reply is longer than 1,000,000 bytes"):
        run(client, client.request("GET", server.url, read=whole))


def reply_of(body: bytes, **headers: str) -> Callable[[], web.Response]:
    return lambda: web.Response(body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 9_000, b"xxx"])
@pytest.mark.parametrize("charset", ["utf-8", "hex", "undefined", "punycode", "nonsense"])
def test_a_hostile_reply_is_a_failed_call(server: Server, body: bytes, charset: str) -> None:
    server.answer = in_turn(reply_of(body, Content_Type=f"application/json; charset={charset}"))
    client = client_of(max_retries=0)
    with pytest.raises(ServiceError, match="its reply is not of the form expected: "):
        run(client, client.request("GET", server.url, read=whole))


def test_json_is_utf_8_whatever_the_header_says(server: Server) -> None:
    body = b'\xef\xbb\xbf{"city": "Z\xc3\xbcrich"}'
    server.answer = in_turn(reply_of(body, Content_Type="application/json; charset=punycode"))
    client = client_of()
    assert run(client, client.request("GET", server.url, read=whole)) == [({"city": "Zürich"}, 0)]


def test_broken_compression_is_a_failed_call(server: Server) -> None:
    server.answer = in_turn(reply_of(b"xxx", Content_Encoding="gzip"), well)
    client = client_of()
    assert run(client, client.request("GET", server.url, read=whole)) == [({"well": True}, 1)]


def test_half_a_character_and_nul_are_replaced(server: Server) -> None:
    body = b'{"a": ["caf\\ud83d", {"\\udc00": "\\u0000"}], "whole": "\\ud83d\\ude00", "raw": "\xed\xa0\xbd"}'
    server.answer = in_turn(reply_of(body))
    client = client_of()
    ((reply, _),) = run(client, client.request("GET", server.url, read=whole))
    assert reply == {"a": ["caf\ufffd", {"\ufffd": "\ufffd"}], "whole": "😀", "raw": "\ufffd\ufffd\ufffd"}


@pytest.mark.parametrize("key", ["sk-secret\n", " sk-secret\r\n", "\ufeffsk-secret"])
def test_white_space_around_a_key_is_stripped(server: Server, key: str) -> None:
    client = client_of(api_key=key)
    run(client, client.request("GET", server.url, read=whole))
    assert server.requests[0]["headers"]["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk one", "sk-\x00", "sk-\x1b[0m", "sk-ü"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(UserError, match="the key of the oracle holds a space, a line break or another") as caught:
        client_of(api_key=key)
    assert "sk" not in str(caught.value)


def test_a_blank_key_is_not_sent(server: Server) -> None:
    client = client_of(api_key=" \n")
    run(client, client.request("GET", server.url, read=whole))
    assert "Authorization" not in server.requests[0]["headers"]


def test_requests_go_round_several_addresses_and_a_retry_goes_to_the_next(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = pauses(monkeypatch)
    urls = [f"{server.url}?server=0", f"{server.url}?server=1", "http://127.0.0.1:9/api"]
    client = client_of(max_concurrency=1)
    replies = run(client, *(client.request("GET", urls, read=whole) for _ in range(6)))
    assert [retries for _, retries in replies] == [0, 0, 1, 0, 0, 1]
    assert [request["query"]["server"] for request in server.requests].count("0") == 4
    assert slept == [], "another server is asked at once"


def test_all_addresses_are_named_when_all_fail(server: Server) -> None:
    server.answer = in_turn(status(503, "down"))
    urls = [f"{server.url}?server=0", f"{server.url}?server=1"]
    client = client_of(max_retries=3)
    with pytest.raises(ServiceError, match=r"at .*server=0, .*server=1 failed, attempt 4 of 4: HTTP status 503: down"):
        run(client, client.request("GET", urls, read=whole))
    assert len(server.requests) == 4


def test_connections_stay_open_until_the_client_is_closed_and_it_may_go_on_elsewhere(server: Server) -> None:
    client = client_of(max_concurrency=1)

    async def ask_thrice() -> None:
        await asyncio.gather(*(client.request("GET", server.url, read=whole) for _ in range(3)))
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
    client = client_of()
    run(client, client.request("POST", server.url, json={}, read=whole))
    assert "hf_secret" not in json.dumps(server.requests)


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


@pytest.mark.parametrize("reply", CHATS_OF_ANOTHER_FORM)
def test_a_chat_completion_of_another_form_is_a_failed_call(server: Server, reply: Any) -> None:
    server.answer = in_turn(lambda: web.json_response(reply))
    client = client_of(max_retries=0)
    with pytest.raises(ServiceError, match="its reply is not of the form expected"):
        run(client, client.request("POST", server.url, json={}, read=read_chat))


def test_models_are_read_adapters_first() -> None:
    assert read_models({"data": [{"id": "a"}, {"id": "b", "parent": "a"}, {"id": "c"}]}) == ["b", "a", "c"]
    with pytest.raises(CallFailed, match="it serves no model"):
        read_models({"data": []})
