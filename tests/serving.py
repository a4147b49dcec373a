"""Real servers for the tests: started, asked as WeChat asks, and watched."""

from __future__ import annotations

import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from conftest import ROOT, Run, sealed, signed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Any, seconds: float = 15) -> Any:
    """Return what ``condition`` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


class Server:
    """A running server, its log, and WeChat's way of talking to it."""

    def __init__(self, run: Run, folder: Path, *arguments: str, **env: str) -> None:
        self.folder, self.port = folder, free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.config = folder / "config.ini"
        if not self.config.exists():
            self.config.write_text("")
        env = {"WXSERVER_CONFIG": str(self.config), "PYTHONPATH": f"{folder}:{ROOT}", **env}
        arguments = tuple(argument.format(port=self.port) for argument in arguments)
        self.process = run(*arguments, env=env, log=folder / "log")

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def ready(self) -> Server:
        def connects() -> bool:
            assert self.process.poll() is None, self.log
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        until(connects)
        return self

    def workers(self) -> set[int]:
        return {int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", self.log)}

    def token(self) -> str:
        path = self.folder / "state" / "callback_token"
        return str(until(lambda: path.exists() and path.read_text().strip()))

    def ask(
        self, body: bytes | None = None, path: str = "/wx", base: str = "", **more: str
    ) -> tuple[int, bytes]:
        query = signed(self.token(), int(time.time()), **more)
        return self._send(f"{base or self.base}{path}?{query}", body)

    def ask_sealed(self, xml: bytes) -> tuple[int, bytes]:
        query, body = sealed(xml, self.token(), int(time.time()))
        return self._send(f"{self.base}/wx?{query}", body)

    def _send(self, url: str, body: bytes | None) -> tuple[int, bytes]:
        trusting = ssl._create_unverified_context()  # of a test's own certificate
        try:
            with urllib.request.urlopen(url, body, timeout=10, context=trusting) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def raw(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))


def gunicorn(run: Run, folder: Path, module: str = "wxserver", **env: str) -> Server:
    env = {"HOME": str(folder), **env}  # so that a test sees what is left there
    arguments = ("-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "-b", "127.0.0.1:{port}")
    return Server(run, folder, *arguments, module, **env)
