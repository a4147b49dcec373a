"""The real server: gunicorn with the shipped settings, several workers, real HTTP, real signals."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, Run, message_xml, signed
from serving import Server, gunicorn, until

from wechat.message import from_xml

_msg_ids = itertools.count(1)


def message(content: str = "hello") -> bytes:
    """Return a message that no other is a copy of."""
    return message_xml(content, MsgId=str(next(_msg_ids)))


@pytest.fixture
def server(run: Run, tmp_path: Path) -> Iterator[Server]:
    running = gunicorn(run, tmp_path, WEB_CONCURRENCY="3").ready()
    yield running
    assert "Traceback" not in running.log
    assert " 500 " not in running.log


def test_a_first_start_makes_one_token_for_all_workers_and_shows_it_once(server: Server) -> None:
    token = server.token()
    until(lambda: len(server.workers()) == 3)
    for number in range(20):
        assert server.ask(echostr=str(number)) == (200, str(number).encode())
    assert server.log.count(token) == 1


def test_a_message_is_echoed(server: Server) -> None:
    status, body = server.ask(message("你好"), openid="o1")
    assert status == 200
    assert from_xml(body)["Content"] == "你好"


def test_many_at_once_each_get_their_own_answer(server: Server) -> None:
    server.token()

    def ask(number: int) -> str:
        _, body = server.ask(message(f"message {number}"))
        return str(from_xml(body)["Content"])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(200))) == [f"message {number}" for number in range(200)]


def test_the_log_has_no_signature_openid_echostr_or_text(server: Server) -> None:
    assert server.ask(echostr="4375120948345356249")[0] == 200
    assert server.ask(message("private words"), openid="oPrivate")[0] == 200
    assert server.ask(path="/elsewhere")[0] == 404
    until(lambda: " GET 200 " in server.log and " POST 200 " in server.log)
    for secret in ("signature=", "nonce", "4375120948345356249", "oPrivate", "private words"):
        assert secret not in server.log
    assert "'/elsewhere' was asked for; the callback is at '/wx'" in server.log


def chunked(server: Server, body: bytes, half_close: bool = True) -> bytes:
    query = signed(server.token(), int(time.time()))
    head = f"POST /wx?{query} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    request = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + body
    return server.raw(request, half_close)


def test_a_chunked_message_is_answered(server: Server) -> None:
    body = message("in pieces")
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:50], body[50:]))
    assert b"in pieces" in chunked(server, pieces + b"0\r\n\r\n", half_close=False)


def test_broken_http_is_refused_without_a_500_or_a_traceback(server: Server) -> None:
    query = signed(server.token(), int(time.time())).encode()
    assert chunked(server, b"zz\r\n").startswith(b"HTTP/1.1 400")
    assert not chunked(server, b"5\r\nab").startswith(b"HTTP/1.1 5")
    for length in (b"10", b"2000000", b"-5", b"abc"):
        head = b"POST /wx?" + query + b" HTTP/1.1\r\nHost: a\r\nContent-Length: " + length
        answer = server.raw(head + b"\r\n\r\nshort")
        expected = b"HTTP/1.1 413" if length == b"2000000" else b"HTTP/1.1 400"
        assert answer.startswith(expected), (length, answer)
    for request in (
        b"GET /wx?%00%ff\xe4&&&=&signature HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /%0d%0aSet-Cookie:a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /wx HTTP/1.1\r\nHost: a\r\nSCRIPT_NAME: /x\r\n\r\n",
        b"BREW /wx HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"GET /wx",
    ):
        answer = server.raw(request)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), (request, answer)
    assert server.ask(echostr="1") == (200, b"1")


def test_a_killed_worker_is_replaced_and_nothing_is_lost(server: Server) -> None:
    token = server.token()
    before = until(lambda: len(server.workers()) == 3 and server.workers())
    os.kill(min(before), signal.SIGKILL)
    until(lambda: len(server.workers()) == 4)
    for number in range(20):
        assert server.ask(echostr=str(number)) == (200, str(number).encode())
    assert server.token() == token


CONF = str(ROOT / "gunicorn.conf.py")

OWN_ENTRY_POINT = """
import time
import wechat.config
from wxserver import create_application

def reply(message):
    if message["Content"] == "slow":
        time.sleep(1)
    return "{version} " + message["Content"]

