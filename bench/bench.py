"""Measure the callback server, in ratios that hold on any machine. ``make bench`` runs it.

Through gunicorn, with the shipped gunicorn.conf.py, an echo is compared to bench/bare.py: once over
connections that serve a few requests each, which leaves the least time beside the callable's own,
and once over a new connection for each, as the shipped nginx site makes them. Every figure is the
median of many short rounds, in which the servers take turns, so that a noisy machine disturbs all
alike.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import token_store
import wxserver
from wechat import crypto
from wechat.config import Config
from wechat.message import from_xml, to_xml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOKEN = "AAAAA"
BODY = """<xml><ToUserName><![CDATA[gh_97417a04a28d]]></ToUserName>
<FromUserName><![CDATA[o9AgO5Kd5ggOC-bXrbNODIiE3bGY]]></FromUserName>
<CreateTime>1714112445</CreateTime>
<MsgType><![CDATA[text]]></MsgType>
<Content><![CDATA[你好 hello]]></Content>
<MsgId>24500000000000001</MsgId>
</xml>""".encode()
ECHO = "你好 hello".encode()
EVENT = {
    "ToUserName": "gh_97417a04a28d",
    "FromUserName": "o9AgO5Kd5ggOC-bXrbNODIiE3bGY",
    "CreateTime": 1714112445,
    "MsgType": "event",
    "Event": "subscribe",
    "EventKey": "",
}
KEY, APPID = "A" * 43, "wxba5fad812f8e6fb9"
ENCRYPTED, ONCE = "wxserver, encrypted", "wxserver, once"
MSG_ID, FOLLOWER = b"24500000000000001", b"bXrbNODIiE3bGY"
SHM = "/dev/shm"  # tmpfs
CONNECTIONS = 16
TURNS = 3  # of each server in a round: its ratio to another is taken within a second or two
REUSE = {"kept": 20, "new": 1}  # requests a connection
PEERS = {"WeRoBot": "peer_werobot", "wechatpy + Flask": "peer_wechatpy"}


def query(**more: str) -> str:
    """Return the signed query of a request of now."""
    timestamp, nonce = str(int(time.time())), "1514711492"
    signature = crypto.sign(TOKEN, timestamp, nonce)
    return urlencode({"signature": signature, "timestamp": timestamp, "nonce": nonce, **more})


_msg_ids = itertools.count(time.time_ns() // 1000)


def message(encrypted: bool = False) -> tuple[str, bytes]:
    """Return the query and the body of a follower's message."""
    if not encrypted:
        return query(openid="o9AgO5Kd5ggOC-bXrbNODIiE3bGY"), unique(BODY)
    encrypt = crypto.MessageCipher(KEY, APPID).encrypt(unique(BODY))
    fields = dict(parse_qsl(query(openid="o9AgO5Kd5ggOC-bXrbNODIiE3bGY", encrypt_type="aes")))
    fields["msg_signature"] = crypto.sign(TOKEN, fields["timestamp"], fields["nonce"], encrypt)
    body = to_xml({"ToUserName": "gh_97417a04a28d", "Encrypt": encrypt})
    return urlencode(fields), body


def unique(request: bytes) -> bytes:
    """Return the request with a MsgId and a follower that no other has."""
    number = next(_msg_ids)
    request = request.replace(MSG_ID, b"%017d" % number)
    return request.replace(FOLLOWER, b"%014d" % (number % 10**14))


