"""Sends as WeChat does: signs, encrypts, waits five seconds, sends again, three times in all.

Sources of the rules: the platform's 接入指南, 接收普通消息 and 消息加解密说明.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import secrets
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, quote, urlencode, urlsplit

import wechat.config
import wechat.crypto
from wechat.config import Config
from wechat.crypto import MessageCipher
from wxsim import messages
from wxsim.messages import Outgoing

WECHAT_TIMEOUT = 5.0  # seconds until WeChat hangs up
TRIES = 3  # requests for one message, all in all
LARGEST_ANSWER = 4 * 1048576  # bytes
CLOCK_TOLERANCE = 30.0  # seconds by which two clocks may differ before it is worth a word


@dataclass(frozen=True)
class Account:
    """A callback as the console knows it."""

    url: str
    token: str = field(repr=False)
    cipher: MessageCipher | None = None
    encryption: str = "plain"


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, and the seconds it took."""

    status: int
    headers: Any  # a mapping of names in any case
    body: bytes
    seconds: float


class NoAnswer(Exception):
    """There was no HTTP answer in time. The text says why, in words."""


def account(config: Config, url: str = "", token: str = "") -> Account:
    """Return the callback of config.ini: by default at the local server, with its Token.

    Raises:
        ConfigError: no Token, or ``encryption`` needs a package that is not installed.
    """
    return Account(
        url or f"http://127.0.0.1:8000{config.path}",
        token or wechat.config.callback_token(config),
        wechat.crypto.from_config(config),
        config.encryption,
    )


