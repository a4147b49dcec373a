"""WeChat on your own machine: try the bot without an account, a public address or a phone.

    python -m wxsim verify          what the console does on 提交, and what it would say
    python -m wxsim text hello      a follower's message; so image, voice, location, link, …
    python -m wxsim event CLICK --key menu1
    python -m wxsim --raw FILE      a body as it is
    python -m wxsim chat            a conversation in the terminal
    python -m wxsim load            a steady stream of messages, checked and timed
    python -m wxsim api             a fake api.weixin.qq.com
    python -m wxsim check           what a real account needs, checked point by point

By default all of them use the local server and its config.ini.
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


def send(account: Account, message: Outgoing, wire: bool = False) -> bool:
    """Send a message as WeChat does and print what the follower sees.

    ``wire``: print the requests and the answer too. Return whether WeChat could use the answer.
    """
    for number, attempt in enumerate(client.deliver(account, message), 1):
        if wire:
            _print_wire(f"→ POST {attempt.url}", attempt.body)
            if attempt.body != message.xml:
                _print_wire("  encrypted from", message.xml)
        if attempt.failure:
            then = "sent again" if number < client.TRIES else "WeChat gives up"
            _note(f"try {number} of {client.TRIES}: {attempt.failure}; {then}")
    answer = attempt.answer
    if not answer:
        print(follower.APOLOGY)
        return False
    shown = follower.show(account, message.fields, answer.body)
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


def verify(account: Account) -> bool:
    """Do what the console does on 提交, and print what it would say."""
    try:
        client.verify(account)
    except client.NoAnswer as error:
        words = "请求URL超时" if isinstance(error, client.TooLate) else "Token验证失败"
        print(f"{words}: {error}")
        return False
    print("提交成功: the server answered with echostr")
    return True


def chat(account: Account, name: str, wire: bool) -> None:
    """Talk to the account as the follower ``name``, line by line, until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  to import it gives input() its history
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{account.url}; /help says what there is besides text")
    while True:
        try:
            line = input(f"{name}> " if is_terminal else "").strip(" \t\r")
            if line == "/quit":
                return
            if line == "/help":
                print(CHAT_HELP)
            elif line == "/xml":
                wire = not wire
            elif line.startswith("/as "):
                name = line[4:].strip() or name
            elif line:
                send(account, _chat_message(line, name), wire)
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("Ctrl-D or /quit ends the chat")
        except ValueError as error:
            print(error)


def _chat_message(line: str, name: str) -> Outgoing:
    """Make the message that a line of the chat stands for.

    Raises:
        ValueError: there is no such command, or what follows it is wrong.
    """
    if not line.startswith("/") or line.startswith("/:"):  # as WeChat's own emoticons do
        return _message("text", name, [f"Content={line}"])
    match shlex.split(line[1:]):
        case ["event", event, key, *settings] if not re.match(r"[\w.]+=", key):
            return _message("event", name, [f"EventKey={key}", *settings], event)
        case ["event", event, *settings]:
            return _message("event", name, settings, event)
        case [kind, *settings] if kind in MESSAGES:
            return _message(kind, name, settings)
    raise ValueError(f"there is no {line!r}; /help says what there is")


def _message(kind: str, name: str, settings: list[str], event: str = "") -> Outgoing:
    message = messages.make(kind, messages.openid(name), time.time(), event, settings)
    return messages.outgoing(message)


def _parser() -> argparse.ArgumentParser:
    # These may stand before the command and after it, so a default in one place would hide a
    # value in the other. _run() sets the defaults.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--url", help="the callback; default: the local server's")
    common.add_argument("--token", help="its Token; default: that of config.ini or state_dir")
    common.add_argument("--as", dest="name", metavar="NAME", help="the follower; default: me")
    common.add_argument("--xml", action="store_true", help="show the wire both ways")
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="wxsim",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--raw", type=Path, metavar="FILE", help="a body as it is")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    names = (*MESSAGES, "event", "verify", "chat", "load", "api", "check")
    parsers = {name: commands.add_parser(name, parents=[common]) for name in names}
    for kind in (*MESSAGES, "event"):
        parsers[kind].add_argument(
            "--set",
            action="append",
            dest="settings",
            default=[],
            metavar="NAME=VALUE",
            help="a field, such as MediaId=abc or ScanCodeInfo.ScanResult=1; may be repeated",
        )
    parsers["text"].add_argument("content", nargs="*", help="default: hello")
    parsers["event"].add_argument(
        "event", metavar="EVENT", help=f"any; these have made-up fields: {', '.join(EVENTS)}"
    )
    parsers["event"].add_argument(
        "--key",
        action="append",
        dest="settings",
        type="EventKey={}".format,
        metavar="KEY",
        help="its EventKey, as --set EventKey=KEY; qrscene_42 makes subscribe a scan",
    )
    load.add_arguments(parsers["load"])
    fake_api_command.add_arguments(parsers["api"])
    return parser


def main() -> None:
    """Play WeChat: send what the command line says and print what the follower would see."""
    try:
        try:
            ok = _run()
        finally:
            sys.stdout.flush()
        sys.exit(not ok)
    except BrokenPipeError:  # of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ConfigError as error:
        sys.exit(f"wxsim: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> bool:
    """Do what the command line says, and tell whether all went well."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # For a terminal without Chinese, and for a pipe that somebody reads line by line.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # any bytes may be typed
    parser = _parser()
    defaults = {"url": "", "token": "", "name": "me", "xml": False, "content": [], "event": ""}
    arguments = parser.parse_args(namespace=argparse.Namespace(**defaults))
    if bool(arguments.command) == bool(arguments.raw):
        parser.error("a COMMAND or --raw FILE is needed; try: verify, or text hello")
    if arguments.command == "check":
        from wxsim import check

        return check.main(arguments.url)
    config = wechat.config.load()
    if arguments.command == "api":
        fake_api_command.main(arguments, config)
        return True
    account = client.from_config(config, arguments.url, arguments.token)
    if not client.is_url(account.url):
        parser.error(f"--url must be http://… or https://…, not {account.url!r}")
    match arguments.command:
        case "verify":
            return verify(account)
        case "load":
            return load.main(arguments, account)
        case "chat":
            chat(account, arguments.name, arguments.xml)
            return True
    try:
        if arguments.raw:
            openid = messages.openid(arguments.name)
            message = messages.outgoing_raw(arguments.raw.read_bytes(), openid)
        else:
            typed = [f"Content={' '.join(arguments.content)}"] if arguments.content else []
            settings = [*typed, *arguments.settings]
            message = _message(arguments.command, arguments.name, settings, arguments.event)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return send(account, message, arguments.xml)


if __name__ == "__main__":
    main()
