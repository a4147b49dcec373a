"""Once-only answers from the callback's end: copies, long texts, and 客服消息."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    APPID,
    APPSECRET,
    KEY,
    NOW,
    TOKEN,
    Run,
    account,
    message_xml,
    sealed,
    signed,
)
from serving import gunicorn, nginx_site, until
from webtest import TestApp

import wechat.api
import wechat.message
from token_store import ApiError
from wechat.config import Config
from wechat.crypto import MessageCipher
from wechat.message import from_xml
from wxserver import create_application
from wxsim.fake_api import FakeApi

LONG = "".join(f"{number}你好😀" for number in range(400))  # 5,690 bytes


class Bot:
    """A ``reply()`` that counts its runs."""

    def __init__(self, answer: Any = None) -> None:
        self.runs, self.answer = 0, answer

    def __call__(self, message: dict[str, Any]) -> Any:
        self.runs += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or f"{message['Content']} {self.runs}"


def make_app(tmp_path: Path, bot: Bot, **more: Any) -> Any:
    config = Config(**{"token": TOKEN, "state_dir": tmp_path / "state", **more})
    return TestApp(create_application(config, bot, lambda: float(NOW)))


def ask(app: Any, msg_id: int, **fields: str) -> bytes:
    answer = app.post(f"/wx?{signed()}", message_xml(MsgId=str(msg_id), **fields))
    return bytes(answer.body)


def content(body: bytes) -> str:
    return str(from_xml(body)["Content"])


def test_copies_run_reply_once_and_get_the_same_bytes_from_any_worker(tmp_path: Path) -> None:
    bot = Bot()
    bodies = {ask(make_app(tmp_path, bot), 1) for _ in range(3)}
    assert [content(body) for body in bodies] == ["hello 1"]
    assert content(ask(make_app(tmp_path, bot), 2)) == "hello 2"


def test_two_events_in_one_second_are_two(tmp_path: Path) -> None:
    app = make_app(tmp_path, bot := Bot("ok"))
    for key in ("a", "b", "a"):
        body = message_xml(MsgType="event", Event="CLICK", EventKey=key).replace(b"MsgId", b"X")
        assert content(app.post(f"/wx?{signed()}", body).body) == "ok"
    assert bot.runs == 2


def test_a_copy_of_an_encrypted_message_gets_the_same_answer_freshly_sealed(
    tmp_path: Path,
) -> None:
    app = make_app(tmp_path, Bot(), appid=APPID, encoding_aes_key=KEY)
    requests = [sealed(message_xml()) for _ in range(2)]
    answers = [app.post(f"/wx?{query}", body).body for query, body in requests]
    assert answers[0] != answers[1]
    cipher = MessageCipher(KEY, APPID)
    first, second = (cipher.decrypt(from_xml(answer)["Encrypt"]) for answer in answers)
    assert first == second
    assert content(first) == "hello 1"


def test_silence_and_failure_are_remembered_as_well(tmp_path: Path) -> None:
    for number, bot in enumerate((Bot(""), Bot(RuntimeError("down")))):
        bot.answer = bot.answer or {"MsgType": "text", "Content": ""}
        app = make_app(tmp_path, bot)
        assert [ask(app, number) for _ in range(3)] == [b"success"] * 3
        assert bot.runs == 1


def test_once_off_runs_reply_every_time_and_writes_nothing(tmp_path: Path) -> None:
    app = make_app(tmp_path, bot := Bot(), once=False)
    assert [content(ask(app, 1)) for _ in range(3)] == ["hello 1", "hello 2", "hello 3"]
    assert not (tmp_path / "state").exists()
    assert bot.runs == 3


def test_a_long_text_goes_on_in_answer_to_the_next_messages(tmp_path: Path) -> None:
    bot, sign = Bot(LONG), "…（未完，发送任意消息继续）"
    app = make_app(tmp_path, bot)
    texts = [content(ask(app, number)) for number in (1, 2, 3)]
    assert bot.runs == 1
    assert all(len(text.encode()) <= wechat.message.MAX_TEXT for text in texts)
    assert [text.endswith(sign) for text in texts] == [True, True, False]
    assert "".join(text.removesuffix(sign) for text in texts) == LONG


def test_a_text_without_end_is_cut_after_ten_messages(tmp_path: Path) -> None:
    app = make_app(tmp_path, Bot("x" * 100_000))
    texts = [content(ask(app, number)) for number in range(11)]
    assert texts[9].endswith("x…")
    assert texts[10] == texts[0]  # another run


@pytest.mark.parametrize("more", [{"late": "drop"}, {"once": False}])
def test_a_long_text_is_cut_where_there_is_no_way_to_go_on(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    app = make_app(tmp_path, bot := Bot(LONG), **more)
    text = content(ask(app, 1))
    assert text.endswith("…")
    assert LONG.startswith(text[:-1])
    ask(app, 2)
    assert bot.runs == 2


def test_the_rest_of_a_long_text_is_pushed_to_the_follower(
    tmp_path: Path, fake_api: FakeApi
) -> None:
    account = {"appid": APPID, "appsecret": APPSECRET, "api_base": fake_api.base}
    app = make_app(tmp_path, Bot(LONG), late="push", **account)
    texts = [content(ask(app, 1, FromUserName="alice"))]
    until(lambda: len(fake_api.calls) == 2)
    for _, path, body in fake_api.calls:
        sent = json.loads(body)
        assert path.startswith("/cgi-bin/message/custom/send?")
        assert (sent["touser"], sent["msgtype"]) == ("alice", "text")
        texts.append(sent["text"]["content"])
    assert "".join(text.removesuffix("…（未完）") for text in texts) == LONG


@pytest.mark.parametrize(
    ("reply", "body"),
    [
        (wechat.message.text("你好"), {"msgtype": "text", "text": {"content": "你好"}}),
        (wechat.message.image("m"), {"msgtype": "image", "image": {"media_id": "m"}}),
        (wechat.message.voice("m"), {"msgtype": "voice", "voice": {"media_id": "m"}}),
        (
            wechat.message.video("m", "t", "d"),
            {"msgtype": "video", "video": {"media_id": "m", "title": "t", "description": "d"}},
        ),
        (
            wechat.message.music("m", "u", "t"),
            {"msgtype": "music", "music": {"thumb_media_id": "m", "musicurl": "u", "title": "t"}},
        ),
        (
            wechat.message.news([{"Title": "t", "PicUrl": "p", "Url": "u"}]),
            {"msgtype": "news", "news": {"articles": [{"title": "t", "picurl": "p", "url": "u"}]}},
        ),
    ],
)
def test_each_kind_of_reply_is_sent_as_this_api_spells_it(
    tmp_path: Path, fake_api: FakeApi, reply: dict[str, Any], body: dict[str, Any]
) -> None:
    api = wechat.api.from_config(account(fake_api, tmp_path))
    # As it comes out of the file of an answer.
    api.send("o1", from_xml(wechat.message.to_xml(reply)))
    assert json.loads(fake_api.calls[-1][2]) == {"touser": "o1", **body}


def test_what_this_api_cannot_send_is_a_clear_error_and_typing_never_fails(
    tmp_path: Path, fake_api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    api = wechat.api.from_config(account(fake_api, tmp_path))
    with pytest.raises(ApiError, match="transfer_customer_service cannot be sent"):
        api.send("o1", wechat.message.transfer_customer_service())
    api.typing("o1")
    assert json.loads(fake_api.calls[-1][2]) == {"touser": "o1", "command": "Typing"}
    fake_api.failure = b"<html>"
    api.typing("o1")
    assert "no typing indicator" in caplog.text


SLOW = """
import os, time
import wechat.config
from wxserver import create_application

