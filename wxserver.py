"""HTTP: the WSGI callable ``application``. It checks that WeChat sent a request, and answers it.

``gunicorn wxserver`` serves it; ``python3 wxserver.py`` serves it for a first look, with nothing
installed. Sources of the rules: the platform's 接入指南, 接收普通消息 and 被动回复用户消息.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

try:
    import fcntl  # noqa: F401  of many modules: told here in one line, before one of them fails
except ModuleNotFoundError:
    sys.exit("wxserver: needs Linux or macOS; on Windows use WSL")

import reply
import wechat.message
from wechat import crypto
from wechat.config import CENTRAL_PATHS, Config, ConfigError, callback_token, load
from wechat.http import (
    BAD_REQUEST,
    FORBIDDEN,
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    OK,
    TEXT,
    UNAVAILABLE,
    ClientGone,
    Headers,
    Refused,
    Response,
    as_wsgi,
    client_gone,
    read_body,
)
from wechat.message import Message, MessageError, Reply, from_xml, to_xml

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger("wxserver")

# The values that a parameter of the query may have.
_HEX = re.compile("[0-9a-f]{40}")
_PARAMETERS = {
    "signature": _HEX,
    "msg_signature": _HEX,
    "timestamp": re.compile("[0-9]{1,11}"),
    "nonce": re.compile("[!-~]{1,128}"),
    "echostr": re.compile("[\x00-\xff]{1,1024}"),
}
MAX_PARAMETERS = 50  # WeChat sends six

_XML: Headers = [("Content-Type", "application/xml")]
_first_call = threading.Lock()


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """The WSGI callable for config.ini, which is read at the first call."""
    with _first_call:  # @cache alone would let two threads make it at the same time
        configured = _configured()
    return configured(environ, start_response)


@cache
def _configured() -> WSGIApplication:
    return create_application(load())


def create_application(
    config: Config,
    reply: Callable[[Message], Reply] = reply.reply,
    clock: Callable[[], float] = time.time,
) -> WSGIApplication:
    """Make the WSGI callable.

    Args:
        config: where the callback is, its Token and its limits.
        reply: returns what the account answers to a message; several threads may call it at once.
        clock: Unix time in seconds.

    Raises:
        ConfigError: no Token is set, and a random one cannot be saved in ``state_dir``; or
            ``encryption`` or Redis needs a package that is not installed.
    """
    cipher, token = crypto.from_config(config), callback_token(config)
    answer = _make_answer(config, reply, clock)

    def respond(environ: WSGIEnvironment) -> Response:
        method = _checked_method(environ, config.path)
        query = _query(environ)
        check_signature = partial(_check_signature, query, token, clock(), config.max_age)
        if method == "GET":
            check_signature("signature")
            return OK, TEXT, _parameter(query, "echostr").encode("latin-1")

        message_cipher = cipher if query.get("encrypt_type") == "aes" else None
        if message_cipher:
            _parameter(query, "msg_signature")  # without one, the body is not even read
            encrypt = crypto.find_encrypt(read_body(environ, config.max_body))
            check_signature("msg_signature", encrypt)  # signature does not cover the body
            xml = message_cipher.decrypt(encrypt)
        elif config.encryption == "safe":
            raise Refused(FORBIDDEN, "the message is not encrypted, and encryption is safe")
        else:
            check_signature("signature")
            xml = read_body(environ, config.max_body)

        message = from_xml(xml)
        wechat.message.check(message)
        xml = answer(message, environ)
        if not xml:
            return OK, TEXT, b"success"  # no reply; it is never encrypted
        if message_cipher:
            encrypt = message_cipher.encrypt(xml)
            xml = to_xml(crypto.envelope(encrypt, token, query["nonce"], clock()))
        return OK, _XML, xml

    callback = as_wsgi(respond, {MessageError: BAD_REQUEST, crypto.DecryptError: FORBIDDEN})
    return _with_central(callback, config) if config.central else callback


def _with_central(callback: WSGIApplication, config: Config) -> WSGIApplication:
    """Let wechat/central.py answer at its two paths, and ``callback`` at all others."""
    from wechat import central

    token_service = central.create_application(config)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        is_central = environ.get("PATH_INFO") in CENTRAL_PATHS
        return (token_service if is_central else callback)(environ, start_response)

    return application


def _checked_method(environ: WSGIEnvironment, path: str) -> str:
    """Return GET or POST; refuse other methods, and other paths than the callback's."""
    requested, method = environ.get("PATH_INFO", ""), str(environ["REQUEST_METHOD"])
    if requested != path:
        raise Refused(NOT_FOUND, f"{requested[:80]!r} was asked for; the callback is at {path!r}")
    if method not in ("GET", "POST"):
        raise Refused(METHOD_NOT_ALLOWED, f"{method[:20]!r}", [("Allow", "GET, POST")])
    return method


