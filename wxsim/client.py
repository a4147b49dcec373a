"""WeChat's end of the wire: signs, encrypts, sends with its patience, and reads what comes back.

Sources of the rules: the platform's 接入指南, 接收普通消息, 被动回复用户消息 and 消息加解密说明.
"""

from __future__ import annotations

import asyncio
import functools
import http.client
import io
import re
import secrets
import socket
import ssl
import string
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import wxconfig
import wxcrypto
import wxmessage
from wxconfig import Config
from wxcrypto import DecryptError, MessageCipher
from wxmessage import Message, MessageError

PATIENCE = 5.0  # seconds until WeChat hangs up
TRIES = 3  # requests for one message, all in all
LARGEST_ANSWER = 4 * 1048576  # bytes
CLOCK_OFF = 30.0  # seconds by which a clock may differ before it is worth a word
FAULT = "该公众号提供的服务出现故障，请稍后再试"  # the platform's own words


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


@dataclass(frozen=True)
class Shown:
    """What the follower sees, and why when it is WeChat's own apology.

    ``text`` is None when nothing is shown; ``xml`` is the reply, decrypted; ``note`` says what
    the owner should know of a reply that is shown all the same.
    """

    text: str | None
    xml: bytes = b""
    problem: str = ""
    note: str = ""


class Malformed(Exception):
    """An answer that WeChat cannot use. The text says what is wrong with it."""


def account(config: Config, url: str = "", token: str = "") -> Account:
    """Return the callback of config.ini: by default at the local server, with its Token.

    Raises:
        ConfigError: no Token, or ``encryption`` needs a package that is not installed.
    """
    return Account(
        url or f"http://127.0.0.1:8000{config.path}",
        token or wxconfig.callback_token(config),
        wxcrypto.from_config(config),
        config.encryption,
    )


