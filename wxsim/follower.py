"""What the follower sees of an answer, or why WeChat cannot use it.

Sources of the rules: the platform's 被动回复用户消息 and 消息加解密说明.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

import wechat.crypto
from wechat.crypto import DecryptError
from wechat.message import MAX_ARTICLES, MAX_TEXT, Message
from wxsim.client import Account

APOLOGY = "该公众号提供的服务出现故障，请稍后再试"  # the platform's own words


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


def show(account: Account, message: Message, answer: bytes) -> Shown:
    """Tell what the follower who sent ``message`` sees of ``answer``, the body of a 200."""
    if answer in (b"", b"success"):
        return Shown(None)
    try:
        xml = _decrypt(account, answer)
        reply = _parse(xml)
        _check_common_fields(message, reply)
        return replace(_show_reply(message, reply), xml=xml)
    except Malformed as error:
        return Shown(APOLOGY, answer, problem=str(error))


def _decrypt(account: Account, body: bytes) -> bytes:
    """Return the XML of the reply, decrypted if it is encrypted."""
    envelope = _parse(body)
    if "Encrypt" not in envelope:
        if account.encryption == "safe":
            raise Malformed("it is not encrypted, and the console's mode is 安全模式")
        return body
    if not account.cipher:
        raise Malformed("it is encrypted, and the console's mode is 明文模式")
    for name in ("TimeStamp", "Nonce", "Encrypt", "MsgSignature"):
        if not isinstance(envelope.get(name), str):
            raise Malformed(f"the envelope has no {name}, or more than one")
    signed = envelope["TimeStamp"], envelope["Nonce"], envelope["Encrypt"]
    if not wechat.crypto.verify(envelope["MsgSignature"], account.token, *signed):
        raise Malformed("MsgSignature is wrong")
    try:
        return account.cipher.decrypt(envelope["Encrypt"])
    except DecryptError as error:
        raise Malformed(f"it cannot be decrypted: {error}") from None


def _parse(body: bytes) -> Message:
    if body.startswith(b"\xef\xbb\xbf"):
        raise Malformed("a byte order mark stands before the XML")
    try:
        # wechat.message.from_xml reads malformed XML too, since WeChat sends it. WeChat does not.
        root = ElementTree.fromstring(body, ElementTree.XMLParser(encoding="utf-8"))
        fields = _fields(root)
    except (ElementTree.ParseError, RecursionError) as error:
        begins = body[:80].decode(errors="replace")
        raise Malformed(f"it is not XML: {error}: {begins!r}") from None
    if root.tag != "xml":
        raise Malformed(f"the root element is {root.tag}, not xml")
    return fields if isinstance(fields, dict) else {}


def _fields(element: ElementTree.Element) -> Any:
    fields: Message = {}
    for child in element:
        fields.setdefault(child.tag, []).append(_fields(child))
    single = {name: values[0] if len(values) == 1 else values for name, values in fields.items()}
    return single or element.text or ""


def _check_common_fields(message: Message, reply: Message) -> None:
    for name, other in (("ToUserName", "FromUserName"), ("FromUserName", "ToUserName")):
        if reply.get(name) != message.get(other, reply.get(name)):
            raise Malformed(f"{name} is not the message's {other}; a reply swaps the two names")
    created = reply.get("CreateTime")
    if not (isinstance(created, str) and created.isascii() and created.isdecimal()):
        raise Malformed("CreateTime is not a whole number")


def _show_reply(message: Message, reply: Message) -> Shown:
    match reply:
        case {"MsgType": "text", "Content": str(text)}:
            size = len(text.encode())
            if size > MAX_TEXT:
                raise Malformed(f"the text has {size} bytes; {MAX_TEXT} are allowed")
            return Shown(text)
        case {"MsgType": "news", "Articles": {"item": items}}:
            return _show_articles(message, items, reply.get("ArticleCount"))
        case {"MsgType": "transfer_customer_service"}:
            return Shown("[a human agent takes over]")
        case (
            {"MsgType": "image", "Image": {"MediaId": str(media)} as fields}
            | {"MsgType": "voice", "Voice": {"MediaId": str(media)} as fields}
            | {"MsgType": "video", "Video": {"MediaId": str(media)} as fields}
            | {"MsgType": "music", "Music": {"ThumbMediaId": str(media)} as fields}
        ) if media:
            names = ("Title", "Description", "MusicUrl", "MediaId")
            return Shown(_bracketed(reply["MsgType"], *map(fields.get, names)))
    raise Malformed(f"the MsgType {reply.get('MsgType')!r} is unknown, or lacks what belongs in it")


def _show_articles(message: Message, items: Any, count: object) -> Shown:
    articles = items if isinstance(items, list) else [items]
    if not all(isinstance(article, dict) for article in articles):
        raise Malformed("an article has no Title, Description, PicUrl or Url")
    if count != str(len(articles)):
        raise Malformed(f"ArticleCount is {count}, and there are {len(articles)} articles")
    limit = MAX_ARTICLES if message.get("MsgType") == "event" else 1
    note = f"{len(articles)} articles; WeChat shows {limit} here" if len(articles) > limit else ""
    names = ("Title", "Description", "Url")
    lines = [_bracketed("article", *map(article.get, names)) for article in articles[:limit]]
    return Shown("\n".join(lines), note=note)


def _bracketed(*parts: object) -> str:
    return f"[{' '.join(part for part in parts if isinstance(part, str) and part)}]"