@dataclass
class Server:
    """A gunicorn that serves one module."""

    name: str
    encrypted: bool
    port: int
    process: subprocess.Popen[bytes]

    def workers(self) -> list[int]:
        """Return the workers' process ids."""
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def serve(
    name: str,
    module: str,
    gunicorn: Path,
    path: str,
    folder: Path,
    redis: str = "",
    max_body: int = Config.max_body,
) -> Iterator[Server]:
    """Run a gunicorn with the shipped settings on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / f"{port}.ini"
    encrypted = name == ENCRYPTED
    key = f"appid = {APPID}\nencoding_aes_key = {KEY}\n" if encrypted else ""
    once = f"state_dir = {folder / 'state'}\n[reply]\nonce = {'on' if name == ONCE else 'off'}\n"
    shared = f"[shared]\nredis = {redis}\n" if redis else ""
    key = f"appid = {APPID}\n" if redis else key
    config.write_text(
        f"[wechat]\ntoken = {TOKEN}\n{key}[server]\nmax_body = {max_body}\n{once}{shared}"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("WX", "GUNICORN", "WEB_"))}
    environ |= {"WX_TOKEN": TOKEN, "WXSERVER_CONFIG": str(config), "PYTHONPATH": path}
    arguments = [str(gunicorn), "-c", "gunicorn.conf.py", "-b", f"127.0.0.1:{port}", module]
    with (folder / f"{port}.log").open("wb") as log:
        process = subprocess.Popen(arguments, env=environ, cwd=ROOT, stdout=log, stderr=log)
    try:
        load(port, 0.3, encrypted, patience=20)
        yield Server(name, encrypted, port, process)
    finally:
        process.terminate()
        process.wait()


def load(port: int, seconds: float, encrypted: bool, reuse: int = 1, patience: float = 0) -> float:
    """Send echoes over ``CONNECTIONS`` connections at a time; return how many a second came back.

    Raises:
        RuntimeError: an answer is not the echo.
    """
    query, body = message(encrypted)
    body = body if encrypted else BODY
    request = (
        f"POST /wx?{query} HTTP/1.1\r\nHost: wx.example.com"
        f"\r\nContent-Type: text/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    expected = b"<Encrypt>" if encrypted else ECHO  # to decrypt each would measure the client
    poll, ready = select.epoll(), time.monotonic() + patience
    open_: dict[int, tuple[socket.socket, int]] = {}

    def start() -> None:
        connection = connect(port, ready)
        connection.sendall(unique(request))
        open_[connection.fileno()] = (connection, 1)
        poll.register(connection.fileno(), select.EPOLLIN)

    for _ in range(CONNECTIONS):
        start()
    count, parts = 0, dict.fromkeys(range(4096), b"")
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        for fd, _ in poll.poll():
            connection, asked = open_[fd]
            data = connection.recv(65536)
            parts[fd] += data
            head, _, body = parts[fd].partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            if data and not (length and len(body) >= int(length[1])):
                continue
            if not head.startswith(b"HTTP/1.1 200 ") or expected not in body:
                raise RuntimeError(f"no echo: {parts[fd][:200]!r}")
            count, parts[fd], last = count + 1, b"", body
            if asked < reuse:
                connection.sendall(unique(request))
                open_[fd] = (connection, asked + 1)
            else:
                del open_[fd]
                connection.close()
                start()
    for connection, _ in open_.values():
        connection.close()
    poll.close()
    if encrypted:
        body = crypto.MessageCipher(KEY, APPID).decrypt(from_xml(last)["Encrypt"])
        if ECHO not in body:
            raise RuntimeError("the last answer does not hold the echo")
    return count / (now - began)


def connect(port: int, ready: float) -> socket.socket:
    """Connect to the server, which is up by the moment ``ready`` at the latest."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > ready:
                raise
            time.sleep(0.1)


def cpu_seconds(pids: list[int]) -> float:
    """Return the user and system time that the processes have taken, in seconds."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def pss(pids: list[int]) -> float:
    """Return the processes' memory in MiB, each shared page counted once in all."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def through_gunicorn(rounds: int, seconds: float, peers: Path | None) -> None:
    """Print the echo's throughput, CPU and memory beside those of the bare callable."""
    own = Path(sys.executable).with_name("gunicorn")
    start = [("bare callable", "bare", own, str(HERE)), ("wxserver", "wxserver", own, "")]
    start += [(ONCE, "wxserver", own, ""), (ENCRYPTED, "wxserver", own, "")]
    if peers:
        start += [(name, module, peers, str(HERE)) for name, module in PEERS.items()]
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)  # requests per second
    cpu, memory = defaultdict(list), defaultdict(list)  # µs per request, MiB: of all workers
    for number in range(rounds):
        with contextlib.ExitStack() as stack:
            # In memory, where the systemd unit keeps the files of wechat.once too.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=SHM)))
            # Anew and in another order each time: a process has its luck with caches and cores.
            turn = number % len(start)
            order = start[turn:] + start[:turn]
            servers = [stack.enter_context(serve(*each, folder)) for each in order]
            for (way, reuse), server in itertools.product([*REUSE.items()] * TURNS, servers):
                pids, key = server.workers(), (server.name, way)
                before = cpu_seconds(pids)
                rate = load(server.port, seconds, server.encrypted, reuse)
                rates[key].append(rate)
                cpu[key].append((cpu_seconds(pids) - before) / (rate * seconds) * 1e6)
                memory[server.name].append(pss(pids))
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(f"\n{'echo through gunicorn':24}{'connections':>12}{'ratio':>8}{'req/s':>8}{'CPU µs':>8}")
    for name, way in itertools.product([name for name, *_ in start], REUSE):
        values, bare = rates[name, way], rates["bare callable", way]
        ratio = statistics.median(a / b for a, b in zip(values, bare, strict=True))
        figures = (ratio, statistics.median(values), statistics.median(cpu[name, way]))
        print("{:24}{:>12}{:8.2f}{:8.0f}{:8.0f}".format(name, way, *figures))
    print(f"\n{'memory of two workers':24}{'MiB':>12}")
    for name, sizes in memory.items():
        print(f"{name:24}{statistics.median(sizes):12.1f}")


