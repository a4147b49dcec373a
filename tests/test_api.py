"""The API client, against a fake API over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import APPID, APPSECRET, Run, config_for

import token_store
from wechat.api import Api, ApiError
from wxsim.fake_api import FakeApi


@pytest.fixture
def api(fake_api: FakeApi, tmp_path: Path) -> Api:
    store = token_store.TokenStore(tmp_path / "t.json", APPID, APPSECRET, api_base=fake_api.base)
    return Api(store, fake_api.base)


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
    assert "add 1.2.3.4 to the account's IP whitelist" in err
