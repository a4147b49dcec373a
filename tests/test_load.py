"""The load generator: real HTTP to gunicorn, and to servers that do everything wrong."""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import APPID, KEY, TOKEN, Run
from serving import free_port, gunicorn, until

import wechat.message
from wechat.message import Message, Reply, from_xml
from wxsim import load
from wxsim.client import Account
from wxsim.load import Tally, report

Bot = Callable[[Message], bytes]  # from a message to the body of the answer; b"500" is that status


def answer(message: Message, reply: Reply) -> bytes:
    parts = wechat.message.answer(message, reply, time.time())
    return parts[0] if parts else b"success"


def echo(message: Message) -> bytes:
    return answer(message, message["Content"])


@contextlib.contextmanager
def served(bot: Bot) -> Iterator[Account]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = bot(from_xml(self.rfile.read(int(self.headers["Content-Length"]))))
            with contextlib.suppress(OSError):
                self.send_response(500 if body == b"500" else 200)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield Account(f"http://127.0.0.1:{server.server_port}/wx", TOKEN)
        server.shutdown()


def options(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    load.add_arguments(parser)
    return parser.parse_args(line.split())


def all_well(bot: Bot, line: str = "--rate 30 --seconds 1") -> bool:
    with served(bot) as to:
        return load.main(options(line), to)


def counts(printed: str) -> dict[str, int]:
    """Return the report's counts, and those of its errors by their reason."""
    first = re.findall(r"^(\w+(?: \w+)?) +(\d+)   ", printed, re.MULTILINE)
    errors = re.findall(r"^ +(\d+) × (.*)$", printed, re.MULTILINE)
    return {name: int(count) for name, count in [*first, *((why, n) for n, why in errors)]}


def command(run: Run, *arguments: str, **env: str) -> tuple[int, str]:
    process = run("-m", "wxsim", "load", *arguments, env=env)
    printed, _ = process.communicate(timeout=60)
    return process.returncode, printed


@pytest.mark.parametrize("encryption", ["plain", "compatible", "safe"])
def test_gunicorn_answers_all_and_the_exit_status_is_0(
    run: Run, tmp_path: Path, encryption: str
) -> None:
    (tmp_path / "config.ini").write_text(f"[wechat]\nencryption = {encryption}\n")
    env = {"WX_TOKEN": TOKEN, "WX_APPID": APPID, "WX_ENCODING_AES_KEY": KEY}
    server = gunicorn(run, tmp_path, **env).ready()
    env["WXSERVER_CONFIG"] = str(server.config)
    arguments = ["--url", f"{server.base}/wx", "--rate", "50", "--seconds", "1"]
    status, printed = command(run, *arguments, **env)
    assert (status, counts(printed)) == (
        0,
        {"sent": 50, "answered": 50, "silent": 0, "wrong": 0, "unanswered": 0},
    )
    assert "50.0 a second for 1.0 s" in printed
    assert re.search(r"^latency +p50 [\d.]+ ms, p95 [\d.]+ ms, p99 .*, max ", printed, re.MULTILINE)


def test_a_dead_server_is_one_line_with_its_count_and_the_exit_status_is_1(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "config.ini").write_text("")
    url = f"http://127.0.0.1:{free_port()}/wx"
    status, printed = command(
        run,
        *("--url", url, "--token", TOKEN, "--rate", "40", "--seconds", "1"),
        WXSERVER_CONFIG=str(tmp_path / "config.ini"),
    )
    assert status == 1
    assert counts(printed)["unanswered"] == 40
    assert counts(printed)["the connection was refused; is the server running?"] == 120
    assert printed.count("refused") == 1
    assert "latency" not in printed


def test_messages_are_as_many_as_asked_from_many_followers_and_none_is_like_another() -> None:
    got: list[Message] = []

    def bot(message: Message) -> bytes:
        got.append(message)
        return echo(message)

    assert all_well(bot, "--rate 60 --seconds 0.5")
    assert len(got) == 30
    for name in ("FromUserName", "Content", "MsgId"):
        assert len({message[name] for message in got}) == 30


def test_messages_leave_when_they_are_due_though_none_before_is_answered() -> None:
    all_are_there = threading.Barrier(30)

    def bot(message: Message) -> bytes:
        all_are_there.wait(4)
        return echo(message)

    assert all_well(bot)


@pytest.mark.parametrize(
    ("followers", "why"),
    [
        (10, "ToUserName is not the message's FromUserName; a reply swaps the two names"),
        (1, "the text of another message came back"),
    ],
)
def test_answers_that_are_mixed_up_are_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, followers: int, why: str
) -> None:
    monkeypatch.setattr(load, "FOLLOWERS", followers)
    lock, answers = threading.Lock(), [b""]

    def previous(message: Message) -> bytes:
        with lock:
            answers.append(echo(message))
            return answers[-2] or answers[-1]

    assert not all_well(previous)
    found = counts(capsys.readouterr().out)
    assert (found["answered"], found["wrong"], found[why]) == (1, 29, 29)


def test_what_wechat_cannot_use_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert not all_well(lambda _: b"hello")
    found = counts(capsys.readouterr().out)
    assert (found["answered"], found["wrong"]) == (0, 30)
    assert found["it is not XML: syntax error: line 1, column 0: 'hello'"] == 30


