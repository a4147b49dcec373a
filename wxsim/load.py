"""A steady stream of messages from many followers: is every answer its message's, and how soon?

    python -m wxsim load --rate 200 --seconds 30

A message leaves when it is due, whatever became of those before it, and its time counts from
there: a server that stalls cannot hide it by being sent fewer messages.
"""

from __future__ import annotations

import argparse
import itertools
import math
import secrets
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from wxsim import client, follower, messages
from wxsim.arguments import number
from wxsim.client import Account

MOST_LATE = 1.0  # seconds after its due time at which a message is not sent any more
SPARE_FILES = 64  # open files that are kept for other things than messages
REASONS = 10  # lines of errors in the report
WAIT_AFTER_CTRL_C = 1.0  # seconds for the messages that are under way
TEXT = "load message "


@dataclass
class Tally:
    """What became of the messages that were due; under ``lock``, for every message has a thread.

    Each was sent or not; a sent one is answered, silent, wrong, unanswered or still under way.
    """

    sent: int = 0
    unsent: int = 0
    answered: list[int] = field(default_factory=lambda: [0] * client.TRIES)  # at the 1st try, …
    silent: int = 0
    wrong: int = 0
    unanswered: int = 0
    late: float = 0.0  # seconds after its due time, of the sent one that left the latest
    latencies: list[float] = field(default_factory=list)  # seconds from the due time, of good ones
    errors: Counter[str] = field(default_factory=Counter)  # by their reason
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def under_way(self) -> int:
        """How many were sent and are neither answered nor given up."""
        done = sum(self.answered) + self.silent + self.wrong + self.unanswered
        return self.sent - done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m wxsim load``."""
    rate, seconds = number(float, 0.01, 10_000), number(float, 0.01, 1_000_000)
    followers = number(int, 1, 1_000_000)
    parser.add_argument("--rate", type=rate, default=200.0, help="messages a second; default: 200")
    parser.add_argument("--seconds", type=seconds, default=30.0, help="default: 30")
    parser.add_argument("--followers", type=followers, default=1000, help="default: 1000")
    parser.add_argument(
        "--no-echo",
        action="store_false",
        dest="echo",
        help="the bot does not send a text back: check the names alone, and silence is fine",
    )


def main(arguments: argparse.Namespace, to: Account) -> bool:
    """Send what the command line says and print a report; Ctrl-C ends it early.

    Return whether all that was due was sent, and answered as it should be: with its own text in
    the answer if ``arguments.echo`` says so.
    """
    tally, ended = Tally(), threading.Event()
    progress = threading.Thread(target=_print_progress, args=(tally, ended), daemon=True)
    progress.start()
    try:
        _send_all(arguments, to, tally)
        _wait(tally, client.TRIES * client.WECHAT_TIMEOUT + 5)
    except KeyboardInterrupt:
        _wait(tally, WAIT_AFTER_CTRL_C)
    ended.set()
    progress.join()
    good = sum(tally.answered) + (0 if arguments.echo else tally.silent)
    with tally.lock:
        print(report(tally, arguments.rate))
    return good == tally.sent + tally.unsent > 0


def _send_all(arguments: argparse.Namespace, to: Account, tally: Tally) -> None:
    """Let every message leave when it is due, in a thread of its own."""
    most = _most_connections()
    first = 24 * 10**15 + secrets.randbelow(10**15)  # so that no other run has the same MsgIds
    began = time.perf_counter()
    for count in itertools.count():
        if count / arguments.rate >= arguments.seconds:
            return
        due = began + count / arguments.rate
        time.sleep(max(0.0, due - time.perf_counter()))
        late = time.perf_counter() - due
        reason = ""
        if late > MOST_LATE:
            reason = "this machine is too slow, or too busy, to send as many"
        elif tally.under_way >= most:
            reason = f"{most} were under way, as many as this shell's limit allows; raise ulimit -n"
        openid = messages.openid(f"load {count % arguments.followers}")
        job = (to, openid, first + count, due, arguments.echo, tally)
        with tally.lock:
            try:
                if not reason:
                    threading.Thread(target=_send, args=job, daemon=True).start()
                    tally.sent += 1
                    tally.late = max(tally.late, late)
                    continue
            except RuntimeError:
                reason = "this machine can start no more threads"
            tally.unsent += 1
            tally.errors[f"not sent: {reason}"] += 1


def _most_connections() -> int:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 512
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 65536 if limit == resource.RLIM_INFINITY else max(limit - SPARE_FILES, 1)


def _wait(tally: Tally, seconds: float) -> None:
    end = time.monotonic() + seconds
    while tally.under_way and time.monotonic() < end:
        time.sleep(0.02)


def _send(to: Account, openid: str, msg_id: int, due: float, echo: bool, tally: Tally) -> None:
    """Send one message, unlike any other, and enter in the tally what comes of it."""
    content = f"{TEXT}{msg_id}"
    message = messages.make("text", openid, time.time())
    message |= {"Content": content, "MsgId": msg_id}
    failures: list[str] = []
    answer = client.deliver(
        to, messages.outgoing(message), lambda _, reason: failures.append(reason)
    )
    seconds = time.perf_counter() - due
    shown = follower.read(to, message, answer.body) if answer else None
    with tally.lock:
        tally.errors.update(failures)
        if shown is None:
            tally.unanswered += 1
            return
        problem = shown.problem
        if shown.text is None:
            tally.silent += 1
            problem = "the account stayed silent; --no-echo when it may" if echo else ""
        elif problem or (problem := _other_text(shown.text, content) if echo else ""):
            tally.wrong += 1
        else:
            tally.answered[len(failures)] += 1
        if problem:
            tally.errors[problem] += 1
        else:
            tally.latencies.append(seconds)


def _other_text(text: str, content: str) -> str:
    """Say what is wrong with an answer that does not have ``content`` in it."""
    if content in text:
        return ""
    if TEXT in text:
        return "the text of another message came back"
    return "the message's text did not come back; --no-echo for a bot that does not echo"


def _print_progress(tally: Tally, ended: threading.Event) -> None:
    """Say every now and then on stderr how it goes."""
    began, terminal = time.perf_counter(), sys.stderr.isatty()
    start, end = ("\r\x1b[K", "") if terminal else ("", "\n")
    while not ended.wait(1 if terminal else 10):
        line = (
            f"{time.perf_counter() - began:.0f} s: {tally.sent} sent,"
            f" {sum(tally.answered) + tally.silent} answered, {tally.under_way} under way,"
            f" {tally.wrong} wrong, {tally.unanswered + tally.unsent} lost"
        )
        print(start + line, end=end, file=sys.stderr, flush=True)
    if terminal:
        print(start, end="", file=sys.stderr, flush=True)


def report(tally: Tally, rate: float) -> str:
    """Return the lines that tell what became of messages that were due ``rate`` a second."""
    due = tally.sent + tally.unsent
    kept = f"{rate * tally.sent / max(due, 1):.1f} a second for {due / rate:.1f} s"
    again = f"{tally.answered[1]} at the 2nd try, {tally.answered[2]} at the 3rd"
    lines = [
        f"sent       {tally.sent:7}   {kept}, none more than {tally.late * 1000:.0f} ms late",
        f"answered   {sum(tally.answered):7}   {again}",
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
    lines += [f"{count:7} × {reason}" for reason, count in tally.errors.most_common(REASONS)]
    if (more := len(tally.errors) - REASONS) > 0:
        lines.append(f"        and {more} more kinds of errors")
    return "\n".join(lines)
