"""WeChat on your own machine: try the bot without an account, a public address or a phone.

    python -m wxsim verify          what the console does on 提交, and what it would say
    python -m wxsim text hello      a follower's message; so image, voice, location, link, …
    python -m wxsim event CLICK --key menu1
    python -m wxsim --raw FILE      a body as it is
    python -m wxsim chat            a conversation in the terminal
    python -m wxsim load            a steady stream of messages, checked and timed
    python -m wxsim api             a fake api.weixin.qq.com
    python -m wxsim check           what a real account needs, looked at point by point

The local server and its config.ini are what all of it talks to by default.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import wechat.config
from wechat.config import ConfigError
from wxsim import client, fake_api_command, follower, load, messages
from wxsim.client import Account
from wxsim.messages import EVENTS, MESSAGES, Outgoing

CHAT_HELP = f"""\
What you type goes to the account as a text. Besides that there are
  /image, /voice, /video, /shortvideo, /location, /link    with NAME=VALUE for other fields
  /event EVENT [KEY] [NAME=VALUE]   /event subscribe, /event CLICK menu1, /event SCAN 42
  /as NAME     be another follower       /xml     show the wire, or no longer
  /help        this                      /quit    or Ctrl-D
Known EVENTs are {", ".join(EVENTS)}"""


def send(to: Account, message: Outgoing, wire: bool = False) -> bool:
    """Send a message as WeChat does and print what the follower sees, and the ``wire`` if wanted.

    Return whether the follower sees something else than WeChat's own apology.
    """

    def on_failure(number: int, reason: str) -> None:
        then = "sent again" if number < client.TRIES else "WeChat gives up"
        _note(f"try {number} of {client.TRIES}: {reason}; {then}")

    def on_request(url: str, body: bytes) -> None:
        if wire:
            _print_wire(f"→ POST {url}", body)
            if body != message.xml:
                _print_wire("  encrypted from", message.xml)

    answer = client.deliver(to, message, on_failure, on_request)
    if answer is None:
        print(follower.FAULT)
        return False
    shown = follower.read(to, message.fields, answer.body)
    if wire:
        _print_wire(f"← {answer.status} in {answer.seconds * 1000:.1f} ms", answer.body)
        if shown.xml not in (b"", answer.body):
            _print_wire("  decrypted", shown.xml)
    if shown.text is None:
        _note("the account stays silent")
    else:
        print(shown.text)
    if shown.problem:
        _note(f"WeChat cannot use the answer: {shown.problem}")
    if shown.note:
        _note(shown.note)
    return not shown.problem


def _print_wire(title: str, body: bytes) -> None:
    print(f"{title}\n{body.decode(errors='backslashreplace')}\n")


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


def verify(to: Account) -> bool:
    """Do what the console does on 提交, and print what it would say."""
    problem = client.verify(to)
    parts = urlsplit(to.url)
    if not problem:
        print("提交成功: the server answered with echostr")
    elif problem.startswith("no answer within"):
        print(f"请求URL超时: {problem}")
    else:
        print(f"Token验证失败: {problem}")
    if (parts.port or 80) not in (80, 443) and parts.hostname not in ("127.0.0.1", "localhost"):
        _note("the console takes port 80 or 443 alone")
    return not problem


def chat(to: Account, name: str, wire: bool) -> None:
    """Talk to the account as the follower ``name``, line by line, until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  to import it gives input() its history
    if sys.stdin.isatty():
        print(f"{to.url}; /help says what there is besides text")
    while True:
        try:
            line = input(f"{name}> " if sys.stdin.isatty() else "").strip(" \t\r")
            if line == "/quit":
                return
            if line == "/xml":
                wire = not wire
            elif line.startswith("/as "):
                name = line[4:].strip() or name
            elif line:
                send(to, _chat_message(line, messages.openid(name)), wire)
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("Ctrl-D or /quit ends the chat")
        except ValueError as error:
            print(error)


def _chat_message(line: str, openid: str) -> Outgoing:
    """Turn a line of the chat into a message.

    Raises:
        ValueError: there is no such command; its text says what there is.
    """
    if not line.startswith("/") or line.startswith("/:"):  # as WeChat's own emoticons do
        return _made("text", openid, [f"Content={line}"])
    command, *words = shlex.split(line[1:]) or [""]
    event, key = "", None
    if command == "help":
        raise ValueError(CHAT_HELP)
    if command == "event" and words:
        event = words.pop(0)
        if words and not re.match(r"[\w.]+=", words[0]):
            key = words.pop(0)
    elif command not in MESSAGES:
        raise ValueError(f"there is no {line!r}; /help says what there is")
    return _made(command, openid, words, event, key)