def is_url(url: str) -> bool:
    """Tell whether WeChat could send a request to ``url``."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # no number from 0 to 65535, or half an IPv6 address
        return False
    complete = parts.scheme in ("http", "https") and parts.hostname and port != 0
    return bool(complete) and not parts.fragment and not parts.username


def signed_url(to: Account, more: dict[str, str], encrypt: str = "") -> str:
    """Return the URL of a request that WeChat makes now, with ``more`` in its query.

    ``encrypt`` is the Encrypt of the body, if it has one: msg_signature covers it.
    """
    timestamp, nonce = str(int(time.time())), str(secrets.randbelow(10**9))
    signature = wechat.crypto.sign(to.token, timestamp, nonce)
    query = {"signature": signature, "timestamp": timestamp, "nonce": nonce, **more}
    if encrypt:
        signature = wechat.crypto.sign(to.token, timestamp, nonce, encrypt)
        query |= {"encrypt_type": "aes", "msg_signature": signature}
    return f"{to.url}{'&' if '?' in to.url else '?'}{urlencode(query)}"


def request(to: Account, message: Outgoing) -> tuple[str, bytes]:
    """Return the URL and the body of the request that brings ``message``, encrypted if need be."""
    fields, body = message.fields, message.xml
    encrypt = str(fields.get("Encrypt", ""))  # of a file that was encrypted before
    if to.cipher and not message.raw:
        encrypt = to.cipher.encrypt(message.xml)
        readable = fields if to.encryption == "compatible" else {"ToUserName": fields["ToUserName"]}
        body = messages.as_wechat_writes({**readable, "Encrypt": encrypt})
    return signed_url(to, {"openid": message.openid}, encrypt), body


def deliver(
    to: Account,
    message: Outgoing,
    on_failure: Callable[[int, str], object] = lambda *_: None,
    on_request: Callable[[str, bytes], object] = lambda *_: None,
    timeout: float = WECHAT_TIMEOUT,
) -> Answer | None:
    """Send a message as WeChat does, up to ``TRIES`` times; None when all of them failed.

    ``on_failure`` is told of every failed try (its number from 1, and why), ``on_request`` of every
    request (the URL and the body). ``timeout`` is seconds for each answer.
    """
    for number in range(1, TRIES + 1):
        url, body = request(to, message)
        on_request(url, body)
        try:
            answer = exchange(url, body, timeout)
        except NoAnswer as error:
            on_failure(number, str(error))
            continue
        if answer.status == 200:
            return answer
        on_failure(number, why_refused(answer))
    return None


def exchange(url: str, body: bytes | None = None, timeout: float = WECHAT_TIMEOUT) -> Answer:
    """GET ``url``, or POST ``body`` to it, and hang up after ``timeout`` seconds.

    A thread of its own does it, so that the time is up wherever it waits: for DNS, for a
    connection, for TLS, or for the next byte of a server that sends one now and then.

    Raises:
        NoAnswer: nobody listens, nothing comes in time, or what comes is not HTTP.
    """
    began, parts = time.monotonic(), urlsplit(url)
    opened: list[socket.socket] = []
    future: Future[tuple[int, Any, bytes]] = Future()

    def run() -> None:
        try:
            with contextlib.closing(_connection(parts, timeout)) as connection:
                connection.connect()
                opened.append(connection.sock)
                if time.monotonic() - began < timeout:
                    future.set_result(_exchange(connection, parts, body))
        except Exception as error:  # noqa: BLE001  told apart below
            future.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True).start()
        status, headers, content = future.result(timeout)
    except (TimeoutError, futures.TimeoutError):
        raise NoAnswer(f"no answer within {timeout:g} s") from None
    except (socket.gaierror, UnicodeError, http.client.InvalidURL):
        raise NoAnswer(f"the name {parts.hostname} does not resolve") from None
    except http.client.RemoteDisconnected:
        raise NoAnswer("the connection broke off without an answer") from None
    except http.client.IncompleteRead as error:
        raise NoAnswer(f"the answer broke off after {len(error.partial)} bytes") from None
    except ssl.SSLError as error:
        raise NoAnswer(f"TLS failed: {getattr(error, 'verify_message', '') or error}") from None
    except (http.client.HTTPException, ValueError):
        raise NoAnswer("the answer is not HTTP") from None
    except ConnectionRefusedError:
        raise NoAnswer("the connection was refused; is the server running?") from None
    except OSError as error:
        raise NoAnswer(f"the connection broke off: {error.strerror or error}") from None
    except RuntimeError:
        raise NoAnswer("this machine can start no more threads") from None
    finally:
        for connection in opened:
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
    return Answer(status, headers, content, time.monotonic() - began)


def _connection(parts: SplitResult, timeout: float) -> http.client.HTTPConnection:
    host, port = str(parts.hostname), parts.port
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, port or 80, timeout)
    return http.client.HTTPSConnection(host, port or 443, timeout=timeout, context=_trusting())


@functools.cache
def _trusting() -> ssl.SSLContext:
    return ssl.create_default_context()


def _exchange(
    connection: http.client.HTTPConnection, parts: SplitResult, body: bytes | None
) -> tuple[int, Any, bytes]:
    target = quote(f"{parts.path or '/'}?{parts.query}", safe=string.punctuation)
    headers = {"User-Agent": "Mozilla/4.0", "Accept": "*/*", "Connection": "close"}
    if body is not None:
        headers["Content-Type"] = "text/xml"
    connection.request("GET" if body is None else "POST", target, body, headers)
    content = b""
    with connection.getresponse() as response:
        try:
            while piece := response.read1(65536):
                content += piece
                if len(content) > LARGEST_ANSWER:
                    raise NoAnswer(f"the answer is larger than {LARGEST_ANSWER} bytes")
        except http.client.IncompleteRead:  # which counts the last chunk alone
            raise http.client.IncompleteRead(content) from None
        if response.length:  # bytes that did not come
            raise http.client.IncompleteRead(content)
        return response.status, response.headers, content


def verify(to: Account, timeout: float = WECHAT_TIMEOUT) -> str:
    """Do what the console does on 提交; return an empty text, or why it would fail, in words."""
    echostr = str(secrets.randbelow(9 * 10**18) + 10**18)
    try:
        answer = exchange(signed_url(to, {"echostr": echostr}), timeout=timeout)
    except NoAnswer as error:
        return str(error)
    if answer.status != 200:
        return why_refused(answer)
    if answer.body == echostr.encode():
        return ""
    if b"<html" in answer.body[:1000].lower() or b"<!doctype" in answer.body[:1000].lower():
        return f"an HTML page came in place of echostr: {_excerpt(answer.body)}"
    if (place := answer.body.find(echostr.encode())) >= 0:
        around = answer.body[max(place - 60, 0) : place + len(echostr) + 60]
        return f"something stands around echostr: {around!r} in place of {echostr}"
    return f"something else came in place of echostr: {_excerpt(answer.body)}"


def why_refused(answer: Answer) -> str:
    """Return in words what an answer with another status than 200 says."""
    why = f"HTTP status {answer.status}: {_excerpt(answer.body)}"
    if answer.status in (301, 302, 303, 307, 308):
        return f"{why}; it redirects to {answer.headers['Location']}, and WeChat does not follow"
    if answer.status == 404:
        return f"{why}; the URL's path is not the callback's"
    ahead = clock_difference(answer)
    if answer.status == 403 and ahead is not None and abs(ahead) > CLOCK_TOLERANCE:
        return f"{why}; the server's clock is {ahead:+.0f} s off from this machine's"
    if answer.status == 403:
        return f"{why}; the Token is not the server's, most likely; the server's log says why"
    return f"{why}; the server's log says why"


def clock_difference(answer: Answer) -> float | None:
    """Return by how many seconds the server's clock is ahead of this machine's, if it tells."""
    try:
        return parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()
    except (TypeError, ValueError):
        return None


def _excerpt(body: bytes) -> str:
    text = " ".join(body[:200].decode(errors="replace").split())
    return repr(text[:80]) if text else "an empty body"
