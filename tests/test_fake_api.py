"""The fake API: the platform's rules over real HTTP, its switches, and the command."""

from __future__ import annotations

import json
import re
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import APPID, APPSECRET, Run

import wechat.api
import wechat.config
from wxsim import fake_api
from wxsim.fake_api import FakeApi

ACCOUNT = {"grant_type": "client_credential", "appid": APPID, "secret": APPSECRET}
CLASSIC = f"/cgi-bin/token?grant_type=client_credential&appid={APPID}&secret={APPSECRET}"
STABLE = "/cgi-bin/stable_token"
SEND, TYPING = "/cgi-bin/message/custom/send", "/cgi-bin/message/custom/typing"
CHECK = "/cgi-bin/callback/check"


class Clock:
    now = datetime(2026, 11, 21, 12, tzinfo=timezone(timedelta(hours=8))).timestamp()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def api(clock: Clock, said: list[str]) -> Iterator[FakeApi]:
    with FakeApi(APPID, APPSECRET, clock=lambda: clock.now, say=said.append) as api:
        yield api


def fetch(base: str, path: str, body: object = None) -> Any:
    """GET, or POST ``body`` as JSON or as the bytes it is; return the JSON of the answer."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    with urllib.request.urlopen(base + path, body, timeout=10) as answer:
        return json.loads(answer.read())


def errcode(api: FakeApi, path: str, body: object = None, token: str | None = None) -> int:
    """Call with ``token``, by default the one given last; return the errcode, 0 for none."""
    whole = f"{path}?access_token={api.token if token is None else token}"
    return int(fetch(api.base, whole, body).get("errcode", 0))


def state(api: FakeApi, token: str) -> int:
    return errcode(api, "/cgi-bin/getcallbackip", token=token)


def classic(api: FakeApi) -> Any:
    return fetch(api.base, CLASSIC)


def stable(api: FakeApi, force: bool = False) -> Any:
    return fetch(api.base, STABLE, ACCOUNT | {"force_refresh": force})


def test_every_classic_call_gives_a_new_token_and_the_one_before_has_five_minutes(
    api: FakeApi, clock: Clock
) -> None:
    first, second = classic(api), classic(api)
    assert first["expires_in"] == second["expires_in"] == 7200
    assert len(first["access_token"]) == 512
    old, new = first["access_token"], second["access_token"]
    clock.now += 299
    assert (state(api, old), state(api, new)) == (0, 0)
    clock.now += 1
    assert (state(api, old), state(api, new)) == (40001, 0)


def test_the_five_minutes_do_not_lengthen_a_life(api: FakeApi, clock: Clock) -> None:
    old = classic(api)["access_token"]
    clock.now += 7100
    classic(api)
    clock.now += 99
    assert state(api, old) == 0
    clock.now += 1
    assert state(api, old) == 40001


@pytest.mark.parametrize("give", [classic, stable])
def test_a_token_that_nothing_replaced_expires(
    api: FakeApi, clock: Clock, give: Callable[[FakeApi], Any]
) -> None:
    token = give(api)["access_token"]
    clock.now += 7199
    assert state(api, token) == 0
    clock.now += 1
    assert state(api, token) == 42001


def test_a_stable_token_is_given_again_until_five_minutes_before_its_end(
    api: FakeApi, clock: Clock
) -> None:
    first = stable(api)
    clock.now += 6900
    assert stable(api) == first | {"expires_in": 300}
    clock.now += 1
    second = stable(api)
    assert second["expires_in"] == 7200
    assert second["access_token"] != first["access_token"]
    clock.now += 298
    assert state(api, first["access_token"]) == 0
    clock.now += 1
    assert state(api, first["access_token"]) == 42001
    assert state(api, second["access_token"]) == 0


def test_force_refresh_kills_the_old_token(api: FakeApi) -> None:
    old, new = stable(api)["access_token"], stable(api, force=True)["access_token"]
    assert (state(api, old), state(api, new)) == (40001, 0)


def test_force_refresh_within_thirty_seconds_of_another_does_not_refresh(
    api: FakeApi, clock: Clock
) -> None:
    token = stable(api, force=True)["access_token"]
    clock.now += 29
    assert stable(api, force=True)["access_token"] == token
    clock.now += 1
    assert stable(api, force=True)["access_token"] != token


def test_force_refresh_is_for_twenty_times_a_day(api: FakeApi, clock: Clock) -> None:
    for _ in range(20):
        token = stable(api, force=True)["access_token"]
        clock.now += 30
    assert stable(api, force=True)["errcode"] == 45009
    assert stable(api)["access_token"] == token


def test_a_classic_token_is_for_two_thousand_times_a_day_of_beijing(
    api: FakeApi, clock: Clock
) -> None:
    assert all("access_token" in classic(api) for _ in range(2000))
    assert classic(api)["errcode"] == 45009
    clock.now += 12 * 3600 - 1  # it was noon
    assert classic(api)["errcode"] == 45009
    clock.now += 1
    assert "access_token" in classic(api)


def test_the_two_kinds_do_not_touch_each_other(api: FakeApi, clock: Clock) -> None:
    tokens = [stable(api)["access_token"], classic(api)["access_token"]]
    stable(api, force=True)
    assert state(api, tokens[1]) == 0
    kept = stable(api)["access_token"]
    classic(api)
    clock.now += 300
    assert (state(api, kept), state(api, tokens[1])) == (0, 40001)


FETCH_ERRORS: list[tuple[dict[str, Any], int]] = [
    ({"grant_type": "authorization_code"}, 40002),
    ({"grant_type": ""}, 40002),
    ({"appid": ""}, 41002),
    ({"appid": "wxother"}, 40013),
    ({"secret": ""}, 41004),
    ({"secret": "other"}, 40125),
]


@pytest.mark.parametrize(("wrong", "expected"), FETCH_ERRORS)
def test_both_kinds_refuse_a_wrong_account_alike(
    api: FakeApi, wrong: dict[str, Any], expected: int
) -> None:
    asked = ACCOUNT | wrong
    query = "&".join(f"{name}={value}" for name, value in asked.items())
    assert fetch(api.base, STABLE, asked)["errcode"] == expected
    assert fetch(api.base, f"/cgi-bin/token?{query}")["errcode"] == expected
    assert fetch(api.base, STABLE, {k: v for k, v in asked.items() if v})["errcode"] == expected
    assert api.token == ""


@pytest.mark.parametrize("field", ["appid", "secret"])
def test_an_account_of_other_types_than_text_is_refused(api: FakeApi, field: str) -> None:
    for value in ([APPID], {"a": 1}, 7, True):
        assert fetch(api.base, STABLE, ACCOUNT | {field: value})["errcode"] in (40013, 40125)


def test_without_an_account_any_will_do_but_none_will_not() -> None:
    with FakeApi() as api:
        assert "access_token" in fetch(api.base, STABLE, ACCOUNT | {"secret": "any", "appid": "wx"})
        assert fetch(api.base, STABLE, ACCOUNT | {"appid": ""})["errcode"] == 41002


@pytest.mark.parametrize(
    ("token", "expected"),
    [("", 41001), ("never-given", 40001), ("%E4%BD%A0", 40014), ("a+b", 40014)],
)
def test_a_call_needs_a_token_that_was_given(api: FakeApi, token: str, expected: int) -> None:
    assert state(api, token) == expected


def test_a_call_that_is_not_there_is_an_invalid_url(api: FakeApi) -> None:
    stable(api)
    for path in ("/cgi-bin", "/cgi-bin/", "/cgi-bin//x", "/cgi-bin/../x", "/menu/get", "/"):
        assert errcode(api, path) == 40066


@pytest.mark.parametrize("path", [STABLE, SEND, TYPING, CHECK])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (None, 43002),
        (b"", 44002),
        (b"{", 47001),
        (b"[]", 47001),
        (b"\xff", 47001),
        (b"[" * 100_000, 47001),
        (b"1" * 10_000, 47001),
    ],
)
def test_what_must_be_posted_must_be_a_json_object(
    api: FakeApi, path: str, body: bytes | None, expected: int
) -> None:
    classic(api)
    assert errcode(api, path, body) == expected


def test_an_error_has_the_platforms_words_and_a_rid(api: FakeApi) -> None:
    answer = fetch(api.base, "/cgi-bin/getcallbackip")
    assert re.fullmatch(r"access_token missing rid: [0-9a-f]{8}(-[0-9a-f]{8}){2}", answer["errmsg"])
    assert set(wechat.api.ADVICE) <= set(fake_api.ERRMSG)


def test_expire_ends_every_token(api: FakeApi) -> None:
    tokens = [give(api)["access_token"] for give in (classic, classic, stable)]
    assert [state(api, token) for token in tokens] == [0, 0, 0]
    api.expire()
    assert [state(api, token) for token in tokens] == [42001] * 3
    assert state(api, stable(api)["access_token"]) == 0


@pytest.mark.parametrize(
    ("message", "sees"),
    [
        ({"msgtype": "text", "text": {"content": "你好\n世界\x1b[2J"}}, "你好 世界 [2J"),
        ({"msgtype": "image", "image": {"media_id": "m1"}}, '[image] {"media_id": "m1"}'),
    ],
)
def test_a_message_is_said_in_one_line_as_the_follower_would_see_it(
    api: FakeApi, said: list[str], message: dict[str, Any], sees: str
) -> None:
    classic(api)
    said.clear()
    assert errcode(api, SEND, {"touser": "o1", **message}) == 0
    assert [line.split(" ", 1)[1] for line in said] == [f"o1 sees: {sees}", f"POST {SEND} ok"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (SEND, {"msgtype": "text", "text": {"content": "x"}}, 40003),
        (SEND, {"touser": ["o1"], "msgtype": "text", "text": {"content": "x"}}, 40003),
        (SEND, {"touser": "o1", "text": {"content": "x"}}, 40008),
        (SEND, {"touser": "o1", "msgtype": ["text"], "text": {"content": "x"}}, 40008),
        (SEND, {"touser": "o1", "msgtype": "text"}, 47001),
        (SEND, {"touser": "o1", "msgtype": "text", "text": "x"}, 47001),
        (SEND, {"touser": "o1", "msgtype": "text", "text": {"content": ""}}, 44004),
        (SEND, {"touser": "o1", "msgtype": "text", "text": {"content": 7}}, 44004),
        (TYPING, {"command": "Typing"}, 40003),
        (TYPING, {"touser": "o1", "command": "typing"}, 45072),
        (CHECK, {"action": "trace", "check_operator": "DEFAULT"}, 40202),
        (CHECK, {"action": "all", "check_operator": {}}, 40203),
    ],
)
def test_a_wrong_field_has_its_errcode_and_no_follower_sees_it(
    api: FakeApi, said: list[str], path: str, body: dict[str, Any], expected: int
) -> None:
    classic(api)
    assert errcode(api, path, body) == expected
    assert "sees" not in "".join(said)


def test_typing_is_seen_too(api: FakeApi, said: list[str]) -> None:
    classic(api)
    for command in ("Typing", "CancelTyping"):
        assert errcode(api, TYPING, {"touser": "o1", "command": command}) == 0
    assert sum("o1 sees: typing" in line for line in said) == 2


@pytest.mark.parametrize(
    ("action", "keys"), [("all", {"dns", "ping"}), ("dns", {"dns"}), ("ping", {"ping"})]
)
def test_callback_check_answers_what_was_asked_for(
    api: FakeApi, action: str, keys: set[str]
) -> None:
    classic(api)
    asked = {"action": action, "check_operator": "CHINANET"}
    answer = fetch(api.base, f"{CHECK}?access_token={api.token}", asked)
    assert set(answer) == keys
    for ping in answer.get("ping", []):
        assert (ping["from_operator"], ping["package_loss"]) == ("CHINANET", "0%")
    for dns in answer.get("dns", []):
        assert set(dns) == {"ip", "real_operator"}


def form(content: bytes, name: str, field: str = "media") -> bytes:
    head = f'Content-Disposition: form-data; name="{field}"; filename="{name}"'
    kind = b"Content-Type: image/jpeg"
    return b"\r\n".join([b"--b", head.encode(), kind, b"", content, b"--b--", b""])


def media(api: FakeApi, kind: str, body: bytes | None) -> Any:
    return fetch(api.base, f"/cgi-bin/media/upload?type={kind}&access_token={api.token}", body)


MB = 1048576
FILES = [
    ("image", "a.png", 10 * MB, 0),
    ("image", "a.JPEG", 1, 0),
    ("image", "a.png", 10 * MB + 1, 40009),
    ("image", "a.bmp", 1, 40005),
    ("voice", "a.mp3", 2 * MB, 0),
    ("voice", "a.amr", 2 * MB + 1, 40010),
    ("voice", "a.wav", 1, 40005),
    ("video", "a.mp4", 10 * MB, 0),
    ("video", "a.mp4", 10 * MB + 1, 40011),
    ("thumb", "a.jpg", 65536, 0),
    ("thumb", "a.jpg", 65537, 40012),
    ("thumb", "a.png", 1, 40005),
    ("file", "a.png", 1, 40004),
    ("", "a.png", 1, 40004),
]


@pytest.mark.parametrize(("kind", "name", "size", "expected"), FILES)
def test_a_file_has_the_limits_of_its_kind(
    api: FakeApi, kind: str, name: str, size: int, expected: int
) -> None:
    classic(api)
    answer = media(api, kind, form(bytes(size), name))
    assert answer.get("errcode", 0) == expected
    if not expected:
        key = "thumb_media_id" if kind == "thumb" else "media_id"
        assert set(answer) == {"type", key, "created_at"}


def test_what_is_no_form_with_a_file_has_no_media_data(api: FakeApi) -> None:
    classic(api)
    whole = form(b"x", "a.jpg")
    encoded = whole.replace(b'filename="a.jpg"', b"filename*=utf-8''a.jpg")
    for body in (b"", b"x", whole[:-4], form(b"", "a.jpg"), form(b"x", ""), encoded):
        assert media(api, "image", body)["errcode"] == 41005
    assert media(api, "image", form(b"x", "a.jpg", "file"))["errcode"] == 41005
    assert media(api, "image", None)["errcode"] == 43002


def test_a_file_is_given_back_for_three_days(api: FakeApi, clock: Clock, said: list[str]) -> None:
    classic(api)
    media_id = media(api, "image", form(b"\r\n--b\r\n", "照片.jpg"))["media_id"]
    assert f"照片.jpg is here: image, 7 bytes, MediaId {media_id}" in said[-2]
    clock.now += 3 * 86400 - 1
    classic(api)
    path = f"/cgi-bin/media/get?access_token={api.token}"
    with urllib.request.urlopen(f"{api.base}{path}&media_id={media_id}", timeout=10) as answer:
        assert (answer.read(), answer.headers["Content-Type"]) == (b"\r\n--b\r\n", "image/jpeg")
    clock.now += 1
    assert fetch(api.base, f"{path}&media_id={media_id}")["errcode"] == 40007
    assert fetch(api.base, f"{path}&media_id=none")["errcode"] == 40007
    assert fetch(api.base, path)["errcode"] == 41006


def test_of_many_files_the_last_are_remembered(api: FakeApi) -> None:
    classic(api)
    made = [media(api, "image", form(b"x", "a.jpg"))["media_id"] for _ in range(101)]
    path = f"/cgi-bin/media/get?access_token={api.token}&media_id="
    assert fetch(api.base, path + made[0])["errcode"] == 40007
    assert urllib.request.urlopen(api.base + path + made[1], timeout=10).read() == b"x"


def test_every_other_path_is_ok_with_a_good_token_and_what_it_got_is_said(
    api: FakeApi, said: list[str]
) -> None:
    classic(api)
    said.clear()
    menu = {"button": [{"name": "今日", "type": "click", "key": "K"}]}
    path = "/cgi-bin/menu/create"
    assert errcode(api, path, json.dumps(menu, ensure_ascii=False).encode()) == 0
    assert errcode(api, path, menu, token="never-given") == 40001
    assert errcode(api, "/cgi-bin/get_current_selfmenu_info") == 0
    assert [line.split(" ", 1)[1] for line in said] == [
        f'{path} got {{"button": [{{"name": "今日", "type": "click", "key": "K"}}]}}',
        f"POST {path} ok",
        f"POST {path} errcode 40001",
        "GET /cgi-bin/get_current_selfmenu_info ok",
    ]


def test_every_request_is_one_line_without_secrets(api: FakeApi, said: list[str]) -> None:
    token = classic(api)["access_token"]
    stable(api)
    state(api, token)
    state(api, "never-given")
    api.failure = fake_api.GARBAGE
    with pytest.raises(ValueError, match="Expecting value"):
        classic(api)
    assert [line.split(" ", 1)[1] for line in said] == [
        "GET /cgi-bin/token ok",
        "POST /cgi-bin/stable_token ok",
        "GET /cgi-bin/getcallbackip ok",
        "GET /cgi-bin/getcallbackip errcode 40001",
        "GET /cgi-bin/token text/html",
    ]
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in said)


MALFORMED = [
    (b"POST /x HTTP/1.0\r\nContent-Length: ten\r\n\r\n", b"400"),
    (b"POST /x HTTP/1.0\r\nContent-Length: -1\r\n\r\n", b"400"),
    (b"POST /x HTTP/1.0\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b"400"),
    (b"POST /x HTTP/1.0\r\nContent-Length: 12582913\r\n\r\n", b"413"),
    (b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
    (b"POST /cgi-bin/stable_token HTTP/1.0\r\nContent-Length: 9\r\n\r\n{}", b"200"),
    (b"GET http://[/cgi-bin/token?appid=%ff&=&& HTTP/1.0\r\n\r\n", b"200"),
    (b"GET //[?access_token=\xff\x1b HTTP/1.0\r\n\r\n", b"200"),
    (b"BREW /x HTTP/1.0\r\n\r\n", b"501"),
    (b"GET /" + b"x" * 70_000 + b" HTTP/1.0\r\n\r\n", b"414"),
    (b"nonsense\x00 of four words\r\n\r\n", b"400"),
]


@pytest.mark.parametrize(("request_", "status"), MALFORMED)
def test_a_malformed_request_is_answered_and_said_without_a_traceback(
    api: FakeApi,
    said: list[str],
    capfd: pytest.CaptureFixture[str],
    request_: bytes,
    status: bytes,
) -> None:
    address = ("127.0.0.1", int(api.base.rpartition(":")[2]))
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.0 " + status) or b"Error code: " + status in answer
    assert len(said) == 1
    assert said[0].isprintable()
    assert "access_token" in classic(api)
    assert capfd.readouterr() == ("", "")


def test_a_client_that_hangs_up_leaves_no_traceback(
    api: FakeApi, capfd: pytest.CaptureFixture[str]
) -> None:
    api.failure, api.drip = b" " * 100, 0.001
    address = ("127.0.0.1", int(api.base.rpartition(":")[2]))
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    api.failure = None
    assert "access_token" in classic(api)
    assert capfd.readouterr().err == ""


def test_the_account_and_the_tokens_do_not_show_in_its_repr(api: FakeApi) -> None:
    token = classic(api)["access_token"]
    assert APPSECRET not in repr(api)
    assert token not in repr(api)


COMMAND = ("-m", "wxsim", "api")


class Command:
    """The running command; what it printed at the start, and its address."""

    def __init__(self, run: Run, folder: Path, *options: str, config: str = "", **env: str) -> None:
        path = folder / "config.ini"
        path.write_text(config)
        env = {"WXSERVER_CONFIG": str(path), **env}
        self.process = run(*COMMAND, "--port", "0", *options, env=env)
        self.start = ""
        while "Ctrl-C" not in self.start:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()
            self.start += line
        self.base = self.start.partition("api_base = ")[2].split()[0]

    def type(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return str(self.process.stdout.readline())

    def raw(self, path: str = CLASSIC) -> bytes:
        with urllib.request.urlopen(self.base + path, timeout=10) as answer:
            return bytes(answer.read())


def test_the_command_prints_what_to_put_into_config_ini(run: Run, tmp_path: Path) -> None:
    command = Command(run, tmp_path)
    lines = command.start.splitlines()
    section = lines.index("[access_token]")
    (tmp_path / "printed.ini").write_text("\n".join(lines[section : section + 2]))
    secrets = {"WX_APPID": "wxany", "WX_APPSECRET": "any"}
    token = wechat.api.token_store(wechat.config.load(tmp_path / "printed.ini", secrets)).get()
    assert "ip_list" in fetch(command.base, f"/cgi-bin/getcallbackip?access_token={token}")
    assert "any appid with any appsecret" in lines[0]


def test_the_command_takes_the_account_of_config_ini_and_shows_no_secret(
    run: Run, tmp_path: Path
) -> None:
    account = f"[wechat]\nappid = {APPID}\nappsecret = {APPSECRET}\n"
    command = Command(run, tmp_path, config=account)
    token = fetch(command.base, CLASSIC)["access_token"]
    assert fetch(command.base, CLASSIC[:-1])["errcode"] == 40125
    command.process.send_signal(signal.SIGINT)
    out, err = command.process.communicate(timeout=10)
    shown = command.start + out + err
    assert APPID in command.start
    assert out.count("GET /cgi-bin/token") == 2
    assert APPSECRET not in shown
    assert token not in shown


def test_ctrl_c_ends_the_command_quietly(run: Run, tmp_path: Path) -> None:
    command = Command(run, tmp_path)
    command.process.send_signal(signal.SIGINT)
    assert command.process.communicate(timeout=10) == ("", "")
    assert command.process.returncode == 0


def test_words_typed_in_the_terminal_are_obeyed(run: Run, tmp_path: Path) -> None:
    command = Command(run, tmp_path)
    token = fetch(command.base, CLASSIC)["access_token"]
    command.process.stdout.readline()
    call = f"/cgi-bin/getcallbackip?access_token={token}"
    outcomes: dict[str, Callable[[bytes], bool]] = {
        "fail 48001": lambda answer: json.loads(answer)["errcode"] == 48001,
        "garbage": lambda answer: answer.startswith(b"<html>"),
        "ok": lambda answer: "ip_list" in json.loads(answer),
        "  expire ": lambda answer: json.loads(answer)["errcode"] == 42001,
    }
    for word, is_so in outcomes.items():
        assert "done" in command.type(word)
        assert is_so(command.raw(call))
        command.process.stdout.readline()
    command.type("expires-in 60")
    command.type("token-length 16")
    answer = json.loads(command.raw())
    assert (answer["expires_in"], len(answer["access_token"])) == (60, 16)


def test_a_wrong_word_is_answered_with_help_and_a_wrong_value_with_what_is_allowed(
    run: Run, tmp_path: Path
) -> None:
    command = Command(run, tmp_path)
    assert "from 0 to 3600, not 'nan'" in command.type("slow nan")
    assert "from -1 to 100000000, not ''" in command.type("fail")
    shown = command.type("holp")
    for word in ("garbage", "slow", "expires-in", "token-length", "expire", "ok", "help"):
        shown += command.process.stdout.readline()
        assert f"\n  {word}" in shown
    assert "  fail ERRCODE" in shown


def test_a_terminal_without_chinese_is_no_obstacle(run: Run, tmp_path: Path) -> None:
    command = Command(run, tmp_path, PYTHONIOENCODING="ascii:strict")
    command.process.stdin.buffer.write("你好\n".encode())
    assert command.type("").startswith("  fail ERRCODE")
    token = fetch(command.base, CLASSIC)["access_token"]
    message = {"touser": "o1", "msgtype": "text", "text": {"content": "你好"}}
    assert fetch(command.base, f"{SEND}?access_token={token}", message)["errcode"] == 0
    command.process.send_signal(signal.SIGINT)
    assert r"o1 sees: \u4f60\u597d" in command.process.communicate(timeout=10)[0]


def test_the_options_are_the_same_switches(run: Run, tmp_path: Path) -> None:
    command = Command(run, tmp_path, "--expires-in", "60", "--token-length", "20")
    answer = json.loads(command.raw())
    assert (answer["expires_in"], len(answer["access_token"])) == (60, 20)
    assert Command(run, tmp_path, "--garbage").raw().startswith(b"<html>")
    assert json.loads(Command(run, tmp_path, "--fail", "45009").raw())["errcode"] == 45009


def test_slow_is_a_wait_before_the_answer(run: Run, tmp_path: Path) -> None:
    command = Command(run, tmp_path, "--slow", "0.3")
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(command.base + CLASSIC, timeout=0.1)
    assert "access_token" in json.loads(command.raw())


def test_the_command_goes_on_when_nobody_types(run: Run, tmp_path: Path) -> None:
    command = Command(run, tmp_path)
    command.process.stdin.close()
    assert "access_token" in json.loads(command.raw())
    command.process.stdin = None
    command.process.send_signal(signal.SIGINT)
    assert command.process.communicate(timeout=10)[1] == ""


BACKGROUND = """
import fcntl, os, subprocess, sys, termios, urllib.request
_, terminal = os.openpty()
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
command = subprocess.Popen(
    [sys.executable, "-m", "wxsim", "api", "--port", "0"],
    stdin=terminal, stdout=subprocess.PIPE, text=True, preexec_fn=os.setpgrp,
)
try:
    lines = iter(command.stdout.readline, "")
    base = next(line.split()[2] for line in lines if line.startswith("api_base"))
    next(line for line in lines if "Ctrl-C" in line)
    print(urllib.request.urlopen(base, timeout=3).status)
finally:
    command.kill()
"""


def test_in_the_background_of_a_shell_it_is_not_stopped(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.ini"
    config.touch()
    process = run("-c", BACKGROUND, env={"WXSERVER_CONFIG": str(config)})
    assert process.communicate(timeout=20)[0] == "200\n"


def test_a_taken_port_is_one_line(run: Run, tmp_path: Path) -> None:
    command = Command(run, tmp_path)
    port = command.base.rpartition(":")[2]
    env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini")}
    process = run(*COMMAND, "--port", port, env=env)
    assert process.communicate(timeout=10) == (
        "",
        f"wxsim api: port {port}: Address already in use\n",
    )
    assert process.returncode == 1


def test_it_listens_on_loopback_alone(api: FakeApi) -> None:
    port = int(api.base.rpartition(":")[2])
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))  # free, unless somebody listens on every address