application = create_application(wechat.config.load(), reply)
"""


def test_slow_replies_do_not_hold_up_the_others(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_ENTRY_POINT.format(version="v1"))
    server = gunicorn(run, tmp_path, "mine", WEB_CONCURRENCY="1").ready()
    server.token()
    with ThreadPoolExecutor(20) as pool:
        slow = [pool.submit(server.ask, message("slow")) for _ in range(20)]
        until(lambda: any(future.running() for future in slow))
        assert b"v1 fast" in server.ask(message("fast"))[1]
        assert not all(future.done() for future in slow)
        assert all(b"v1 slow" in future.result()[1] for future in slow)


def test_hup_takes_up_a_changed_reply_without_losing_a_message(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_ENTRY_POINT.format(version="v1"))
    server = gunicorn(run, tmp_path, "mine", PYTHONDONTWRITEBYTECODE="1").ready()
    server.token()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(server.ask, message("slow"))
        time.sleep(0.3)
        (tmp_path / "mine.py").write_text(OWN_ENTRY_POINT.format(version="v2"))
        server.process.send_signal(signal.SIGHUP)
        until(lambda: b"v2 fast" in server.ask(message("fast"))[1])
        assert b"v1 slow" in slow.result()[1]


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ("[server]\nmax_age = soon\n", "[server] max_age: 'soon': must be a whole number"),
        ("[wechat]\ntokn = a\n", "[wechat] tokn: unknown key"),
        ("[server]\nstate_dir = /proc/nowhere\n", "[server] state_dir: /proc/nowhere"),
    ],
)
def test_a_wrong_config_stops_the_start_with_one_line(
    run: Run, tmp_path: Path, config: str, error: str
) -> None:
    (tmp_path / "config.ini").write_text(config)
    server = gunicorn(run, tmp_path)
    assert server.process.wait(timeout=15) != 0
    assert error in server.log
    assert "Traceback" not in server.log
    assert len([line for line in server.log.splitlines() if "INFO" not in line]) == 1


def test_check_config_refuses_what_a_reload_would_not_survive(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.ini"
    for text, status, errors in (("", 0, 0), ("[wechat]\ntokn = a\n", 1, 1)):
        config.write_text(f"[server]\nstate_dir = {tmp_path / 'state'}\n{text}")
        env = {"WXSERVER_CONFIG": str(config)}
        process = run("-m", "gunicorn", "--check-config", "-c", CONF, "wxserver", env=env)
        err = process.communicate(timeout=20)[1]
        assert (process.returncode, err.count("unknown key")) == (status, errors)
        assert "Traceback" not in err


def test_it_stops_at_once_when_told_and_leaves_only_its_token(run: Run, tmp_path: Path) -> None:
    server = gunicorn(run, tmp_path, WEB_CONCURRENCY="1").ready()
    assert server.ask(echostr="1") == (200, b"1")  # so the worker is up: before, gunicorn waits
    assert sorted(os.listdir(tmp_path)) == ["config.ini", "log", "state"]
    server.process.terminate()
    assert server.process.wait(timeout=10) == 0
    assert sorted(os.listdir(tmp_path)) == ["config.ini", "log", "state"]
    assert os.listdir(tmp_path / "state") == ["callback_token"]


def test_a_first_look_needs_the_standard_library_alone(run: Run, tmp_path: Path) -> None:
    server = Server(run, tmp_path, "-S", str(ROOT / "wxserver.py"), "--port", "{port}").ready()
    assert server.ask(echostr="4375120948345356249") == (200, b"4375120948345356249")
    assert b"hello" in server.ask(message("hello"))[1]
    assert "signature=" not in server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("config", "error"),
    [("[wechat]\ntoken = a\n", "wxserver: "), ("", "Address already in use")],
)
def test_a_first_look_that_cannot_start_says_why(
    run: Run, tmp_path: Path, config: str, error: str
) -> None:
    (tmp_path / "config.ini").write_text(config)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        server = Server(run, tmp_path, str(ROOT / "wxserver.py"), "--port", port)
        assert server.process.wait(timeout=15) == 1
    assert error in server.log
    assert "Traceback" not in server.log


def test_what_is_not_turned_on_is_not_imported(run: Run) -> None:
    out, _ = run("-c", "import wxserver, sys; print(*sys.modules)").communicate()
    loaded = set(out.split())
    assert "wechat.message" in loaded
    assert not loaded & {
        "token_store",
        "wechat.api",
        "urllib.request",
        "wsgiref",
        "argparse",
        "ssl",
    }


def test_a_malformed_request_line_stays_out_of_the_error_log(server: Server) -> None:
    secret, openid = "0123456789abcdef", "o9AgO5Kd5ggOC"
    for line in (
        f"GET /cgi-bin/token?secret={secret}&openid={openid}&note=你好 HTTP/1.1",
        f"GET /wx?signature={secret} {openid} HTTP/1.1",
        f"BR?EW /wx?signature={secret}&openid={openid} HTTP/1.1",
        f"GET /wx HTTP/1.1\r\nX {secret}: {openid}",
    ):
        server.raw(f"{line}\r\nHost: a\r\n\r\n".encode())
    until(lambda: "Invalid request from ip=127.0.0.1: Invalid HTTP request line" in server.log)
    assert secret not in server.log
    assert openid not in server.log
