"""A steady stream of messages from many followers: is every answer its question's, and how soon?

    python -m wxsim load --rate 200 --seconds 30

A message leaves when it is due, whatever became of those before it, and its time counts from
there: a server that stalls cannot hide it by being asked less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import resource
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from wxsim import messages
from wxsim import client
from wxmessage import to_xml
from wxsim.client import Account

LATEST = 1.0  # seconds after its due time at which a message is given up and not sent
SPARE = 64  # open files that are kept for other things than messages
REASONS = 10  # lines of errors in the report
PATIENCE = 1.0  # seconds that Ctrl-C leaves to what is under way
_TEXT = "load message "


@dataclass
class Tally:
    """What became of the messages that were due.

    Each was sent or not; a sent one is answered, silent, wrong, unanswered or still under way.
    """

    sent: int = 0
    unsent: int = 0
    answered: Counter[int] = field(default_factory=Counter)  # by the number of the try, from 1
    silent: int = 0
    wrong: int = 0
    unanswered: int = 0
    late: float = 0.0  # seconds after its due time, of the sent one that left the latest
    latencies: list[float] = field(default_factory=list)  # seconds from the due time, of good ones
    errors: Counter[str] = field(default_factory=Counter)  # by their reason

    @property
    def under_way(self) -> int:
        """How many were sent and are neither answered nor given up."""
        done = self.answered.total() + self.silent + self.wrong + self.unanswered
        return self.sent - done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m wxsim load``."""
    rate, seconds, followers = _positive(float), _positive(float), _positive(int)
    parser.add_argument("--rate", type=rate, default=200.0, help="messages a second; default: 200")
    parser.add_argument("--seconds", type=seconds, default=30.0, help="default: 30")
    parser.add_argument("--followers", type=followers, default=1000, help="default: 1000")
    parser.add_argument(
        "--no-echo",
        action="store_false",
        dest="echo",
        help="the bot does not send a text back: check the names alone, and silence is fine",
    )


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < (value := kind(text)) < math.inf:
                return value
        whole = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {whole} above 0, not {text!r}")

    return convert


def main(arguments: argparse.Namespace, to: Account) -> bool:
    """Send what the command line says and print a report; Ctrl-C ends it early.

    Args:
        arguments: ``rate`` in messages a second, ``seconds``, ``followers``, and ``echo``: whether
            an answer must have the message's own text in it.
        to: the callback.

    Returns:
        Whether all that was due was sent, and answered as it should be.
    """
    tally = Tally()
    asyncio.run(_run(arguments, to, tally))
    good = tally.answered.total() + (0 if arguments.echo else tally.silent)
    print(report(tally, arguments.rate))
    return good == tally.sent + tally.unsent > 0


async def _run(arguments: argparse.Namespace, to: Account, tally: Tally) -> None:
    under_way: set[asyncio.Task[None]] = set()
    progress = asyncio.create_task(_progress(tally))
    sending = asyncio.create_task(_send(arguments, to, tally, under_way))
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, sending.cancel)
    try:
        await sending
    except asyncio.CancelledError:
        if under_way:
            await asyncio.wait(under_way, timeout=PATIENCE)
    progress.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await progress


