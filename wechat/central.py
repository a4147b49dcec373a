"""Gives the access_token to other programs over HTTP, in the same way as WeChat's API.

A client of ``[central]`` sends here what it would send to api.weixin.qq.com, with the account's
AppID and the client's own secret: ``POST /cgi-bin/stable_token`` or ``GET /cgi-bin/token``. Both
return the token of the ``TokenStore``. Sources of the rules: the platform's 获取 Access token,
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
MAX_CHECKS, CHECK_INTERVAL = 10, 30.0  # ten checks may be made at once, and one more every 30 s

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
# A proxy on this machine adds some of these to the requests that it passes on.
_PROXY_HEADERS = ("FORWARDED", "X_FORWARDED_FOR", "X_FORWARDED_PROTO", "X_REAL_IP", "VIA")

log = logging.getLogger("wechat.central")


class WrongRequest(Exception):
    """A client has to be answered with ``errcode``, as WeChat would answer it."""

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
    """Gives out the access_token of one account.

    Args:
        config: the account and its clients.
        store: where the access_token comes from.
        clock: seconds, never set back.
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
            Refused: the body is too large or not whole.
        """
        if not _is_private(environ):
            log.warning("%s: %s", FORBIDDEN, _why_not_private(environ))
            return FORBIDDEN, TEXT, f"{FORBIDDEN}: ask over https\n".encode()
        answer = self._answer(environ)
        return OK, _JSON, json.dumps(answer, ensure_ascii=False).encode()

    def _answer(self, environ: WSGIEnvironment) -> dict[str, Any]:
        """Return a token or an error, in the fields of WeChat's answers."""
        asker = _sender(environ)
        try:
            fields = _fields(environ, self._config.max_body)
            asker = f"{self._client_name(fields)} ({asker})"
            token, left = self._lease(asker, fields)
        except WrongRequest as wrong:
            errmsg = ERRMSG[wrong.errcode]
            log.warning("errcode %d (%s) to %s", wrong.errcode, errmsg, asker)
            return {"errcode": wrong.errcode, "errmsg": errmsg}
        except TokenError as error:
            log.warning("no access_token for %s: %s", asker, error)
            errcode = -1 if error.errcode is None else error.errcode
            return {"errcode": errcode, "errmsg": str(error)}
        log.info("%s got the access_token, which lives %d s more", asker, left)
        return {"access_token": token, "expires_in": max(1, int(left))}

    def _client_name(self, fields: dict[str, Any]) -> str:
        """Return the name of the client that sent these fields."""
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
        for name, expected in self._clients:  # compare all, so that the time taken tells nothing
            if hmac.compare_digest(given, expected):
                client = name
        if not client:
            raise WrongRequest(40125)
        return client

    def _lease(self, asker: str, fields: dict[str, Any]) -> tuple[str, float]:
        """Return a token for a client, and the seconds until it expires.

        This project's own client sends a token that WeChat refused as ``stale_token``. Other SDKs
        just ask again, so for them WeChat is asked whether the token is still valid. They never
        get a refused token, and a valid one is not replaced.
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
    """Asks WeChat whether it refuses a token, but not too often.

    Args:
        api_base: the address of WeChat's API.
        clock: seconds, never set back.
    """

    def __init__(self, api_base: str, clock: Callable[[], float]) -> None:
        self._api_base, self._clock = api_base, clock
        self._lock = threading.Lock()  # held during a check
        self._checks_made, self._last_token, self._last_refused = 0, "", False
        self._checks_left, self._counted_at = float(MAX_CHECKS), clock()

    def is_refused(self, token: str) -> bool:
        """Tell whether WeChat refuses the token; False if no check may be made now.

        All calls that wait while a check is made share its result.
        """
        checks_before = self._checks_made
        with self._lock:
            has_result = self._last_refused or self._checks_made > checks_before
            if self._last_token == token and has_result:
                return self._last_refused
            counted_at, self._counted_at = self._counted_at, self._clock()
            more = (self._counted_at - counted_at) / CHECK_INTERVAL
            self._checks_left = min(self._checks_left + more, MAX_CHECKS)
            if self._checks_left < 1:
                return False
            self._checks_left -= 1
            self._last_token, self._last_refused = token, self._ask(token)
            self._checks_made += 1
            return self._last_refused

    def _ask(self, token: str) -> bool:
        url = f"{self._api_base}/cgi-bin/getcallbackip?{urlencode({'access_token': token})}"
        try:
            wechat.api.request_json(url, None, token, CHECK_TIMEOUT)
        except ApiError as error:
            if error.errcode is None:  # WeChat is down, so let no client wait for it for a while
                self._checks_left, self._counted_at = 0.0, self._clock()
            return error.errcode in wechat.api.TOKEN_REFUSED
        return False


def _is_private(environ: WSGIEnvironment) -> bool:
    """Tell whether only the client can read the response: it uses https, or is on this machine."""
    if environ["wsgi.url_scheme"] == "https":
        return True
    try:
        address = ipaddress.ip_address(environ.get("REMOTE_ADDR", ""))
    except ValueError:  # it came over a Unix socket, so from a proxy
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback and not any(f"HTTP_{name}" in environ for name in _PROXY_HEADERS)


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
    """Return the sender's address for the log, and the one that a proxy says it has."""
    address, origin = environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR", "")
    return f"{address} for {origin[:80]!r}" if origin else f"{address}"


def _fields(environ: WSGIEnvironment, max_body: int) -> dict[str, Any]:
    """Return the fields of the query or of the JSON in the body."""
    method = environ["REQUEST_METHOD"]
    try:
        if environ["PATH_INFO"] == "/cgi-bin/token":
            if method != "GET":
                raise WrongRequest(43001)
            query = environ.get("QUERY_STRING", "")
            pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=20)
            fields: Any = _unrepeated(pairs)
            fields.pop("force_refresh", None)  # WeChat ignores it here
        else:
            if method != "POST":
                raise WrongRequest(43002)
            if not (body := read_body(environ, max_body)):
                raise WrongRequest(44002)
            fields = json.loads(body.decode(), object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError):
        raise WrongRequest(47001) from None
    if (
        not isinstance(fields, dict)
        or not isinstance(fields.get("stale_token") or "", str)
        or not isinstance(fields.get("force_refresh") or False, bool)
    ):
        raise WrongRequest(47001)
    return fields


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is repeated")
    return fields
