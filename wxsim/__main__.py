"""WeChat on your own machine: try the bot without an account, a public address or a phone.

    python -m wxsim verify          what the console does on 提交, and what it would say
    python -m wxsim text hello      a follower's message; so image, voice, location, link, …
    python -m wxsim event CLICK --key menu1
    python -m wxsim --raw FILE      a body as it is
    python -m wxsim chat            a conversation in the terminal
    python -m wxsim load            a steady stream of messages, checked and timed
    python -m wxsim api             a fake api.weixin.qq.com

The local server and its config.ini are what all of it talks to by default.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import re
import shlex
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import wxconfig
from wxsim import fake_api
from wxsim import load
from wxsim import messages
from wxsim import client
from wxconfig import Config, ConfigError
from wxmessage import to_xml
from wxsim.messages import EVENTS, MESSAGES
from wxsim.client import Account, Answer

CHAT_HELP = """\
What you type goes to the account as a text. Besides that there are
  /image, /voice, /video, /shortvideo, /location, /link    with NAME=VALUE for other fields
  /event EVENT [KEY] [NAME=VALUE]   /event subscribe, /event CLICK menu1, /event SCAN 42
  /as NAME     be another follower       /xml     show the wire, or no longer
  /help        this                      /quit    or Ctrl-D"""


def send(to: Account, xml: bytes, follower: str, wire: bool = False, raw: bool = False) -> bool:
    """Send a message as WeChat does and print what the follower sees.

    Args:
        to: the callback.
        xml: the message.
        follower: the OpenID it comes from.
        wire: whether to print both sides of the wire.
        raw: whether to send ``xml`` as it is even in the encrypted modes.

    Returns:
        Whether that is something else than WeChat's own apology.
    """

    def failed(number: int, why: str) -> None:
        more = "sent again" if number < client.TRIES else "WeChat gives up"
        _note(f"try {number} of {client.TRIES}: {why}; {more}")

    def sent(url: str, body: bytes) -> None:
        if wire:
            _print_wire(f"→ POST {url}", body)
            if body != xml:
                _print_wire("  encrypted from", xml)

    plain = Account(to.url, to.token) if raw else to
    answer = asyncio.run(client.deliver(plain, xml, follower, failed, sent))
    if answer is None:
        print(client.FAULT)
        return False
    return _print_answer(to, xml, answer, wire)


def _print_answer(to: Account, xml: bytes, answer: Answer, wire: bool) -> bool:
    shown = client.read(to, xml, answer)
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
    why = client.verify(to)
    parts = urlsplit(to.url)
    if not why:
        print("提交成功: the server answered with echostr")
    elif why.startswith("no answer within"):
        print(f"请求URL超时: {why}")
    else:
        print(f"Token验证失败: {why}")
    if (parts.port or 80) not in (80, 443) and parts.hostname not in ("127.0.0.1", "localhost"):
        _note("the console takes port 80 or 443 alone")
    return not why


def chat(to: Account, follower: str, wire: bool) -> None:
    """Talk to the account, line by line, until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  to import it gives input() its history
    if sys.stdin.isatty():
        print(f"{to.url}; /help says what there is besides text")
    while True:
        try:
            line = input(f"{follower}> " if sys.stdin.isatty() else "").strip()
            if line == "/quit":
                return
            if line == "/xml":
                wire = not wire
            elif line.startswith("/as "):
                follower = line[4:].strip() or follower
            elif line:
                xml = _chat_message(line, messages.openid(follower))
                send(to, xml, messages.openid(follower), wire)
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("Ctrl-D or /quit ends the chat")
        except ValueError as error:
            print(error)


