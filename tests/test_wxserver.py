"""The callback as WeChat meets it, and everybody else. WebTest checks each request as WSGI."""

from __future__ import annotations

import contextlib
import io
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import NOW, TOKEN, Run, message_xml, signed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import free_port, until
from webtest import TestApp

from wechat.config import Config
from wechat.message import from_xml
from wxserver import create_application

TestApp.__test__ = False
ANY = {"expect_errors": True}


def make_app(reply: Callable[[Any], Any] = lambda message: message["Content"], **more: Any) -> Any:
    clock = more.pop("clock", lambda: float(NOW))
    config = Config(**{"token": TOKEN, "once": False, **more})
    return TestApp(create_application(config, reply, clock))


@pytest.fixture
def app() -> Any:
    return make_app()


def test_the_official_verification_is_answered_with_echostr_and_nothing_else(app: Any) -> None:
    answer = app.get(
        "/wx?signature=f464b24fc39322e44b38aa78f5edd27bd1441696&timestamp=1714036504"
        "&nonce=1514711492&echostr=4375120948345356249"
    )
    assert answer.status == "200 OK"
    assert answer.body == b"4375120948345356249"
    assert answer.content_type == "text/plain"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@given(st.binary(min_size=1, max_size=60))
def test_echostr_comes_back_byte_for_byte_and_never_as_a_page(echostr: bytes) -> None:
    answer = make_app().get(f"/wx?{signed()}&echostr={quote(echostr)}")
    assert answer.body == echostr
    assert answer.content_type == "text/plain"


def test_a_message_is_answered_with_the_reply_and_the_names_swapped(app: Any) -> None:
    answer = app.post(f"/wx?{signed(openid='o9AgO5Kd5ggOC-bXrbNODIiE3bGY')}", message_xml("你好"))
    assert answer.status == "200 OK"
    assert answer.content_type == "application/xml"
    assert from_xml(answer.body) == {
        "ToUserName": "o9AgO5Kd5ggOC-bXrbNODIiE3bGY",
        "FromUserName": "gh_97417a04a28d",
        "CreateTime": str(NOW),
        "MsgType": "text",
        "Content": "你好",
    }


def test_reply_gets_the_message_as_a_plain_dict() -> None:
    seen: list[dict[str, Any]] = []
    make_app(seen.append).post(f"/wx?{signed()}", message_xml(Unknown="kept"))
    assert seen[0]["MsgType"] == "text"
    assert seen[0]["Content"] == "hello"
    assert seen[0]["Unknown"] == "kept"


def test_no_reply_is_success() -> None:
    answer = make_app(lambda _: None).post(f"/wx?{signed()}", message_xml())
    assert (answer.status, answer.body) == ("200 OK", b"success")
    assert answer.content_type == "text/plain"


def raises(_: Any) -> str:
    raise RuntimeError("the database is down")


def exits(_: Any) -> str:
    raise SystemExit("as a library may")


def takes_apart(message: dict[str, Any]) -> str:
    message.clear()
    raise KeyError("MsgType")


@pytest.mark.parametrize(
    "reply", [raises, exits, takes_apart, lambda _: 7, lambda _: {"MsgType": "text", "a b": "c"}]
)
def test_a_reply_that_fails_is_logged_with_its_traceback_and_answered_success(
    reply: Any, caplog: pytest.LogCaptureFixture
) -> None:
    answer = make_app(reply).post(f"/wx?{signed()}", message_xml("private words"))
    assert (answer.status, answer.body) == ("200 OK", b"success")
    assert "Traceback" in caplog.text
    assert "private words" not in caplog.text