def reply(message):
    with open(os.environ["RUNS"], "a") as runs:
        runs.write("run\\n")
    time.sleep(6)
    return "at last: " + message["Content"]

application = create_application(wechat.config.load(), reply)
"""


def test_a_reply_of_six_seconds_reaches_the_follower_through_the_second_copy(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    server = gunicorn(run, tmp_path, "slow", RUNS=str(tmp_path / "runs"), WX_TOKEN=TOKEN).ready()
    command = ("-m", "wxsim", "--url", f"{server.base}/wx", "text", "hello")
    process = run(*command, env={"WXSERVER_CONFIG": str(server.config), "WX_TOKEN": TOKEN})
    out, errors = process.communicate(timeout=30)
    assert out == "at last: hello\n"
    assert errors == "(try 1 of 3: no answer within 5 s; sent again)\n"
    assert (tmp_path / "runs").read_text() == "run\n"


WAITING = """
import os, time
import wechat.config
from wxserver import create_application

def reply(message):
    with open(os.environ["RUNS"], "a") as runs:
        runs.write(message["Content"] + "\\n")
    time.sleep(float(message["Content"].split()[1]))
    return message["Content"]

application = create_application(wechat.config.load(), reply)
"""


@pytest.mark.parametrize("worker_class", ["gthread", "sync"])
@pytest.mark.parametrize("behind_nginx", [False, True])
def test_a_request_whose_client_hung_up_before_its_turn_runs_nothing(
    run: Run, tmp_path: Path, worker_class: str, behind_nginx: bool
) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    arguments = f"--threads 1 --worker-class {worker_class}"
    env = {"WEB_CONCURRENCY": "1", "GUNICORN_CMD_ARGS": arguments, "WX_TOKEN": TOKEN}
    server = gunicorn(run, tmp_path, "waiting", RUNS=str(tmp_path / "runs"), **env).ready()
    with contextlib.ExitStack() as stack:
        base = server.base
        if behind_nginx:
            base = stack.enter_context(nginx_site(server, tmp_path)).base
            until(lambda: server.ask(base=base, echostr="1") == (200, b"1"))
        else:
            assert server.ask(echostr="1") == (200, b"1")
        with ThreadPoolExecutor() as threads:
            first = threads.submit(server.ask, message_xml("first 1.5", MsgId="1"), base=base)
            until(lambda: (tmp_path / "runs").exists())
            with pytest.raises(OSError, match="timed out"):
                server.ask(message_xml("second 0", MsgId="2"), base=base, timeout=0.5)
            assert b"first" in first.result()[1]
            last = threads.submit(server.ask, message_xml("third 0", MsgId="3"), base=base)
            assert b"third" in last.result()[1]
    assert (tmp_path / "runs").read_text().split() == ["first", "1.5", "third", "0"]
    assert "[INFO] 503 Service Unavailable: the client hung up before its turn" in server.log
    assert "WARNING" not in server.log


@pytest.mark.parametrize("environ", [{}, {"gunicorn.socket": None}])
def test_where_the_server_shows_no_connection_messages_run_as_ever(
    tmp_path: Path, environ: dict[str, Any]
) -> None:
    app = make_app(tmp_path, Bot())
    app.extra_environ.update(environ)
    assert content(ask(app, 1)) == "hello 1"


def test_what_matters_for_seconds_is_kept_in_systemds_folder_and_what_waits_is_not(
    tmp_path: Path,
) -> None:
    app = make_app(tmp_path, Bot(LONG), runtime_dir=tmp_path / "run")
    ask(app, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "state"]
    assert list((tmp_path / "run" / "replies").glob("journal.*"))
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["late"]


def test_parts_that_wechat_does_not_take_wait_and_the_text_says_so(
    tmp_path: Path, fake_api: FakeApi
) -> None:
    """It takes five after a message, three after an event."""
    for count, fields in (
        (5, {}),
        (3, {"MsgType": "event", "Event": "CLICK", "EventKey": "a"}),
    ):
        account = {"appid": APPID, "appsecret": APPSECRET, "api_base": fake_api.base}
        bot, before = Bot("x" * 20_000), len(fake_api.calls)
        app = make_app(tmp_path / str(count), bot, late="push", **account)
        texts = [content(ask(app, 1, **fields))]
        until(lambda c=count, b=before: len(fake_api.calls) == b + c)
        # The last call has come in, and its answer may still be on the way back.
        until(lambda: not any(isinstance(t, threading.Timer) for t in threading.enumerate()))
        texts += [json.loads(body)["text"]["content"] for _, _, body in fake_api.calls[before:]]
        assert all(text.endswith("x…（未完）") for text in texts[:-1])
        assert texts[-1].endswith("x…（未完，发送任意消息继续）")
        assert content(ask(app, 2)).startswith("x")
        assert bot.runs == 1


def test_an_answer_to_an_event_that_another_message_gets_has_one_article(tmp_path: Path) -> None:
    clock, config = [float(NOW)], Config(token=TOKEN, state_dir=tmp_path / "state")
    near, far = socket.socketpair()

    def hang_up(message: dict[str, Any]) -> Any:
        far.close()
        return wechat.message.news([{"Title": str(number)} for number in range(8)])

    application = create_application(config, hang_up, lambda: clock[0])
    event = message_xml(MsgType="event", Event="CLICK", EventKey="a")
    with near:
        app = TestApp(application, extra_environ={"gunicorn.socket": near})
        app.post(f"/wx?{signed()}", event, status=503)
    clock[0] += 20
    late = from_xml(ask(TestApp(application), 1))
    assert (late["ArticleCount"], late["Articles"]) == ("1", {"item": {"Title": "0"}})
