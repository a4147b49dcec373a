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
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode, urlsplit

import wechat.config
import wechat.crypto
from wechat.config import Config
from wechat.crypto import MessageCipher
from wxsim import messages
from wxsim.messages import Outgoing

WECHAT_TIMEOUT = 5.0  # seconds until WeChat hangs up
TRIES = 3  # of a message, in all
LARGEST_ANSWER = 4 * 1048576  # bytes


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
    headers: http.client.HTTPMessage
    body: bytes
    seconds: float


class NoAnswer(Exception):
    """No HTTP answer came, or none that WeChat accepts. The text says why, in words."""


class TooLate(NoAnswer):
    """No HTTP answer came in time."""


@dataclass(frozen=True)
class Try:
    """One request that brought a message, and its answer; without one ``failure`` says why."""

    url: str
    body: bytes
    answer: Answer | None = None
    failure: str = ""


def from_config(config: Config, url: str = "", token: str = "") -> Account:
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
        has_server = bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port from 0 to 65535, or half an IPv6 address
        return False
    return (
        has_server and parts.scheme in ("http", "https") and not (parts.fragment or parts.username)
    )


def signed_url(account: Account, query: dict[str, str], encrypt: str = "") -> str:
    """Return the URL of a request that WeChat makes now, with ``query`` after the signature.

    ``encrypt`` is the Encrypt of the body, if it has one: msg_signature covers it.
    """
    timestamp, nonce = str(int(time.time())), str(secrets.randbelow(10**9))
    signature = wechat.crypto.sign(account.token, timestamp, nonce)
    query = {"signature": signature, "timestamp": timestamp, "nonce": nonce, **query}
    if encrypt:
        signature = wechat.crypto.sign(account.token, timestamp, nonce, encrypt)
        query |= {"encrypt_type": "aes", "msg_signature": signature}
    return f"{account.url}{'&' if '?' in account.url else '?'}{urlencode(query)}"


def request(account: Account, message: Outgoing) -> tuple[str, bytes]:
    """Return the URL and the body of the request that brings ``message``, encrypted if need be."""
    fields, body = message.fields, message.xml
    encrypt = str(fields.get("Encrypt", ""))  # of a raw message that was encrypted before
    if account.cipher and not message.raw:
        encrypt = account.cipher.encrypt(message.xml)
        readable = (
            fields if account.encryption == "compatible" else {"ToUserName": fields["ToUserName"]}
        )
        body = messages.to_unescaped_xml({**readable, "Encrypt": encrypt})
    return signed_url(account, {"openid": message.openid}, encrypt), body


def deliver(account: Account, message: Outgoing, timeout: float = WECHAT_TIMEOUT) -> Iterator[Try]:
    """Send a message as WeChat does, ``TRIES`` times at most, until a try has an answer.

    ``timeout`` is seconds for each try.
    """
    for _ in range(TRIES):
        url, body = request(account, message)
        try:
            answer = _exchange_ok(url, body, timeout)
        except NoAnswer as error:
            yield Try(url, body, failure=str(error))
        else:
            yield Try(url, body, answer)
            return


def verify(account: Account, timeout: float = WECHAT_TIMEOUT) -> None:
    """Do what the console does on 提交.

    Raises:
        NoAnswer: the console would not accept the callback.
    """
    echostr = str(secrets.randbelow(9 * 10**18) + 10**18)
    answer = _exchange_ok(signed_url(account, {"echostr": echostr}), None, timeout)
    if answer.body != echostr.encode():
        raise NoAnswer(f"in place of echostr, {echostr}, came {_excerpt(answer.body)}")


def _exchange_ok(url: str, body: bytes | None, timeout: float) -> Answer:
    """Do what ``exchange`` does, but accept the HTTP status 200 alone."""
    answer = exchange(url, body, timeout)
    if answer.status != 200:
        shown = _excerpt(answer.body.strip())
        raise NoAnswer(f"HTTP status {answer.status}: {shown}; {_advice(answer)}")
    return answer


def exchange(url: str, body: bytes | None = None, timeout: float = WECHAT_TIMEOUT) -> Answer:
    """GET ``url``, or POST ``body`` to it, and hang up after ``timeout`` seconds.

    Another thread does it, so that the timeout holds for the whole exchange: for DNS, connecting
    and TLS, and for an answer that comes byte by byte.

    Raises:
        NoAnswer: nobody listens, nothing comes in time, or what comes is not HTTP.
    """
    began, parts = time.monotonic(), urlsplit(url)
    opened: list[socket.socket] = []
    future: futures.Future[Answer] = futures.Future()

    def run() -> None:
        try:
            with contextlib.closing(_connection(parts.scheme, parts.netloc, timeout)) as connection:
                connection.connect()
                opened.append(connection.sock)
                if time.monotonic() - began < timeout:
                    future.set_result(_send(connection, url, body, began))
        except Exception as error:  # noqa: BLE001  raised again by result()
            future.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True).start()
        return future.result(timeout)
    except (TimeoutError, futures.TimeoutError):
        raise TooLate(f"no answer within {timeout:g} s") from None
    except (socket.gaierror, UnicodeError):
        raise NoAnswer(f"the name {parts.hostname} does not resolve") from None
    except ConnectionRefusedError:
        raise NoAnswer("the connection was refused; is the server running?") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: there are too many threads
        raise NoAnswer(
            f"the connection failed: {getattr(error, 'strerror', '') or error}"
        ) from None
    except (http.client.HTTPException, ValueError) as error:
        raise NoAnswer(f"the answer is not HTTP, or not whole: {error!r:.80}") from None
    finally:
        for connection in opened:
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _connection(scheme: str, server: str, timeout: float) -> http.client.HTTPConnection:
    if scheme == "http":
        return http.client.HTTPConnection(server, timeout=timeout)
    return http.client.HTTPSConnection(server, timeout=timeout, context=_tls())


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _send(
    connection: http.client.HTTPConnection, url: str, body: bytes | None, began: float
) -> Answer:
    parts = urlsplit(url)
    target = quote(f"{parts.path or '/'}?{parts.query}", safe=string.punctuation)
    headers = {"User-Agent": "Mozilla/4.0", "Accept": "*/*", "Connection": "close"}
    if body is not None:
        headers["Content-Type"] = "text/xml"
    connection.request("GET" if body is None else "POST", target, body, headers)
    content = b""
    with connection.getresponse() as response:
        while piece := response.read1(65536):
            content += piece
            if len(content) > LARGEST_ANSWER:
                raise NoAnswer(f"the answer is larger than {LARGEST_ANSWER} bytes")
        if response.length:  # bytes that did not come
            raise http.client.IncompleteRead(content)
        return Answer(response.status, response.headers, content, time.monotonic() - began)


def _advice(answer: Answer) -> str:
    """Say what is wrong when the status of an answer is not 200."""
    match answer.status:
        case 301 | 302 | 303 | 307 | 308:
            return f"it redirects to {answer.headers['Location']}, and WeChat does not follow"
        case 404:
            return "the URL's path is not the callback's"
        case 403:
            return "the Token is not the server's, most likely; the server's log says why"
    return "the server's log says why"


def _excerpt(body: bytes) -> str:
    return repr(body[:200].decode(errors="replace")[:80]) if body else "an empty body"
