"""HTTP: the WSGI callable ``application``, and the gate that lets nobody in but WeChat.

``gunicorn wxserver`` serves it; ``python3 wxserver.py`` serves it for a first look, with nothing
installed. Sources of the rules: the platform's 接入指南, 接收普通消息 and 被动回复用户消息.
"""

from __future__ import annotations

import logging
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import parse_qsl

import reply
import wechat.config
import wechat.crypto
import wechat.message
from wechat.config import Config, ConfigError
from wechat.crypto import DecryptError
from wechat.message import Message, MessageError, Reply

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger("wxserver")

OK = "200 OK"
BAD_REQUEST = "400 Bad Request"
FORBIDDEN = "403 Forbidden"
NOT_FOUND = "404 Not Found"
UNAVAILABLE = "503 Service Unavailable"
METHOD_NOT_ALLOWED = "405 Method Not Allowed"
CONTENT_TOO_LARGE = "413 Content Too Large"

# The parameters of a query that are used, and what they look like.
_HEX = re.compile("[0-9a-f]{40}")
_PARAMETERS = {
    "signature": _HEX,
    "msg_signature": _HEX,
    "timestamp": re.compile("[0-9]{1,11}"),
    "nonce": re.compile("[!-~]{1,128}"),
    "echostr": re.compile("[\x00-\xff]{1,1024}"),  # any bytes, as latin-1
}
MAX_PARAMETERS = 50  # WeChat sends six
_METHODS = ("GET", "POST")
_STATUS = {MessageError: BAD_REQUEST, DecryptError: FORBIDDEN}

# What poll() says of a client that has hung up. Linux tells of it while data is still unread.
_HANG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
TCP_ESTABLISHED = 1  # the state of a connection that neither side has closed, in Linux's TCP_INFO

Headers: TypeAlias = list[tuple[str, str]]
Response: TypeAlias = tuple[str, Headers, bytes]  # the status, headers and body
_TEXT: Headers = [("Content-Type", "text/plain"), ("X-Content-Type-Options", "nosniff")]
_XML: Headers = [("Content-Type", "application/xml")]


