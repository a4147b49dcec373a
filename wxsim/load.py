"""A steady stream of messages from many followers: does each get its own answer, and how soon?

    python -m wxsim load --rate 200 --seconds 30

Every message is sent when it is due, even while earlier ones wait for an answer, and its latency
counts from its due time. So a server that stalls looks no better for having received less.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from wechat.message import Message
from wxsim import client, follower, messages
from wxsim.arguments import number
from wxsim.client import Account

FOLLOWERS = 1000
MAX_DELAY = 1.0  # seconds; a message that is later than that is not sent
MAX_REASONS = 10  # lines of errors in the report
WAIT_AFTER_CTRL_C = 1.0  # seconds for the messages that are under way
PROGRESS_INTERVAL = 5.0  # seconds
TEXT = "load message "


@dataclass
class Tally:
    """What became of the messages; take ``lock`` to change it, since every message has a thread.

    A message counts as "sent" or "not sent". A sent one is "under way", and then "answered",
    "silent", "wrong" or "unanswered".
    """

    counts: Counter[str] = field(default_factory=Counter)
    tries: Counter[int] = field(default_factory=Counter)  # that the answered ones needed
    max_delay: float = 0.0  # seconds from the due time of a message until it was sent
    latencies: list[float] = field(default_factory=list)  # seconds from the due time, of good ones
    errors: Counter[str] = field(default_factory=Counter)  # by their reason
    lock: threading.Lock = field(default_factory=threading.Lock)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m wxsim load``."""
    rate, seconds = number(float, 0.01, 10_000), number(float, 0.01, 1_000_000)
    parser.add_argument("--rate", type=rate, default=200.0, help="messages a second; default: 200")
    parser.add_argument("--seconds", type=seconds, default=30.0, help="default: 30")
    parser.add_argument(
        "--no-echo",
        action="store_false",
        dest="echo",
        help="the bot does not send a text back: check the names alone, and silence is fine",
    )


def main(arguments: argparse.Namespace, account: Account) -> bool:
    """Send what the command line says and print a report; Ctrl-C ends it early.

    Return whether every message was sent and well answered: with its own text in the answer, if
    ``arguments.echo`` asks for that.
    """
    tally, is_over = Tally(), threading.Event()
    threading.Thread(target=_print_progress, args=(tally, is_over), daemon=True).start()
    try:
        _send_all(arguments, account, tally)
        _wait(tally, client.TRIES * client.WECHAT_TIMEOUT + 5)
    except KeyboardInterrupt:
        _wait(tally, WAIT_AFTER_CTRL_C)
    is_over.set()
    with tally.lock:
        print(report(tally, arguments.rate))
        counts = tally.counts
        as_expected = counts["answered"] + (0 if arguments.echo else counts["silent"])
        return as_expected == counts["sent"] + counts["not sent"] > 0


def _send_all(arguments: argparse.Namespace, account: Account, tally: Tally) -> None:
    """Send every message when it is due, in a thread of its own."""
    began = time.perf_counter()
    for count in itertools.count():
        if count / arguments.rate >= arguments.seconds:
            return
        due = began + count / arguments.rate
        time.sleep(max(0.0, due - time.perf_counter()))
        delay = time.perf_counter() - due
        openid = messages.openid(f"load {count % FOLLOWERS}")
        message = messages.make("text", openid, time.time())
        message["Content"] = f"{TEXT}{message['MsgId']}"
        thread = threading.Thread(
            target=_send, args=(account, message, due, arguments.echo, tally), daemon=True
        )
        with tally.lock:
            reason = ""
            if delay > MAX_DELAY:
                reason = "this machine is too slow, or too busy, to send as many"
            else:
                try:
                    thread.start()
                except RuntimeError:
                    reason = "this machine can start no more threads"
            if reason:
                tally.counts["not sent"] += 1
                tally.errors[f"not sent: {reason}"] += 1
            else:
                tally.counts.update(["sent", "under way"])
                tally.max_delay = max(tally.max_delay, delay)


def _wait(tally: Tally, seconds: float) -> None:
    end = time.monotonic() + seconds
    while tally.counts["under way"] and time.monotonic() < end:
        time.sleep(0.02)


def _send(account: Account, message: Message, due: float, echo: bool, tally: Tally) -> None:
    """Send one message and enter in the tally what comes of it."""
    tries = list(client.deliver(account, messages.outgoing(message)))
    seconds = time.perf_counter() - due
    answer, problem = tries[-1].answer, ""
    if answer:
        shown = follower.show(account, message, answer.body)
        problem = shown.problem or (_why_no_echo(message["Content"], shown.text) if echo else "")
        outcome = "wrong" if problem else "answered"
        if shown.text is None:
            outcome = "silent"
    else:
        outcome = "unanswered"
    with tally.lock:
        tally.counts.update({outcome: 1, "under way": -1})
        tally.errors.update(each.failure for each in tries if each.failure)
        if problem:
            tally.errors[problem] += 1
        elif answer:
            tally.latencies.append(seconds)
        if outcome == "answered":
            tally.tries[len(tries)] += 1


def _why_no_echo(content: str, text: str | None) -> str:
    """Say what is wrong with an answer that does not have ``content`` in it."""
    if text is None:
        return "the account stayed silent; --no-echo when it may"
    if content in text:
        return ""
    if TEXT in text:
        return "the text of another message came back"
    return "the message's text did not come back; --no-echo for a bot that does not echo"


def _print_progress(tally: Tally, is_over: threading.Event) -> None:
    """Print the counts on stderr every ``PROGRESS_INTERVAL``."""
    while not is_over.wait(PROGRESS_INTERVAL):
        with tally.lock:
            counts = ", ".join(f"{count} {name}" for name, count in tally.counts.items())
        print(counts, file=sys.stderr, flush=True)


def report(tally: Tally, rate: float) -> str:
    """Return the report on messages that were due at ``rate`` a second."""
    counts, tries = tally.counts, tally.tries
    due = counts["sent"] + counts["not sent"]
    sent = f"{rate * counts['sent'] / max(due, 1):.1f} a second for {due / rate:.1f} s"
    meanings = {
        "sent": f"{sent}, none more than {tally.max_delay * 1000:.0f} ms late",
        "answered": f"{tries[2]} at the 2nd try, {tries[3]} at the 3rd",
        "silent": "success, or nothing",
        "wrong": "another message's answer, or none that WeChat can use",
        "unanswered": f"after {client.TRIES} tries",
        "under way": "when it was ended",
        "not sent": f"of {due}: this was not the load asked for",
    }
    lines = [
        f"{name:10} {counts[name]:7}   {meaning}"
        for name, meaning in meanings.items()
        if counts[name] or name not in ("under way", "not sent")
    ]
    if latencies := sorted(tally.latencies):
        figures = []
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0)):
            rank = math.ceil(share * len(latencies))
            figures.append(f"{name} {latencies[rank - 1] * 1000:.1f} ms")
        lines.append(f"latency    {', '.join(figures)}")
    lines += [f"{count:7} × {reason}" for reason, count in tally.errors.most_common(MAX_REASONS)]
    if len(tally.errors) > MAX_REASONS:
        lines.append(f"        and {len(tally.errors) - MAX_REASONS} more kinds of errors")
    return "\n".join(lines)