def _chat_message(line: str, openid: str) -> bytes:
    """Turn a line of the chat into a message.

    Raises:
        ValueError: there is no such command; its text says what there is.
    """
    if not line.startswith("/") or line.startswith("/:"):  # as WeChat's own emoticons do
        return to_xml(messages.make("text", openid, time.time()) | {"Content": line})
    command, *words = shlex.split(line[1:]) or [""]
    kind, kinds, key = command, MESSAGES, None
    if command == "event":
        kind, *words = words or [""]
        kinds = EVENTS
        if words and not re.match(r"[\w.]+=", words[0]):
            key, *words = words
    if command == "help":
        raise ValueError(f"{CHAT_HELP}\nEVENT is one of {', '.join(EVENTS)}")
    if kind not in kinds:
        raise ValueError(f"there is no {line!r}; /help says what there is")
    message = messages.make(kind, openid, time.time(), key)
    return to_xml(messages.with_fields(message, words))


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--url", help="the callback; default: the local server's")
    common.add_argument("--token", help="its Token; default: that of config.ini or state_dir")
    message = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    message.add_argument("--as", dest="follower", metavar="NAME", help="the follower; default: me")
    message.add_argument("--xml", action="store_true", help="show the wire both ways")
    message.add_argument(
        "--raw", type=Path, metavar="FILE", help="send this body as it is; - is stdin"
    )
    setting = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    setting.add_argument(
        "--set",
        action="append",
        dest="settings",
        metavar="NAME=VALUE",
        help="a field, such as MediaId=abc or ScanCodeInfo.ScanResult=1; may be repeated",
    )
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common, message],
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("verify", parents=[common], help="what the console does on 提交")
    for kind in MESSAGES:
        command = commands.add_parser(
            kind, parents=[common, message, setting], help=f"a follower's message: {kind}"
        )
        if kind == "text":
            command.add_argument("content", nargs="*", help="default: hello")
    command = commands.add_parser(
        "event",
        parents=[common, message, setting],
        help="an event: subscribe, CLICK, SCAN, …",
        epilog=f"EVENT is one of {', '.join(EVENTS)}",
    )
    command.add_argument("event", metavar="EVENT", choices=EVENTS)
    command.add_argument("--key", help="its EventKey; qrscene_42 makes subscribe a scan")
    commands.add_parser("chat", parents=[common, message], help="a conversation in the terminal")
    command = commands.add_parser(
        "load", parents=[common], help="a steady stream of messages, checked and timed"
    )
    load.add_arguments(command)
    command = commands.add_parser("api", help="a fake api.weixin.qq.com")
    fake_api.add_arguments(command)
    return parser


def main() -> None:
    """Play WeChat: send what the command line says and print what the follower would see."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Chinese
    parser = _parser()
    arguments = argparse.Namespace(
        url="", token="", follower="me", xml=False, raw=None, settings=[], key=None
    )
    parser.parse_args(namespace=arguments)
    if not arguments.command and not arguments.raw:
        parser.error("a COMMAND or --raw FILE is needed; try: verify, or text hello")
    try:
        _run(parser, arguments, wxconfig.load())
    except ConfigError as error:
        sys.exit(f"wxsim: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, config: Config) -> None:
    if arguments.command == "api":
        fake_api.main(arguments, config)
        return
    to = client.account(config, arguments.url, arguments.token)
    if not client.is_url(to.url):
        parser.error(f"--url must be http://… or https://…, not {to.url!r}")
    openid = messages.openid(arguments.follower)
    if arguments.command == "verify":
        sys.exit(not verify(to))
    if arguments.command == "load":
        sys.exit(not load.main(arguments, to))
    if arguments.raw:
        try:
            body = (
                sys.stdin.buffer.read() if str(arguments.raw) == "-" else arguments.raw.read_bytes()
            )
        except OSError as error:
            parser.error(f"--raw {arguments.raw}: {error.strerror}")
        sys.exit(not send(to, body, openid, arguments.xml, raw=True))
    if arguments.command == "chat":
        chat(to, arguments.follower, arguments.xml)
        return
    event = arguments.command == "event"
    kind = arguments.event if event else arguments.command
    message = messages.make(kind, openid, time.time(), arguments.key)
    if kind == "text" and arguments.content:
        message["Content"] = " ".join(arguments.content)
    try:
        xml = to_xml(messages.with_fields(message, arguments.settings))
    except ValueError as error:
        parser.error(f"--set {error}")
    sys.exit(not send(to, xml, openid, arguments.xml))


if __name__ == "__main__":
    main()