@pytest.mark.parametrize("name", ["signature", "timestamp", "nonce", "echostr"])
def test_a_parameter_missing_repeated_or_malformed_is_400(
    app: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    query = signed(echostr="1")
    assert app.get(f"/wx?{query}").status_int == 200
    missing = re.sub(f"{name}=[^&]*&?", "", query)
    assert app.get(f"/wx?{missing}", **ANY).status_int == 400
    assert f"{name} is missing" in caplog.text
    assert app.get(f"/wx?{query}&{name}=1", **ANY).status_int == 400
    assert "repeated" in caplog.text
    for bad in ("", "%00" * 2000, "x" * 2000):
        malformed = re.sub(f"{name}=[^&]*", f"{name}={bad}", query)
        assert app.get(f"/wx?{malformed}", **ANY).status_int == 400
    assert f"{name} is malformed" in caplog.text


@pytest.mark.parametrize("timestamp", ["-1", "1.5", "1e9", "²", "１７", "0x10", " 1", "1" * 30])
def test_a_timestamp_that_is_no_whole_number_is_400(app: Any, timestamp: str) -> None:
    assert app.get(f"/wx?{signed(timestamp=timestamp, echostr='1')}", **ANY).status_int == 400


def test_a_wrong_signature_is_403_for_get_and_post(
    app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    query = signed(token="BBBBB", echostr="1")
    assert app.get(f"/wx?{query}", **ANY).status_int == 403
    answer = app.post(f"/wx?{query}", message_xml(), **ANY)
    assert (answer.status_int, answer.body) == (403, b"403 Forbidden\n")
    assert "wrong signature" in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("seconds", [-301, 301, 86400])
def test_a_timestamp_too_far_from_now_is_403_and_the_log_says_how_far(
    seconds: int, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(clock=lambda: float(NOW + seconds))
    assert app.get(f"/wx?{signed(echostr='1')}", **ANY).status_int == 403
    assert f"{abs(seconds)} s {'ago' if seconds > 0 else 'from now'}" in caplog.text
    assert "check the clock" in caplog.text


@pytest.mark.parametrize("seconds", [-300, 0, 300])
def test_a_timestamp_near_enough_is_let_in(seconds: int) -> None:
    app = make_app(clock=lambda: float(NOW + seconds))
    assert app.get(f"/wx?{signed(echostr='1')}").body == b"1"


def test_max_age_0_turns_the_check_off() -> None:
    app = make_app(max_age=0, clock=lambda: NOW + 1e8)
    assert app.get(f"/wx?{signed(echostr='1')}").body == b"1"


def test_with_no_token_one_is_made_and_the_empty_one_verifies_nothing(tmp_path: Path) -> None:
    config = Config(token="", state_dir=tmp_path / "state", once=False)
    app = TestApp(create_application(config, clock=lambda: float(NOW)))
    assert app.get(f"/wx?{signed(token='', echostr='1')}", **ANY).status_int == 403
    made = (tmp_path / "state" / "callback_token").read_text().strip()
    assert app.get(f"/wx?{signed(token=made, echostr='1')}").body == b"1"


@pytest.mark.parametrize("path", ["/", "/wx/", "/WX", "/wx/more", "/favicon.ico", "/wx%0aINFO"])
def test_another_path_is_404_and_the_log_names_the_right_one(
    app: Any, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert app.get(f"{path}?{signed(echostr='1')}", **ANY).status_int == 404
    assert "the callback is at '/wx'" in caplog.text
    assert "\nINFO" not in caplog.text


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_another_method_is_405_with_allow(app: Any, method: str) -> None:
    answer = app.request(f"/wx?{signed()}", method=method, **ANY)
    assert answer.status_int == 405
    assert answer.headers["Allow"] == "GET, POST"
    assert answer.body == (b"" if method == "HEAD" else b"405 Method Not Allowed\n")


class Unread(io.BytesIO):
    """A body that must not be read."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise AssertionError(f"{size} bytes were read")


def bare(body: io.BytesIO, reply: Any = lambda message: message["Content"], **environ: Any) -> str:
    """Call the application without WebTest, which reads the body itself; return the status."""
    seen: list[str] = []
    application: Any = create_application(
        Config(token=TOKEN, once=False), reply, lambda: float(NOW)
    )
    base = {"REQUEST_METHOD": "POST", "PATH_INFO": "/wx", "QUERY_STRING": signed()}
    environ = {**base, "wsgi.input": body, **environ}
    list(application(environ, lambda status, _: seen.append(status)))
    return seen[0][:3]


def test_a_body_over_max_body_is_413_without_reading_it() -> None:
    assert bare(Unread(), CONTENT_LENGTH="262145") == "413"
    assert bare(Unread(), CONTENT_LENGTH="9" * 18) == "413"


def test_a_chunked_body_is_read_no_further_than_max_body() -> None:
    endless = io.BytesIO(b"a" * 3_000_000)
    assert bare(endless, **{"wsgi.input_terminated": True}) == "413"
    assert endless.tell() == 262145
    chunked = io.BytesIO(message_xml())
    assert bare(chunked, **{"wsgi.input_terminated": True}) == "200"


def test_a_body_of_no_length_is_not_waited_for() -> None:
    assert bare(io.BytesIO(message_xml())) == "400"


@pytest.mark.parametrize("length", ["-1", "1.5", "abc", "１", "9" * 5000])
def test_a_content_length_that_is_no_number_is_400(length: str) -> None:
    assert bare(Unread(), CONTENT_LENGTH=length) == "400"


def test_a_body_that_ends_early_or_breaks_off_is_400() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise ConnectionResetError

    assert bare(io.BytesIO(message_xml()), CONTENT_LENGTH="5000") == "400"
    assert bare(Broken(), CONTENT_LENGTH="5") == "400"


def test_an_unsigned_body_is_not_read() -> None:
    assert bare(Unread(), CONTENT_LENGTH="100", QUERY_STRING=signed(token="BBBBB")) == "403"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (b'{"MsgType": "text"}', "the body is JSON; choose XML as 数据格式"),
        (b"[]", "the body is JSON"),
        (b"<!DOCTYPE html><html></html>", "the body is an HTML page"),
        (b"<html/>", "the body is an HTML page"),
        (b"hello", "the body is not WeChat's XML"),
        (b"<a>b</a>", "the body is not WeChat's XML"),
        (b"<xml><a>b</a></xml>", "no ToUserName"),
        (b"<xml><ToUserName>a</ToUserName><Encrypt>b</Encrypt></xml>", "the message is encrypted"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]><xml>&a;</xml>', "the body is XML with a DOCTYPE"),
    ],
)
def test_a_body_that_is_no_message_is_400_and_the_log_says_why(
    app: Any, body: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = app.post(f"/wx?{signed()}", body, **ANY)
    assert (answer.status_int, answer.body) == (400, b"400 Bad Request\n")
    assert f"400 Bad Request: {why}" in caplog.text


queries = st.one_of(
    st.text(st.characters(min_codepoint=0, max_codepoint=255)),
    st.text(alphabet="signaturetimestampnonceechostr=&%+;0123456789abcdef"),
    st.text().map(lambda text: f"{signed()}&echostr={quote(text)}&{quote(text)}"),
)
bodies = st.one_of(
    st.binary(),
    st.text().map(lambda text: message_xml(text, MsgType=text)),
    st.tuples(st.integers(0, 300), st.binary(max_size=5)).map(
        lambda cut: message_xml()[: cut[0]] + cut[1] + message_xml()[cut[0] :]
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(method=st.sampled_from(["GET", "POST"]), query=queries, body=bodies)
def test_no_request_however_malformed_is_a_500_or_a_traceback(
    method: str, query: str, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    status = bare(
        io.BytesIO(body),
        lambda _: None,
        REQUEST_METHOD=method,
        QUERY_STRING=query,
        CONTENT_LENGTH=str(len(body)),
    )
    assert status in ("200", "400", "403")
    assert not [record for record in caplog.records if record.exc_info]
    assert all("\n" not in record.getMessage() for record in caplog.records)


@settings(max_examples=200)
@given(body=bodies)
def test_no_signed_body_is_a_500(body: bytes) -> None:
    answer = make_app(lambda _: None).post(f"/wx?{signed()}", body, **ANY)
    assert answer.status_int in (200, 400)


def test_errors_say_one_plain_line_and_nothing_secret(app: Any) -> None:
    for answer in (
        app.get("/", **ANY),
        app.get("/wx", **ANY),
        app.get(f"/wx?{signed(token='BBBBB', echostr='1')}", **ANY),
        app.put("/wx", **ANY),
    ):
        assert re.fullmatch(rb"4\d\d [A-Z][A-Za-z ]+\n", answer.body)
        assert answer.content_type == "text/plain"


def test_importing_the_module_needs_no_config_and_the_first_call_reads_it(
    run: Run, tmp_path: Path
) -> None:
    env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini")}
    out, err = run("-c", "import wxserver; print(wxserver.application)", env=env).communicate()
    assert (out[:12], err) == ("<function ap", "")
    _, err = run("-c", "import wxserver; wxserver.application({}, print)", env=env).communicate()
    assert f"ConfigError: {tmp_path / 'config.ini'}: No such file or directory" in err


def test_waitress_serves_it_as_any_wsgi_server_does(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text(f"[wechat]\ntoken = {TOKEN}\n")
    env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini")}
    port = free_port()
    run("-m", "waitress", "--listen", f"127.0.0.1:{port}", "wxserver:application", env=env)
    url = f"http://127.0.0.1:{port}/wx?{signed(timestamp=int(time.time()), echostr='437512')}"

    def echostr() -> bytes:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            return bytes(answer.read())
        return b""

    assert until(echostr) == b"437512"
