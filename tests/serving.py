"""Real servers for the tests: started, asked as WeChat asks, and watched."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROOT, Run, sealed, signed, skip

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")


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
        self._token = env.get("WX_TOKEN", "")
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
        if self._token:
            return self._token
        path = self.folder / "state" / "callback_token"
        return str(until(lambda: path.exists() and path.read_text().strip()))

    def ask(
        self,
        body: bytes | None = None,
        path: str = "/wx",
        base: str = "",
        timeout: float = 10,
        **more: str,
    ) -> tuple[int, bytes]:
        query = signed(self.token(), int(time.time()), **more)
        return self._send(f"{base or self.base}{path}?{query}", body, timeout)

    def ask_sealed(self, xml: bytes) -> tuple[int, bytes]:
        query, body = sealed(xml, self.token(), int(time.time()))
        return self._send(f"{self.base}/wx?{query}", body)

    def _send(self, url: str, body: bytes | None, timeout: float = 10) -> tuple[int, bytes]:
        trusting = ssl._create_unverified_context()  # of a test's own certificate
        try:
            with urllib.request.urlopen(url, body, timeout=timeout, context=trusting) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def raw(self, request: bytes, half_close: bool = True) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(request)
            if half_close:  # to the server it looks as if the client had hung up
                connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))


def gunicorn(run: Run, folder: Path, module: str = "wxserver", **env: str) -> Server:
    env = {"HOME": str(folder), **env}  # so that a test sees what is left there
    arguments = ("-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "-b", "127.0.0.1:{port}")
    return Server(run, folder, *arguments, module, **env)


@dataclass(frozen=True)
class Site:
    """The shipped nginx site, running: its ports, and the certificate that a client must trust."""

    http: int
    https: int
    certificate: Path

    @property
    def base(self) -> str:
        return f"https://127.0.0.1:{self.https}"


@contextlib.contextmanager
def nginx_site(
    server: Server, folder: Path, changes: dict[str, str] | None = None
) -> Iterator[Site]:
    """Serve ``server`` through deploy/nginx.conf, with ``changes`` of its text."""
    if not NGINX or not shutil.which("openssl"):
        skip("needs nginx and openssl")
    http, https = free_port(), free_port()
    key, certificate = folder / "privkey.pem", folder / "fullchain.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a.example"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1"]
    make += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    site = (ROOT / "deploy" / "nginx.conf").read_text()
    for old, new in {
        "/etc/letsencrypt/live/wx.example.com": str(folder),
        "/var/log/nginx": str(folder),
        "listen [::]:80;": "",
        "listen [::]:443 ssl;": "",
        "listen 80;": f"listen 127.0.0.1:{http};",
        "listen 443 ssl;": f"listen 127.0.0.1:{https} ssl;",
        **(changes or {}),
        "127.0.0.1:8000": f"127.0.0.1:{server.port}",
    }.items():
        assert old in site
        site = site.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"pid {folder}/pid; error_log {folder}/error.log; daemon off; events {{}}"
        f" http {{ access_log off; {folders} {site} }}"
    )
    arguments = [NGINX, "-e", f"{folder}/error.log", "-c", str(folder / "nginx.conf")]
    subprocess.run([*arguments, "-t"], check=True, capture_output=True)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as nginx:
        try:
            pid = folder / "pid"  # which -t has left there, empty
            until(lambda: nginx.poll() is not None or pid.read_text())
            assert nginx.poll() is None, nginx.stderr and nginx.stderr.read()
            yield Site(http, https, certificate)
        finally:
            nginx.terminate()


class RedisServer:
    """A redis-server that keeps nothing on the disk, and can be lost in several ways."""

    def __init__(self, *arguments: str) -> None:
        if not shutil.which("redis-server"):
            skip("there is no redis-server; on Debian and Ubuntu: sudo apt install redis-server")
        self.port, self._arguments = free_port(), arguments
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        command = f"redis-server --port {self.port} --bind 127.0.0.1 --save --appendonly no"
        self.process = subprocess.Popen(
            [*command.split(), *self._arguments], stdout=subprocess.DEVNULL
        )
        until(lambda: self.ask("PING").startswith((b"+PONG", b"-NOAUTH")))

    def ask(self, *words: str) -> bytes:
        """Return the beginning of what Redis says to a command, or nothing without it."""
        request = [f"*{len(words)}", *(line for word in words for line in (f"${len(word)}", word))]
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
                connection.sendall("".join(f"{line}\r\n" for line in request).encode())
                return connection.recv(65536)
        except OSError:
            return b""

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
