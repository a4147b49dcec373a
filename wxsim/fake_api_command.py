"""The command ``python -m wxsim api``: the fake api.weixin.qq.com, and the words that steer it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wxsim.arguments import number
from wxsim.fake_api import GARBAGE, LIFE, FakeApi, error

if TYPE_CHECKING:
    from wechat.config import Config


def _failure(text: str) -> bytes:
    return error(int(number(int, -1, 10**8)(text)))


# Words for the terminal, which are options too: the field they set, its value, and what it does.
_SWITCHES: dict[str, tuple[str, str, Callable[[str], Any], str]] = {
    "fail": ("failure", "ERRCODE", _failure, "answer everything with this errcode"),
    "garbage": ("failure", "", lambda _: GARBAGE, "answer everything with a page of HTML"),
    "slow": ("delay", "SECONDS", number(float, 0, 3600), "wait before every answer"),
    "expires-in": ("expires_in", "SECONDS", number(int, 1, LIFE), "the life of the next tokens"),
    "token-length": ("length", "CHARACTERS", number(int, 16, 4096), "of the next tokens"),
}
_HELP = {f"{word} {value}": what for word, (_, value, _, what) in _SWITCHES.items()}
_HELP |= {"expire": "let all tokens die now: 42001", "ok": "back to normal", "help": "this list"}


def obey(api: FakeApi, line: str) -> str:
    """Do what a line typed in the terminal says; return what to print."""
    word, _, value = " ".join(line.split()).partition(" ")
    if word == "expire":
        api.expire()
    elif word == "ok":
        api.failure, api.delay, api.expires_in, api.length = None, 0.0, LIFE, 512
    elif word in _SWITCHES:
        attribute, _, convert, _ = _SWITCHES[word]
        try:
            setattr(api, attribute, convert(value))
        except argparse.ArgumentTypeError as wrong:
            return f"{word}: {wrong}"
    else:
        return "\n".join(f"  {words:<26}{what}" for words, what in _HELP.items())
    return f"{word}: done"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m wxsim api``."""
    port = number(int, 0, 65535)
    parser.add_argument("--port", type=port, default=8001, help="default: 8001; 0: a free one")
    for word, (attribute, value, convert, what) in _SWITCHES.items():
        kind: dict[str, Any] = {"metavar": value, "type": convert}
        if not value:
            kind = {"action": "store_const", "const": convert("")}
        parser.add_argument(f"--{word}", dest=attribute, help=what, **kind)


def main(arguments: argparse.Namespace, config: Config) -> None:
    """Serve a fake api.weixin.qq.com until Ctrl-C, and obey the words typed meanwhile.

    Raises:
        SystemExit: the port cannot be had.
    """
    api = FakeApi(config.appid, config.appsecret, port=arguments.port, say=_say)
    for attribute, *_ in _SWITCHES.values():
        if (value := getattr(arguments, attribute)) is not None:
            setattr(api, attribute, value)
    with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
        try:
            stack.enter_context(api)
        except OSError as failure:
            sys.exit(f"wxsim api: port {arguments.port}: {failure.strerror}")
        appid, secret = config.appid or "any appid", "its" if config.appsecret else "any"
        _say(f"a fake api.weixin.qq.com for {appid} with {secret} appsecret; in config.ini it is\n")
        _say(f"[access_token]\napi_base = {api.base}\n")
        _say("Ctrl-C ends it; help lists what can be typed here")
        _listen(api)
        threading.Event().wait()


def _listen(api: FakeApi) -> None:
    # In the background of a shell, a read from its terminal would stop the process.
    if hasattr(signal, "SIGTTIN"):  # which Windows has not
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        for line in sys.stdin or ():
            _say(obey(api, line))


def _say(text: str) -> None:
    try:
        print(f"{text}\n", end="", flush=True)  # in one piece, for several threads write
    except BrokenPipeError:  # of `| head`, which has read enough; main() may wait for a line
        os._exit(1)
