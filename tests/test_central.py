"""The token over HTTP: the gate, WeChat's words, and clients that nobody here wrote.

The API behind it is a fake one over real HTTP; the clocks of the store are passed in.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from conftest import (
    APPID,
    APPSECRET,
    NOW,
    ROOT,
    TOKEN,
    Run,
    account,
    message_xml,
    signed,
    skip,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Server, Site, gunicorn, nginx_site, until
from webtest import TestApp

import wechat.api
import wechat.central
from token_store import FilePlace, TokenError, TokenStore
from wechat.central import TokenService
from wechat.config import Config
from wxserver import create_application
from wxsim.fake_api import FakeApi

TestApp.__test__ = False
SHOP, REPORTS = "shop0123456789abcdef", "reports0123456789abc"
CLIENTS = {"shop": SHOP, "reports": REPORTS}
LOCAL = {"REMOTE_ADDR": "127.0.0.1"}
RIGHT: dict[str, Any] = {"grant_type": "client_credential", "appid": APPID, "secret": SHOP}


@pytest.fixture
def make_app(fake_api: FakeApi, tmp_path: Path) -> Callable[..., Any]:
    def make(**more: Any) -> Any:
        settings: dict[str, Any] = {
            "token": TOKEN,
            "appid": APPID,
            "appsecret": APPSECRET,
            "api_base": fake_api.base,
            "state_dir": tmp_path / "state",
            "once": False,
            "central": CLIENTS,
        }
        application = create_application(
            Config(**(settings | more)), lambda message: "hello", lambda: float(NOW)
        )
        return TestApp(application, extra_environ=LOCAL)

    return make


@pytest.fixture
def app(make_app: Callable[..., Any]) -> Any:
    return make_app()


def get(app: Any, **more: Any) -> Any:
    return app.get(f"/cgi-bin/token?{urlencode(RIGHT | more)}")


def post(app: Any, **more: Any) -> Any:
    return app.post_json("/cgi-bin/stable_token", RIGHT | more)


either = pytest.mark.parametrize("ask", [get, post])


@either
def test_the_answer_is_the_platforms(app: Any, fake_api: FakeApi, ask: Any) -> None:
    answer = ask(app)
    assert answer.status == "200 OK"
    assert answer.content_type == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json["access_token"] == fake_api.token
    assert 7190 < answer.json["expires_in"] <= 7200
    assert set(answer.json) == {"access_token", "expires_in"}


def test_every_client_gets_the_one_token_of_the_store(app: Any, fake_api: FakeApi) -> None:
    asks = [get(app), post(app), get(app, secret=REPORTS), post(app, secret=REPORTS)]
    assert {answer.json["access_token"] for answer in asks} == {fake_api.token}
    assert len(fake_api.fetches) == 1
    assert fake_api.fetches[0]["secret"] == APPSECRET


@either
@pytest.mark.parametrize(
    ("wrong", "errcode", "errmsg"),
    [
        ({"grant_type": "password"}, 40002, "invalid grant_type"),
        ({"grant_type": ""}, 40002, "invalid grant_type"),
        ({"appid": "wx1"}, 40013, "invalid appid"),
        ({"appid": 5}, 40013, "invalid appid"),
        ({"appid": ""}, 41002, "appid missing"),
        ({"secret": ""}, 41004, "appsecret missing"),
        ({"secret": 5}, 40125, "invalid appsecret"),
        ({"secret": SHOP[:-1]}, 40125, "invalid appsecret"),
        ({"secret": SHOP + "0"}, 40125, "invalid appsecret"),
        ({"secret": "密钥"}, 40125, "invalid appsecret"),
        ({"secret": APPSECRET}, 40125, "invalid appsecret"),
    ],
)
def test_a_wrong_request_is_answered_with_the_platforms_errcode(
    app: Any, fake_api: FakeApi, ask: Any, wrong: dict[str, Any], errcode: int, errmsg: str
) -> None:
    answer = ask(app, **wrong)
    assert answer.status == "200 OK"
    assert answer.json == {"errcode": errcode, "errmsg": errmsg}
    assert fake_api.fetches == []


@pytest.mark.parametrize(
    ("body", "errcode"),
    [
        (b"", 44002),
        (b"{", 47001),
        (b"[]", 47001),
        (b"null", 47001),
        (b"\xff\xfe{}", 47001),
        ('{"secret": "密"}'.encode("gbk"), 47001),
        (b'{"appid": "a", "appid": "b"}', 47001),
        (b"[" * 100_000, 47001),
        (b'{"appid": %s}' % (b"9" * 5000), 47001),
        (json.dumps(RIGHT | {"force_refresh": "true"}).encode(), 47001),
        (json.dumps(RIGHT | {"stale_token": 5}).encode(), 47001),
        (json.dumps(RIGHT | {"secret": "\ud800"}).encode(), 40125),
        (json.dumps(RIGHT | {"secret": [SHOP]}).encode(), 40125),
    ],
)
def test_a_body_of_something_else_is_a_clean_error(app: Any, body: bytes, errcode: int) -> None:
    answer = app.post("/cgi-bin/stable_token", body)
    assert (answer.status, answer.json["errcode"]) == ("200 OK", errcode)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), query=st.binary(max_size=100))
def test_nothing_that_a_stranger_sends_is_a_500_or_gets_a_token(
    app: Any, fake_api: FakeApi, body: bytes, query: bytes
) -> None:
    for answer in (
        app.post("/cgi-bin/stable_token", body),
        app.get(f"/cgi-bin/token?{quote(query, safe='&=%+;')}"),
    ):
        assert answer.json["errcode"] in wechat.central.ERRMSG
    assert fake_api.fetches == []


def test_a_query_that_says_something_twice_is_a_clean_error(app: Any) -> None:
    answer = app.get(f"/cgi-bin/token?secret=1&{urlencode(RIGHT)}")
    assert answer.json["errcode"] == 47001


def test_a_wrong_method_is_answered_as_the_platform_does(app: Any, fake_api: FakeApi) -> None:
    assert app.get("/cgi-bin/stable_token").json["errcode"] == 43002
    assert app.put("/cgi-bin/stable_token").json["errcode"] == 43002
    assert app.post(f"/cgi-bin/token?{urlencode(RIGHT)}").json["errcode"] == 43001
    for path in ("/cgi-bin/token", "/cgi-bin/stable_token"):
        answer = app.head(f"{path}?{urlencode(RIGHT)}")
        assert (answer.status, answer.body) == ("200 OK", b"")
    assert fake_api.fetches == []


def test_a_body_over_the_limit_is_413_and_one_that_broke_off_400(make_app: Any) -> None:
    app = make_app(max_body=1024)
    answer = app.post("/cgi-bin/stable_token", b" " * 1025, expect_errors=True)
    assert (answer.status_int, answer.content_type) == (413, "text/plain")
    answer = app.post(
        "/cgi-bin/stable_token", b"{}", headers={"Content-Length": "10"}, expect_errors=True
    )
    assert (answer.status_int, answer.body) == (400, b"400 Bad Request\n")


def test_without_a_client_it_is_not_there(make_app: Any, fake_api: FakeApi) -> None:
    app = make_app(central={})
    for ask in (get, post):
        with pytest.raises(Exception, match="404 Not Found"):
            ask(app)
    assert fake_api.fetches == []


def test_without_a_client_it_is_never_imported(run: Run) -> None:
    script = (
        "import sys, wxserver, wechat.config; wxserver.create_application(wechat.config.Config("
        "token='AAAAA', once=False)); print('wechat.central' in sys.modules)"
    )
    assert run("-c", script).communicate()[0] == "False\n"


def test_the_callback_and_all_other_paths_are_as_without_it(app: Any) -> None:
    assert b"hello" in app.post(f"/wx?{signed()}", message_xml()).body
    assert app.get("/cgi-bin/getcallbackip", expect_errors=True).status_int == 404
    assert app.get("/cgi-bin/token/", expect_errors=True).status_int == 404


FAR, HTTPS = {"REMOTE_ADDR": "203.0.113.7"}, {"wsgi.url_scheme": "https"}


@pytest.mark.parametrize(
    ("environ", "allowed"),
    [
        (LOCAL, True),
        ({"REMOTE_ADDR": "127.8.9.1"}, True),
        ({"REMOTE_ADDR": "::1"}, True),
        ({"REMOTE_ADDR": "::ffff:127.0.0.1"}, True),
        ({"REMOTE_ADDR": "::ffff:203.0.113.7"}, False),
        ({"REMOTE_ADDR": "192.168.1.2"}, False),
        ({"REMOTE_ADDR": "localhost"}, False),
        ({"REMOTE_ADDR": ""}, False),
        (FAR, False),
        (FAR | {"HTTP_X_FORWARDED_PROTO": "https"}, False),
        (FAR | HTTPS, True),
        ({"REMOTE_ADDR": ""} | HTTPS, True),
        (LOCAL | HTTPS | {"HTTP_X_FORWARDED_FOR": "203.0.113.7"}, True),
        (LOCAL | {"HTTP_X_FORWARDED_FOR": "127.0.0.1"}, False),
        (LOCAL | {"HTTP_X_FORWARDED_PROTO": "http"}, False),
        (LOCAL | {"HTTP_X_REAL_IP": "203.0.113.7"}, False),
        (LOCAL | {"HTTP_FORWARDED": "for=203.0.113.7"}, False),
        (LOCAL | {"HTTP_VIA": "1.1 proxy"}, False),
    ],
)
@either
def test_without_https_only_this_machine_is_answered(
    app: Any,
    fake_api: FakeApi,
    caplog: pytest.LogCaptureFixture,
    environ: dict[str, str],
    allowed: bool,
    ask: Any,
) -> None:
    app.extra_environ = environ
    if allowed:
        assert ask(app).json["access_token"] == fake_api.token
        return
    with pytest.raises(Exception, match="403 Forbidden: ask over https"):
        ask(app)
    assert fake_api.fetches == []
    assert "without https" in caplog.text


def test_a_proxy_that_gunicorn_does_not_trust_is_named_with_the_setting(
    run: Run, fake_api: FakeApi, tmp_path: Path
) -> None:
    told = {"GUNICORN_CMD_ARGS": "--forwarded-allow-ips=203.0.113.7"}
    server = gunicorn(run, tmp_path, **central_config(fake_api, tmp_path), **told).ready()
    request = f"GET /cgi-bin/token?{urlencode(RIGHT)} HTTP/1.0\r\nX-Forwarded-Proto: https\r\n\r\n"
    assert b"403 Forbidden: ask over https" in server.raw(request.encode())
    assert "gunicorn does not trust 127.0.0.1" in server.log
    assert "start gunicorn with --forwarded-allow-ips=127.0.0.1" in server.log
    assert fake_api.fetches == []


@pytest.fixture
def _all_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")


@pytest.mark.usefixtures("_all_logged")
def test_a_hand_out_is_logged_with_the_clients_name_and_no_secret(
    app: Any, fake_api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    get(app, secret=REPORTS)
    assert re.search(r"reports \(127.0.0.1\) got the access_token, .* 7\d\d\d s", caplog.text)
    caplog.clear()
    post(app, force_refresh=True)
    assert "shop (127.0.0.1) got the access_token" in caplog.text
    caplog.clear()
    app.extra_environ = LOCAL | HTTPS | {"HTTP_X_FORWARDED_FOR": "203.0.113.7\n"}
    get(app, secret="wrong0123456789abcdef")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert r"errcode 40125 (invalid appsecret) to 127.0.0.1 for '203.0.113.7\n'" in caplog.text
    fake_api.failure = b'{"errcode": -1, "errmsg": "system error"}'
    post(app, stale_token=fake_api.token)
    assert "no access_token for shop" in caplog.text
    for secret in (SHOP, REPORTS, APPSECRET, fake_api.token, "wrong0123456789abcdef"):
        assert secret not in caplog.text


@pytest.mark.parametrize("secret", [SHOP, REPORTS, "wrong0123456789abcdef"])
def test_a_secret_is_compared_with_every_clients_whichever_it_is(
    app: Any, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def compare(given: bytes, own: bytes) -> bool:
        compared.append(own)
        return real(given, own)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    get(app, secret=secret)
    assert compared == [SHOP.encode(), REPORTS.encode()]


# What follows is the service itself, with clocks that the test moves.


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Client:
    """Asks a service, as a program on this machine does."""

    def __init__(self, service: TokenService) -> None:
        self.service = service

    def post(self, **more: Any) -> dict[str, Any]:
        return self._ask("POST", "/cgi-bin/stable_token", "", json.dumps(RIGHT | more).encode())

    def get(self, **more: Any) -> dict[str, Any]:
        return self._ask("GET", "/cgi-bin/token", urlencode(RIGHT | more), b"")

    def _ask(self, method: str, path: str, query: str, body: bytes) -> dict[str, Any]:
        environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, **LOCAL}
        environ |= {"QUERY_STRING": query, "wsgi.url_scheme": "http"}
        environ |= {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}
        answer: dict[str, Any] = json.loads(self.service.respond(environ)[2])
        return answer


@pytest.fixture
def make(fake_api: FakeApi, clock: Clock, tmp_path: Path) -> Callable[..., Client]:
    """Make clients of as many workers: nothing shared but the store's file."""
    fake_api.clock = clock

    def made(endpoint: str = "stable_token") -> Client:
        config = account(fake_api, tmp_path, endpoint=endpoint, central=CLIENTS)
        place = FilePlace(tmp_path / "access_token.json")
        fetch = functools.partial(wechat.api.fetch_token, config)
        store = TokenStore(APPID, place, fetch, clock=clock, uptime=clock)
        return Client(TokenService(config, store, clock))

    return made


