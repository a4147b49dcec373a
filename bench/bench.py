"""Measure the callback server, in ratios that hold on any machine. ``make bench`` runs it.

Through gunicorn, with the shipped gunicorn.conf.py and connections that are kept alive (new ones
would cost more than any callable and flatter the ratio), an echo is compared to bench/bare.py.
Every figure is the median of several rounds, in which the servers take turns, so that a noisy
machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import io
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import token_store  # noqa: E402  the project's own, beside this folder
import wxcrypto  # noqa: E402
import wxserver  # noqa: E402
from wxconfig import Config  # noqa: E402

TOKEN = "AAAAA"
BODY = """<xml><ToUserName><![CDATA[gh_97417a04a28d]]></ToUserName>
<FromUserName><![CDATA[o9AgO5Kd5ggOC-bXrbNODIiE3bGY]]></FromUserName>
<CreateTime>1714112445</CreateTime>
<MsgType><![CDATA[text]]></MsgType>
<Content><![CDATA[你好 hello]]></Content>
<MsgId>24500000000000001</MsgId>
</xml>""".encode()
ECHO = "你好 hello".encode()
CONNECTIONS = 16
PEERS = {"WeRoBot": "peer_werobot", "wechatpy + Flask": "peer_wechatpy"}


def query(**more: str) -> str:
    """Return the signed query of a request of now."""
    timestamp, nonce = str(int(time.time())), "1514711492"
    signature = wxcrypto.sign(TOKEN, timestamp, nonce)
    return urlencode({"signature": signature, "timestamp": timestamp, "nonce": nonce, **more})


@dataclass
class Server:
    """A gunicorn that serves one module, and what was measured of it."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    rates: list[float] = field(default_factory=list)  # requests per second
    cpu: list[float] = field(default_factory=list)  # µs per request, all workers
    memory: float = 0.0  # MiB of all workers, shared pages by halves (PSS)

    def workers(self) -> list[int]:
        """Return the workers' process ids."""
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def serve(name: str, module: str, gunicorn: Path, path: str, folder: Path) -> Iterator[Server]:
    """Run a gunicorn with the shipped settings on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / f"{module}.ini"
    config.write_text(f"[wechat]\ntoken = {TOKEN}\n")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("WX", "GUNICORN"))}
    environ |= {"WX_TOKEN": TOKEN, "WXSERVER_CONFIG": str(config), "PYTHONPATH": path}
    arguments = [str(gunicorn), "-c", "gunicorn.conf.py", "-b", f"127.0.0.1:{port}", module]
    with (folder / f"{module}.log").open("wb") as log:
        process = subprocess.Popen(arguments, env=environ, cwd=ROOT, stdout=log, stderr=log)
    try:
        load(port, 0.5, patience=20)
        yield Server(name, port, process)
    finally:
        process.terminate()
        process.wait()


def load(port: int, seconds: float, patience: float = 0) -> float:
    """Send echoes over ``CONNECTIONS`` connections; return how many a second were answered.

    Raises:
        RuntimeError: an answer is not the echo.
    """
    request = (
        f"POST /wx?{query(openid='o9AgO5Kd5ggOC-bXrbNODIiE3bGY')} HTTP/1.1\r\nHost: wx.example.com"
        f"\r\nContent-Type: text/xml\r\nContent-Length: {len(BODY)}\r\n\r\n"
    ).encode() + BODY
    poll, connections, ready = select.epoll(), {}, time.monotonic() + patience
    for _ in range(CONNECTIONS):
        connection = connect(port, ready)
        connection.sendall(request)
        connections[connection.fileno()] = connection
        poll.register(connection.fileno(), select.EPOLLIN)
    count, parts = 0, dict.fromkeys(connections, b"")
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        for fd, _ in poll.poll():
            data = connections[fd].recv(65536)
            parts[fd] += data
            head, _, body = parts[fd].partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            if data and not (length and len(body) >= int(length[1])):
                continue
            if not head.startswith(b"HTTP/1.1 200 ") or ECHO not in body:
                raise RuntimeError(f"no echo: {parts[fd][:200]!r}")
            parts[fd] = b""
            count += 1
            connections[fd].sendall(request)
    for connection in connections.values():
        connection.close()
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
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start = [("bare callable", "bare", own, str(HERE)), ("wxserver", "wxserver", own, "")]
        if peers:
            start += [(name, module, peers, str(HERE)) for name, module in PEERS.items()]
        servers = [stack.enter_context(serve(*each, folder)) for each in start]
        for number in range(rounds):
            for server in servers:
                pids = server.workers()
                before = cpu_seconds(pids)
                rate = load(server.port, seconds)
                server.rates.append(rate)
                server.cpu.append((cpu_seconds(pids) - before) / (rate * seconds) * 1e6)
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for server in servers:
            server.memory = pss(server.workers())
    bare = servers[0]
    print(f"\n{'echo through gunicorn':24}{'ratio':>8}{'req/s':>8}{'CPU µs/req':>12}{'MiB':>8}")
    for server in servers:
        ratio = statistics.median(a / b for a, b in zip(server.rates, bare.rates, strict=True))
        print(
            f"{server.name:24}{ratio:8.2f}{statistics.median(server.rates):8.0f}"
            f"{statistics.median(server.cpu):12.0f}{server.memory:8.1f}"
        )


def in_process(rounds: int) -> None:
    """Print what the callable and ``TokenStore.get()`` take by themselves."""
    application: Any = wxserver.create_application(Config(token=TOKEN))
    environ = {"PATH_INFO": "/wx", "QUERY_STRING": query(echostr="4375120948345356249")}
    get = environ | {"REQUEST_METHOD": "GET"}
    post = environ | {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": str(len(BODY))}

    def call(environ: dict[str, Any]) -> None:
        list(application({**environ, "wsgi.input": io.BytesIO(BODY)}, lambda *_: None))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "access_token.json"
        store = token_store.TokenStore(path, "wx1", "secret")
        age = {"fetched_at": time.time(), "uptime": token_store._uptime()}
        token = {"appid": "wx1", "access_token": "T" * 512, "expires_in": 7200}
        path.write_text(json.dumps(token | age))
        assert store.get() == "T" * 512
        figures: dict[str, tuple[Callable[[], object], int, list[float]]] = {
            "POST, an echo": (lambda: call(post), 2000, []),
            "GET, a verification": (lambda: call(get), 5000, []),
            "TokenStore.get()": (store.get, 20000, []),
        }
        for _ in range(rounds * 3):
            for function, loops, results in figures.values():
                began = time.perf_counter()
                for _ in range(loops):
                    function()
                results.append((time.perf_counter() - began) / loops * 1e6)
    print(f"\n{'in process':24}{'µs':>8}{'best':>8}")
    for name, (_, _, results) in figures.items():
        print(f"{name:24}{statistics.median(results):8.1f}{min(results):8.1f}")


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="default: 9")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round, default: 2")
    parser.add_argument("--peers", type=Path, help="a gunicorn beside WeRoBot, wechatpy and Flask")
    arguments = parser.parse_args()
    in_process(arguments.rounds)
    through_gunicorn(arguments.rounds, arguments.seconds, arguments.peers)


if __name__ == "__main__":
    main()
