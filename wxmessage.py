"""Messages: WeChat's XML as plain dicts, plain dicts as XML, and the reply builders.

A message is a dict of WeChat's own names: nested elements are dicts, repeated ones lists, every
leaf a str. Sources of the rules: the platform's 接收普通消息, 接收事件推送, 被动回复用户消息.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias
from xml.parsers import expat

Message: TypeAlias = dict[str, Any]
Reply: TypeAlias = str | Message | None

MAX_TEXT = 2048  # bytes of UTF-8 in a text reply; the platform drops a longer one
MAX_ARTICLES = 8  # in a news reply to an event; in one to a message it is 1
MAX_DEPTH = 16  # elements inside one another; WeChat's own messages stay far below

_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# A follower's text as WeChat writes it. Most messages are one.
_TEXT = re.compile(
    rb"[\t\n ]*".join(
        [
            rb"<xml>",
            rb"<ToUserName><!\[CDATA\[([^]]*)\]\]></ToUserName>",
            rb"<FromUserName><!\[CDATA\[([^]]*)\]\]></FromUserName>",
            rb"<CreateTime>([0-9]*)</CreateTime>",
            rb"<MsgType><!\[CDATA\[text\]\]></MsgType>",
            rb"<Content><!\[CDATA\[([^]]*)\]\]></Content>",
            rb"<MsgId>([0-9]*)</MsgId>",
            rb"</xml>",
            rb"",
        ]
    )
)


class MessageError(ValueError):
    """The bytes are no message of WeChat's. The text says why and quotes nothing of them."""


def from_xml(body: bytes) -> Message:
    """Read ``<xml>…</xml>`` in UTF-8 into a dict.

    Attributes, and text beside child elements, are dropped; WeChat sends neither.

    Raises:
        MessageError: not well-formed, not UTF-8, a DOCTYPE (so no entities either), nested
            deeper than ``MAX_DEPTH``, or a root other than ``xml``.
    """
    return _text(body) or _tree(body)


def _text(body: bytes) -> Message | None:
    """Read a follower's text as ``_tree`` does, at a sixth of the cost; None for any other body."""
    if not (usual := _TEXT.fullmatch(body)):
        return None
    account, follower, created, content, msg_id = usual.groups()
    try:
        account, follower, content = account.decode(), follower.decode(), content.decode()
    except UnicodeDecodeError:
        return None
    if not (account + follower + content).isprintable():  # XML may forbid or change the rest
        return None
    return {
        "ToUserName": account,
        "FromUserName": follower,
        "CreateTime": created.decode(),
        "MsgType": "text",
        "Content": content,
        "MsgId": msg_id.decode(),
    }


def _tree(body: bytes) -> Message:
    if b"\0" in body:  # else expat takes it for UTF-16, whatever it is told
        raise MessageError("not UTF-8")
    stack: list[Message] = [{}]
    chunks: list[str] = []

    def start(_name: str, _attributes: dict[str, str]) -> None:
        if len(stack) > MAX_DEPTH:
            raise MessageError(f"elements are nested deeper than {MAX_DEPTH}")
        stack.append({})
        chunks.clear()

    def end(name: str) -> None:
        value: Any = stack.pop() or "".join(chunks)
        parent = stack[-1]
        if name not in parent:
            parent[name] = value
        elif isinstance(parent[name], list):
            parent[name].append(value)
        else:
            parent[name] = [parent[name], value]

    parser = expat.ParserCreate("UTF-8")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = chunks.append
    parser.XmlDeclHandler = _check_encoding
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(body, True)
    except expat.ExpatError as error:
        raise MessageError(f"not well-formed XML: {error}") from None
    root = stack[0].get("xml")
    if root is None:
        raise MessageError("the root element is not xml")
    return root if isinstance(root, dict) else {}


def _check_encoding(_version: str, encoding: str | None, _standalone: int) -> None:
    if encoding and encoding.lower() not in ("utf-8", "utf8"):
        raise MessageError("the declared encoding is not UTF-8")


def _refuse_doctype(*_: object) -> None:
    raise MessageError("a DOCTYPE is not allowed")


