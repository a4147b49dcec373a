"""A soak: slow and fast replies mixed while workers are killed and reloaded. ``make soak`` runs it.

Every message must be answered, none run twice but those whose worker was killed, and no file left.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import bench
import reply_once


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
            ok = soak(server, folder, arguments)
    sys.exit(not ok)


def soak(server: bench.Server, folder: Path, arguments: argparse.Namespace) -> bool:
    """Send, kill and reload; return whether all promises were kept."""
    command = [sys.executable, "-m", "wxsim", "load", "--no-echo", "--token", bench.TOKEN]
    command += ["--url", f"http://127.0.0.1:{server.port}/wx"]
    command += ["--rate", str(arguments.rate), "--seconds", str(arguments.seconds)]
    killed: set[int] = set()
    began, reloaded, next_kill = time.monotonic(), False, arguments.kill
    load = subprocess.Popen(command, cwd=bench.ROOT)
    while load.poll() is None:
        time.sleep(0.2)
        past = time.monotonic() - began
        if past > arguments.seconds:
            continue
        if past > next_kill and (workers := server.workers()):
            next_kill += arguments.kill
            killed.add(worker := random.choice(workers))
            os.kill(worker, signal.SIGKILL)
        if past > arguments.seconds / 2 and not reloaded:
            reloaded = True
            server.process.send_signal(signal.SIGHUP)
    runs: dict[str, list[int]] = defaultdict(list)
    for line in (folder / "runs").read_text().splitlines():
        pid, _, text = line.partition(" ")
        if text != bench.ECHO.decode():  # of the warm-up, whose messages are many with one text
            runs[text].append(int(pid))
    again = {text: pids for text, pids in runs.items() if len(pids) > 1}
    wrong = sum(not set(pids[:-1]) <= killed for pids in again.values())
    print(f"{len(killed)} workers killed, 1 reload, {len(runs)} messages run")
    print(f"{len(again)} run again after a kill, {wrong} run twice without one")
    time.sleep(reply_once.KEEP + 1)
    bench.load(server.port, 0.1, encrypted=False)  # whoever comes next sweeps
    time.sleep(1)
    old = time.time() - reply_once.KEEP
    replies = folder / "state" / "replies"
    living = {str(pid) for pid in server.workers()}
    left = [p for p in replies.iterdir() if p.is_file() and p.name.split(".")[1] not in living]
    # Answers are kept as long as their journal.
    kept_by = {path: path.with_name(path.name.replace("answers", "journal")) for path in left}
    left = [p for p, by in kept_by.items() if (by if by.exists() else p).stat().st_mtime < old]
    waiting = sum(path.is_file() for path in replies.glob("late/*/*"))
    print(f"{len(left)} files left after the sweep, {waiting} kept for a follower's next message")
    return load.returncode == 0 and not wrong and not left


if __name__ == "__main__":
    main()
