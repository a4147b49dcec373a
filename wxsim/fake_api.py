"""A fake api.weixin.qq.com on loopback, with the platform's own rules for access_tokens.

    python -m wxsim api

Sources of the rules: the platform's 获取 Access token, 获取稳定版接口调用凭据, 发送客服消息,
客服输入状态, 网络通信检测, 新增临时素材, 获取临时素材 and 全局返回码.
"""

from __future__ import annotations

import json
import re
import secrets
import socketserver
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs

LIFE = 7200  # seconds that a token lives
OVERLAP = 300  # seconds for which an old token and the new one are both good
A_DAY = {"token": 2000, "force_refresh": 20}  # quotas
FORCED_APART = 30  # seconds between two force_refresh; a sooner one does not refresh
BEIJING = 8 * 3600  # seconds; the platform's days begin at midnight there
LARGEST_BODY = 12 * 1048576  # bytes
KEPT = 10_000  # requests and tokens that are remembered
FILES_KEPT, FILE_LIFE = 100, 3 * 86400  # in number, and in seconds
GARBAGE = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"

ERRMSG = {
    -1: "system error",
    40001: "invalid credential, access_token is invalid or not latest",
    40002: "invalid grant_type",
    40003: "invalid openid",
    40004: "invalid media type",
    40005: "invalid file type",
    40007: "invalid media_id",
    40008: "invalid message type",
    40009: "invalid image size",
    40010: "invalid voice size",
    40011: "invalid video size",
    40012: "invalid thumb size",
    40013: "invalid appid",
    40014: "invalid access_token",
    40066: "invalid url",
    40125: "invalid appsecret",
    40164: "invalid ip 127.0.0.1 ipv6 ::ffff:127.0.0.1, not in whitelist",
    40202: "invalid action",
    40203: "invalid check_operator",
    40243: "AppSecret已被冻结",
    41001: "access_token missing",
    41002: "appid missing",
    41004: "appsecret missing",
    41005: "media data missing",
    41006: "media_id missing",
    42001: "access_token expired",
    43002: "require POST method",
    44002: "empty post data",
    44004: "empty content",
    45002: "content size out of limit",
    45009: "reach max api daily quota limit",
    45011: "api minute-quota reach limit, must slower, retry next minute",
    45015: "response out of time limit or subscription is canceled",
    45047: "out of response count limit",
    45072: "invalid command",
    47001: "data format error",
    48001: "api unauthorized",
    50004: "禁止使用 token 接口",
    89503: "此次调用需要管理员确认",
    89506: "24小时内不可再使用该IP调用",
    89507: "1小时内不可再使用该IP调用",
}
# The largest file in bytes, the errcode of a larger one, and the endings of its name.
_FILES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "image": (10 * 1048576, 40009, (".png", ".jpg", ".jpeg", ".gif")),
    "voice": (2 * 1048576, 40010, (".amr", ".mp3")),
    "video": (10 * 1048576, 40011, (".mp4",)),
    "thumb": (65536, 40012, (".jpg",)),
}
_FORM = re.compile(
    rb"--(?P<boundary>[^\r\n]+)\r\n"
    rb'Content-Disposition: form-data; name="media"; filename="(?P<name>[^"\r\n]+)"\r\n'
    rb"Content-Type: (?P<type>[^\r\n]+)\r\n\r\n(?P<content>.+)\r\n--(?P=boundary)--\r\n",
    re.DOTALL,
)
_MSGTYPES = ["text", "image", "voice", "video", "music", "news", "mpnews", "mpnewsarticle"]
_MSGTYPES += ["msgmenu", "wxcard", "miniprogrampage"]
_OK = {"errcode": 0, "errmsg": "ok"}
_JSON = "application/json; encoding=utf-8"


def error(errcode: int) -> bytes:
    """Return the platform's answer of ``errcode``."""
    rid = "-".join(secrets.token_hex(4) for _ in range(3))
    errmsg = f"{ERRMSG.get(errcode, 'error')} rid: {rid}"
    return json.dumps({"errcode": errcode, "errmsg": errmsg}, ensure_ascii=False).encode()