class Refused(Exception):
    """A request goes no further: the status to answer and, for the log alone, the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ClientGone(Refused):
    """The client hung up: nobody reads what it is answered."""


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """The WSGI callable for config.ini, which is read at the first call."""
    with _first_call:
        configured = _configured()
    return configured(environ, start_response)


_first_call = threading.Lock()


@cache
def _configured() -> WSGIApplication:
    return create_application(wechat.config.load())


def create_application(
    config: Config,
    reply: Callable[[Message], Reply] = reply.reply,
    clock: Callable[[], float] = time.time,
) -> WSGIApplication:
    """Make the WSGI callable.

    Args:
        config: where the callback lives, its Token and its limits.
        reply: what the account answers; several threads may call it at once.
        clock: Unix time in seconds.

    Raises:
        ConfigError: no Token is set, and none can be made and kept in ``state_dir``; or
            ``encryption`` or Redis needs a package that is not installed.
    """
    cipher, token = wechat.crypto.from_config(config), wechat.config.callback_token(config)
    answer = _answerer(config, reply, clock)

    def respond(environ: WSGIEnvironment) -> Response:
        method = _route(environ, config.path)
        query = _query(environ)
        check_signature = partial(_check_signature, query, token, clock(), config.max_age)
        if method == "GET":
            check_signature("signature")
            return OK, _TEXT, _parameter(query, "echostr").encode("latin-1")

        message_cipher = cipher if query.get("encrypt_type") == "aes" else None
        if message_cipher:
            _parameter(query, "msg_signature")  # before the body is read
            encrypt = wechat.crypto.find_encrypt(_body(environ, config.max_body))
            check_signature("msg_signature", encrypt)
            xml = message_cipher.decrypt(encrypt)
        elif config.encryption == "safe":
            raise Refused(FORBIDDEN, "the message is not encrypted, and encryption is safe")
        else:
            check_signature("signature")
            xml = _body(environ, config.max_body)

        message = wechat.message.from_xml(xml)
        wechat.message.check(message)
        xml = answer(message, environ)
        if not xml:
            return OK, _TEXT, b"success"  # no reply; it is never encrypted
        if message_cipher:
            encrypt = message_cipher.encrypt(xml)
            xml = wechat.message.to_xml(
                wechat.crypto.envelope(encrypt, token, query["nonce"], clock())
            )
        return OK, _XML, xml

    callback = _wsgi(respond)
    return _with_central(callback, config) if config.central else callback


def _wsgi(respond: Callable[[WSGIEnvironment], Response]) -> WSGIApplication:
    """Make a WSGI callable of ``respond``; every refusal becomes an HTTP answer here."""

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            status, headers, body = respond(environ)
        except (Refused, MessageError, DecryptError) as error:
            status = error.status if isinstance(error, Refused) else _STATUS[type(error)]
            headers, body = _TEXT, f"{status}\n".encode()
            if status == METHOD_NOT_ALLOWED:
                headers = [*_TEXT, ("Allow", ", ".join(_METHODS))]
            level = logging.INFO if isinstance(error, ClientGone) else logging.WARNING
            log.log(level, "%s: %s", status, error)
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return application


def _with_central(callback: WSGIApplication, config: Config) -> WSGIApplication:
    """Send the requests for the access_token to wechat/central.py."""
    import wechat.central

    service = wechat.central.from_config(config)

    def respond(environ: WSGIEnvironment) -> Response:
        return service.answer(environ, partial(_body, environ, config.max_body))

    central = _wsgi(respond)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        is_central = environ.get("PATH_INFO") in wechat.config.CENTRAL_PATHS
        return (central if is_central else callback)(environ, start_response)

    return application


def _route(environ: WSGIEnvironment, path: str) -> str:
    if environ.get("PATH_INFO") != path:
        asked = environ.get("PATH_INFO", "")[:80]
        raise Refused(NOT_FOUND, f"{asked!r} was asked for; the callback is at {path!r}")
    method: str = environ["REQUEST_METHOD"]
    if method not in _METHODS:
        raise Refused(METHOD_NOT_ALLOWED, f"{method[:20]!r}")
    return method


def _query(environ: WSGIEnvironment) -> dict[str, str]:
    """Return the parameters, none of which may be repeated."""
    try:
        pairs = parse_qsl(
            environ.get("QUERY_STRING", ""),
            keep_blank_values=True,
            encoding="latin-1",
            max_num_fields=MAX_PARAMETERS,
        )
    except ValueError:
        raise Refused(BAD_REQUEST, f"more than {MAX_PARAMETERS} parameters") from None
    query = dict(pairs)
    if len(query) < len(pairs):
        raise Refused(BAD_REQUEST, "a parameter is repeated")
    return query


def _parameter(query: dict[str, str], name: str) -> str:
    if not _PARAMETERS[name].fullmatch(query.get(name, "")):
        raise Refused(BAD_REQUEST, f"{name} is {'malformed' if name in query else 'missing'}")
    return query[name]


def _check_signature(
    query: dict[str, str], token: str, now: float, max_age: int, name: str, *encrypt: str
) -> None:
    """Let nobody in but WeChat, and nothing signed more than ``max_age`` seconds from now.

    Args:
        query: has timestamp, nonce and the signature.
        token: the callback's Token.
        now: Unix time in seconds.
        max_age: in seconds; 0 lets in what is older, too.
        name: signature, or msg_signature, which covers ``encrypt`` as well.
        encrypt: the Encrypt of an encrypted message.
    """
    signature, timestamp, nonce = (_parameter(query, each) for each in (name, "timestamp", "nonce"))
    if not wechat.crypto.verify(signature, token, timestamp, nonce, *encrypt):
        raise Refused(FORBIDDEN, "wrong signature; is the Token the one in WeChat's console?")
    age = now - int(timestamp)
    if max_age and abs(age) > max_age:
        when = f"{abs(age):.0f} s {'ago' if age > 0 else 'from now'}"
        raise Refused(
            FORBIDDEN,
            f"the signature is right, but was made {when} by this machine's clock, and max_age is"
            f" {max_age} s; check the clock with timedatectl",
        )


def _body(environ: WSGIEnvironment, max_body: int) -> bytes:
    length = environ.get("CONTENT_LENGTH", "")
    if length:
        if not (length.isascii() and length.isdigit() and len(length) <= 18):
            raise Refused(BAD_REQUEST, "Content-Length is no number")
        size = int(length)
        if size > max_body:
            raise Refused(CONTENT_TOO_LARGE, f"a body of {size} bytes; max_body is {max_body}")
    else:  # the server must say that a read ends with the body, as gunicorn does of a chunked one
        size = max_body + 1 if environ.get("wsgi.input_terminated") else 0
    try:
        body: bytes = environ["wsgi.input"].read(size)
    except OSError as error:
        raise Refused(BAD_REQUEST, f"the body broke off: {type(error).__name__}") from None
    if len(body) > max_body:
        raise Refused(CONTENT_TOO_LARGE, f"a body of more than max_body, {max_body} bytes")
    if length and len(body) < size:
        raise Refused(BAD_REQUEST, f"only {len(body)} bytes came of a body of {size}")
    return body


def _answerer(
    config: Config, reply: Callable[[Message], Reply], clock: Callable[[], float]
) -> Callable[[Message, WSGIEnvironment], bytes]:
    """Return what makes the XML of the answer to a message, empty for none.

    It raises Refused when ``reply()`` outlasts WeChat's patience, so that WeChat asks again, and
    ClientGone when nobody waits for the answer.
    """

    def write(
        message: Message, reply: Reply, signs: Sequence[str] = (), late: bool = False
    ) -> list[bytes]:
        return _write(message, reply, clock(), signs, late)

    once = None
    if config.once:
        import wechat.once

        once = wechat.once.from_config(config, write, clock)

    def answer(message: Message, environ: WSGIEnvironment) -> bytes:
        client_gone = partial(_client_gone, environ.get("gunicorn.socket"))
        if client_gone():
            raise ClientGone(UNAVAILABLE, "the client hung up before its turn")
        run = partial(_run, message, reply)
        if not once:
            return b"".join(write(message, run()))
        xml = once.answer(message, run, client_gone)
        if xml is None and client_gone():
            raise ClientGone(UNAVAILABLE, "the client hung up before its answer was there")
        if xml is None:
            raise Refused(UNAVAILABLE, "reply() still runs; WeChat sends this once more")
        return xml

    return answer


def _client_gone(connection: socket.socket | None) -> bool:
    """Tell whether the client has hung up, if the server shows the connection, as gunicorn does.

    nginx hangs up here when WeChat does there. What waited for a thread for so long need not run:
    nobody would read its answer, and WeChat has sent the message again.
    """
    if connection is None:
        return False
    try:  # On Linux, over TCP. Unlike poll() it does not make this thread wait for its next turn.
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_ESTABLISHED
    except (AttributeError, OSError):
        poll = select.poll()
        poll.register(connection, _HANG_UP)
        return bool(poll.poll(0))


def _run(message: Message, reply: Callable[[Message], Reply]) -> Reply:
    """Run ``reply()``; what fails is no reply."""
    try:
        return reply(dict(message))
    # Anything else than success would be sent again and shown as a failure; and what is no
    # Exception (SystemExit, CancelledError) would take the worker and its other replies along.
    except BaseException:
        log.exception("reply() failed for MsgType %r; answered success", message["MsgType"][:32])
        return None


def _write(
    message: Message, reply: Reply, now: float, signs: Sequence[str] = (), late: bool = False
) -> list[bytes]:
    """Write the XML of a reply, in several parts if it is too long; what cannot be is no reply."""
    try:
        return wechat.message.answer(message, reply, now, signs, late)
    except Exception:
        log.exception("bad reply() for MsgType %r; answered success", message["MsgType"][:32])
        return []


def main() -> None:
    """Serve on 127.0.0.1 with the standard library alone, for a first look."""
    import argparse
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    class Server(ThreadingMixIn, WSGIServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            log.info("a connection broke off")

    class Handler(WSGIRequestHandler):  # its own log lines would show the query: the signature
        def log_request(self, code: object = "-", _size: object = "-") -> None:
            log.info("%r %s", self.command, code)

        def log_error(self, *_: object) -> None:
            log.info("a request that is not HTTP")

    parser = argparse.ArgumentParser(description=main.__doc__, epilog="For real use: make run")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    port = parser.parse_args().port
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        config = wechat.config.load()
        if config.redis:
            from wechat import redis_store

            redis_store.check(config)
        callback = create_application(config)
        with make_server("127.0.0.1", port, callback, Server, Handler) as server:
            log.info(
                "Serving http://127.0.0.1:%d%s for a first look; end with Ctrl-C", port, config.path
            )
            server.serve_forever()
    except (ConfigError, OSError, OverflowError) as error:
        sys.exit(f"wxserver: {error}")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