def _made(
    kind: str, openid: str, settings: list[str], event: str = "", key: str | None = None
) -> Outgoing:
    """Make a message, or an event if ``kind`` is that.

    Raises:
        ValueError: one of ``settings`` is no setting.
    """
    if kind == "event":
        message = messages.make_event(event, openid, time.time(), key)
    else:
        message = messages.make(kind, openid, time.time())
    messages.set_fields(message, settings)
    return messages.outgoing(message)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--url", help="the callback; default: the local server's")
    common.add_argument("--token", help="its Token; default: that of config.ini or state_dir")
    message = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    message.add_argument("--as", dest="name", metavar="NAME", help="the follower; default: me")
    message.add_argument("--xml", action="store_true", help="show the wire both ways")
    message.add_argument("--raw", type=Path, metavar="FILE", help="a body as it is; - is stdin")
    setting = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    setting.add_argument(
        "--set",
        action="append",
        dest="settings",
        metavar="NAME=VALUE",
        help="a field, such as MediaId=abc or ScanCodeInfo.ScanResult=1; may be repeated",
    )
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="wxsim",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common, message],
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("verify", parents=[common], help="what the console does on 提交")
    parents = [common, message, setting]
    for kind in MESSAGES:
        command = commands.add_parser(kind, parents=parents, help=f"a follower's message: {kind}")
        if kind == "text":
            command.add_argument("content", nargs="*", help="default: hello")
    epilog = f"These have fields of their own: {', '.join(EVENTS)}. Any other has those of --set."
    command = commands.add_parser("event", parents=parents, help="an event", epilog=epilog)
    command.add_argument("event", metavar="EVENT", help="subscribe, CLICK, SCAN, …")
    command.add_argument("--key", help="its EventKey; qrscene_42 makes subscribe a scan")
    commands.add_parser("chat", parents=[common, message], help="a conversation in the terminal")
    steady = "a steady stream of messages, checked and timed"
    load.add_arguments(commands.add_parser("load", parents=[common], help=steady))
    fake_api_command.add_arguments(commands.add_parser("api", help="a fake api.weixin.qq.com"))
    command = commands.add_parser("check", help="look whether a real account has all that it needs")
    command.add_argument("--url", help="the callback's public address, as in the console")
    return parser


def main() -> None:
    """Play WeChat: send what the command line says and print what the follower would see."""
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ConfigError as error:
        sys.exit(f"wxsim: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # For a terminal without Chinese, and for a pipe that somebody reads line by line.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # any bytes may be typed
    parser = _parser()
    defaults = {"url": "", "token": "", "name": "me", "xml": False, "raw": None, "settings": []}
    defaults |= {"content": [], "event": "", "key": None}
    arguments = argparse.Namespace(**defaults)
    parser.parse_args(namespace=arguments)
    if not arguments.command and not arguments.raw:
        parser.error("a COMMAND or --raw FILE is needed; try: verify, or text hello")
    if arguments.command == "check":
        try:
            from wxsim import check
        except ModuleNotFoundError:
            sys.exit("wxsim check: needs Linux or macOS; on Windows use WSL")
        sys.exit(check.main(arguments.url))
    config = wechat.config.load()
    if arguments.command == "api":
        fake_api_command.main(arguments, config)
        return
    to = client.account(config, arguments.url, arguments.token)
    if not client.is_url(to.url):
        parser.error(f"--url must be http://… or https://…, not {to.url!r}")
    if arguments.command == "verify":
        sys.exit(not verify(to))
    if arguments.command == "load":
        sys.exit(not load.main(arguments, to))
    if arguments.command == "chat" and not arguments.raw:
        chat(to, arguments.name, arguments.xml)
        return
    openid = messages.openid(arguments.name)
    settings = [f"Content={' '.join(arguments.content)}"] if arguments.content else []
    settings += arguments.settings
    try:
        if arguments.raw:
            is_stdin = str(arguments.raw) == "-"
            body = sys.stdin.buffer.read() if is_stdin else arguments.raw.read_bytes()
            message = messages.outgoing_raw(body, openid)
        else:
            message = _made(arguments.command, openid, settings, arguments.event, arguments.key)
    except OSError as error:
        parser.error(f"--raw {arguments.raw}: {error.strerror}")
    except ValueError as error:
        parser.error(f"--set {error}")
    sys.exit(not send(to, message, arguments.xml))


if __name__ == "__main__":
    main()