class _Refused(Exception):
    """The platform's answer is ``errcode``."""

    def __init__(self, errcode: int) -> None:
        self.errcode = errcode


def _refuse_if(wrong: object, errcode: int) -> None:
    if wrong:
        raise _Refused(errcode)


@dataclass
class _Token:
    text: str
    end: float  # Unix seconds
    errcode: int = 42001  # what it is met with after its end


@dataclass
class _File:
    kind: str
    content: bytes
    content_type: str
    end: float  # Unix seconds


@dataclass(repr=False)
class FakeApi:
    """The API of one account, served while the ``with`` block lasts.

    Fields may be set at any time: they are the switches.

    Raises:
        OSError: on entering the block, when the port cannot be had.
    """

    appid: str = ""  # empty: any will do
    appsecret: str = ""  # empty: any will do
    port: int = 0  # 0: one that is free
    clock: Callable[[], float] = time.time  # Unix seconds
    say: Callable[[str], object] = lambda _: None  # takes the lines to print
    expires_in: Any = LIFE  # seconds, of the next token; what is no life is answered as it is
    length: int = 512  # characters, of the next token
    delay: float = 0.0  # seconds before an answer
    drip: float = 0.0  # seconds between two bytes of an answer
    failure: bytes | None = None  # an answer to everything, as it is
    status: int = 200  # of HTTP
    location: str = ""  # where to redirect to
    dead: int = 0  # the errcode that every token is met with
    on_fetch: Callable[[], object] = lambda: None  # what else happens when a token is asked for
    token: str = field(default="", init=False)  # the one given last
    fetches: list[dict[str, Any]] = field(default_factory=list, init=False)  # requests for a token
    calls: list[tuple[str, str, bytes]] = field(default_factory=list, init=False)  # the others

    def __post_init__(self) -> None:
        """Begin with no token and nothing used of the quotas."""
        self._tokens: dict[str, _Token] = {}
        self._files: dict[str, _File] = {}  # by MediaId
        self._classic: _Token | None = None
        self._stable: _Token | None = None
        self._forced_at = float("-inf")
        self._used: Counter[tuple[str, float]] = Counter()
        self._lock = threading.RLock()

    def __enter__(self) -> FakeApi:
        """Begin to serve, on 127.0.0.1 alone."""
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def base(self) -> str:
        """The ``api_base`` for config.ini."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def expire(self) -> None:
        """Let every token come to its end now; it is met with 42001."""
        with self._lock:
            for token in self._tokens.values():
                if token.end > self.clock():
                    token.end, token.errcode = self.clock(), 42001

    def answer(self, method: str, target: str, body: bytes) -> tuple[bytes, str]:
        """Return the body of the answer to a request, and its Content-Type."""
        with self._lock:
            if self.failure is not None:
                self._note(method, target, body)
                return self.failure, "text/html" if self.failure.startswith(b"<") else _JSON
            try:
                answer = self._answer(method, target, body)
            except _Refused as refused:
                return error(refused.errcode), _JSON
            if isinstance(answer, _File):
                return answer.content, answer.content_type
            return json.dumps(answer).encode(), _JSON

    def tell(self, text: str) -> None:
        """Say one line, with the time and without control characters."""
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        self.say(f"{time.strftime('%H:%M:%S', time.localtime(self.clock()))} {line[:2048]}")

    def _answer(self, method: str, target: str, body: bytes) -> dict[str, Any] | _File:
        path, _, query = target.partition("?")
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        if path == "/cgi-bin/token":
            return self._fetch(asked, self._give_classic)
        if path == "/cgi-bin/stable_token":
            return self._fetch(_posted(method, body), self._give_stable)
        self._note(method, target, body)
        if path == "/video":  # what video_url names
            return self._find_file(asked)
        self._check(asked.get("access_token", ""))
        match path.removeprefix("/cgi-bin/"):
            case "getcallbackip":
                return {"ip_list": ["101.226.62.77"]}
            case "message/custom/send":
                return self._send(_posted(method, body))
            case "message/custom/typing":
                return self._typing(_posted(method, body))
            case "callback/check":
                return _check_callback(_posted(method, body))
            case "media/upload":
                return self._upload(asked.get("type", ""), method, body)
            case "media/get":
                file = self._find_file(asked)
                url = f"{self.base}/video?media_id={asked['media_id']}"
                return {"video_url": url} if file.kind == "video" else file
        _refuse_if(not re.fullmatch("/cgi-bin(/[a-z_]+)+", path), 40066)
        if body:
            self.tell(f"{path} got {body[:2048].decode(errors='replace')}")
        return _OK

    def _note(self, method: str, target: str, body: bytes) -> None:
        self.calls.append((method, target, body[:65536]))
        del self.calls[:-KEPT]

    def _check(self, text: str) -> None:
        _refuse_if(not text, 41001)
        _refuse_if(self.dead, self.dead)
        _refuse_if(not re.fullmatch(r"[\w-]+", text, re.ASCII), 40014)
        token = self._tokens.get(text)
        if not token:
            raise _Refused(40001)
        _refuse_if(self.clock() >= token.end, token.errcode)

    def _fetch(self, asked: dict[str, Any], give: Callable[[bool], _Token]) -> dict[str, Any]:
        self.fetches.append(asked)
        del self.fetches[:-KEPT]
        self.on_fetch()
        appid, secret = asked.get("appid"), asked.get("secret")
        _refuse_if(asked.get("grant_type") != "client_credential", 40002)
        _refuse_if(not appid, 41002)
        _refuse_if(appid != (self.appid or appid), 40013)
        _refuse_if(not secret, 41004)
        _refuse_if(secret != (self.appsecret or secret), 40125)
        token = give(asked.get("force_refresh") is True)
        self.token = token.text
        left = round(token.end - self.clock()) if self._has_life() else self.expires_in
        return {"access_token": token.text, "expires_in": left}

    def _give_classic(self, _: bool) -> _Token:
        """Return a new token; the one before is good for a while."""
        self._spend("token")
        if old := self._classic:
            old.end, old.errcode = min(old.end, self.clock() + OVERLAP), 40001
        self._classic = self._make()
        return self._classic

    def _give_stable(self, force: bool) -> _Token:
        """Return the same token until shortly before its end, unless it is forced."""
        now, old = self.clock(), self._stable
        if force and abs(now - self._forced_at) >= FORCED_APART:
            self._spend("force_refresh")
            self._forced_at = now
            if old:
                old.end, old.errcode = min(old.end, now), 40001
        if not old or old.end - now < OVERLAP:
            self._stable = old = self._make()
        return old

    def _spend(self, quota: str) -> None:
        today = (self.clock() + BEIJING) // 86400
        _refuse_if(self._used[quota, today] >= A_DAY[quota], 45009)
        self._used[quota, today] += 1

    def _has_life(self) -> bool:
        return type(self.expires_in) is int and self.expires_in > 0

    def _make(self) -> _Token:
        text = f"{len(self._tokens)}_{secrets.token_urlsafe(self.length)}"[: self.length]
        token = _Token(text, self.clock() + (self.expires_in if self._has_life() else LIFE))
        self._tokens[text] = token
        if len(self._tokens) > KEPT:
            del self._tokens[next(iter(self._tokens))]
        return token

    def _send(self, message: dict[str, Any]) -> dict[str, Any]:
        touser, msgtype = _openid(message), message.get("msgtype", "")
        _refuse_if(msgtype not in _MSGTYPES, 40008)
        content = message.get(msgtype)
        if not isinstance(content, dict):
            raise _Refused(47001)
        shown: Any = f"[{msgtype}] {json.dumps(content, ensure_ascii=False)}"
        if msgtype == "text":
            shown = content.get("content")
            _refuse_if(not shown or not isinstance(shown, str), 44004)
        self.tell(f"{touser} sees: {shown}")
        return _OK

    def _upload(self, kind: str, method: str, body: bytes) -> dict[str, Any]:
        _refuse_if(method != "POST", 43002)
        _refuse_if(kind not in _FILES, 40004)
        form = _FORM.fullmatch(body)
        if not form:
            raise _Refused(41005)
        largest, too_large, endings = _FILES[kind]
        name, content = form["name"].decode(errors="replace"), form["content"]
        _refuse_if(not name.lower().endswith(endings), 40005)
        _refuse_if(len(content) > largest, too_large)
        now, media_id = self.clock(), secrets.token_urlsafe(48)
        self._files[media_id] = _File(
            kind, content, form["type"].decode("latin-1"), now + FILE_LIFE
        )
        if len(self._files) > FILES_KEPT:
            del self._files[next(iter(self._files))]
        self.tell(f"{name} is here: {kind}, {len(content)} bytes, MediaId {media_id}")
        key = "thumb_media_id" if kind == "thumb" else "media_id"
        return {"type": kind, key: media_id, "created_at": int(now)}

    def _find_file(self, asked: dict[str, str]) -> _File:
        _refuse_if("media_id" not in asked, 41006)
        file = self._files.get(asked["media_id"])
        if not file or self.clock() >= file.end:
            raise _Refused(40007)
        return file

    def _typing(self, asked: dict[str, Any]) -> dict[str, Any]:
        touser, command = _openid(asked), asked.get("command")
        _refuse_if(command not in ("Typing", "CancelTyping"), 45072)
        self.tell(f"{touser} sees: {'typing…' if command == 'Typing' else 'typing no more'}")
        return _OK


def _posted(method: str, body: bytes) -> dict[str, Any]:
    _refuse_if(method != "POST", 43002)
    _refuse_if(not body, 44002)
    try:
        posted = json.loads(body)
    except (ValueError, RecursionError):
        raise _Refused(47001) from None
    if not isinstance(posted, dict):
        raise _Refused(47001)
    return posted


def _openid(asked: dict[str, Any]) -> str:
    touser = asked.get("touser")
    if not touser or not isinstance(touser, str):
        raise _Refused(40003)
    return touser


def _check_callback(asked: dict[str, Any]) -> dict[str, Any]:
    action, operator = asked.get("action", ""), asked.get("check_operator")
    _refuse_if(action not in ("all", "dns", "ping"), 40202)
    _refuse_if(operator not in ("DEFAULT", "CHINANET", "UNICOM", "CAP"), 40203)
    sender = "UNICOM" if operator == "DEFAULT" else operator
    ping = {"ip": "127.0.0.1", "from_operator": sender, "package_loss": "0%", "time": "0.045ms"}
    found = {"dns": [{"ip": "127.0.0.1", "real_operator": "UNICOM"}], "ping": [ping]}
    return found if action == "all" else {action: found[action]}


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, api: FakeApi) -> None:
        self.api = api
        super().__init__(("127.0.0.1", api.port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # then the client just had enough
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 30  # seconds for a client that says nothing
    outcome = ""

    def do_GET(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers:
            return self.send_error(411)
        if not re.fullmatch("[0-9]{1,18}", length):
            return self.send_error(400)
        if int(length) > LARGEST_BODY:
            return self.send_error(413)
        body = self.rfile.read(int(length))
        api = self.server.api
        time.sleep(api.delay)
        answer, content_type = api.answer(self.command, self.path, body)
        self.outcome = _outcome(answer) if content_type == _JSON else content_type
        self.send_response(api.status)
        self.send_header("Content-Type", content_type)
        if api.location:
            self.send_header("Location", api.location)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        for piece in [answer] if not api.drip else [bytes([byte]) for byte in answer]:
            self.wfile.write(piece)
            time.sleep(api.drip)
        return None

    def do_POST(self) -> None:
        self.do_GET()

    def log_request(self, code: int | str = "-", *_: object) -> None:
        path = getattr(self, "path", "?").partition("?")[0]  # the query holds secrets
        outcome = self.outcome or f"HTTP status {int(code)}"
        self.server.api.tell(f"{self.command or '?'} {path} {outcome}")

    def log_message(self, *_: object) -> None:
        pass


def _outcome(answer: bytes) -> str:
    try:
        errcode = json.loads(answer).get("errcode")
    except (ValueError, RecursionError, AttributeError):
        return "not JSON"
    return f"errcode {errcode}" if errcode else "ok"