def _query(environ: WSGIEnvironment) -> dict[str, str]:
    """Return the parameters of the query; refuse a repeated one."""
    text = environ.get("QUERY_STRING", "")
    try:  # latin-1 keeps every byte of echostr, which goes back unchanged
        pairs = parse_qsl(text, True, encoding="latin-1", max_num_fields=MAX_PARAMETERS)
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
    query: dict[str, str], token: str, now: float, max_age: int, name: str, encrypt: str = ""
) -> None:
    """Refuse what WeChat did not sign, or signed more than ``max_age`` seconds from now.

    Args:
        query: has timestamp, nonce and the signature.
        token: the callback's Token.
        now: Unix time in seconds.
        max_age: in seconds; 0 allows any age.
        name: signature, or msg_signature, which covers ``encrypt`` as well.
        encrypt: the Encrypt of an encrypted message.
    """
    signature, timestamp, nonce = (_parameter(query, each) for each in (name, "timestamp", "nonce"))
    if not crypto.verify(signature, token, timestamp, nonce, encrypt):
        raise Refused(FORBIDDEN, "wrong signature; is the Token the one in WeChat's console?")
    age = now - int(timestamp)
    if max_age and abs(age) > max_age:
        when = f"{abs(age):.0f} s {'ago' if age > 0 else 'from now'}"
        raise Refused(
            FORBIDDEN,
            f"the signature is right, but was made {when} by this machine's clock, and max_age is"
            f" {max_age} s; check the clock with timedatectl",
        )


def _make_answer(
    config: Config, reply: Callable[[Message], Reply], clock: Callable[[], float]
) -> Callable[[Message, WSGIEnvironment], bytes]:
    """Return a function that makes the XML of the answer to a message, empty for no reply.

    It raises ClientGone when the client has hung up, and Refused when ``reply()`` still runs and
    WeChat has to send the message again.
    """
    write = partial(_write, clock)
    reply_once = None
    if config.once:
        from wechat import once

        reply_once = once.from_config(config, write, clock)

    def answer(message: Message, environ: WSGIEnvironment) -> bytes:
        if client_gone(environ):
            raise ClientGone(UNAVAILABLE, "the client hung up before its turn")
        run = partial(_run, reply, message)
        if not reply_once:
            return b"".join(write(message, run()))  # one part: without endings no text is split
        xml = reply_once.answer(message, run, partial(client_gone, environ))
        if xml is not None:
            return xml
        if client_gone(environ):
            raise ClientGone(UNAVAILABLE, "the client hung up before its answer was there")
        raise Refused(UNAVAILABLE, "reply() still runs; WeChat sends this once more")

    return answer


def _run(reply: Callable[[Message], Reply], message: Message) -> Reply:
    """Run ``reply()``; log what it raises, which counts as no reply."""
    try:
        return reply(dict(message))
    # An error response would make WeChat send the message again and show the follower a failure.
    # SystemExit and CancelledError, which are no Exception, would end the worker as well.
    except BaseException:
        log.exception("reply() failed for MsgType %r; answered success", message["MsgType"][:32])
        return None


def _write(
    clock: Callable[[], float],
    message: Message,
    reply: Reply,
    endings: Sequence[str] = (),
    late: bool = False,
) -> list[bytes]:
    """Write the XML of a reply; log a reply that cannot be written, which counts as no reply."""
    try:
        return wechat.message.answer(message, reply, clock(), endings, late)
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

    class Handler(WSGIRequestHandler):  # whose own log lines would show the signature
        def log_request(self, code: object = "-", _size: object = "-") -> None:
            log.info("%r %s", self.command, code)

        def log_error(self, *_: object) -> None:
            log.info("a request that is not HTTP")

    parser = argparse.ArgumentParser(description=main.__doc__, epilog="For real use: make run")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    port = parser.parse_args().port
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        import fcntl  # noqa: F401  (what keeps files needs it)
    except ModuleNotFoundError:
        sys.exit("wxserver: needs Linux or macOS; on Windows use WSL")
    try:
        config = load()
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
