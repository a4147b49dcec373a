"""Both stores side by side: files of this machine, and Redis. ``make bench`` runs it.

What ``TokenStore.get()`` takes, what a message takes that claims itself and leaves its answer, and
how long ``ASKERS`` wait who all ask at once when there is no token. Redis runs on this machine, so
to what is measured of it the way to another machine is to be added.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import wechat.api
import wechat.late
import wechat.once
from wechat.config import Config
from wxsim.fake_api import FakeApi

SHM = "/dev/shm"  # tmpfs
PROCESSES, THREADS = 20, 10
ROUNDS = 15
ASKERS = PROCESSES * THREADS
DELAY = 0.1  # seconds that the API takes to answer
ACCOUNT = Config(appid="wxba5fad812f8e6fb9", appsecret="0123456789abcdef")
PARTS = [b"<xml>" + b"x" * 290 + b"</xml>"]


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a Redis that keeps nothing on disk; yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(["redis-server", *arguments], stdout=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                sys.exit("redis-server did not start")
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def once(config: Config) -> wechat.once.ReplyOnce:
    """Return what runs a message once, on one machine or with Redis."""
    if config.redis:
        from wechat.redis_store import stores
    else:
        from wechat.journal import stores
    answers, store = stores(config)
    late = wechat.late.LateAnswers(store)
    return wechat.once.ReplyOnce(answers, late, lambda _message, parts, _late: parts, "")


def row(name: str, function: Callable[[], object], loops: int) -> None:
    """Print what a call takes in µs: the median of the rounds, and the best."""
    results = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(loops):
            function()
        results.append((time.perf_counter() - began) / loops * 1e6)
    print(f"{name:24}{statistics.median(results):8.1f}{min(results):8.1f}")


def claim(config: Config) -> Callable[[], object]:
    """Return what a fast message does: it claims itself, and leaves its answer."""
    one, numbers = once(config), itertools.count(time.time_ns())
    message = {"ToUserName": "gh_1", "FromUserName": "o9AgO5Kd5ggOC-bXrbNODIiE3bGY"}
    return lambda: one.answer({**message, "MsgId": str(next(numbers))}, lambda: PARTS)


def cpu(config: Config) -> float:
    """Return the seconds that Redis has worked, 0 without one."""
    if not config.redis:
        return 0.0
    import redis

    with redis.Redis.from_url(config.redis) as client:
        used = client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


def ask(config: Config, began: float) -> list[float]:
    """Ask for the token in many threads at a moment; return the seconds that each waited."""
    store = wechat.api.token_store(config)

    def one(_: int) -> float:
        time.sleep(max(began - time.monotonic(), 0))
        assert store.get()
        return time.monotonic() - began

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(one, range(THREADS)))


def stampede(config: Config, rounds: int) -> str:
    """Let all ask at once for a token that nobody has; return what came of it."""
    waited, fetches = [], 0
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for number in range(rounds):
            with FakeApi(delay=DELAY) as api:
                account = replace(config, api_base=api.base, appid=f"{config.appid}{number}")
                account = replace(account, state_dir=config.state_dir / str(number))
                began = time.monotonic() + 2
                askers = [(account, began)] * PROCESSES
                waited += [seconds for each in pool.starmap(ask, askers, 1) for seconds in each]
                fetches += len(api.fetches)
    took = (
        f"{statistics.median(waited) * 1000:.0f} ms in the median, {max(waited) * 1000:.0f} at most"
    )
    return f"{fetches} fetches in {rounds} rounds, {took}"


def main() -> None:
    """Run the benchmark and print its table."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=SHM)))
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stores = {"files": replace(ACCOUNT, state_dir=folder / "state")}
        if shutil.which("redis-server"):
            url = stack.enter_context(redis_server(folder))
            stores["Redis"] = replace(ACCOUNT, state_dir=folder / "none", redis=url)
        else:
            print("no redis-server here, so Redis is not measured: apt-get install redis-server")
        print(f"\n{'both stores':24}{'µs':>8}{'best':>8}")
        for name, config in stores.items():
            with FakeApi() as api:
                store = wechat.api.token_store(replace(config, api_base=api.base))
                store.get()
                row(f"get(), {name}", store.get, 5000)
        on_disk = {"files on disk": replace(ACCOUNT, state_dir=disk)}
        for name, config in (stores | on_disk).items():
            before = cpu(config)
            row(f"a claim, {name}", claim(config), 1000)
            if config.redis:
                took = (cpu(config) - before) / (ROUNDS * 1000) * 1e6
                print(f"{'  of Redis itself, CPU':24}{took:8.1f}")
        print(f"\n{ASKERS} ask at once for a token, of an API that takes {DELAY * 1000:.0f} ms")
        for name, config in stores.items():
            print(f"  {name}: {stampede(config, 5)}")


if __name__ == "__main__":
    main()
