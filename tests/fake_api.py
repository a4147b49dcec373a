"""An api.weixin.qq.com on loopback, with the platform's own rules for access_tokens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

APPID, APPSECRET = "wxba5fad812f8e6fb9", "0123456789abcdef0123456789abcdef"


@dataclass
class FakeApi:
    """Counts what it is asked; its fields are the switches."""

    expires_in: Any = 7200
    length: int = 512  # characters of a token
    delay: float = 0.0  # seconds before an answer
    drip: float = 0.0  # seconds between two bytes of an answer
    failure: bytes | None = None  # an answer to everything, as it is
    status: int = 200
    location: str = ""  # where to redirect to
    dead: int = 0  # the errcode that every token is met with
    on_fetch: Callable[[], object] = lambda: None  # what else happens at a fetch
    fetches: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[str, str, bytes]] = field(default_factory=list)
    token: str = ""  # the one that is good now
    stable: str = ""  # the one that stable_token gives again
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> FakeApi:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(b"")

            def do_POST(self) -> None:
                self.answer(self.rfile.read(int(self.headers["Content-Length"])))

            def answer(self, body: bytes) -> None:
                time.sleep(api.delay)
                if api.failure is None:
                    answer = json.dumps(api._answer(self.path, body)).encode()
                else:
                    api.calls.append((self.command, self.path, body))
                    answer = api.failure
                self.send_response(api.status)
                if api.location:
                    self.send_header("Location", api.location)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                try:
                    for piece in [answer] if not api.drip else [bytes([byte]) for byte in answer]:
                        self.wfile.write(piece)
                        time.sleep(api.drip)
                except OSError:
                    pass  # the client had enough

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, target: str, body: bytes) -> dict[str, Any]:
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        with self._lock:
            if path == "/cgi-bin/token":
                return self._fetch({k: v[0] for k, v in query.items()}, new=True)
            if path == "/cgi-bin/stable_token":
                asked = json.loads(body)
                force = asked.get("force_refresh", False)
                return self._fetch(asked, new=force or self.token != self.stable or not self.stable)
            self.calls.append(("POST" if body else "GET", target, body))
            if self.dead or query.get("access_token") != [self.token]:
                errmsg = f"invalid credential {query['access_token'][0]}"
                return {"errcode": self.dead or 40001, "errmsg": errmsg}
            if path == "/cgi-bin/getcallbackip":
                return {"ip_list": ["101.226.62.77"]}
            return {"errcode": 0, "errmsg": "ok"}

    def _fetch(self, asked: dict[str, Any], new: bool) -> dict[str, Any]:
        self.fetches.append(asked)
        self.on_fetch()
        if asked["grant_type"] != "client_credential":
            return {"errcode": 40002, "errmsg": "invalid grant_type"}
        if asked["appid"] != APPID:
            return {"errcode": 40013, "errmsg": "invalid appid"}
        if asked["secret"] != APPSECRET:
            return {"errcode": 40125, "errmsg": f"invalid appsecret {asked['secret']}"}
        if new:
            self.token = f"T{len(self.fetches)}_".ljust(self.length, "x")
            self.stable = self.token
        return {"access_token": self.token, "expires_in": self.expires_in}