@pytest.fixture
def client(make: Callable[..., Client]) -> Client:
    return make()


def looks(api: FakeApi) -> int:
    return sum("getcallbackip" in target for _, target, _ in api.calls)


def test_expires_in_is_what_is_left_now(client: Client, clock: Clock) -> None:
    assert client.post()["expires_in"] == 7200
    clock.now += 100
    assert client.post()["expires_in"] == 7100
    assert client.get()["expires_in"] == 7100


def test_near_its_end_the_token_is_renewed(client: Client, clock: Clock, fake_api: FakeApi) -> None:
    first = client.get()["access_token"]
    clock.now += 7200 - 239
    assert client.get() == {"access_token": fake_api.token, "expires_in": 7200}
    assert fake_api.token != first


@pytest.mark.parametrize("endpoint", ["stable_token", "token"])
def test_a_client_told_40001_posts_stale_token_and_gets_another_one(
    make: Callable[..., Client], fake_api: FakeApi, endpoint: str
) -> None:
    client = make(endpoint)
    first = client.post()["access_token"]
    second = client.post(stale_token=first)["access_token"]
    assert second == fake_api.token != first
    assert client.post(stale_token=first)["access_token"] == second  # somebody already got it
    assert make(endpoint).post(stale_token=first, force_refresh=True)["access_token"] == second
    assert client.get(stale_token=first)["access_token"] == second


