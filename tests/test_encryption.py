"""The encrypted modes as WeChat meets them: what is taken, what is refused, what is answered."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pytest
from conftest import APPID, KEY, NOW, ROOT, TOKEN, Run, message_xml, sealed, signed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import gunicorn
from test_xml import FREE, body_of, typed_pieces, with_text
from webtest import TestApp

import wechat.crypto
from wechat.config import Config, ConfigError
from wechat.crypto import MessageCipher
from wechat.message import from_xml, to_xml
from wxserver import create_application

ANY = {"expect_errors": True}
CIPHER = MessageCipher(KEY, APPID)


def echo(message: dict[str, Any]) -> Any:
    return message["Content"]


def make_app(
    encryption: str = "safe", reply: Callable[[dict[str, Any]], Any] = echo, **more: Any
) -> Any:
    more = {"token": TOKEN, "appid": APPID, "encoding_aes_key": KEY, "once": False, **more}
    return TestApp(create_application(Config(encryption=encryption, **more), reply, lambda: NOW))


def opened(body: bytes, token: str = TOKEN) -> dict[str, Any]:
    """Read an answer as WeChat does: the signature first, then what is encrypted."""
    envelope = from_xml(body)
    assert list(envelope) == ["Encrypt", "MsgSignature", "TimeStamp", "Nonce"]
    parts = (envelope["TimeStamp"], envelope["Nonce"], envelope["Encrypt"])
    assert wechat.crypto.verify(envelope["MsgSignature"], token, *parts)
    return from_xml(CIPHER.decrypt(envelope["Encrypt"]))


def compatible(plain: bytes, envelope: bytes) -> bytes:
    """Join the two as WeChat does in compatible mode: ToUserName once, the rest of both."""
    return plain.removesuffix(b"</xml>") + envelope[envelope.index(b"<Encrypt>") :]


@pytest.mark.parametrize("encryption", ["safe", "compatible"])
def test_an_encrypted_message_is_answered_encrypted(encryption: str) -> None:
    query, body = sealed(message_xml("你好"))
    answer = make_app(encryption).post(f"/wx?{query}", body)
    assert answer.status == "200 OK"
    assert answer.content_type == "application/xml"
    assert "你好".encode() not in answer.body
    assert from_xml(answer.body)["TimeStamp"] == str(NOW)
    assert opened(answer.body) == {
        "ToUserName": "o9AgO5Kd5ggOC-bXrbNODIiE3bGY",
        "FromUserName": "gh_97417a04a28d",
        "CreateTime": str(NOW),
        "MsgType": "text",
        "Content": "你好",
    }


def test_a_key_alone_means_safe() -> None:
    app = make_app(encryption="")
    assert app.post(f"/wx?{signed()}", message_xml(), **ANY).status_int == 403


def test_in_safe_mode_a_plain_message_is_refused_though_its_signature_is_right(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for more in ({}, {"encrypt_type": "raw"}, {"msg_signature": "0" * 40}):
        answer = make_app().post(f"/wx?{signed(**more)}", message_xml(), **ANY)
        assert (answer.status_int, answer.body) == (403, b"403 Forbidden\n")
    assert "the message is not encrypted, and encryption is safe" in caplog.text


def test_in_safe_mode_plain_fields_beside_encrypt_are_not_believed() -> None:
    query, body = sealed(message_xml("true"))
    both = body.replace(b"<Encrypt>", b"<MsgType>text</MsgType><Content>false</Content><Encrypt>")
    assert opened(make_app().post(f"/wx?{query}", both).body)["Content"] == "true"


def test_in_compatible_mode_a_plain_message_is_answered_in_the_clear() -> None:
    answer = make_app("compatible").post(f"/wx?{signed()}", message_xml("hello"))
    assert from_xml(answer.body)["Content"] == "hello"


def test_in_compatible_mode_the_body_has_both_and_the_encrypted_one_counts() -> None:
    query, body = sealed(message_xml("true"))
    both = compatible(message_xml("false"), body)
    assert opened(make_app("compatible").post(f"/wx?{query}", both).body)["Content"] == "true"


def test_in_plain_mode_the_plain_fields_of_a_compatible_body_are_answered() -> None:
    query, body = sealed(message_xml("encrypted"))
    both = compatible(message_xml("plain"), body)
    app = make_app("plain", encoding_aes_key="", appid="")
    assert from_xml(app.post(f"/wx?{query}", both).body)["Content"] == "plain"


def test_in_plain_mode_an_encrypted_message_is_400_and_the_log_says_which_key_to_set(
    caplog: pytest.LogCaptureFixture,
) -> None:
    query, body = sealed(message_xml())
    app = make_app("plain", encoding_aes_key="", appid="")
    assert app.post(f"/wx?{query}", body, **ANY).status_int == 400
    assert "set [wechat] encoding_aes_key" in caplog.text


def test_the_verification_is_the_same_in_every_mode() -> None:
    for encryption in ("plain", "compatible", "safe"):
        assert make_app(encryption).get(f"/wx?{signed(echostr='123')}").body == b"123"


def test_no_reply_is_success_in_the_clear() -> None:
    query, body = sealed(message_xml())
    for nothing in (lambda _: None, lambda _: 1 / 0):
        answer = make_app(reply=nothing).post(f"/wx?{query}", body)
        assert (answer.content_type, answer.body) == ("text/plain", b"success")


def test_msg_signature_is_what_counts_not_signature() -> None:
    query, body = sealed(message_xml())
    for change in ({"signature": "0" * 40}, {"signature": None}):
        fields = {k: v for k, v in {**dict(parse_qsl(query)), **change}.items() if v}
        assert make_app().post(f"/wx?{urlencode(fields)}", body).status_int == 200


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("msg_signature", None, 400),
        ("msg_signature", "0" * 39, 400),
        ("msg_signature", "0" * 40, 403),
        ("timestamp", str(NOW + 1), 403),
        ("nonce", "another", 403),
        ("encrypt_type", None, 403),
        ("encrypt_type", "AES", 403),
    ],
)
def test_an_encrypted_message_whose_query_is_not_right_is_refused(
    name: str, value: str | None, status: int
) -> None:
    query, body = sealed(message_xml())
    fields = {k: v for k, v in {**dict(parse_qsl(query)), name: value}.items() if v}
    assert make_app().post(f"/wx?{urlencode(fields)}", body, **ANY).status_int == status


def test_an_encrypted_message_too_far_from_now_is_403(caplog: pytest.LogCaptureFixture) -> None:
    query, body = sealed(message_xml(), timestamp=NOW - 301)
    assert make_app().post(f"/wx?{query}", body, **ANY).status_int == 403
    assert "made 301 s ago" in caplog.text


def resealed(encrypt: str) -> tuple[str, bytes]:
    """Sign ``encrypt`` as only the holder of the Token can."""
    query, _ = sealed(b"")
    signature = wechat.crypto.sign(TOKEN, str(NOW), "1514711492", encrypt)
    return urlencode(dict(parse_qsl(query)) | {"msg_signature": signature}), to_xml(
        {"ToUserName": "gh_97417a04a28d", "Encrypt": encrypt}
    )


@pytest.mark.parametrize(
    ("encrypt", "why"),
    [
        ("!", "base64"),
        (base64.b64encode(b"x" * 40).decode(), "blocks"),
        (MessageCipher("B" * 43, APPID).encrypt(message_xml()), "encoding_aes_key|length|AppID"),
        (MessageCipher(KEY, "wxother").encrypt(message_xml()), "[wechat] appid"),
    ],
)
def test_what_cannot_be_decrypted_is_the_same_403_told_apart_in_the_log_alone(
    encrypt: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    query, body = resealed(encrypt)
    answer = make_app().post(f"/wx?{query}", body, **ANY)
    forged = make_app().post(f"/wx?{query}", body.replace(b"<Encrypt>", b"<Encrypt>A"), **ANY)
    assert (answer.status, answer.body, answer.headerlist) == (
        forged.status,
        forged.body,
        forged.headerlist,
    )
    assert (answer.status_int, answer.body) == (403, b"403 Forbidden\n")
    assert any(part in caplog.text for part in why.split("|"))


@pytest.mark.parametrize(
    "written",
    [
        lambda xml: xml.replace("<![CDATA[", "").replace("]]>", ""),
        lambda xml: xml.replace("\n", "\r\n"),
        lambda xml: f'<?xml version="1.0"?>{xml}',
    ],
)
def test_an_envelope_may_be_any_xml_that_says_the_same(written: Callable[[str], str]) -> None:
    query, body = sealed(message_xml("hello"))
    answer = make_app().post(f"/wx?{query}", written(body.decode()).encode())
    assert opened(answer.body)["Content"] == "hello"


def test_a_body_without_encrypt_is_refused() -> None:
    query, _ = sealed(message_xml())
    for body in (message_xml(), b"<xml><Encrypt>a</Encrypt><Encrypt>b</Encrypt></xml>"):
        assert make_app().post(f"/wx?{query}", body, **ANY).status_int == 403


def test_an_encrypted_body_over_max_body_is_413() -> None:
    query, body = sealed(message_xml("x" * 2000))
    assert make_app(max_body=1024).post(f"/wx?{query}", body, **ANY).status_int == 413


@pytest.mark.parametrize("inside", [b"", b"hello", b"<xml></xml>", b"<!DOCTYPE x><xml/>", b"{}"])
def test_what_is_encrypted_but_no_message_is_refused(inside: bytes) -> None:
    query, body = sealed(inside)
    assert make_app().post(f"/wx?{query}", body, **ANY).status_int in (400, 403)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_mangled_envelope_is_accepted_or_a_500(data: Any) -> None:
    query, body = sealed(message_xml("private"))
    start = data.draw(st.integers(body.index(b"<Encrypt>") + 9, len(body) - 20))
    end = data.draw(st.integers(start + 1, len(body)))
    piece = data.draw(st.binary(max_size=40) | st.text("A=/+ \n<&]", max_size=40).map(str.encode))
    mangled = body[:start] + piece + body[end:]
    answer = make_app().post(f"/wx?{query}", mangled, **ANY)
    if mangled != body:
        assert answer.status_int in (400, 403)
        assert b"private" not in answer.body


@given(
    st.text("ABCDwxyz0189+/=", max_size=200)
    | st.binary(max_size=96).map(lambda data: base64.b64encode(data).decode())
)
def test_not_even_the_holder_of_the_token_gets_past_the_key(encrypt: str) -> None:
    query, body = resealed(encrypt)
    assert make_app().post(f"/wx?{query}", body, **ANY).status_int == 403


def test_without_cryptography_the_start_says_what_to_install(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cryptography.py").write_text("raise ModuleNotFoundError('cryptography')")
    (tmp_path / "config.ini").write_text(f"[wechat]\nappid = {APPID}\nencoding_aes_key = {KEY}\n")
    env = {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "WXSERVER_CONFIG": str(tmp_path / "config.ini"),
    }
    settings = ("-c", str(ROOT / "gunicorn.conf.py"), "-b", "127.0.0.1:0")
    for command in ((str(ROOT / "wxserver.py"),), ("-m", "gunicorn", *settings, "wxserver")):
        process = run(*command, env=env)
        _, errors = process.communicate(timeout=20)
        assert process.returncode != 0
        assert "encryption = safe needs the package cryptography: pip install '.[safe]'" in errors
        assert "Traceback" not in errors


def test_without_a_key_cryptography_is_not_imported(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cryptography.py").write_text("raise RuntimeError('imported')")
    code = "import wxserver as s, wechat.config as c; s.create_application(c.Config(token='AAAAA'))"
    process = run("-c", code, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 0


def test_under_gunicorn_an_encrypted_message_is_answered(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text(f"[wechat]\nappid = {APPID}\n")
    server = gunicorn(run, tmp_path, WX_ENCODING_AES_KEY=KEY).ready()
    token = server.token()
    status, body = server.ask_sealed(message_xml("你好"))
    assert status == 200
    assert opened(body, token)["Content"] == "你好"
    assert server.ask(message_xml())[0] == 403


def test_a_config_that_cannot_be_is_refused_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="encryption: safe needs encoding_aes_key"):
        Config(encryption="safe")
    with pytest.raises(ConfigError, match="encoding_aes_key: needs appid"):
        Config(encoding_aes_key=KEY)


@settings(max_examples=300)
@given(st.data())
def test_what_a_follower_typed_is_text_in_all_three_modes(data: st.DataObject) -> None:
    message, path = data.draw(st.sampled_from(FREE))
    encrypts = ["<Encrypt>", "</Encrypt>", f"]]></{path[-1]}><Encrypt><![CDATA[x]]></Encrypt>"]
    pieces = st.sampled_from([*typed_pieces(path), *encrypts]) | st.text(max_size=5)
    text = "".join(data.draw(st.lists(pieces, max_size=6))).replace("\r", "")
    allowed = re.sub("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)
    xml = body_of(with_text(message, path, text))
    query, body = sealed(xml)
    for encryption, sent in {
        "plain": (signed(), xml),
        "compatible": (query, compatible(xml, body)),
        "safe": (query, body),
    }.items():
        seen: list[dict[str, Any]] = []
        answer = make_app(encryption, seen.append).post(f"/wx?{sent[0]}", sent[1])
        assert answer.body == b"success"
        assert seen == [with_text(message, path, allowed.replace("]]]]><![CDATA[>", "]]>"))]
