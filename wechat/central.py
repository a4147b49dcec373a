"""Handing the access_token to other programs over HTTP, in WeChat's own words.

A client of ``[central]`` asks here as it would ask api.weixin.qq.com, with the account's AppID and
a secret of its own: ``POST /cgi-bin/stable_token`` or ``GET /cgi-bin/token``. Either way it gets
the token of the store. Sources of the rules: the platform's 获取 Access token,
获取稳定版接口调用凭据 and 全局返回码.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

import token_store
from token_store import ApiError, TokenError, TokenStore
from wechat.api import ANOTHER_TOKEN

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wechat.config import Config

PATIENCE = 2.0  # seconds for WeChat to say whether a token is good: whoever asks may wait just 5
LOOKS, LOOKS_APART = 10, 30.0  # how often it is asked: so many times at once, then every 30 s

ERRMSG = {
    40002: "invalid grant_type",
    40013: "invalid appid",
    40125: "invalid appsecret",
    41002: "appid missing",
    41004: "appsecret missing",
    43001: "require GET method",
    43002: "require POST method",
    44002: "empty post data",
    47001: "data format error",
}
_TEXT = [("Content-Type", "text/plain"), ("X-Content-Type-Options", "nosniff")]
_JSON = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
# Any of these shows that a request from this machine is somebody else's, passed on by a proxy.
_PASSED_ON = ("FORWARDED", "X_FORWARDED_FOR", "X_FORWARDED_PROTO", "X_REAL_IP", "VIA")

log = logging.getLogger("wechat.central")


class _Refused(Exception):
    """The answer is ``errcode``."""

    def __init__(self, errcode: int) -> None:
        self.errcode = errcode


class TokenService:
    """Answers for one account.

    Args:
        store: where the access_token comes from.
        appid: the account's AppID.
        clients: the secret of each client, by its name.
        api_base: where WeChat's API is.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        store: TokenStore,
        appid: str,
        clients: dict[str, str],
        api_base: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._appid, self._api_base, self._clock = store, appid, api_base, clock
        self._clients = [(name, secret.encode()) for name, secret in clients.items()]
        self._looking = threading.Lock()
        self._looks, self._found = 0, ("", False)  # how many, and what the last one found
        self._spent = float("-inf")  # the moment up to which looks are used up

    def answer(
        self, environ: WSGIEnvironment, read: Callable[[], bytes]
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        """Answer a request for the token.

        Args:
            environ: the request, by WSGI; its path is one of ``wechat.config.CENTRAL_PATHS``.
            read: returns the request's body; what it raises is not caught.

        Returns:
            The status, the headers but for Content-Length, and the body.
        """
        who = _sender(environ)
        if not _is_private(environ):
            log.warning("403 Forbidden: %s asked for the access_token without https", who)
            return "403 Forbidden", _TEXT, b"403 Forbidden: ask over https\n"
        try:
            fields = _fields(environ, read)
            who = f"{self._client(fields)} ({who})"
            token, left = self._lease(who, fields)
            answer: dict[str, Any] = {"access_token": token, "expires_in": max(1, int(left))}
            log.info("%s got the access_token, which lives %d s more", who, left)
        except _Refused as refused:
            answer = {"errcode": refused.errcode, "errmsg": ERRMSG[refused.errcode]}
            log.warning("errcode %d (%s) to %s", *answer.values(), who)
        except TokenError as error:
            errcode = -1 if error.errcode is None else error.errcode
            answer = {"errcode": errcode, "errmsg": str(error)}
            log.warning("no access_token for %s: %s", who, error)
        return "200 OK", _JSON, json.dumps(answer, ensure_ascii=False).encode()

    def _client(self, fields: dict[str, Any]) -> str:
        appid, secret = fields.get("appid"), fields.get("secret")
        if fields.get("grant_type") != "client_credential":
            raise _Refused(40002)
        if not appid:
            raise _Refused(41002)
        if appid != self._appid:
            raise _Refused(40013)
        if not secret:
            raise _Refused(41004)
        given, client = str(secret).encode(errors="replace"), ""
        for name, own in self._clients:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(given, own):
                client = name
        if not client:
            raise _Refused(40125)
        return client

    def _lease(self, who: str, fields: dict[str, Any]) -> tuple[str, float]:
        """Return the token that a client is to have, and the seconds it still lives.

        Most SDKs know no ``stale_token``: told that theirs is no good, they just ask again. They
        are not given a dead one again, and no good one is given up for that: WeChat is asked.
        """
        if stale := fields.get("stale_token"):
            return self._store.lease(stale)
        token, left = self._store.lease()
        try:
            if fields.get("force_refresh"):
                return self._store.lease(token)
        except TokenError as error:
            log.warning("%s gets the old access_token: %s", who, error)
        else:
            if self._is_dead(token):
                return self._store.lease(token)
        return token, left

    def _is_dead(self, token: str) -> bool:
        """Tell whether WeChat says so. All who ask meanwhile get the same answer."""
        looks = self._looks
        with self._looking:
            found, dead = self._found
            if found == token and (dead or self._looks != looks):
                return dead
            now = self._clock()
            self._spent = max(self._spent, now)
            if self._spent - now > (LOOKS - 1) * LOOKS_APART:
                return False
            self._spent += LOOKS_APART
            query, dead = urlencode({"access_token": token}), False
            try:
                url = f"{self._api_base}/cgi-bin/getcallbackip?{query}"
                token_store.fetch_json(url, None, token, PATIENCE)
            except ApiError as error:
                dead = error.errcode in ANOTHER_TOKEN
                if error.errcode is None:  # WeChat is down: nobody waits for it for a while
                    self._spent = self._clock() + LOOKS * LOOKS_APART
            self._looks, self._found = self._looks + 1, (token, dead)
            return dead


def _is_private(environ: WSGIEnvironment) -> bool:
    """Tell whether nobody on the way sees the token: https, or a program on this machine."""
    if environ["wsgi.url_scheme"] == "https":
        return True
    try:
        address = ipaddress.ip_address(environ.get("REMOTE_ADDR", ""))
    except ValueError:  # a Unix socket has none, and a proxy at its other end
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback and not any(f"HTTP_{name}" in environ for name in _PASSED_ON)


def _sender(environ: WSGIEnvironment) -> str:
    """Return the address for the log, and the one that a proxy tells."""
    address, told = environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR", "")
    return f"{address} for {told[:80]!r}" if told else f"{address}"


def _fields(environ: WSGIEnvironment, read: Callable[[], bytes]) -> dict[str, Any]:
    """Return what the query or the body says."""
    method = environ["REQUEST_METHOD"]
    try:
        if environ["PATH_INFO"] == "/cgi-bin/token":
            if method != "GET":
                raise _Refused(43001)
            query = environ.get("QUERY_STRING", "")
            fields: Any = _once(parse_qsl(query, keep_blank_values=True, max_num_fields=20))
            fields.pop("force_refresh", None)  # it is the other kind's
        else:
            if method != "POST":
                raise _Refused(43002)
            if not (body := read()):
                raise _Refused(44002)
            fields = json.loads(body.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise _Refused(47001) from None
    if (
        not isinstance(fields, dict)
        or not isinstance(fields.get("stale_token") or "", str)
        or not isinstance(fields.get("force_refresh") or False, bool)
    ):
        raise _Refused(47001)
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is repeated")
    return fields


def from_config(config: Config) -> TokenService:
    """Return the service of the account of config.ini.

    Raises:
        TokenError: AppID or AppSecret is not set.
    """
    store = token_store.from_config(config)
    return TokenService(store, config.appid, dict(config.central), config.api_base)