def to_xml(message: Message) -> bytes:
    """Write a dict as ``<xml>…</xml>`` in UTF-8; ``from_xml`` reads the same dict back.

    A str becomes CDATA, an int stands bare. Characters that XML 1.0 forbids are dropped. What XML
    cannot tell apart is read as the simpler: an int as a str, an empty dict as "", a list of one
    as its item, an empty list not at all, and every end of line as LF.

    Raises:
        ValueError: a key that cannot be the name of an element.
        TypeError: a value that is no str, int, dict, or list of these.
    """
    return f"<xml>{_elements(message)}</xml>".encode()


def _elements(fields: Message) -> str:
    parts: list[str] = []
    for name, value in fields.items():
        # The regex alone would do; WeChat's own names all pass the quicker test before it.
        if not (name.isascii() and name.isidentifier()) and not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of an XML element")
        if isinstance(value, str):
            # First of all: without what is dropped, a new "]]>" may stand there.
            content = value if value.isprintable() else _NOT_XML.sub("", value)
            if "]]>" in content:
                content = content.replace("]]>", "]]]]><![CDATA[>")
            parts.append(f"<{name}><![CDATA[{content}]]></{name}>")
        elif type(value) is int:
            parts.append(f"<{name}>{value}</{name}>")
        elif isinstance(value, dict):
            parts.append(f"<{name}>{_elements(value)}</{name}>")
        elif isinstance(value, list):
            parts += [_elements({name: item}) for item in value]
        else:
            raise TypeError(f"{name} is a {type(value).__name__}, not a str, int, dict or list")
    return "".join(parts)


def check(message: Message) -> None:
    """Make sure that ``message`` can be answered.

    Raises:
        MessageError: ToUserName, FromUserName or MsgType is missing, empty or no text; or the
            message is encrypted.
    """
    if "Encrypt" in message and "MsgType" not in message:
        raise MessageError(
            "the message is encrypted; set [wechat] encoding_aes_key and encryption to what the"
            " console says, or choose 明文模式 there"
        )
    for name in ("ToUserName", "FromUserName", "MsgType"):
        if not (isinstance(message.get(name), str) and message[name]):
            raise MessageError(f"no {name}")


def answer(message: Message, reply: Reply, now: float, signs: Sequence[str] = ()) -> list[bytes]:
    """Write the whole answer to ``message`` from what ``reply()`` returned.

    A str is a text reply, None and an empty text are no reply: the list is empty. A text over
    ``MAX_TEXT`` bytes is cut between characters and ends in "…", or goes on in other messages.

    Args:
        message: the message that is answered.
        reply: a str, a dict from a builder, or None.
        now: Unix time in seconds, for CreateTime.
        signs: what stands at the end of the first, second, … part of a text that goes on; after
            as many parts it is cut.

    Raises:
        TypeError: ``reply`` is something else, or holds what ``to_xml`` cannot write.
        ValueError: ``reply`` lacks its MsgType, Content or Articles, has more articles than
            WeChat allows here, or a name that ``to_xml`` cannot write.
    """
    if reply is None:
        return []
    if isinstance(reply, str) and (usual := _usual(message, reply, now)):
        return [usual]
    fields = text(reply) if isinstance(reply, str) else reply
    if not isinstance(fields, dict):
        raise TypeError(f"reply() returned a {type(reply).__name__}, not a str, dict or None")
    kind, texts = fields.get("MsgType"), []
    if not kind or not isinstance(kind, str):
        raise ValueError("the reply has no MsgType")
    if kind == "text":
        if not isinstance(fields.get("Content"), str):
            raise ValueError("the text reply has no Content")
        content = fields["Content"]
        if not content.isprintable():
            content = _NOT_XML.sub("", content)
        if not content:
            return []
        texts = _split(content, signs)
    elif kind == "news":
        _check_articles(fields, MAX_ARTICLES if message["MsgType"] == "event" else 1)
    whole = {
        "ToUserName": message["FromUserName"],
        "FromUserName": message["ToUserName"],
        "CreateTime": int(now),
    }
    whole = {**whole, **fields, **whole}  # these three first, and never the reply's own
    return [to_xml({**whole, "Content": part}) for part in texts] or [to_xml(whole)]