def is_url(url: str) -> bool:
    """Tell whether ``url`` is one that WeChat could ask."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # no number from 0 to 65535, or half an IPv6 address
        return False
    usual = parts.scheme in ("http", "https") and parts.hostname and port != 0
    return bool(usual) and not parts.fragment and not parts.username


def sign(to: Account, *parts: str) -> dict[str, str]:
    """Return signature, timestamp and nonce as WeChat makes them now."""
    timestamp, nonce = str(int(time.time())), str(secrets.randbelow(10**9))
    signature = wxcrypto.sign(to.token, timestamp, nonce, *parts)
    return {"signature": signature, "timestamp": timestamp, "nonce": nonce}


def wrap(to: Account, xml: bytes, follower: str) -> tuple[str, bytes]:
    """Return the URL and the body of the request that brings ``xml``, as it is or encrypted."""
    query, fields = sign(to) | {"openid": follower}, _fields(xml)
    encrypt = fields.get("Encrypt")  # of a body that was encrypted before
    if to.cipher:
        encrypt = to.cipher.encrypt(xml)
        if to.encryption == "safe":
            fields = {"ToUserName": fields.get("ToUserName", "")}
        xml = wxmessage.to_xml({**fields, "Encrypt": encrypt})
    if isinstance(encrypt, str):
        parts = (query["timestamp"], query["nonce"], encrypt)
        query |= {"encrypt_type": "aes", "msg_signature": wxcrypto.sign(to.token, *parts)}
    return f"{to.url}{'&' if '?' in to.url else '?'}{urlencode(query)}", xml


def _fields(xml: bytes) -> Message:
    try:
        return wxmessage.from_xml(xml)
    except MessageError:
        return {}


async def exchange(url: str, body: bytes | None = None, patience: float = PATIENCE) -> Answer:
    """GET ``url``, or POST ``body`` to it, and hang up after ``patience`` seconds.

    Raises:
        NoAnswer: nobody listens, nothing comes in time, or what comes is not HTTP.
    """
    began = time.perf_counter()
    try:
        status, headers, content = await asyncio.wait_for(_request(url, body), patience)
    except (TimeoutError, asyncio.TimeoutError):
        raise NoAnswer(f"no answer within {patience:g} s") from None
    except (socket.gaierror, UnicodeError):
        raise NoAnswer(f"the name {urlsplit(url).hostname} does not resolve") from None
    except ssl.SSLError as error:
        raise NoAnswer(f"TLS failed: {getattr(error, 'verify_message', '') or error}") from None
    except OSError as error:
        # Of a name with several addresses there are several errors in one, of no class.
        if isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):
            raise NoAnswer("the connection was refused; is the server running?") from None
        raise NoAnswer(f"the connection broke off: {error.strerror or error}") from None
    except asyncio.IncompleteReadError as error:
        raise NoAnswer(f"the answer broke off after {len(error.partial)} bytes") from None
    except (http.client.HTTPException, asyncio.LimitOverrunError, ValueError):
        raise NoAnswer("the answer is not HTTP") from None
    return Answer(status, headers, content, time.perf_counter() - began)


async def _request(url: str, body: bytes | None) -> tuple[int, Any, bytes]:
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or (443 if tls else 80), ssl=_tls() if tls else None
    )
    target = quote(f"{parts.path or '/'}?{parts.query}", safe=string.punctuation)
    head = (
        f"{'GET' if body is None else 'POST'} {target} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        "User-Agent: Mozilla/4.0\r\nAccept: */*\r\nConnection: close\r\n"
    )
    if body is not None:
        head += f"Content-Type: text/xml\r\nContent-Length: {len(body)}\r\n"
    try:
        writer.write(head.encode() + b"\r\n" + (body or b""))
        return await _receive(reader)
    finally:
        writer.transport.abort()  # close() would wait for the other side's end of TLS


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


async def _receive(reader: asyncio.StreamReader) -> tuple[int, Any, bytes]:
    """Return status, headers and content as soon as they are whole; the connection may stay."""
    status = 100
    while status < 200:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise ValueError from None
            raise NoAnswer("the connection broke off without an answer") from None
        line, _, rest = head.partition(b"\r\n")
        if not (found := re.fullmatch(rb"HTTP/1\.[01] ([1-5][0-9]{2})( .*)?", line)):
            raise ValueError
        status, headers = int(found[1]), http.client.parse_headers(io.BytesIO(rest))
    content, length = b"", headers["Content-Length"]
    if "chunked" in headers.get("Transfer-Encoding", "").lower():
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            content += (await reader.readexactly(_bounded(size) + 2))[:-2]
            _bounded(len(content))
    elif length is not None:
        content = await reader.readexactly(_bounded(int(length)))
    else:
        while data := await reader.read(65536):
            content += data
            _bounded(len(content))
    return status, headers, content


def _bounded(size: int) -> int:
    if not 0 <= size <= LARGEST_ANSWER:
        raise NoAnswer(f"the answer is larger than {LARGEST_ANSWER} bytes")
    return size


async def deliver(
    to: Account,
    xml: bytes,
    follower: str,
    failed: Callable[[int, str], object] = lambda *_: None,
    sent: Callable[[str, bytes], object] = lambda *_: None,
    patience: float = PATIENCE,
) -> Answer | None:
    """Send a message as WeChat does, up to ``TRIES`` times; None when all of them failed.

    Args:
        to: the callback.
        xml: the message.
        follower: the OpenID it comes from.
        failed: is told of every failed try: its number from 1, and why.
        sent: is told of every request: the URL and the body.
        patience: seconds to wait for each answer.
    """
    for number in range(1, TRIES + 1):
        url, body = wrap(to, xml, follower)
        sent(url, body)
        try:
            answer = await exchange(url, body, patience)
        except NoAnswer as error:
            failed(number, str(error))
            continue
        if answer.status == 200:
            return answer
        failed(number, _why_refused(answer))
    return None


def read(to: Account, xml: bytes, answer: Answer) -> Shown:
    """Tell what the follower who sent ``xml`` sees of ``answer``."""
    if answer.body in (b"", b"success"):
        return Shown(None)
    message = _fields(xml)
    try:
        body = _open(to, answer.body)
        reply = _parse(body)
        _check(message, reply)
        text, note = _show(message, reply)
    except Malformed as error:
        return Shown(FAULT, answer.body, problem=str(error))
    return Shown(text, body, note=note)


def _parse(body: bytes) -> Message:
    start = body.lstrip()[:200].lower()
    if body.startswith(b"\xef\xbb\xbf"):
        raise Malformed("a byte order mark stands before the XML")
    if start.startswith((b"{", b"[")):
        raise Malformed("it is JSON; WeChat wants XML")
    if b"<html" in start or start.startswith(b"<!doctype"):
        raise Malformed("it is an HTML page; WeChat wants XML")
    if not start.startswith(b"<"):
        raise Malformed("it is neither XML nor success")
    try:
        return wxmessage.from_xml(body)
    except MessageError as error:
        raise Malformed(f"bad XML: {error}") from None


def _open(to: Account, body: bytes) -> bytes:
    """Return the XML of the reply, decrypted when it has to be."""
    envelope = _parse(body)
    if not to.cipher:
        if "Encrypt" in envelope and "MsgType" not in envelope:
            raise Malformed("it is encrypted, and the console's mode is 明文模式")
        return body
    if "Encrypt" not in envelope:
        if to.encryption == "safe":
            raise Malformed("it is not encrypted, and the console's mode is 安全模式")
        return body
    try:
        parts = [envelope[name] for name in ("TimeStamp", "Nonce", "Encrypt", "MsgSignature")]
    except KeyError as error:
        raise Malformed(f"the envelope has no {error.args[0]}") from None
    if not all(isinstance(part, str) for part in parts):
        raise Malformed("something in the envelope is there twice")
    timestamp, nonce, encrypt, signature = parts
    if not wxcrypto.verify(signature, to.token, timestamp, nonce, encrypt):
        raise Malformed("MsgSignature is wrong")
    try:
        return to.cipher.decrypt(encrypt)
    except DecryptError as error:
        raise Malformed(f"it cannot be decrypted: {error}") from None


def _check(message: Message, reply: Message) -> None:
    swapped = {"ToUserName": "FromUserName", "FromUserName": "ToUserName"}
    for name, other in swapped.items():
        if other in message and reply.get(name) != message[other]:
            same = reply.get(name) == message.get(name)
            hint = "; the two names must be swapped" if same else ""
            raise Malformed(f"{name} is not the message's {other}{hint}")
    created = str(reply.get("CreateTime", ""))
    if not (created.isascii() and created.isdecimal()):
        raise Malformed("CreateTime is not a whole number")
    if not isinstance(reply.get("MsgType"), str):
        raise Malformed("there is no MsgType")


def _show(message: Message, reply: Message) -> tuple[str, str]:
    """Return what the follower sees, and a note to the owner or an empty one."""
    match reply:
        case {"MsgType": "text", "Content": str(text)}:
            size = len(text.encode())
            if size > wxmessage.MAX_TEXT:
                raise Malformed(f"the text has {size} bytes; {wxmessage.MAX_TEXT} are allowed")
            return text, ""
        case {"MsgType": "image", "Image": {"MediaId": str(media)}} if media:
            return f"[image {media}]", ""
        case {"MsgType": "voice", "Voice": {"MediaId": str(media)}} if media:
            return f"[voice {media}]", ""
        case {"MsgType": "video", "Video": {"MediaId": str(media), **more}} if media:
            return _line("[video", more.get("Title"), more.get("Description"), media + "]"), ""
        case {"MsgType": "music", "Music": {"ThumbMediaId": str(thumb), **more}} if thumb:
            shown = [more.get(name) for name in ("Title", "Description", "MusicUrl")]
            return _line("[music", *shown) + "]", ""
        case {"MsgType": "news", "Articles": {"item": items}, **more}:
            return _show_articles(message, items, more.get("ArticleCount"))
        case {"MsgType": "transfer_customer_service"}:
            return "[a human agent takes over]", ""
        case {"MsgType": "text" | "image" | "voice" | "video" | "music" | "news" as kind}:
            raise Malformed(f"the {kind} reply lacks what belongs in it")
    raise Malformed(f"there is no reply of MsgType {reply['MsgType']!r}")


def _show_articles(message: Message, items: Any, count: object) -> tuple[str, str]:
    articles = items if isinstance(items, list) else [items]
    if not all(isinstance(article, dict) for article in articles):
        raise Malformed("an article has no Title, Description, PicUrl or Url")
    if count != str(len(articles)):
        raise Malformed(f"ArticleCount is {count}, and there are {len(articles)} articles")
    most = wxmessage.MAX_ARTICLES if message.get("MsgType") == "event" else 1
    note = "" if len(articles) <= most else f"{len(articles)} articles; WeChat shows {most} here"
    fields = ("Title", "Description", "Url")
    lines = [_line("[article", *map(article.get, fields)) + "]" for article in articles[:most]]
    return "\n".join(lines), note


def _line(*parts: object) -> str:
    return " ".join(part for part in parts if isinstance(part, str) and part)


def _excerpt(body: bytes) -> str:
    text = " ".join(body[:200].decode(errors="replace").split())
    return repr(text[:80]) if text else "an empty body"


def verify(to: Account, patience: float = PATIENCE) -> str:
    """Do what the console does on 提交; return an empty text, or why it would fail, in words."""
    echostr = str(secrets.randbelow(9 * 10**18) + 10**18)
    url = f"{to.url}{'&' if '?' in to.url else '?'}{urlencode(sign(to) | {'echostr': echostr})}"
    try:
        answer = asyncio.run(exchange(url, patience=patience))
    except NoAnswer as error:
        return str(error)
    if answer.body == echostr.encode() and answer.status == 200:
        return ""
    if answer.status != 200:
        return _why_refused(answer)
    if b"<html" in answer.body[:1000].lower() or b"<!doctype" in answer.body[:1000].lower():
        return f"an HTML page came in place of echostr: {_excerpt(answer.body)}"
    if (place := answer.body.find(echostr.encode())) >= 0:
        around = answer.body[max(place - 60, 0) : place + len(echostr) + 60]
        return f"something stands around echostr: {around!r} in place of {echostr}"
    return f"something else came in place of echostr: {_excerpt(answer.body)}"


def _why_refused(answer: Answer) -> str:
    why = f"HTTP status {answer.status}: {_excerpt(answer.body)}"
    if answer.status in (301, 302, 303, 307, 308):
        return f"{why}; it redirects to {answer.headers['Location']}, and WeChat does not follow"
    if answer.status == 404:
        return f"{why}; the URL's path is not the callback's"
    off = clock_difference(answer)
    if answer.status == 403 and off is not None and abs(off) > CLOCK_OFF:
        return f"{why}; the server's clock is {off:+.0f} s off from this machine's"
    if answer.status == 403:
        return f"{why}; the Token is not the server's, most likely; the server's log says why"
    return f"{why}; the server's log says why"


def clock_difference(answer: Answer) -> float | None:
    """Return by how many seconds the server's clock is ahead of this machine's, if it tells."""
    try:
        return parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()
    except (TypeError, ValueError):
        return None