def calls(config: Config, method: str, query: str, body: bytes) -> Callable[[int], float]:
    """Return what calls the callable so many times and returns the seconds that these took."""
    application = wxserver.create_application(config)
    environ = {"REQUEST_METHOD": method, "PATH_INFO": "/wx", "CONTENT_LENGTH": str(len(body))}
    environ["QUERY_STRING"] = query
    statuses: set[str] = set()

    def start_response(status: str, *_: Any) -> Any:
        statuses.add(status)

    def run(loops: int) -> float:
        environs = [{**environ, "wsgi.input": io.BytesIO(unique(body))} for _ in range(loops)]
        began = time.perf_counter()
        for each in environs:
            answer = application(each, start_response)
        took = time.perf_counter() - began
        if statuses != {"200 OK"} or list(answer) == [b"success"]:
            raise RuntimeError(f"no echo: {statuses}")
        return took

    return run


def in_process(rounds: int) -> None:
    """Print what the callable and ``TokenStore.get()`` take by themselves."""
    plain = Config(token=TOKEN, once=False)
    safe = replace(plain, appid=APPID, encoding_aes_key=KEY, encryption="safe")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=SHM) as shm:
        path = Path(folder) / "access_token.json"
        store = token_store.TokenStore(path, "wx1", "secret")
        age = {"fetched_at": time.time(), "uptime": token_store._uptime()}
        token = {"appid": "wx1", "access_token": "T" * 512, "expires_in": 7200}
        path.write_text(json.dumps(token | age))
        assert store.get() == "T" * 512

        def get(loops: int) -> float:
            began = time.perf_counter()
            for _ in range(loops):
                store.get()
            return time.perf_counter() - began

        def claimed(folder: str) -> Config:
            return replace(plain, once=True, state_dir=Path(folder))

        event = to_xml(EVENT)
        figures = {
            "POST, an echo": (calls(plain, "POST", query(), BODY), 1000),
            "POST, an event": (calls(plain, "POST", query(), event), 1000),
            "… once, on tmpfs": (calls(claimed(shm), "POST", query(), BODY), 1000),
            "… once, on disk": (calls(claimed(folder), "POST", query(), BODY), 1000),
            "POST, encrypted": (calls(safe, "POST", *message(encrypted=True)), 1000),
            "GET, a verification": (calls(plain, "GET", query(echostr="4375"), b""), 1000),
            "TokenStore.get()": (get, 20000),
        }
        results: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for name, (run, loops) in figures.items():
                results[name].append(run(loops) / loops * 1e6)
    print(f"\n{'in process':24}{'µs':>8}{'best':>8}")
    for name, times in results.items():
        print(f"{name:24}{statistics.median(times):8.1f}{min(times):8.1f}")


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=24, help="default: 24")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn, default: 0.2")
    parser.add_argument("--peers", type=Path, help="a gunicorn beside WeRoBot, wechatpy and Flask")
    arguments = parser.parse_args()
    in_process(arguments.rounds)
    through_gunicorn(arguments.rounds, arguments.seconds, arguments.peers)


if __name__ == "__main__":
    main()
