"""The simulator as its user meets it: what is printed, and how it ends, for good bots and bad."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from conftest import APPID, KEY, ROOT, TOKEN, Run, message_xml
from serving import Server, free_port, gunicorn, until

import wechat.crypto
import wxsim.__main__
from wechat.crypto import MessageCipher
from wechat.message import from_xml, to_xml
from wxsim import messages
from wxsim.follower import APOLOGY

WXSIM = ("-m", "wxsim")
ENCRYPTED = f"[wechat]\nappid = {APPID}\nencoding_aes_key = {KEY}\n"
# Leaves out what Windows has not.
WITHOUT_UNIX = """
import runpy, signal, sys
for name in ("fcntl", "pwd", "resource", "readline"):
    sys.modules[name] = None
del signal.SIGTTIN
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
GAVE_UP = "; WeChat gives up)\n"


class Asked(BaseHTTPRequestHandler):
    """One request to a bot that is broken in a test's own way, and the means to answer it."""

    server: Bot
    timeout = 10  # a test that fails must not hang

    def do_GET(self) -> None:
        self.query = dict(parse_qsl(urlsplit(self.path).query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self)
        if (answer := self.server.answer(self)) is not None:
            self.say(answer)

    def do_POST(self) -> None:
        self.do_GET()

    def say(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def reply(self, *without: str, **fields: Any) -> bytes:
        """Return a good text reply with ``fields`` over or beside its own."""
        message = from_xml(self.body)
        whole = {
            "ToUserName": message.get("FromUserName", messages.openid("me")),
            "FromUserName": message["ToUserName"],
            "CreateTime": 1714112445,
            "MsgType": "text",
            "Content": "hello",
            **fields,
        }
        return to_xml({name: value for name, value in whole.items() if name not in without})

    def log_message(self, *_: object) -> None:
        pass


Answer = Callable[[Asked], bytes | None]


class Bot(ThreadingHTTPServer):
    """A bot of a test's own on loopback, and what it was asked."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.answer = answer
        self.asked: list[Asked] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/wx"
        Thread(target=self.serve_forever, args=(0.01,)).start()


@pytest.fixture
def bot() -> Iterator[Callable[[Answer], Bot]]:
    """Start bots that answer as they are told."""
    bots: list[Bot] = []

    def start(answer: Answer) -> Bot:
        bots.append(Bot(answer))
        return bots[-1]

    yield start
    for one in bots:
        one.shutdown()
        one.server_close()


Wxsim = Callable[..., Any]  # of the arguments, the input and a config.ini


@pytest.fixture
def process(run: Run, tmp_path: Path) -> Wxsim:
    """Run ``python -m wxsim …`` to its end."""

    def call(*arguments: str, typed: str = "", config: str = "", **env: str) -> Any:
        path = tmp_path / "config.ini"
        path.write_text(config)
        started = run(
            *WXSIM, *arguments, env={"WXSERVER_CONFIG": str(path), "WX_TOKEN": TOKEN, **env}
        )
        out, errors = started.communicate(typed, timeout=30)
        return SimpleNamespace(out=out, errors=errors, status=started.returncode)

    return call


@pytest.fixture
def sim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Wxsim:
    """Do what ``process`` does in this one, for the long tables: a start takes a while."""

    def call(*arguments: str, config: str = "") -> Any:
        path = tmp_path / "config.ini"
        path.write_text(config)
        for name in ("WX_APPID", "WX_APPSECRET", "WX_ENCODING_AES_KEY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WXSERVER_CONFIG", str(path))
        monkeypatch.setenv("WX_TOKEN", TOKEN)
        monkeypatch.setattr(sys, "argv", ["wxsim", *arguments])
        with pytest.raises(SystemExit) as end:
            wxsim.__main__.main()
        out, errors = capsys.readouterr()
        return SimpleNamespace(out=out, errors=errors, status=int(end.value.code or 0))

    return call


OWN_ENTRY_POINT = """
import wechat.config
from wxserver import create_application

def reply(message):
    return message.get("Content") or message.get("Event") or message["MsgType"]

application = create_application(wechat.config.load(), reply)
"""


def real(run: Run, folder: Path, config: str = "", **env: str) -> Server:
    """Serve a bot that says what reached it."""
    (folder / "mine.py").write_text(OWN_ENTRY_POINT)
    (folder / "config.ini").write_text(config)
    return gunicorn(run, folder, "mine", WEB_CONCURRENCY="1", **env).ready()


# The real server


@pytest.mark.parametrize("mode", ["plain", "compatible", "safe"])
def test_in_every_mode_the_real_server_is_verified_and_answers(
    run: Run, tmp_path: Path, mode: str
) -> None:
    config = f"{ENCRYPTED}encryption = {mode}\n"
    server = real(run, tmp_path, config)
    server.token()  # not given to wxsim: config.ini leads to the same one
    env = {"WXSERVER_CONFIG": str(server.config)}
    url = ("--url", f"{server.base}/wx")
    submit, text = (
        run(*WXSIM, *url, "verify", env=env),
        run(*WXSIM, *url, "--xml", "text", "你好", "]]> <&", env=env),
    )
    out, errors = submit.communicate(timeout=20)
    assert (out, errors, submit.returncode) == (
        "提交成功: the server answered with echostr\n",
        "",
        0,
    )
    out, errors = text.communicate(timeout=20)
    assert (errors, text.returncode) == ("", 0)
    assert out.endswith("\n你好 ]]> <&\n")
    sent, came = out.split("← 200 in ")
    assert sent.startswith(f"→ POST {server.base}/wx?signature=")
    assert ("<Encrypt>" in sent, "<Encrypt>" in came) == (mode != "plain",) * 2
    on_the_wire = sent.split("  encrypted from\n")[0]
    assert ("<Content><![CDATA[你好" in on_the_wire) == (mode != "safe")
    assert "<Content><![CDATA[你好" in sent
    assert ("  decrypted\n<xml>" in came) == (mode != "plain")


def test_every_message_and_event_can_be_sent_in_a_chat_with_several_followers(
    run: Run, tmp_path: Path
) -> None:
    server = real(run, tmp_path, WX_TOKEN=TOKEN)
    kinds = [kind for kind in messages.MESSAGES if kind != "text"]
    typed = ["hello there", "/text Content=by", *(f"/{kind}" for kind in kinds)]
    typed += [f"/event {event}" for event in messages.EVENTS]
    typed += ["/as 小明", "/image MediaId=abc", "/event CLICK menu1 A.B=c", "", "  /quit ", "never"]
    env = {"WXSERVER_CONFIG": str(server.config), "WX_TOKEN": TOKEN}
    chat = run(*WXSIM, "chat", "--url", f"{server.base}/wx", env=env)
    out, errors = chat.communicate("\n".join(typed), timeout=20)
    answers = ["hello there", "by", *kinds, *messages.EVENTS, "image", "CLICK"]
    assert out.splitlines() == answers
    assert (errors, chat.returncode) == ("", 0)


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"WX_TOKEN": "wrong"}, "; the Token is not the server's, most likely"),
        ({"path": "/elsewhere"}, "; the URL's path is not the callback's"),
    ],
)
def test_what_the_real_server_refuses_is_explained(
    process: Wxsim, run: Run, tmp_path: Path, env: dict[str, str], why: str
) -> None:
    server = real(run, tmp_path, WX_TOKEN=TOKEN)
    env = dict(env)
    done = process("verify", "--url", server.base + env.pop("path", "/wx"), **env)
    assert done.out.startswith("Token验证失败: HTTP status 40")
    assert why in done.out
    assert (done.errors, done.status) == ("", 1)


# Verification


def echostr(asked: Asked) -> bytes:
    return asked.query["echostr"].encode()


HTML = b"<!DOCTYPE html><html><title>It works!</title></html>"
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda a: b'"%s"' % echostr(a), """in place of echostr, \\d{19}, came '"\\d{19}"'$"""),
        (lambda a: echostr(a) + b"\n", r"in place of echostr, \d{19}, came '\d{19}\\n'$"),
        (lambda a: BOM + echostr(a), r"in place of echostr, \d{19}, came '\\ufeff\d{19}'$"),
        (lambda _: b"", r"in place of echostr, \d{19}, came an empty body"),
        (lambda _: b"success", r"in place of echostr, \d{19}, came 'success'"),
        (lambda _: HTML, r"in place of echostr, \d{19}, came '<!DOCTYPE html>"),
        (
            lambda a: a.say(b"", 302, Location="/login"),
            "302: an empty body; it redirects to /login",
        ),
        (lambda a: a.say(HTML, 404), "HTTP status 404: .*; the URL's path is not the callback's"),
        (lambda a: a.say(b"no", 403), "HTTP status 403: 'no'; the Token is not the server's"),
        (lambda a: a.say(b"", 500), "HTTP status 500: an empty body; the server's log says why"),
        (lambda a: a.say(echostr(a), 201), "HTTP status 201: "),
        (lambda a: a.wfile.write(b"hello\r\n\r\n") and None, "the answer is not HTTP"),
        (lambda _: None, "the connection failed"),
    ],
    ids=[
        "quotes",
        "newline",
        "bom",
        "empty",
        "success",
        "html",
        "redirect",
        "404",
        "403",
        "500",
        "201",
        "no-http",
        "gone",
    ],
)
def test_a_failed_submit_says_what_stands_in_the_way(
    bot: Callable[[Answer], Bot], sim: Wxsim, answer: Answer, words: str
) -> None:
    done = sim("verify", "--url", bot(answer).url)
    assert re.match(f"Token验证失败: (HTTP status )?{words}", done.out), done.out
    assert done.out.count("\n") == 1
    assert (done.errors, done.status) == ("", 1)


def test_nobody_there_is_told_in_words(process: Wxsim) -> None:
    url = f"http://127.0.0.1:{free_port()}/wx"
    done = process("verify", "--url", url)
    words = "the connection was refused; is the server running?"
    assert (done.out, done.status) == (f"Token验证失败: {words}\n", 1)
    done = process("text", "--url", url)
    assert (done.out, done.status) == (APOLOGY + "\n", 1)
    assert done.errors == (
        f"(try 1 of 3: {words}; sent again)\n"
        f"(try 2 of 3: {words}; sent again)\n"
        f"(try 3 of 3: {words}{GAVE_UP}"
    )


def test_a_submit_is_signed_and_asks_once(bot: Callable[[Answer], Bot], sim: Wxsim) -> None:
    good = bot(echostr)
    assert sim("verify", "--url", good.url, "--token", "another").status == 0
    (asked,) = good.asked
    parts = (asked.query["timestamp"], asked.query["nonce"])
    assert wechat.crypto.verify(asked.query["signature"], "another", *parts)
    assert abs(int(parts[0]) - time.time()) < 10


# Time


def test_after_five_seconds_wechat_hangs_up_and_sends_the_same_message_again(
    bot: Callable[[Answer], Bot], run: Run, tmp_path: Path
) -> None:
    waited: list[float] = []

    def first_never(asked: Asked) -> bytes | None:
        if asked.command == "POST" and waited:
            return asked.reply(Content="at last")
        began = time.monotonic()
        assert asked.connection.recv(1) == b"", "the other side hangs up"
        waited.append(time.monotonic() - began)
        return None

    slow = bot(first_never)
    (tmp_path / "config.ini").write_text("")
    env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini"), "WX_TOKEN": TOKEN}
    text, verify = (run(*WXSIM, what, "--url", slow.url, env=env) for what in ("text", "verify"))
    assert text.communicate(timeout=20) == (
        "at last\n",
        "(try 1 of 3: no answer within 5 s; sent again)\n",
    )
    assert verify.communicate(timeout=20) == ("请求URL超时: no answer within 5 s\n", "")
    assert (text.returncode, verify.returncode) == (0, 1)
    assert len(waited) == 2
    assert all(4.8 < seconds < 7 for seconds in waited)
    first, second = (asked for asked in slow.asked if asked.command == "POST")
    assert first.body == second.body
    assert first.query["openid"] == second.query["openid"]
    assert first.query["nonce"] != second.query["nonce"]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda a: a.say(b"Oh!", 500), "HTTP status 500: 'Oh!'"),
        (lambda a: a.say(b"", 301, Location="/wx/"), "it redirects to /wx/, and WeChat does not"),
        (lambda a: a.say(b"", 403), "the Token is not the server's, most likely"),
        (lambda a: a.say(a.reply(), 404), "HTTP status 404: '<xml><ToUserName>"),
        (lambda a: a.wfile.write(b"hello") and None, "the answer is not HTTP"),
        (
            lambda a: a.say(a.reply()[:50], 200, **{"Content-Length": "99"}),
            "or not whole: IncompleteRead(50 bytes",
        ),
        (lambda _: None, "the connection failed"),
    ],
    ids=["500", "redirect", "403", "404", "no-http", "cut", "gone"],
)
def test_a_failed_try_is_repeated_twice_with_the_same_message_and_then_given_up(
    bot: Callable[[Answer], Bot], sim: Wxsim, answer: Answer, why: str
) -> None:
    broken = bot(answer)
    done = sim("text", "hello", "--url", broken.url)
    assert (done.out, done.status) == (APOLOGY + "\n", 1)
    tries = done.errors.splitlines()
    assert [line[:12] for line in tries] == [f"(try {n} of 3:" for n in (1, 2, 3)]
    assert all(why in line for line in tries)
    assert done.errors.endswith(GAVE_UP)
    assert len({asked.body for asked in broken.asked}) == 1
    assert len({asked.query["nonce"] for asked in broken.asked}) == 3


# What the follower sees


def articles(asked: Asked, count: int, **more: Any) -> bytes:
    items = [{"Title": f"T{n}", "Description": "D", "Url": "U"} for n in range(count)]
    news = {"MsgType": "news", "ArticleCount": count, "Articles": {"item": items}}
    return asked.reply("Content", **{**news, **more})


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"Content": "x" * 2048}, "x" * 2048),
        ({"Content": "两行\n<&]]>"}, "两行\n<&]]>"),
        ({"MsgType": "image", "Image": {"MediaId": "m"}}, "[image m]"),
        ({"MsgType": "voice", "Voice": {"MediaId": "m"}}, "[voice m]"),
        ({"MsgType": "video", "Video": {"MediaId": "m"}}, "[video m]"),
        ({"MsgType": "video", "Video": {"MediaId": "m", "Title": "T"}}, "[video T m]"),
        (
            {"MsgType": "music", "Music": {"ThumbMediaId": "m", "Title": "T", "MusicUrl": "U"}},
            "[music T U]",
        ),
        ({"MsgType": "transfer_customer_service"}, "[a human agent takes over]"),
    ],
)
def test_a_good_reply_is_shown_as_the_follower_sees_it(
    bot: Callable[[Answer], Bot], sim: Wxsim, fields: dict[str, Any], shown: str
) -> None:
    done = sim("text", "--url", bot(lambda asked: asked.reply(**fields)).url)
    assert (done.out, done.errors, done.status) == (shown + "\n", "", 0)


def test_eight_articles_are_shown_of_nine_after_an_event_and_one_after_a_message(
    bot: Callable[[Answer], Bot], sim: Wxsim
) -> None:
    url = ("--url", bot(lambda asked: articles(asked, 9)).url)
    lines = [f"[article T{n} D U]\n" for n in range(9)]
    done = sim("event", "CLICK", *url)
    assert (done.out, done.status) == ("".join(lines[:8]), 0)
    assert done.errors == "(9 articles; WeChat shows 8 here)\n"
    done = sim("text", *url)
    assert (done.out, done.status) == (lines[0], 0)
    assert done.errors == "(9 articles; WeChat shows 1 here)\n"


@pytest.mark.parametrize("nothing", [b"", b"success"])
def test_no_reply_is_told_apart_from_an_empty_one(
    bot: Callable[[Answer], Bot], sim: Wxsim, nothing: bytes
) -> None:
    done = sim("text", "--url", bot(lambda _: nothing).url)
    assert (done.out, done.errors, done.status) == ("", "(the account stays silent)\n", 0)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda _: b'{"MsgType": "text"}', """it is not XML: .*: '{"MsgType": "text"}'"""),
        (lambda _: HTML, "the root element is html, not xml"),
        (lambda _: b"hello", "it is not XML: .*: 'hello'"),
        (lambda _: b"success\n", r"it is not XML: .*: 'success\\n'"),
        (lambda a: BOM + a.reply(), "a byte order mark stands before the XML"),
        (lambda a: a.reply()[:-5], "it is not XML: unclosed token"),
        (lambda a: a.reply(Content="好").decode().encode("gbk"), "it is not XML: not well-formed"),
        (lambda a: a.reply().replace(b"xml>", b"XML>"), "the root element is XML, not xml"),
        (lambda a: a.reply(Content="x" * 2049), "the text has 2049 bytes; 2048 are allowed"),
        (lambda a: a.reply(Content="好" * 683), "the text has 2049 bytes; 2048 are allowed"),
        (
            lambda a: a.reply(**{n: from_xml(a.body)[n] for n in ("ToUserName", "FromUserName")}),
            "ToUserName is not the message's FromUserName; a reply swaps the two names",
        ),
        (lambda a: a.reply(FromUserName="x"), "FromUserName is not the message's ToUserName"),
        (lambda a: a.reply("CreateTime"), "CreateTime is not a whole number"),
        (lambda a: a.reply(CreateTime="1714112445.5"), "CreateTime is not a whole number"),
        (lambda a: a.reply("MsgType"), "the MsgType None is unknown"),
        (lambda a: a.reply(MsgType="txt"), "the MsgType 'txt' is unknown"),
        (
            lambda a: a.reply("Content"),
            "the MsgType 'text' is unknown, or lacks what belongs in it",
        ),
        (
            lambda a: a.reply(MsgType="image", MediaId="m"),
            "the MsgType 'image' is unknown, or lacks what belongs in it",
        ),
        (
            lambda a: a.reply(MsgType="image", Image={"MediaId": ""}),
            "the MsgType 'image' is unknown, or lacks what belongs in it",
        ),
        (
            lambda a: a.reply(MsgType="voice", Voice={"MediaId": ""}),
            "the MsgType 'voice' is unknown, or lacks what belongs in it",
        ),
        (
            lambda a: a.reply(MsgType="video", Video={"MediaId": ""}),
            "the MsgType 'video' is unknown, or lacks what belongs in it",
        ),
        (
            lambda a: a.reply(MsgType="music", Music={"Title": "T"}),
            "the MsgType 'music' is unknown, or lacks what belongs in it",
        ),
        (lambda a: articles(a, 0), "the MsgType 'news' is unknown, or lacks what belongs in it"),
        (lambda a: articles(a, 2, ArticleCount=1), "ArticleCount is 1, and there are 2 articles"),
        (lambda a: articles(a, 1, Articles={"item": "T"}), "an article has no Title"),
    ],
)
def test_a_malformed_answer_is_the_fault_message_and_says_what_is_wrong(
    bot: Callable[[Answer], Bot], sim: Wxsim, answer: Answer, why: str
) -> None:
    broken = bot(answer)
    done = sim("text", "--url", broken.url)
    assert (done.out, done.status) == (APOLOGY + "\n", 1)
    assert re.match(rf"\(WeChat cannot use the answer: {why}", done.errors)
    assert len(broken.asked) == 1


def sealed(
    xml: bytes, *without: str, token: str = TOKEN, key: str = KEY, appid: str = APPID
) -> Any:
    encrypt = MessageCipher(key, appid).encrypt(xml)
    signature = wechat.crypto.sign(token, "1714112445", "n", encrypt)
    whole = {"Encrypt": encrypt, "MsgSignature": signature, "TimeStamp": 1714112445, "Nonce": "n"}
    return to_xml({name: value for name, value in whole.items() if name not in without})


def answer_to_encrypted(make: Callable[[bytes], bytes]) -> Answer:
    """Answer with what ``make`` makes of a good reply in the clear."""

    def answer(asked: Asked) -> bytes:
        return make(asked.reply())

    return answer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda xml: xml, "it is not encrypted, and the console's mode is 安全模式"),
        (lambda xml: sealed(xml, token="B"), "MsgSignature is wrong"),
        (lambda xml: sealed(xml, appid="wx0"), "it cannot be decrypted: the AppID inside is not"),
        (lambda xml: sealed(xml, key="B" * 43), "it cannot be decrypted: "),
        (lambda xml: sealed(xml, "Nonce"), "the envelope has no Nonce"),
        (
            lambda xml: sealed(xml).replace(b"</xml>", b"<Nonce/></xml>"),
            "the envelope has no Nonce, or more than one",
        ),
        (lambda _: sealed(b'{"MsgType": "text"}'), "it is not XML"),
        (lambda _: b"{}", "it is not XML"),
        (lambda xml: sealed(xml)[:-3], "it is not XML"),
    ],
)
def test_in_safe_mode_a_malformed_answer_says_what_is_wrong(
    bot: Callable[[Answer], Bot], sim: Wxsim, make: Callable[[bytes], bytes], why: str
) -> None:
    done = sim("text", "--url", bot(answer_to_encrypted(make)).url, config=ENCRYPTED)
    assert (done.out, done.status) == (APOLOGY + "\n", 1)
    assert re.match(rf"\(WeChat cannot use the answer: {why}", done.errors)


def test_in_compatible_mode_both_answers_will_do(bot: Callable[[Answer], Bot], sim: Wxsim) -> None:
    config = f"{ENCRYPTED}encryption = compatible\n"
    for make in (bytes, sealed):
        done = sim("text", "--url", bot(answer_to_encrypted(make)).url, config=config)
        assert (done.out, done.errors, done.status) == ("hello\n", "", 0)


# What is sent


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (("text",), {"MsgType": "text", "Content": "hello"}),
        (("text", "two", "words"), {"Content": "two words"}),
        (
            ("text", "--set", "MsgId=1", "--set", "MsgId=2", "--set", "Idx=3"),
            {"MsgId": "2", "Idx": "3"},
        ),
        (("image", "--set", "PicUrl=http://a/?b=c"), {"PicUrl": "http://a/?b=c"}),
        (("--as", "a", "voice"), {"FromUserName": messages.openid("a")}),
        (("voice", "--as", "a"), {"FromUserName": messages.openid("a")}),
        (("event", "CLICK", "--key", "k=1"), {"Event": "CLICK", "EventKey": "k=1"}),
        (
            ("event", "subscribe", "--key", "qrscene_7"),
            {"EventKey": "qrscene_7", "Ticket": "gQFwTICKET"},
        ),
        (
            ("event", "ANYTHING", "--set", "A=B", "--set", "C.D=E"),
            {"MsgType": "event", "Event": "ANYTHING", "A": "B", "C": {"D": "E"}},
        ),
        (
            ("event", "text", "--set", "A=B"),
            {"MsgType": "event", "Event": "text", "A": "B"},
        ),
        (
            ("event", "scancode_push", "--set", "ScanCodeInfo.ScanResult=x"),
            {"ScanCodeInfo": {"ScanType": "qrcode", "ScanResult": "x"}},
        ),
    ],
)
def test_every_field_can_be_chosen(
    bot: Callable[[Answer], Bot], sim: Wxsim, arguments: tuple[str, ...], fields: dict[str, Any]
) -> None:
    silent = bot(lambda _: b"success")
    assert sim(*arguments, "--url", silent.url).status == 0
    (asked,) = silent.asked
    message = from_xml(asked.body)
    assert {name: message[name] for name in fields} == fields
    assert asked.query["openid"] == message["FromUserName"]
    assert asked.headers["Content-Type"] == "text/xml"
    parts = (asked.query["timestamp"], asked.query["nonce"])
    assert wechat.crypto.verify(asked.query["signature"], TOKEN, *parts)


@pytest.mark.parametrize("config", ["", ENCRYPTED])
@pytest.mark.parametrize("body", [b"", b"\xff\0no XML\r\n", b" <xml><MsgType>new</MsgType></xml>"])
def test_raw_sends_a_file_byte_by_byte(
    bot: Callable[[Answer], Bot], sim: Wxsim, tmp_path: Path, config: str, body: bytes
) -> None:
    silent = bot(lambda _: b"success")
    (tmp_path / "body").write_bytes(body)
    assert sim("--raw", str(tmp_path / "body"), "--url", silent.url, config=config).status == 0
    assert [asked.body for asked in silent.asked] == [body]


def test_what_answers_a_raw_body_without_names_is_shown_too(
    bot: Callable[[Answer], Bot], sim: Wxsim, tmp_path: Path
) -> None:
    (tmp_path / "body").write_bytes(b"<xml><ToUserName>gh_1</ToUserName></xml>")
    done = sim("--raw", str(tmp_path / "body"), "--url", bot(lambda asked: asked.reply()).url)
    assert (done.out, done.errors, done.status) == ("hello\n", "", 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "a COMMAND or --raw FILE is needed; try: verify, or text hello"),
        (("tex",), "invalid choice: 'tex'"),
        (("text", "--set", "Content"), "error: 'Content' is not NAME=VALUE"),
        (("text", "--set", "a b=c"), "error: 'a b=c' is not NAME=VALUE"),
        (("--raw", "/nowhere"), "No such file or directory: '/nowhere'"),
        (("verify", "--url", "127.0.0.1:8000/wx"), "--url must be http://… or https://…, not '127"),
        (("verify", "--url", "ftp://a/"), "--url must be http://… or https://…"),
        (("verify", "--url", "http://a:99999/"), "--url must be http://… or https://…"),
        (("verify", "--url", "http://[::1/"), "--url must be http://… or https://…"),
        (("verify", "--url", "http://a:0/"), "--url must be http://… or https://…"),
        (("verify", "--url", "http:///wx"), "--url must be http://… or https://…"),
    ],
)
def test_a_wrong_command_line_is_explained_and_sends_nothing(
    sim: Wxsim, arguments: tuple[str, ...], words: str
) -> None:
    done = sim(*arguments)
    assert words in done.errors
    assert (done.out, done.status) == ("", 2)


def test_a_wrong_config_is_one_line(process: Wxsim) -> None:
    done = process("text", config="[wechat]\ntokn = a\n")
    assert done.errors.startswith("wxsim: ")
    assert "[wechat] tokn: unknown key" in done.errors
    assert (done.out, done.errors.count("\n"), done.status) == ("", 1, 1)


def test_a_terminal_without_chinese_is_no_reason_to_crash(
    bot: Callable[[Answer], Bot], process: Wxsim
) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = process("--help", **ascii_only)
    assert (done.errors, done.status) == ("", 0)
    assert "python -m wxsim verify" in done.out
    url = bot(lambda asked: asked.reply(Content="你好")).url
    done = process("text", "--as", "小明", "--url", url, **ascii_only)
    assert (done.out, done.errors, done.status) == ("\\u4f60\\u597d\n", "", 0)


def test_a_name_that_does_not_resolve_is_told_in_words(sim: Wxsim) -> None:
    done = sim("verify", "--url", "http://nowhere.invalid:8000/wx")
    assert done.out == "Token验证失败: the name nowhere.invalid does not resolve\n"


# The chat


def test_a_chat_outlives_whatever_goes_wrong_in_it(
    bot: Callable[[Answer], Bot], process: Wxsim
) -> None:
    def answer(asked: Asked) -> bytes | None:
        content = from_xml(asked.body).get("Content")
        return {"json": b"{}", "gone": None}.get(str(content), asked.reply(Content=content or "-"))

    typed = [
        "json",
        "gone",
        "/nonsense",
        "/event",
        '/image "',
        "/image x",
        "/event CLICK a.=1",
        "fine",
    ]
    done = process("chat", "--url", bot(answer).url, typed="\n".join(typed))
    lines = done.out.splitlines()
    assert lines[:2] == [APOLOGY, APOLOGY]
    assert lines[2:4] == [
        f"there is no '{line}'; /help says what there is" for line in ("/nonsense", "/event")
    ]
    assert lines[-4:] == [
        "No closing quotation",
        "'x' is not NAME=VALUE",
        "'a.=1' is not NAME=VALUE",
        "fine",
    ]
    assert "Traceback" not in done.errors
    assert done.status == 0


def test_xml_in_a_chat_shows_the_wire_until_it_is_said_again(
    bot: Callable[[Answer], Bot], process: Wxsim
) -> None:
    url = bot(lambda asked: asked.reply(Content="hi")).url
    done = process("chat", "--url", url, typed="/xml\none\n/xml\ntwo\n")
    assert re.fullmatch(
        r"→ POST http://\S+\n<xml>.*one.*</xml>\n\n← 200 in [\d.]+ ms\n<xml>.*</xml>\n\nhi\nhi\n",
        done.out,
    )


IN_A_TERMINAL = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"


def test_in_a_terminal_the_prompt_names_the_follower_and_arrow_up_brings_the_line_back(
    bot: Callable[[Answer], Bot], run: Run, tmp_path: Path
) -> None:
    pytest.importorskip("readline")  # which not every Python is built with
    echoing = bot(lambda asked: asked.reply(Content=f"You said {from_xml(asked.body)['Content']}."))
    (tmp_path / "config.ini").write_text("")
    env = {
        "WXSERVER_CONFIG": str(tmp_path / "config.ini"),
        "WX_TOKEN": TOKEN,
        "TERM": "dumb",
        "INPUTRC": "/dev/null",
    }
    screen = tmp_path / "screen"
    command = (sys.executable, *WXSIM, "chat", "--as", "小明", "--url", echoing.url)
    chat = run("-c", IN_A_TERMINAL, *command, env=env, log=screen)

    def shown() -> str:
        return screen.read_bytes().decode(errors="ignore")

    def type_at(prompt: str, keys: str) -> None:
        until(lambda: shown().endswith(prompt))
        chat.stdin.write(keys)
        chat.stdin.flush()

    type_at("小明> ", "hello\n")
    type_at("You said hello.\r\n小明> ", "\x1b[A\n")
    until(lambda: len(echoing.asked) == 2)
    type_at("You said hello.\r\n小明> ", "/help\n")
    type_at("subscribe_msg_sent_event\r\n小明> ", "/as 小红\n")
    type_at("小红> ", "\x03")
    type_at("(Ctrl-D or /quit ends the chat)\r\n小红> ", "\x04")
    assert chat.wait(timeout=10) == 0
    assert shown().startswith(f"{echoing.url}; /help says what there is besides text\r\n")
    assert "What you type goes to the account as a text." in shown()
    assert shown().count("You said hello.") == len(echoing.asked) == 2


def test_a_text_may_begin_with_a_slash_as_wechats_own_emoticons_do(
    bot: Callable[[Answer], Bot], process: Wxsim
) -> None:
    done = process(
        "chat", "--url", bot(lambda a: a.reply()).url, typed="/:rose\n/event VIEW https://a/?b=c\n"
    )
    assert "there is no" not in done.out
    assert "cannot be" not in done.out


def test_a_body_that_was_encrypted_before_is_signed_as_it_is(run: Run, tmp_path: Path) -> None:
    server = real(run, tmp_path, WX_TOKEN=TOKEN, WX_APPID=APPID, WX_ENCODING_AES_KEY=KEY)
    (tmp_path / "body").write_bytes(sealed(message_xml("你好", FromUserName=messages.openid("me"))))
    env = {
        "WXSERVER_CONFIG": str(server.config),
        "WX_TOKEN": TOKEN,
        "WX_APPID": APPID,
        "WX_ENCODING_AES_KEY": KEY,
    }
    process = run(*WXSIM, "--url", f"{server.base}/wx", "--raw", str(tmp_path / "body"), env=env)
    assert process.communicate(timeout=20) == ("你好\n", "")


def test_an_encrypted_answer_in_plain_mode_is_called_that(
    bot: Callable[[Answer], Bot], sim: Wxsim
) -> None:
    encrypted = sealed(message_xml())
    done = sim("text", "hello", "--url", bot(lambda a: a.say(encrypted)).url)
    assert "it is encrypted, and the console's mode is 明文模式" in done.errors


# The shell around it


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("text",),
        ("--xml", "text"),
        ("chat",),
        ("load", "--rate", "20", "--seconds", "0.5"),
        ("api", "--port", "0"),
        ("check",),
    ],
    ids=lambda arguments: arguments[-1] if arguments[0] == "--xml" else arguments[0],
)
def test_a_reader_that_has_read_enough_ends_it_quietly(
    bot: Callable[[Answer], Bot], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "config.ini").touch()
    url = () if arguments[0] in ("--help", "api") else ("--url", bot(lambda a: a.reply()).url)
    command = shlex.join([sys.executable, *WXSIM, *arguments, *url])
    done = subprocess.run(
        ["sh", "-c", f"{command} | true"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "WXSERVER_CONFIG": str(tmp_path / "config.ini"),
            "WX_TOKEN": TOKEN,
        },
        input=b"hello\n" * 1000,
        capture_output=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == (b"", b"")


def test_the_fake_api_ends_too_when_nobody_reads_what_it_prints(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.ini").touch()
    command = f"{sys.executable} -m wxsim api --port 0 | head -n 4"
    script = f"import subprocess; subprocess.run({command!r}, shell=True)"
    process = run("-c", script, env={"WXSERVER_CONFIG": str(tmp_path / "config.ini")})
    base = [process.stdout.readline() for _ in range(4)][-1].partition(" = ")[2].strip()
    for _ in range(2):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(base, timeout=5).close()
    assert process.wait(10) == 0
    assert process.communicate()[1] == ""


@pytest.mark.parametrize("command", ["verify", "text", "chat", "load"])
def test_it_works_where_there_is_no_fcntl_as_on_windows(
    bot: Callable[[Answer], Bot], run: Run, tmp_path: Path, command: str
) -> None:
    def answer(asked: Asked) -> bytes:
        return (
            echostr(asked) if asked.command == "GET" else asked.reply(Content=asked.body.decode())
        )

    (tmp_path / "config.ini").touch()
    arguments = [command, "--url", bot(answer).url]
    arguments += ["--rate", "20", "--seconds", "0.5"] if command == "load" else []
    env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini"), "WX_TOKEN": TOKEN}
    process = run("-c", WITHOUT_UNIX, "wxsim", *arguments, env=env)
    out, errors = process.communicate("hello\n", timeout=20)
    assert (errors, process.returncode) == ("", 0)
    assert out


def test_the_fake_api_works_there_too(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.ini").touch()
    env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini")}
    process = run("-c", WITHOUT_UNIX, "wxsim", "api", "--port", "0", env=env)
    process.stdin.write("expire\n")
    process.stdin.flush()
    lines = iter(process.stdout.readline, "")
    assert "expire: done\n" in lines
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1] == ""


@pytest.mark.parametrize(
    "command", ["wxsim text", "wxsim check", "wxserver", "token_store", "wechat.api getcallbackip"]
)
def test_what_needs_more_than_windows_has_says_so(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "config.ini").touch()
    env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini")}
    process = run("-c", WITHOUT_UNIX, *command.split(), env=env)
    out, errors = process.communicate(timeout=20)
    assert "needs Linux or macOS; on Windows use WSL" in errors
    assert (out, errors.count("\n"), process.returncode) == ("", 1, 1)


def test_bytes_that_are_no_utf_8_go_out_as_the_shell_hands_them_over(
    bot: Callable[[Answer], Bot], tmp_path: Path
) -> None:
    (tmp_path / "config.ini").touch()
    silent = bot(lambda _: b"success")
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WXSERVER_CONFIG": str(tmp_path / "config.ini"),
        "WX_TOKEN": TOKEN,
        "PYTHONIOENCODING": "utf-8:strict",  # as it is in most terminals
    }
    command = [sys.executable.encode(), b"-m", b"wxsim", b"--url", silent.url.encode()]
    subprocess.run([*command, b"text", b"a\xffb\x1d]]>"], env=env, check=True, timeout=20)
    subprocess.run([*command, b"chat"], env=env, check=True, timeout=20, input=b"c\xfed\x00\n")
    typed = [re.search(rb"<Content><!\[CDATA\[(.*)\]\]></Content>", a.body) for a in silent.asked]
    assert [found and found[1] for found in typed] == [b"a\xffb\x1d]]>", b"c\xfed\0"]


def test_it_needs_nothing_installed(bot: Callable[[Answer], Bot], run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.ini").touch()
    env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini"), "WX_TOKEN": TOKEN}
    process = run("-S", *WXSIM, "text", "--url", bot(lambda a: a.reply()).url, env=env)
    assert process.communicate(timeout=20) == ("hello\n", "")


def test_the_server_never_imports_it(run: Run, tmp_path: Path) -> None:
    script = (
        "import sys, wxserver, wechat.config; wxserver.create_application(wechat.config.load());"
    )
    script += "print([name for name in sys.modules if name.startswith('wxsim')])"
    (tmp_path / "config.ini").touch()
    process = run("-c", script, env={"WXSERVER_CONFIG": str(tmp_path / "config.ini")})
    assert process.communicate(timeout=20)[0] == "[]\n"
