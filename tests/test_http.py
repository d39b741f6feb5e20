"""The HTTP client against a real server that answers as told: well, badly, late, or not at all."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, TypeVar

import pytest
from aiohttp import web
from http_servers import serving

from zerosearch import http
from zerosearch.http import CallFailed, HTTPClient, ServiceError, read_chat_text, read_models

Result = TypeVar("Result")
Answer = Callable[[int], web.Response | Coroutine[Any, Any, web.Response]]


@dataclass
class Server:
    """What the test tells the server, and what it saw: `answer(place)` is the reply to the place-th request."""

    url: str = ""
    answer: Answer = lambda place: web.json_response({"place": place})
    requests: list[dict[str, Any]] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
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
    assert run(client, client.post(server.url, {"q": "Zürich"}, read=lambda reply: reply["place"] + 7)) == [(7, 0)]
    (request,) = server.requests
    assert (request["method"], request["body"]) == ("POST", {"q": "Zürich"})
    assert request["headers"]["Authorization"] == "Bearer sk-secret"
    assert (client.counts.calls, client.counts.retries, client.counts.failures) == (1, 0, 0)


def test_parameters_go_into_the_address(server: Server) -> None:
    client = client_of()
    run(client, client.get(server.url, {"q": "a b&c", "num": 5}, read=whole))
    (request,) = server.requests
    assert (request["method"], request["query"]) == ("GET", {"q": "a b&c", "num": "5"})
    assert "Authorization" not in request["headers"]


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_repeated_and_counted(server: Server, code: int) -> None:
    server.answer = in_turn(status(code, "busy"), status(code, "busy"), well)
    client = client_of()
    assert run(client, client.post(server.url, {}, read=whole)) == [({"well": True}, 2)]
    assert (client.counts.calls, client.counts.retries, client.counts.failures) == (3, 2, 0)


@pytest.mark.parametrize("reply", ["<html>gateway</html>", "", '{"cut', "[1, 2"])
def test_a_reply_that_is_no_json_is_asked_for_again(server: Server, reply: str) -> None:
    server.answer = in_turn(status(200, reply), well)
    client = client_of()
    assert run(client, client.get(server.url, read=whole)) == [({"well": True}, 1)]


def test_a_reply_of_another_form_is_asked_for_again(server: Server) -> None:
    def read(reply: Any) -> bool:
        if "well" not in reply:
            raise CallFailed("no word of how it is")
        return reply["well"]

    server.answer = in_turn(lambda: web.json_response({}), well)
    client = client_of()
    assert run(client, client.get(server.url, read=read)) == [(True, 1)]


@pytest.mark.parametrize("code", [400, 401, 402, 403, 404, 422, 501])
def test_a_refusal_is_final(server: Server, code: int) -> None:
    server.answer = in_turn(status(code, "no"), well)
    client = client_of()
    with pytest.raises(ServiceError, match=f"attempt 1 of 6: HTTP status {code}: no; ask a neighbour") as caught:
        run(client, client.post(server.url, {}, read=whole))
    assert (caught.value.status, caught.value.retries) == (code, 0)
    assert len(server.requests) == 1


def test_an_empty_balance_reported_as_too_many_requests_is_final(server: Server) -> None:
    server.answer = in_turn(status(429, '{"error": {"code": "insufficient_quota"}}'))
    client = client_of(final_signs=["insufficient_quota"])
    with pytest.raises(ServiceError, match="insufficient_quota"):
        run(client, client.post(server.url, {}, read=whole))
    assert len(server.requests) == 1


def test_retries_are_bounded_and_the_error_names_service_address_and_remedy(server: Server) -> None:
    server.answer = in_turn(status(503, "down"))
    client = client_of(max_retries=2)
    with pytest.raises(ServiceError) as caught:
        run(client, client.post(server.url, {}, read=whole))
    assert str(caught.value) == (
        f"the oracle at {server.url} failed, attempt 3 of 3: HTTP status 503: down; ask a neighbour"
    )
    assert (caught.value.status, caught.value.retries) == (503, 2)
    assert (client.counts.calls, client.counts.retries, client.counts.failures) == (3, 2, 1)


def test_a_late_reply_is_given_up_and_asked_for_again(server: Server) -> None:
    async def never() -> web.Response:
        await asyncio.Event().wait()
        return well()

    client = client_of(timeout_s=0.2)

    def answer(place: int) -> web.Response | Coroutine[Any, Any, web.Response]:
        client.timeout_s = 30.0  # from the second call on, so that a busy machine may take its time
        return never() if place == 0 else well()

    server.answer = answer
    ((reply, retries),) = run(client, client.get(server.url, read=whole))
    assert reply == {"well": True} and retries == client.counts.retries == client.counts.calls - 1 >= 1
    server.answer = lambda place: never()
    client = client_of(timeout_s=0.1, max_retries=0)
    with pytest.raises(ServiceError, match=r"attempt 1 of 1: no answer within 0\.1 s"):
        run(client, client.get(server.url, read=whole))


def test_waiting_for_a_slot_does_not_use_up_the_time_limit(server: Server) -> None:
    async def slow() -> web.Response:
        await asyncio.sleep(0.4)
        return well()

    server.answer = lambda place: slow()
    client = client_of(timeout_s=2.0, max_concurrency=2, max_retries=0)
    replies = run(client, *(client.post(server.url, {"row": row}, read=whole) for row in range(12)))  # 2.4 s in all
    assert replies == [({"well": True}, 0)] * 12
    assert server.most_in_flight == 2
    assert len(server.connections) == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", "http://no-such-host.invalid/api"])
def test_nobody_there_is_asked_again(url: str) -> None:
    client = client_of(max_retries=1)
    with pytest.raises(ServiceError, match=f"the oracle at {url} failed, attempt 2 of 2: Client") as caught:
        run(client, client.get(url, read=whole))
    assert caught.value.status is None


@pytest.mark.parametrize("url", ["localhost:6001", "http://localhost:port/v1", "no address", "file:///etc/passwd", ""])
def test_an_address_that_is_none_is_final(url: str) -> None:
    client = client_of()
    with pytest.raises(ServiceError, match="attempt 1 of 6: this is no http address"):
        run(client, client.get(url, read=whole))


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


def test_pauses_double_up_to_a_bound_and_jitter_comes_from_the_key(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "FIRST_BACK_OFF_S", 1.0)
    monkeypatch.setattr(http, "LONGEST_BACK_OFF_S", 4.0)
    server.answer = in_turn(status(500))
    slept = pauses(monkeypatch)
    taken = []
    for key in ((1,), (1,), (2,)):
        client = client_of(max_retries=4)
        with pytest.raises(ServiceError):
            run(client, client.post(server.url, {}, read=whole, key=key))
        taken.append(slept[:])
        slept.clear()
    assert taken[0] == taken[1] != taken[2]
    for pause, nominal in zip(taken[0], [1, 2, 4, 4], strict=True):
        assert 0.5 * nominal <= pause < 1.5 * nominal


def test_without_a_key_requests_still_spread(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = in_turn(status(500))
    slept = pauses(monkeypatch)
    client = client_of(max_retries=1)
    for row in range(5):
        with pytest.raises(ServiceError):
            run(client, client.post(server.url, {"row": row}, read=whole))
    assert len(set(slept)) == 5


def test_a_service_that_says_when_is_not_asked_earlier(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    in_40_s = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    answers = [status(429, Retry_After="7"), status(503, Retry_After=in_40_s), status(429, Retry_After="soon"), well]
    server.answer = in_turn(*answers)
    slept = pauses(monkeypatch)
    client = client_of()
    assert run(client, client.get(server.url, read=whole)) == [({"well": True}, 3)]
    assert slept[0] == 7.0
    assert 7.0 < slept[1] <= 40.0
    assert slept[2] < 0.1


@pytest.mark.parametrize("asked", ["3600", "inf", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_service_that_wants_a_long_pause_is_not_waited_for(server: Server, asked: str) -> None:
    server.answer = in_turn(status(429, "hourly limit", Retry_After=asked))
    client = client_of()
    with pytest.raises(ServiceError, match="attempt 1 of 6: HTTP status 429: hourly limit"):
        run(client, client.get(server.url, read=whole))
    assert len(server.requests) == 1


def test_no_message_or_log_holds_a_secret(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    secret, key = "se cret+/=", "sk-0123456789"
    # Echoed plainly and as in a URL, and once where the message is cut off.
    echo = f"bad key {key}, api_key=se%20cret%2B%2F%3D se+cret%2B/%3D {secret}" + "." * 150 + key * 9
    server.answer = in_turn(status(503, echo))
    client = client_of(api_key=key, secrets=[secret], max_retries=1)
    with caplog.at_level(logging.DEBUG, "zerosearch"), pytest.raises(ServiceError) as caught:
        run(client, client.get(server.url, {"api_key": secret}, read=whole))
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("zerosearch")]
    shown = f"{caught.value} {caught.value.__cause__} {logged}"
    assert "bad key ***, api_key=***" in str(caught.value)
    assert len(logged) == 1 and "asking again" in logged[0]
    for leak in (secret, key, key[:8], "cret"):
        assert leak not in shown


def test_a_password_in_an_address_is_not_shown(server: Server) -> None:
    client = client_of(max_retries=0)
    with pytest.raises(ServiceError, match=r"the oracle at http://\*\*\*@127\.0\.0\.1:9/api failed"):
        run(client, client.get("http://user:password@127.0.0.1:9/api", read=whole))


def test_connections_stay_open_within_a_loop_and_a_client_outlives_one(server: Server) -> None:
    client = client_of(max_concurrency=3)

    async def ask_thrice() -> None:
        for _ in range(3):
            await client.get(server.url, read=whole)

    asyncio.run(ask_thrice())
    assert len(server.connections) == 1
    asyncio.run(ask_thrice())  # the first loop is closed, its connection with it
    assert len(server.connections) == 2
    assert len(client._connections) == 1
    run(client, client.get(server.url, read=whole))
    assert not client._connections


def test_two_loops_at_once_each_have_their_own(server: Server) -> None:
    client = client_of()
    replies: list[Any] = []

    async def ask_often() -> None:
        for _ in range(20):
            replies.append((await client.get(server.url, read=whole))[1])
        await client.aclose()

    threads = [threading.Thread(target=asyncio.run, args=(ask_often(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert replies == [0] * 80
    assert not client._connections


def test_the_users_hub_token_and_offline_mode_stay_out_of_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    client = client_of()
    run(client, client.post(server.url, {}, read=whole))
    assert "hf_secret" not in json.dumps(server.requests)


def test_chat_text_and_models_are_read_or_refused() -> None:
    assert read_chat_text({"choices": [{"message": {"content": "hello"}}]}) == "hello"
    assert read_chat_text({"choices": [{"message": {"content": None}}]}) == ""
    others: list[Any] = [{}, {"choices": []}, {"error": "out of memory"}, [], "x", None]
    for reply in others:
        with pytest.raises(CallFailed, match="no chat completion"):
            read_chat_text(reply)
    assert read_models({"data": [{"id": "a"}, {"id": "b"}]}) == ["a", "b"]
    for reply in [*others, {"data": 5}, {"data": [{}]}]:
        with pytest.raises(CallFailed, match="no list of models"):
            read_models(reply)