def test_a_stale_token_that_nobody_ever_had_costs_nothing(
    client: Client, fake_api: FakeApi
) -> None:
    first = client.post()["access_token"]
    for stale in ("an older one", "\ud800", "", None):
        assert client.post(stale_token=stale)["access_token"] == first
    assert len(fake_api.fetches) == 1


def test_tokens_that_are_refused_one_after_another_are_not_burned(
    client: Client, fake_api: FakeApi, clock: Clock
) -> None:
    second = client.post(stale_token=client.post()["access_token"])["access_token"]
    fetches = len(fake_api.fetches)
    for _ in range(5):
        clock.now += 1
        assert client.post(stale_token=second)["errcode"] == 45011
    assert len(fake_api.fetches) == fetches
    clock.now += 31
    assert client.post(stale_token=second)["access_token"] not in (second, None)


def test_force_refresh_alone_refreshes_at_most_once_in_30_s(
    client: Client, fake_api: FakeApi, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    first = client.post()["access_token"]
    second = client.post(force_refresh=True)["access_token"]
    assert second != first
    fetches = len(fake_api.fetches)
    for _ in range(5):
        clock.now += 5
        assert client.post(force_refresh=True)["access_token"] == second
    assert len(fake_api.fetches) == fetches
    assert "shop (127.0.0.1) gets the old access_token: WeChat is asked for another" in caplog.text
    clock.now += 10
    assert client.post(force_refresh=True)["access_token"] == fake_api.token != second
    for no in (False, None):
        assert client.post(force_refresh=no)["access_token"] == fake_api.token


@pytest.mark.parametrize(
    "more", [{}, {"force_refresh": True}, {"stale_token": True}], ids=["cold", "forced", "stale"]
)
def test_a_hundred_clients_at_once_cause_one_fetch(
    make: Callable[..., Client], fake_api: FakeApi, more: dict[str, Any]
) -> None:
    clients, first = [make() for _ in range(4)], ""
    if more:
        first = clients[0].post()["access_token"]
        more = {"stale_token": first} if "stale_token" in more else more
    fake_api.expire()
    fake_api.fetches.clear()
    fake_api.delay = 0.1
    with ThreadPoolExecutor(100) as pool:
        got = set(pool.map(lambda n: clients[n % 4].post(**more)["access_token"], range(100)))
    assert got == {fake_api.token}
    assert fake_api.token != first
    assert len(fake_api.fetches) == 1


@pytest.mark.parametrize("errcode", [40001, 40014, 42001])
def test_a_client_that_just_asks_again_is_not_given_a_dead_token(
    make: Callable[..., Client], fake_api: FakeApi, errcode: int
) -> None:
    first = make().get()["access_token"]
    fake_api.dead = errcode
    second = make().get()["access_token"]
    assert second == fake_api.token != first
    assert make().post()["errcode"] == 45011  # that one is dead too: something is wrong


def test_a_client_that_just_asks_again_costs_no_good_token(
    client: Client, fake_api: FakeApi, clock: Clock
) -> None:
    tokens = set()
    for _ in range(600):
        tokens |= {client.get()["access_token"], client.post()["access_token"]}
        clock.now += 1
    assert tokens == {fake_api.token}
    assert len(fake_api.fetches) == 1
    # Ten at once, and then one in thirty seconds.
    assert looks(fake_api) == 10 + 600 / 30 - 1


def test_a_hundred_who_ask_again_at_once_share_one_look_and_one_fetch(
    client: Client, fake_api: FakeApi
) -> None:
    first = client.get()["access_token"]
    fake_api.expire()
    fake_api.calls.clear()
    fake_api.delay = 0.5
    together = threading.Barrier(100)

    def ask(_: int) -> Any:
        together.wait()
        return client.get()["access_token"]

    with ThreadPoolExecutor(100) as pool:
        got = set(pool.map(ask, range(100)))
    assert got == {fake_api.token} != {first}
    assert looks(fake_api) == 1
    assert len(fake_api.fetches) == 2


def test_while_wechat_is_down_the_old_token_is_served_as_long_as_it_lives(
    client: Client, fake_api: FakeApi, clock: Clock
) -> None:
    first = client.post()["access_token"]
    fake_api.failure = b'{"errcode": 45009, "errmsg": "reach max api daily quota limit"}'
    for left in (7000, 200, 1, 0.5):
        clock.now += client.post()["expires_in"] - left
        for more in ({}, {"force_refresh": True}):
            answer = client.post(**more)
            assert answer == {"access_token": first, "expires_in": max(1, int(left))}
    clock.now += 61
    answer = client.get()
    assert answer["errcode"] == 45009
    assert "the day's quota is used up" in answer["errmsg"]
    fake_api.failure = None
    clock.now += 61
    assert client.get()["access_token"] == fake_api.token != first


def test_a_wechat_that_does_not_answer_at_all_is_errcode_minus_1_without_a_secret(
    client: Client, fake_api: FakeApi
) -> None:
    fake_api.failure = b"<html>" + APPSECRET.encode()
    answer = client.post()
    assert answer["errcode"] == -1
    assert "something else than WeChat's JSON" in answer["errmsg"]
    assert APPSECRET not in str(answer)


def test_an_errmsg_that_quotes_the_appsecret_is_passed_on_without_it(
    client: Client, fake_api: FakeApi
) -> None:
    fake_api.failure = json.dumps({"errcode": 40125, "errmsg": f"bad {APPSECRET}"}).encode()
    answer = client.post()
    assert answer["errcode"] == 40125
    assert APPSECRET not in str(answer)


def test_a_wechat_that_is_down_is_not_asked_each_time_whether_a_token_is_good(
    client: Client, fake_api: FakeApi, clock: Clock
) -> None:
    first = client.get()["access_token"]
    fake_api.calls.clear()
    fake_api.failure = b"<html>"
    for seconds, looked in ((0, 1), (29, 1), (31, 2), (1, 2)):
        clock.now += seconds
        assert client.get()["access_token"] == first
        assert len(fake_api.calls) == looked


# Real servers, and a second copy of this project as the client.


@pytest.fixture
def server(run: Run, fake_api: FakeApi, tmp_path: Path) -> Iterator[Server]:
    yield (running := central(run, fake_api, tmp_path))
    assert "Traceback" not in running.log
    for secret in filter(None, (SHOP, REPORTS, APPSECRET, fake_api.token)):
        assert secret not in running.log


def central(run: Run, api: FakeApi, folder: Path) -> Server:
    return gunicorn(run, folder, **central_config(api, folder)).ready()


def central_config(api: FakeApi, folder: Path) -> dict[str, str]:
    """Write the config.ini of a server with clients; return the secrets for its environment."""
    (folder / "config.ini").write_text(
        f"[central]\nshop = {SHOP}\nreports = {REPORTS}\n[access_token]\napi_base = {api.base}\n"
    )
    return {"WX_APPID": APPID, "WX_APPSECRET": APPSECRET}


def second_copy(server: Server, folder: Path, secret: str = SHOP, **more: str) -> TokenStore:
    """Return the store of another copy of this project, which asks ``server``."""
    settings: dict[str, Any] = {"api_base": server.base, "state_dir": folder, **more}
    return wechat.api.token_store(Config(appid=APPID, appsecret=secret, **settings))


@pytest.mark.parametrize("endpoint", ["stable_token", "token"])
def test_a_second_copy_gets_its_token_here_survives_its_end_and_refreshes(
    server: Server, fake_api: FakeApi, tmp_path: Path, endpoint: str
) -> None:
    copy = second_copy(server, tmp_path / "copy", endpoint=endpoint)
    first = copy.get()
    assert first == fake_api.token
    fake_api.expire()
    second = copy.refresh(first)
    assert second == fake_api.token != first
    assert len(fake_api.fetches) == 2
    assert "shop (127.0.0.1) got the access_token" in server.log
    with pytest.raises(TokenError, match="errcode 40125"):
        second_copy(server, tmp_path / "other", "x" * 20, endpoint=endpoint).get()


@pytest.mark.parametrize("endpoint", ["stable_token", "token"])
def test_a_second_copy_told_40001_of_what_wechat_calls_good_gets_another_one_too(
    server: Server, fake_api: FakeApi, tmp_path: Path, endpoint: str
) -> None:
    copy = second_copy(server, tmp_path / "copy", endpoint=endpoint)
    first = copy.get()
    assert copy.refresh(first) == fake_api.token != first


def test_while_wechat_hangs_a_second_copy_gets_the_token_before_it_gives_up(
    server: Server, fake_api: FakeApi, tmp_path: Path
) -> None:
    stores = [second_copy(server, tmp_path / name) for name in "ab"]
    first = stores[0].get()
    fake_api.delay = 20
    assert stores[1].get() == first


def test_a_hundred_clients_at_once_get_one_token_of_one_fetch_from_all_workers(
    server: Server, fake_api: FakeApi, tmp_path: Path
) -> None:
    fake_api.delay = 0.2
    stores = [second_copy(server, tmp_path / str(n)) for n in range(100)]
    with ThreadPoolExecutor(100) as pool:
        assert set(pool.map(lambda store: store.get(), stores)) == {fake_api.token}
    assert len(fake_api.fetches) == 1


def test_over_a_unix_socket_https_has_to_be_told(
    run: Run, fake_api: FakeApi, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    arguments = ("-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "-b", f"unix:{path}")
    Server(run, tmp_path, *arguments, "wxserver", **central_config(fake_api, tmp_path))
    until(path.exists)

    def ask(*headers: str) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            until(lambda: connection.connect_ex(str(path)) == 0)
            lines = [f"GET /cgi-bin/token?{urlencode(RIGHT)} HTTP/1.0", *headers, "", ""]
            connection.sendall("\r\n".join(lines).encode())
            return b"".join(iter(lambda: connection.recv(65536), b""))

    assert ask().endswith(b"403 Forbidden: ask over https\n")
    assert fake_api.fetches == []
    told = json.loads(ask("X-Forwarded-Proto: https").rpartition(b"\r\n")[2])
    assert told["access_token"] == fake_api.token


# Clients that nobody here wrote, through the shipped nginx site.


def snippet(language: str) -> str:
    """Return the document's code for a client in ``language``."""
    section = (ROOT / "docs/access-token.md").read_text().partition("\n## Over HTTP")[2]
    found = re.search(rf"```{language}\n([^`]*wx\.example\.com/cgi-bin/[^`]*)```", section)
    assert found
    return found[1]


@contextlib.contextmanager
def central_site(
    server: Server, api: FakeApi, folder: Path, allowed: str = "127.0.0.1"
) -> Iterator[Site]:
    """Serve the service and, for all other calls, the fake API at one address, as nginx does."""
    inside = (ROOT / "deploy" / "nginx-central.conf").read_text()
    for old, new in {
        "allow 203.0.113.7;": f"allow {allowed};",
        "https://api.weixin.qq.com;": f"{api.base};",
        "proxy_ssl_trusted_certificate /etc/ssl/certs/ca-certificates.crt;": "",
        "proxy_ssl_verify on;": "",
        "/var/log/nginx": str(folder),
        "127.0.0.1:8000": f"127.0.0.1:{server.port}",
    }.items():
        assert old in inside
        inside = inside.replace(old, new)
    (folder / "central.conf").write_text(inside)
    include = "# include /etc/nginx/wxserver-central.conf;"
    with nginx_site(server, folder, {include: f"include {folder}/central.conf;"}) as running:
        yield running


@pytest.fixture
def site(server: Server, fake_api: FakeApi, tmp_path: Path) -> Iterator[Site]:
    with central_site(server, fake_api, tmp_path) as running:
        yield running


def clients_environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WX")}
    return clean | {"APPID": APPID, "SECRET": SHOP} | more


def survives(command: list[str], fake_api: FakeApi, site: Site) -> None:
    """Let a client that calls getcallbackip for every line on stdin live through an expiry."""
    ca = str(site.certificate)
    env = clients_environment(REQUESTS_CA_BUNDLE=ca, NODE_EXTRA_CA_CERTS=ca)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, **pipes) as process:
        assert process.stdin
        assert process.stdout
        try:
            for fetches in (1, 2, 2):
                process.stdin.write("call\n")
                process.stdin.flush()
                assert "101.226.62.77" in process.stdout.readline()
                assert len(fake_api.fetches) == fetches
                if fetches == 1:
                    fake_api.expire()
        finally:
            process.kill()
    assert {asked["secret"] for asked in fake_api.fetches} == {APPSECRET}


def test_wechatpy_gets_its_token_here_and_survives_its_end(
    fake_api: FakeApi, server: Server, site: Site
) -> None:
    code, _, call = (
        snippet("python").replace("https://wx.example.com", site.base).rpartition("\n\n")
    )
    script = f"import sys\n{code}\nfor line in sys.stdin:\n    {call.strip()}"
    survives([sys.executable, "-u", "-c", script], fake_api, site)
    assert "shop (127.0.0.1 for '127.0.0.1') got the access_token" in server.log


def test_co_wechat_api_gets_its_token_here_and_survives_its_end(
    fake_api: FakeApi, server: Server, site: Site
) -> None:
    node, modules = shutil.which("node"), ROOT / "tests" / "node" / "node_modules"
    if not node or not (modules / "co-wechat-api").exists():
        skip("needs node, npm and what make test installs with it")
    code, _, call = snippet("js").replace("https://wx.example.com", site.base).rpartition("\n\n")
    script = (
        f"{code}\nrequire('readline').createInterface(process.stdin).on('line', () => {{{call}}})"
    )
    (site.certificate.parent / "node_modules").symlink_to(modules)
    (site.certificate.parent / "client.js").write_text(script)
    survives([node, str(site.certificate.parent / "client.js")], fake_api, site)
    assert "shop (127.0.0.1 for '127.0.0.1') got the access_token" in server.log


def test_a_second_copy_behind_nginx_calls_wechat_as_well(
    fake_api: FakeApi, server: Server, site: Site, run: Run, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.ini").write_text(f"[access_token]\napi_base = {site.base}\n")
    env = {"WXSERVER_CONFIG": str(copy / "config.ini"), "SSL_CERT_FILE": str(site.certificate)}
    env |= {"WX_APPID": APPID, "WX_APPSECRET": SHOP}
    process = run("-m", "wechat.api", "getcallbackip", env=env)
    assert "101.226.62.77" in process.communicate()[0]
    assert "shop (127.0.0.1 for '127.0.0.1') got the access_token" in server.log


def test_nginx_lets_nobody_in_who_is_not_on_its_list(
    fake_api: FakeApi, server: Server, tmp_path: Path
) -> None:
    with central_site(server, fake_api, tmp_path, allowed="203.0.113.7") as site:
        for name in ("token", "stable_token", "getcallbackip"):
            assert server.ask(base=site.base, path=f"/cgi-bin/{name}")[0] == 403
        assert server.ask(base=site.base, echostr="1") == (200, b"1")
    assert "https" not in server.log


def test_nginx_logs_no_secret_even_when_the_server_is_down(
    fake_api: FakeApi, server: Server, site: Site, tmp_path: Path
) -> None:
    asked = f"/cgi-bin/token?{urlencode(RIGHT)}"
    assert server.ask(base=site.base, path=asked)[0] == 200
    server.process.terminate()
    server.process.wait()
    assert server.ask(base=site.base, path=asked)[0] == 502
    log = tmp_path / "wxserver.log"
    until(lambda: "GET /cgi-bin/token 502" in log.read_text())
    assert SHOP not in log.read_text() + (tmp_path / "error.log").read_text()


@pytest.mark.parametrize(("language", "program"), [("sh", "sh"), ("php", "php")])
def test_the_snippets_of_the_readme_print_the_token(
    fake_api: FakeApi, server: Server, tmp_path: Path, language: str, program: str
) -> None:
    if not shutil.which(program) or not shutil.which("curl"):
        skip(f"needs {program} and curl")
    path = tmp_path / "snippet"
    path.write_text(snippet(language).replace("https://wx.example.com", server.base))
    printed = subprocess.check_output([program, str(path)], env=clients_environment(), text=True)
    assert fake_api.token in printed
    assert len(fake_api.fetches) == 1