def _usual(message: Message, content: str, now: float) -> bytes | None:
    """Write the usual answer, a short text with nothing to escape; None for any other.

    It writes what ``to_xml`` writes, at a quarter of the cost.
    """
    follower, account = message["FromUserName"], message["ToUserName"]
    all_texts = follower + account + content
    if not all_texts.isprintable() or "]]>" in all_texts or not 0 < len(content) <= MAX_TEXT / 4:
        return None
    return (
        b"<xml><ToUserName><![CDATA[%b]]></ToUserName><FromUserName><![CDATA[%b]]></FromUserName>"
        b"<CreateTime>%d</CreateTime><MsgType><![CDATA[text]]></MsgType>"
        b"<Content><![CDATA[%b]]></Content></xml>"
    ) % (follower.encode(), account.encode(), now, content.encode())


def _split(content: str, signs: Sequence[str]) -> list[str]:
    texts: list[str] = []
    while len(content.encode()) > MAX_TEXT and len(texts) < len(signs):
        sign = signs[len(texts)]
        part = _cut(content, MAX_TEXT - len(sign.encode()))
        texts.append(part + sign)
        content = content[len(part) :]
    if len(content.encode()) > MAX_TEXT:
        content = _cut(content, MAX_TEXT - len("…".encode())) + "…"
    return [*texts, content] if content else texts


def _cut(content: str, size: int) -> str:
    """Return as many characters as fit into ``size`` bytes."""
    return content.encode()[:size].decode(errors="ignore")


def first_article(reply: Reply) -> Reply:
    """Return the reply with one article at most: so many may answer a message."""
    match reply:
        case dict({"MsgType": "news", "Articles": {"item": [first, _, *_]}}):
            return {**reply, "ArticleCount": 1, "Articles": {"item": [first]}}
    return reply


def _check_articles(fields: Message, most: int) -> None:
    match fields.get("Articles"):
        case {"item": list(articles)}:
            count = len(articles)
        case {"item": dict()}:
            count = 1
        case _:
            raise ValueError("the news reply has no Articles")
    if not 1 <= count <= most:
        raise ValueError(f"{count} articles: 1 to {MAX_ARTICLES} may answer an event, 1 a message")


def text(content: str) -> Message:
    """Build a text reply; a plain str returned by ``reply()`` is the same."""
    return {"MsgType": "text", "Content": content}


def image(media_id: str) -> Message:
    """Build an image reply from an uploaded MediaId, or from one that a follower sent."""
    return {"MsgType": "image", "Image": {"MediaId": media_id}}


def voice(media_id: str) -> Message:
    """Build a voice reply from an uploaded MediaId, or from one that a follower sent."""
    return {"MsgType": "voice", "Voice": {"MediaId": media_id}}


def video(media_id: str, title: str = "", description: str = "") -> Message:
    """Build a video reply from an uploaded MediaId; empty fields are left out."""
    return {
        "MsgType": "video",
        "Video": _filled(MediaId=media_id, Title=title, Description=description),
    }


def music(
    thumb_media_id: str,
    music_url: str = "",
    title: str = "",
    description: str = "",
    hq_music_url: str = "",
) -> Message:
    """Build a music reply; the thumbnail is an uploaded MediaId, empty fields are left out."""
    return {
        "MsgType": "music",
        "Music": _filled(
            Title=title,
            Description=description,
            MusicUrl=music_url,
            HQMusicUrl=hq_music_url,
            ThumbMediaId=thumb_media_id,
        ),
    }


def news(articles: Sequence[Message]) -> Message:
    """Build a news reply from dicts of Title, Description, PicUrl and Url.

    One article may answer a message, up to ``MAX_ARTICLES`` a menu, scan or subscribe event.

    Raises:
        ValueError: no article, or more than ``MAX_ARTICLES``.
    """
    fields = {"MsgType": "news", "ArticleCount": len(articles), "Articles": {"item": [*articles]}}
    _check_articles(fields, MAX_ARTICLES)
    return fields


def transfer_customer_service(kf_account: str = "") -> Message:
    """Build the hand-over to a human agent: ``kf_account`` (name@account), or whoever is free."""
    message: Message = {"MsgType": "transfer_customer_service"}
    return message | {"TransInfo": {"KfAccount": kf_account}} if kf_account else message


def _filled(**fields: str) -> Message:
    return {name: value for name, value in fields.items() if value}