async def _send(
    arguments: argparse.Namespace, to: Account, tally: Tally, under_way: set[asyncio.Task[None]]
) -> None:
    """Let every message leave when it is due, and wait until the last is answered or given up."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # each one under way has its connection
    most = 65536 if limit == resource.RLIM_INFINITY else max(limit - SPARE, 1)
    first = 24 * 10**15 + secrets.randbelow(10**15)  # so that no other run has the same MsgIds
    began = time.perf_counter()
    for number in itertools.count():
        if number / arguments.rate >= arguments.seconds:
            break
        due = began + number / arguments.rate
        # Even when it is late: whoever is under way has to get on as well.
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        late = time.perf_counter() - due
        if late > LATEST or len(under_way) >= most:
            tally.unsent += 1
            full = f"{most} were under way, as many as this shell's limit allows; raise ulimit -n"
            slow = "this machine is too slow, or too busy, to send as many"
            tally.errors[f"not sent: {slow if late > LATEST else full}"] += 1
            continue
        tally.sent += 1
        tally.late = max(tally.late, late)
        follower = messages.openid(f"load {number % arguments.followers}")
        coming = _message(to, follower, first + number, due, arguments.echo, tally)
        task = asyncio.create_task(coming)
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    if under_way:
        await asyncio.wait(under_way)


async def _message(
    to: Account, follower: str, msg_id: int, due: float, echo: bool, tally: Tally
) -> None:
    """Send one message, which no other resembles, and enter in the tally what comes of it."""
    content = f"{_TEXT}{msg_id}"
    message = messages.make("text", follower, time.time())
    xml = to_xml(message | {"Content": content, "MsgId": msg_id})
    tries = 1

    def failed(number: int, why: str) -> None:
        nonlocal tries
        tries = number + 1
        tally.errors[why] += 1

    answer = await client.deliver(to, xml, follower, failed)
    if answer is None:
        tally.unanswered += 1
        return
    seconds = time.perf_counter() - due
    shown = client.read(to, xml, answer)
    problem = shown.problem
    if shown.text is None:
        tally.silent += 1
        problem = "the account stayed silent; --no-echo when it may" if echo else ""
    elif problem:
        tally.wrong += 1
    elif echo and content not in shown.text:
        tally.wrong += 1
        problem = "the message's text did not come back; --no-echo for a bot that does not echo"
        if _TEXT in shown.text:
            problem = "the text of another message came back"
    else:
        tally.answered[tries] += 1
    if problem:
        tally.errors[problem] += 1
    else:
        tally.latencies.append(seconds)


async def _progress(tally: Tally) -> None:
    """Say every now and then on stderr how it goes, until it is cancelled."""
    began, terminal = time.perf_counter(), sys.stderr.isatty()
    start, end = ("\r\x1b[K", "") if terminal else ("", "\n")
    try:
        while True:
            await asyncio.sleep(1 if terminal else 10)
            line = (
                f"{time.perf_counter() - began:.0f} s: {tally.sent} sent,"
                f" {tally.answered.total() + tally.silent} answered, {tally.under_way} under way,"
                f" {tally.wrong} wrong, {tally.unanswered + tally.unsent} lost"
            )
            print(start + line, end=end, file=sys.stderr, flush=True)
    finally:
        if terminal:
            print(start, end="", file=sys.stderr, flush=True)


def report(tally: Tally, rate: float) -> str:
    """Return the lines that tell what became of messages that were due ``rate`` a second."""
    due = tally.sent + tally.unsent
    kept = f"{rate * tally.sent / max(due, 1):.1f} a second for {due / rate:.1f} s"
    again = f"{tally.answered[2]} at the 2nd try, {tally.answered[3]} at the 3rd"
    lines = [
        f"sent       {tally.sent:7}   {kept}, none more than {tally.late * 1000:.0f} ms late",
        f"answered   {tally.answered.total():7}   {again}",
        f"silent     {tally.silent:7}   success, or nothing",
        f"wrong      {tally.wrong:7}   another message's answer, or none that WeChat can use",
        f"unanswered {tally.unanswered:7}   after {client.TRIES} tries",
    ]
    if tally.under_way:
        lines.append(f"under way  {tally.under_way:7}   when it was ended")
    if tally.unsent:
        lines.append(f"not sent   {tally.unsent:7}   of {due}: this was not the load asked for")
    if ordered := sorted(tally.latencies):
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
        ranks = {name: math.ceil(share * len(ordered)) for name, share in shares.items()}
        figures = [f"{name} {ordered[rank - 1] * 1000:.1f} ms" for name, rank in ranks.items()]
        lines.append(f"latency    {', '.join(figures)}")
    lines += [f"{count:7} × {why}" for why, count in tally.errors.most_common(REASONS)]
    if (more := len(tally.errors) - REASONS) > 0:
        lines.append(f"        and {more} more kinds of errors")
    return "\n".join(lines)
