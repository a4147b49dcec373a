"""Hands the access_token to other programs over HTTP, in WeChat's own words.

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

import wechat.api
from token_store import ApiError, TokenError, TokenStore
from wechat.http import FORBIDDEN, OK, TEXT, Headers, Response, as_wsgi, read_body

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

    from wechat.config import Config

CHECK_TIMEOUT = 2.0  # seconds for WeChat to say whether a token is valid; clients wait 5 in all
CHECKS, CHECKS_APART = 10, 30.0  # ten checks may be made at once, then one every 30 s

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
_JSON: Headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
# Any of these shows that a request from this machine is somebody else's, passed on by a proxy.
_PASSED_ON = ("FORWARDED", "X_FORWARDED_FOR", "X_FORWARDED_PROTO", "X_REAL_IP", "VIA")

log = logging.getLogger("wechat.central")


class WrongRequest(Exception):
    """The answer is ``errcode``, as WeChat's would be."""

    def __init__(self, errcode: int) -> None:
        self.errcode = errcode


def create_application(config: Config) -> WSGIApplication:
    """Make the WSGI callable that answers at ``wechat.config.CENTRAL_PATHS`` for ``[central]``.

    Raises:
        TokenError: AppID or AppSecret is not set.
        ConfigError: ``[shared] redis`` needs a package that is not installed.
    """
    return as_wsgi(TokenService(config, wechat.api.token_store(config)).respond)


