"""A soak: slow and fast replies while workers are killed and reloaded, then an overload.

``make soak`` runs it. Nobody may get another message's answer, no message may run twice unless its
worker was killed, and no old file may be left.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import followers
from followers import Follower

import bench
import wechat.answers
from wechat.config import Config

FOLLOWERS = 200
SLOW = 0.05  # the share of messages whose reply() takes 6 s


async def write(follower: Follower, rate: float, end: float, counts: Counter[str]) -> None:
    """Let a follower write until ``end``, and judge what is shown."""
    unanswered: set[str] = set()  # what may still come
    number = 0
    await asyncio.sleep(random.uniform(0, FOLLOWERS / rate))
    while (began := time.monotonic()) < end:
        number += 1
        text = f"{6 if random.random() < SLOW else 0} {follower.name} {number}"
        shown = await follower.send(text)
        counts["messages"] += 1
        if shown == text:
            counts["answered"] += 1
        elif shown in unanswered:
            counts["got a late answer"] += 1
            unanswered.discard(str(shown))
        elif shown is None or shown == Config.late_text:
            counts["told to wait" if shown else "without an answer"] += 1
            unanswered.add(text)
        else:
            counts["wrong"] += 1
            print(f"{text!r} was answered {shown!r}")
        await asyncio.sleep(max(began + FOLLOWERS / rate - time.monotonic(), 0))


async def disturb(server: bench.Server, every: float, end: float) -> set[int]:
    """Kill a worker now and then, and reload once; return who was killed."""
    killed: set[int] = set()
    reload_at = (time.monotonic() + end) / 2
    while time.monotonic() + every < end:
        await asyncio.sleep(every)
        if workers := server.workers():
            killed.add(worker := random.choice(workers))
            os.kill(worker, signal.SIGKILL)
        if time.monotonic() > reload_at:
            reload_at = end
            server.process.send_signal(signal.SIGHUP)
    return killed


async def soak(server: bench.Server, arguments: argparse.Namespace) -> tuple[set[int], int]:
    """Send, kill and reload, then overload; return who was killed, and how many were wrong."""
    counts = Counter[str]()
    end = time.monotonic() + arguments.seconds
    writing = [
        write(Follower(server.port, f"f{number}"), arguments.rate, end, counts)
        for number in range(FOLLOWERS)
    ]
    disturbing = asyncio.create_task(disturb(server, arguments.kill, end))
    await asyncio.gather(*writing)
    killed = await disturbing
    print(f"{len(killed)} workers killed, 1 reload: {dict(counts)}", flush=True)
    await asyncio.sleep(2)
    _, lines = await followers.crowd(server.port, 840, 70)
    print("overload, 70 a second for 12 s whose reply() takes 12 s", *lines, sep="\n", flush=True)
    return killed, counts["wrong"]


def runs_without_a_kill(folder: Path, killed: set[int]) -> int:
    """Return how many messages ran again though the worker that ran them was not killed."""
    runs: dict[str, list[int]] = defaultdict(list)
    for line in (folder / "runs").read_text().splitlines():
        pid, _, text = line.partition(" ")
        if text != bench.ECHO.decode():  # of the warm-up, whose messages have one text
            runs[text].append(int(pid))
    again = {text: pids for text, pids in runs.items() if len(pids) > 1}
    wrong = sum(not set(pids[:-1]) <= killed for pids in again.values())
    print(f"{len(runs)} messages run, {len(again)} again after a kill, {wrong} without one")
    return wrong


def old_files(server: bench.Server, folder: Path) -> int:
    """Return how many files of the journal are left that should have been removed."""
    time.sleep(wechat.answers.REMEMBER + 1)
    bench.load(server.port, 0.1, encrypted=False)  # the next message sweeps
    time.sleep(1)
    replies = folder / "state" / "replies"
    alive = {str(pid) for pid in server.workers()}
    left = [path for path in replies.iterdir() if path.name.split(".")[1] not in alive]
    old = time.time() - wechat.answers.REMEMBER
    left = [path for path in left if path.stat().st_mtime < old]
    waiting = sum(path.is_file() for path in (folder / "state" / "late").glob("*/*"))
    print(f"{len(left)} old files left, {waiting} late answers wait for a next message")
    return len(left)


def main() -> None:
    """Run the soak and print what was found; the exit status is 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=50, help="messages a second, default: 50")
    parser.add_argument("--seconds", type=float, default=60, help="default: 60")
    parser.add_argument("--kill", type=float, default=7, help="seconds between kills, default: 7")
    arguments = parser.parse_args()
    own = Path(sys.executable).with_name("gunicorn")
    with tempfile.TemporaryDirectory(dir=bench.SHM) as name:
        folder = Path(name)
        os.environ["RUNS"] = str(folder / "runs")
        with bench.serve(bench.ONCE, "slow", own, str(bench.HERE), folder) as server:
            killed, wrong = asyncio.run(soak(server, arguments))
            wrong += runs_without_a_kill(folder, killed)
            wrong += old_files(server, folder)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
