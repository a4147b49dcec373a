"""What the follower would see of an answer, or why WeChat cannot use it.

Sources of the rules: the platform's 被动回复用户消息 and 消息加解密说明.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import wechat.crypto
import wechat.message
from wechat.crypto import DecryptError
from wechat.message import Message
from wxsim.client import Account

FAULT = "该公众号提供的服务出现故障，请稍后再试"  # the platform's own words


class Malformed(Exception):
    """WeChat cannot use the answer. The text says what is wrong with it."""


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


def read(to: Account, message: Message, answer: bytes) -> Shown:
    """Tell what the follower who sent ``message`` sees of ``answer``, the body of a 200."""
    if answer in (b"", b"success"):
        return Shown(None)
    try:
        xml = _decrypted(to, answer)
        reply = _parse(xml)
        _check_common_fields(message, reply)
        text, note = _show(message, reply)
    except Malformed as error:
        return Shown(FAULT, answer, problem=str(error))
    return Shown(text, xml, note=note)


def _decrypted(to: Account, body: bytes) -> bytes:
    """Return the XML of the reply, decrypted if it is encrypted."""
    envelope = _parse(body)
    if not to.cipher:
        if "Encrypt" in envelope and "MsgType" not in envelope:
            raise Malformed("it is encrypted, and the console's mode is 明文模式")
        return body
    if "Encrypt" not in envelope:
        if to.encryption == "safe":
            raise Malformed("it is not encrypted, and the console's mode is 安全模式")
        return body
    for name in ("TimeStamp", "Nonce", "Encrypt", "MsgSignature"):
        if not isinstance(envelope.get(name), str):
            raise Malformed(f"the envelope has no {name}, or more than one")
    encrypt, signed = envelope["Encrypt"], (envelope["TimeStamp"], envelope["Nonce"])
    if not wechat.crypto.verify(envelope["MsgSignature"], to.token, *signed, encrypt):
        raise Malformed("MsgSignature is wrong")
    try:
        return to.cipher.decrypt(encrypt)
    except DecryptError as error:
        raise Malformed(f"it cannot be decrypted: {error}") from None


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
        # Not wechat.message.from_xml, which puts up with what a follower typed. WeChat does not.
        root = ElementTree.fromstring(body, ElementTree.XMLParser(encoding="utf-8"))
        fields = _fields(root)
    except (ElementTree.ParseError, RecursionError) as error:
        raise Malformed(f"bad XML: {error}") from None
    if root.tag != "xml":
        raise Malformed("bad XML: the root element is not xml")
    return fields if isinstance(fields, dict) else {}


def _fields(element: ElementTree.Element) -> Any:
    fields: Message = {}
    for child in element:
        value = _fields(child)
        if child.tag not in fields:
            fields[child.tag] = value
        elif isinstance(fields[child.tag], list):
            fields[child.tag].append(value)
        else:
            fields[child.tag] = [fields[child.tag], value]
    return fields or element.text or ""


def _check_common_fields(message: Message, reply: Message) -> None:
    for name, other in (("ToUserName", "FromUserName"), ("FromUserName", "ToUserName")):
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
            if size > wechat.message.MAX_TEXT:
                raise Malformed(f"the text has {size} bytes; {wechat.message.MAX_TEXT} are allowed")
            return text, ""
        case {"MsgType": "image", "Image": {"MediaId": str(media)}} if media:
            return f"[image {media}]", ""
        case {"MsgType": "voice", "Voice": {"MediaId": str(media)}} if media:
            return f"[voice {media}]", ""
        case {"MsgType": "video", "Video": {"MediaId": str(media), **more}} if media:
            return _bracketed("video", more.get("Title"), more.get("Description"), media), ""
        case {"MsgType": "music", "Music": {"ThumbMediaId": str(thumb), **more}} if thumb:
            shown = [more.get(name) for name in ("Title", "Description", "MusicUrl")]
            return _bracketed("music", *shown), ""
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
    most = wechat.message.MAX_ARTICLES if message.get("MsgType") == "event" else 1
    note = "" if len(articles) <= most else f"{len(articles)} articles; WeChat shows {most} here"
    fields = ("Title", "Description", "Url")
    lines = [_bracketed("article", *map(article.get, fields)) for article in articles[:most]]
    return "\n".join(lines), note


def _bracketed(*parts: object) -> str:
    return f"[{' '.join(part for part in parts if isinstance(part, str) and part)}]"