class TokenService:
    """Hands out the access_token of one account.

    Args:
        config: the account and its clients.
        store: where the access_token comes from.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        config: Config,
        store: TokenStore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._store = config, store
        self._clients = [(name, secret.encode()) for name, secret in config.central.items()]
        self._token_check = TokenCheck(config.api_base, clock)

    def respond(self, environ: WSGIEnvironment) -> Response:
        """Answer a request for the token.

        Raises:
            Refused: the body is too large, or broke off.
        """
        if not _is_private(environ):
            log.warning("%s: %s", FORBIDDEN, _why_not_private(environ))
            return FORBIDDEN, TEXT, f"{FORBIDDEN}: ask over https\n".encode()
        return OK, _JSON, self._answer(environ)

    def _answer(self, environ: WSGIEnvironment) -> bytes:
        """Return the JSON that WeChat would answer with."""
        asker = _sender(environ)
        try:
            fields = _fields(environ, self._config.max_body)
            asker = f"{self._client_name(fields)} ({asker})"
            token, left = self._lease(asker, fields)
            answer: dict[str, Any] = {"access_token": token, "expires_in": max(1, int(left))}
            log.info("%s got the access_token, which lives %d s more", asker, left)
        except WrongRequest as wrong:
            answer = {"errcode": wrong.errcode, "errmsg": ERRMSG[wrong.errcode]}
            log.warning("errcode %d (%s) to %s", *answer.values(), asker)
        except TokenError as error:
            errcode = -1 if error.errcode is None else error.errcode
            answer = {"errcode": errcode, "errmsg": str(error)}
            log.warning("no access_token for %s: %s", asker, error)
        return json.dumps(answer, ensure_ascii=False).encode()

    def _client_name(self, fields: dict[str, Any]) -> str:
        """Return the name of the client that asks."""
        appid, secret = fields.get("appid"), fields.get("secret")
        if fields.get("grant_type") != "client_credential":
            raise WrongRequest(40002)
        if not appid:
            raise WrongRequest(41002)
        if appid != self._config.appid:
            raise WrongRequest(40013)
        if not secret:
            raise WrongRequest(41004)
        given, client = str(secret).encode(errors="replace"), ""
        for name, own in self._clients:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(given, own):
                client = name
        if not client:
            raise WrongRequest(40125)
        return client

    def _lease(self, asker: str, fields: dict[str, Any]) -> tuple[str, float]:
        """Return the token that a client is to have, and the seconds it still lives.

        Most SDKs know no ``stale_token``: when WeChat refuses their token, they just ask again. So
        WeChat is asked whether the token is valid before it is handed out again. They never get a
        token that WeChat refuses, and a valid one is not replaced.
        """
        if stale := fields.get("stale_token"):
            return self._store.lease(stale)
        token, left = self._store.lease()
        try:
            if fields.get("force_refresh"):
                return self._store.lease(token)
        except TokenError as error:
            log.warning("%s gets the old access_token: %s", asker, error)
        else:
            if self._token_check.is_refused(token):
                return self._store.lease(token)
        return token, left


class TokenCheck:
    """Asks WeChat whether it refuses a token, ten times at once and then once in 30 s at most.

    Args:
        api_base: where WeChat's API is.
        clock: seconds that only grow.
    """

    def __init__(self, api_base: str, clock: Callable[[], float]) -> None:
        self._api_base, self._clock = api_base, clock
        self._one_at_a_time = threading.Lock()
        self._count, self._last = 0, ("", False)  # of checks: how many, and the last one's outcome
        self._used_up_to = float("-inf")  # each check moves this time on by CHECKS_APART

    def is_refused(self, token: str) -> bool:
        """Tell whether WeChat refuses the token. All who ask during a check share its outcome."""
        count = self._count
        with self._one_at_a_time:
            last_token, refused = self._last
            if last_token == token and (refused or self._count != count):
                return refused
            now = self._clock()
            self._used_up_to = max(self._used_up_to, now)
            if self._used_up_to - now > (CHECKS - 1) * CHECKS_APART:
                return False
            self._used_up_to += CHECKS_APART
            refused = self._ask(token)
            self._count, self._last = self._count + 1, (token, refused)
            return refused

    def _ask(self, token: str) -> bool:
        url = f"{self._api_base}/cgi-bin/getcallbackip?{urlencode({'access_token': token})}"
        try:
            wechat.api.request_json(url, None, token, CHECK_TIMEOUT)
        except ApiError as error:
            if error.errcode is None:  # WeChat is down: nobody waits for it for a while
                self._used_up_to = self._clock() + CHECKS * CHECKS_APART
            return error.errcode in wechat.api.TOKEN_REFUSED
        return False


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


def _why_not_private(environ: WSGIEnvironment) -> str:
    why = f"{_sender(environ)} asked for the access_token without https"
    if environ.get("HTTP_X_FORWARDED_PROTO", "").lower() != "https":
        return why
    address = environ.get("REMOTE_ADDR", "")
    return (
        f"{why}: its X-Forwarded-Proto says https, but gunicorn does not trust {address}. If that"
        f" is your proxy, start gunicorn with --forwarded-allow-ips={address}"
    )


def _sender(environ: WSGIEnvironment) -> str:
    """Return the address for the log, and the one that a proxy tells."""
    address, told = environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR", "")
    return f"{address} for {told[:80]!r}" if told else f"{address}"


def _fields(environ: WSGIEnvironment, max_body: int) -> dict[str, Any]:
    """Return what the query or the body says."""
    method = environ["REQUEST_METHOD"]
    try:
        if environ["PATH_INFO"] == "/cgi-bin/token":
            if method != "GET":
                raise WrongRequest(43001)
            query = environ.get("QUERY_STRING", "")
            pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=20)
            fields: Any = _without_repetition(pairs)
            fields.pop("force_refresh", None)  # only stable_token knows it
        else:
            if method != "POST":
                raise WrongRequest(43002)
            if not (body := read_body(environ, max_body)):
                raise WrongRequest(44002)
            fields = json.loads(body.decode(), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError):
        raise WrongRequest(47001) from None
    if (
        not isinstance(fields, dict)
        or not isinstance(fields.get("stale_token") or "", str)
        or not isinstance(fields.get("force_refresh") or False, bool)
    ):
        raise WrongRequest(47001)
    return fields


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is repeated")
    return fields