def test_a_message_that_needs_a_second_try_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    tries: Counter[str] = Counter()

    def bot(message: Message) -> bytes:
        tries[message["MsgId"]] += 1
        return echo(message) if tries[message["MsgId"]] == 2 else b"500"

    assert all_well(bot)
    printed = capsys.readouterr().out
    assert "30 at the 2nd try, 0 at the 3rd" in printed
    assert counts(printed) == {
        "sent": 30,
        "answered": 30,
        "silent": 0,
        "wrong": 0,
        "unanswered": 0,
        "HTTP status 500: '500'; the server's log says why": 30,
    }


@pytest.mark.parametrize("no_echo", [False, True])
def test_a_bot_that_does_not_echo_is_fine_with_no_echo(
    capsys: pytest.CaptureFixture[str], no_echo: bool
) -> None:
    line = "--rate 30 --seconds 1" + " --no-echo" * no_echo
    assert all_well(lambda message: answer(message, "hello"), line) is no_echo
    found = counts(capsys.readouterr().out)
    assert (found["answered"], found["wrong"]) == ((30, 0) if no_echo else (0, 30))


def test_names_are_checked_with_no_echo_too(capsys: pytest.CaptureFixture[str]) -> None:
    def bot(message: Message) -> bytes:
        return answer({**message, "FromUserName": "somebody else"}, "hello")

    assert not all_well(bot, "--rate 30 --seconds 1 --no-echo")
    assert counts(capsys.readouterr().out)["wrong"] == 30


@pytest.mark.parametrize("no_echo", [False, True])
def test_silence_is_counted_and_an_error_only_of_a_bot_that_echoes(
    capsys: pytest.CaptureFixture[str], no_echo: bool
) -> None:
    line = "--rate 30 --seconds 1" + " --no-echo" * no_echo
    assert all_well(lambda message: answer(message, None), line) is no_echo
    printed = capsys.readouterr().out
    found = counts(printed)
    assert (found["silent"], found["answered"], found["wrong"]) == (30, 0, 0)
    assert ("the account stayed silent" in printed) is not no_echo


def test_more_under_way_than_open_files_allow_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.ini").touch()

    def bot(message: Message) -> bytes:
        time.sleep(1.5)
        return echo(message)

    limited = "import resource, runpy; "
    limited += "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)); "
    limited += "runpy.run_module('wxsim', run_name='__main__')"
    with served(bot) as to:
        arguments = ("--url", to.url, "--token", TOKEN, "--rate", "40", "--seconds", "1")
        env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini")}
        process = run("-c", limited, "load", *arguments, env=env)
        found = counts(process.communicate(timeout=30)[0])
    assert process.returncode == 1
    assert found["unanswered"] > 0
    assert found["answered"] > 0
    assert found["the connection failed: Too many open files"] >= 3 * found["unanswered"]


def test_a_machine_too_slow_for_the_rate_says_so(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.ini").touch()
    came = threading.Event()

    def bot(message: Message) -> bytes:
        came.set()
        return echo(message)

    with served(bot) as to:
        arguments = ("--url", to.url, "--token", TOKEN, "--rate", "20", "--seconds", "3")
        env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini")}
        process = run("-m", "wxsim", "load", *arguments, env=env)
        assert came.wait(10)
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
        printed, _ = process.communicate(timeout=30)
    found = counts(printed)
    assert process.returncode == 1
    assert found["sent"] + found["not sent"] == 60
    assert found["not sent: this machine is too slow, or too busy, to send as many"] >= 10
    assert found["answered"] == found["sent"]


def test_ctrl_c_ends_it_and_prints_what_there_is(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text("")
    came, end = threading.Event(), threading.Event()

    def bot(message: Message) -> bytes:
        came.set()
        end.wait(30)
        return b"success"

    with served(bot) as to:
        process = run(
            *("-m", "wxsim", "load", "--url", to.url, "--token", TOKEN),
            *("--rate", "20", "--seconds", "3600"),
            env={"WXSERVER_CONFIG": str(tmp_path / "config.ini")},
        )
        until(came.is_set)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=30)
        end.set()
    assert process.returncode == 1
    assert "Traceback" not in errors
    found = counts(printed)
    assert 1 <= found["sent"] == found["under way"] < 3600 * 20


def test_now_and_then_a_line_says_how_it_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "PROGRESS_INTERVAL", 0.5)
    assert all_well(echo, "--rate 20 --seconds 1.4")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"\d+ sent, \d+ under way, \d+ answered", line) for line in lines)


def test_percentiles_are_of_the_sorted_times() -> None:
    times = [number / 1000 for number in range(1, 201)]
    random.shuffle(times)
    printed = report(Tally(latencies=times), 200)
    assert "p50 100.0 ms, p95 190.0 ms, p99 198.0 ms, max 200.0 ms" in printed
    assert "p50 7.0 ms, p95 7.0 ms, p99 7.0 ms, max 7.0 ms" in report(Tally(latencies=[0.007]), 200)


def test_errors_of_thousands_of_kinds_are_a_few_lines() -> None:
    errors = Counter({f"kind {number}": number for number in range(1, 2001)})
    lines = report(Tally(errors=errors), 200).splitlines()
    assert len(lines) < 20
    assert "   2000 × kind 2000" in lines
    assert lines[-1].strip() == "and 1990 more kinds of errors"


@pytest.mark.parametrize(
    "line",
    ["--rate 0", "--rate nan", "--seconds -1", "--seconds inf"],
)
def test_a_bad_option_is_an_error_in_one_line(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        options(line)
    assert caught.value.code == 2
    name, value = line.split()
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {name}: must be a number from " in error
    assert error.endswith(f", not '{value}'")
