"""The API client, against a fake API over HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import APPID, APPSECRET, Run, account, config_for

import wechat.api
from token_store import TokenError
from wechat.api import Api, ApiError
from wechat.config import KEYS_CONSOLE, Config
from wechat.exchange import LARGEST_ANSWER
from wxsim.fake_api import FakeApi


@pytest.fixture
def api(fake_api: FakeApi, tmp_path: Path) -> Api:
    return wechat.api.from_config(account(fake_api, tmp_path))


def test_a_get_carries_the_token(api: Api, fake_api: FakeApi) -> None:
    assert api.call("getcallbackip") == {"ip_list": ["101.226.62.77"]}
    expected = f"/cgi-bin/getcallbackip?access_token={fake_api.token}"
    assert fake_api.calls == [("GET", expected, b"")]


def test_a_post_sends_json_in_utf8_without_escapes(api: Api, fake_api: FakeApi) -> None:
    message = {"touser": "o1", "msgtype": "text", "text": {"content": "你好"}}
    assert api.call("message/custom/send", message) == {"errcode": 0, "errmsg": "ok"}
    method, _, body = fake_api.calls[0]
    assert method == "POST"
    assert json.loads(body) == message
    assert "你好".encode() in body


def test_a_path_may_be_whole_and_have_a_query(api: Api, fake_api: FakeApi) -> None:
    api.call("getcallbackip")
    fake_api.failure = b"{}"
    api.call("/datacube/getusersummary", {})
    api.call("user/info?openid=o1&lang=zh_CN")
    assert [target for _, target, _ in fake_api.calls[1:]] == [
        f"/datacube/getusersummary?access_token={fake_api.token}",
        f"/cgi-bin/user/info?openid=o1&lang=zh_CN&access_token={fake_api.token}",
    ]


def test_a_dead_token_is_replaced_and_the_call_made_again_once(api: Api, fake_api: FakeApi) -> None:
    api.call("getcallbackip")
    fake_api.expire()
    assert api.call("getcallbackip") == {"ip_list": ["101.226.62.77"]}
    assert len(fake_api.calls) == 3
    assert len(fake_api.fetches) == 2


@pytest.mark.parametrize("errcode", [40001, 40014, 42001])
def test_a_token_that_stays_dead_is_an_error_after_one_more_try(
    api: Api, fake_api: FakeApi, errcode: int
) -> None:
    api.call("getcallbackip")
    fake_api.calls.clear()
    fake_api.dead = errcode
    with pytest.raises(ApiError, match=f"errcode {errcode}") as caught:
        api.call("getcallbackip")
    assert caught.value.errcode == errcode
    assert len(fake_api.calls) == 2
    assert fake_api.token not in str(caught.value)


def test_a_token_that_wechat_quotes_is_not_shown(api: Api, fake_api: FakeApi) -> None:
    api.call("getcallbackip")
    answer = {"errcode": 48001, "errmsg": f"no right with {fake_api.token} to call this"}
    fake_api.failure = json.dumps(answer).encode()
    with pytest.raises(ApiError, match=r"48001 \(no right with \*\*\* to call this\)"):
        api.call("getcallbackip")


def test_a_token_that_stays_dead_is_not_fetched_at_every_call(api: Api, fake_api: FakeApi) -> None:
    fake_api.dead = 40001
    for _ in range(20):
        with pytest.raises(ApiError, match=r"40001|once in 30 s"):
            api.call("getcallbackip")
    assert len(fake_api.fetches) == 3  # the first, the same again, another by force


def test_an_errcode_is_an_exception_with_its_meaning(api: Api, fake_api: FakeApi) -> None:
    api.call("getcallbackip")
    fake_api.failure = b'{"errcode": 48001, "errmsg": "api unauthorized"}'
    with pytest.raises(ApiError, match=r"errcode 48001 \(api unauthorized\): .*verification"):
        api.call("getcallbackip")


def test_no_answer_is_an_exception_that_names_the_host_not_the_token(
    api: Api, fake_api: FakeApi
) -> None:
    api.call("getcallbackip")
    fake_api.failure, fake_api.status = b"<html>Bad Gateway</html>", 502
    with pytest.raises(ApiError, match=r"no answer from 127\.0\.0\.1:\d+: HTTP status 502$"):
        api.call("getcallbackip")


def test_the_command_prints_the_servers_of_wechat(
    fake_api: FakeApi, tmp_path: Path, run: Run
) -> None:
    process = run("-m", "wechat.api", "getcallbackip", env=config_for(fake_api, tmp_path))
    out, err = process.communicate()
    assert (json.loads(out), err, process.returncode) == ({"ip_list": ["101.226.62.77"]}, "", 0)


def test_the_command_posts_a_json_body(fake_api: FakeApi, tmp_path: Path, run: Run) -> None:
    body = '{"touser": "o1", "command": "Typing"}'
    env = config_for(fake_api, tmp_path)
    out, _ = run("-m", "wechat.api", "message/custom/typing", body, env=env).communicate()
    assert json.loads(out) == {"errcode": 0, "errmsg": "ok"}
    assert json.loads(fake_api.calls[0][2]) == json.loads(body)


@pytest.mark.parametrize("body", ["{", "[]", "[" * 100_000])
def test_the_command_refuses_a_body_that_is_no_json_object(body: str, run: Run) -> None:
    process = run("-m", "wechat.api", "x", body)
    assert "the body is not" in process.communicate()[1]
    assert process.returncode == 2


def test_the_command_says_on_stderr_what_went_wrong(
    fake_api: FakeApi, tmp_path: Path, run: Run
) -> None:
    fake_api.failure = b'{"errcode": 40164, "errmsg": "invalid ip 1.2.3.4, not in whitelist"}'
    process = run("-m", "wechat.api", "getcallbackip", env=config_for(fake_api, tmp_path))
    out, err = process.communicate()
    assert (out, process.returncode) == ("", 1)
    assert err.startswith("wechat.api: errcode 40164")
    assert err.count("\n") == 1
    assert f"add 1.2.3.4 to the account's IP whitelist: {KEYS_CONSOLE}" in err


# The exchange by itself.


@pytest.mark.parametrize("switches", [{"delay": 5.0}, {"drip": 0.05, "failure": b" " * 500}])
def test_an_api_too_slow_to_answer_or_to_finish_is_left(
    fake_api: FakeApi, switches: dict[str, Any]
) -> None:
    vars(fake_api).update(switches)
    with pytest.raises(ApiError, match="no answer from 127"):
        wechat.api.request_json(f"{fake_api.base}/cgi-bin/token", None, "secret", timeout=0.2)


@pytest.mark.parametrize(
    "drip", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"X-Header: 1\r\n"]
)
def test_an_api_that_never_comes_to_the_point_is_left(drip: bytes) -> None:
    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\n" if drip.startswith(b"X") else b"")
            with contextlib.suppress(OSError):
                while not over.wait(0.01):
                    connection.sendall(drip)

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        with pytest.raises(ApiError, match="no answer from 127"):
            wechat.api.request_json(url, None, "secret", timeout=0.2)
        over.set()
        thread.join()


@pytest.mark.parametrize(
    "api_base", ["api.weixin.qq.com", "http://[::1", "https://a..b", "ftp://a"]
)
def test_an_impossible_address_is_an_error_without_the_secret(api_base: str) -> None:
    for endpoint in ("token", "stable_token"):
        config = Config(appid=APPID, appsecret=APPSECRET, api_base=api_base, endpoint=endpoint)
        with pytest.raises(ApiError, match="no answer from") as caught:
            wechat.api.fetch_token(config)
        assert APPSECRET not in str(caught.value)


def test_an_api_that_is_not_there_is_named() -> None:
    with pytest.raises(ApiError, match=r"no answer from 127\.0\.0\.1:1: .*refused"):
        wechat.api.request_json("http://127.0.0.1:1", None, "secret")


def test_an_answer_without_end_is_left(fake_api: FakeApi) -> None:
    fake_api.failure = b" " * (LARGEST_ANSWER + 10_000_000)
    with pytest.raises(ApiError, match=r"no answer from .*: its answer is over 4 MB$"):
        wechat.api.request_json(f"{fake_api.base}/cgi-bin/token", None, "secret")


WITHOUT_THREADS = """
import resource, sys, threading, wechat.api
threading.stack_size(1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    wechat.api.request_json(sys.argv[1], None, "secret")
except wechat.api.ApiError as error:
    print(error)
"""


def test_a_thread_that_cannot_be_started_is_an_error_of_the_api(
    fake_api: FakeApi, run: Run
) -> None:
    out, err = run("-c", WITHOUT_THREADS, f"{fake_api.base}/cgi-bin/token").communicate()
    assert (out.startswith("no answer from 127.0.0.1:"), err) == (True, "")
    assert "thread" in out


# The access_token of WeChat.


def test_every_errcode_of_the_platform_that_an_owner_meets_has_a_meaning() -> None:
    known = {-1, 40001, 40002, 40003, 40007, 40013, 40014, 40125, 40164, 40243}
    known |= {41002, 41004, 42001, 43002, 45002, 45009, 45011, 45015, 45047}
    known |= {48001, 50004, 89503, 89506, 89507}
    assert set(wechat.api.ADVICE) == known


def test_stale_token_is_sent_to_another_copy_and_never_to_wechat_itself() -> None:
    for api_base, sent in (
        ("https://api.weixin.qq.com", None),
        ("https://sh.api.weixin.qq.com", None),
        ("https://api.weixin.qq.com.example.com", "T"),
        ("https://wx.example.com", "T"),
    ):
        config = Config(appid=APPID, appsecret=APPSECRET, api_base=api_base)
        _, fields = wechat.api.token_request(config, "T")
        assert fields
        assert (fields.get("stale_token"), fields["force_refresh"]) == (sent, True)
        _, fields = wechat.api.token_request(config)
        assert fields == {
            "grant_type": "client_credential",
            "appid": APPID,
            "secret": APPSECRET,
        }


@pytest.mark.parametrize("missing", ["appid", "appsecret"])
def test_a_store_without_credentials_is_refused_at_once(tmp_path: Path, missing: str) -> None:
    settings: dict[str, Any] = {"appid": "wx1", "appsecret": "s", "state_dir": tmp_path}
    with pytest.raises(TokenError, match="appid and appsecret"):
        wechat.api.token_store(Config(**(settings | {missing: ""})))
