"""Messages and the answers to them: which can be answered, how replies are built and written.

A message is a dict of WeChat's own names. Source of the rules: the platform's 被动回复用户消息.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from wechat.xml import Message, MessageError, drop_forbidden, from_xml, to_xml

__all__ = [
    "Message", "MessageError", "Reply", "answer", "check", "from_xml", "image", "music", "news",
    "text", "to_xml", "transfer_customer_service", "video", "voice",
]  # fmt: skip

Reply: TypeAlias = str | Message | None

MAX_TEXT = 2048  # bytes of UTF-8 in a text reply; the platform drops a longer one
MAX_ARTICLES = 8  # in a news reply to an event; a reply to a message may have one


def check(message: Message) -> None:
    """Make sure that ``message`` can be answered.

    Raises:
        MessageError: the message is encrypted, or has no ToUserName, FromUserName or MsgType that
            is a text.
    """
    if "Encrypt" in message and "MsgType" not in message:
        raise MessageError(
            "the message is encrypted; set [wechat] encoding_aes_key and encryption to what the"
            " console says, or choose 明文模式 there"
        )
    for name in ("ToUserName", "FromUserName", "MsgType"):
        if not (isinstance(message.get(name), str) and message[name]):
            raise MessageError(f"no {name}")


def answer(
    message: Message, reply: Reply, now: float, endings: Sequence[str] = (), late: bool = False
) -> list[bytes]:
    """Write what ``reply()`` returned as XML: one answer, or several parts of a long text.

    The list is empty for no reply: None, or a text without characters that XML can carry. A text
    is split where it exceeds ``MAX_TEXT`` bytes; what does not fit into the last part is cut off,
    and "…" stands there. A news reply may lack ArticleCount, and its Articles may be a plain list.

    Args:
        message: the message that is answered.
        reply: a str, a dict from a builder, or None.
        now: Unix time in seconds, for CreateTime.
        endings: the text at the end of each part of a long text but the last. So there are
            ``len(endings) + 1`` parts at most.
        late: another message will be answered with this, so a news reply keeps one article.

    Raises:
        TypeError: ``reply`` is something else, or holds what ``to_xml`` cannot write.
        ValueError: ``reply`` lacks its MsgType, Content or Articles, has more articles than
            WeChat allows here, or a name that ``to_xml`` cannot write.
    """
    if reply is None:
        return []
    fields = text(reply) if isinstance(reply, str) else reply
    if not isinstance(fields, dict):
        raise TypeError(f"reply() returned a {type(reply).__name__}, not a str, dict or None")
    kind = fields.get("MsgType")
    if not kind or not isinstance(kind, str):
        raise ValueError("the reply has no MsgType")
    parts = [fields]
    if kind == "text":
        if not isinstance(fields.get("Content"), str):
            raise ValueError("the text reply has no Content")
        contents = _split(drop_forbidden(fields["Content"]), endings)
        parts = [{**fields, "Content": content} for content in contents]
    elif kind == "news":
        limit = MAX_ARTICLES if message["MsgType"] == "event" else 1
        parts = [_complete_news(fields, limit, late)]
    head = {
        "ToUserName": message["FromUserName"],
        "FromUserName": message["ToUserName"],
        "CreateTime": int(now),
    }
    return [to_xml({**head, **part, **head}) for part in parts]  # a part cannot replace the head


def _split(content: str, endings: Sequence[str]) -> list[str]:
    contents: list[str] = []
    for ending in endings:
        if len(content.encode()) <= MAX_TEXT:
            break
        start = _cut(content, MAX_TEXT - len(ending.encode()))
        contents.append(start + ending)
        content = content[len(start) :]
    if len(content.encode()) > MAX_TEXT:
        content = _cut(content, MAX_TEXT - len("…".encode())) + "…"
    return [*contents, content] if content else contents


def _cut(content: str, size: int) -> str:
    """Return as many whole characters as fit into ``size`` bytes."""
    return content.encode()[:size].decode(errors="ignore")


def _complete_news(fields: Message, limit: int, late: bool = False) -> Message:
    articles = fields.get("Articles")
    if isinstance(articles, dict):
        articles = articles.get("item")
    if isinstance(articles, dict):
        articles = [articles]
    if not isinstance(articles, list) or not all(isinstance(each, dict) for each in articles):
        raise ValueError("the news reply has no Articles, a list of dicts of Title, Url and so on")
    if late:
        articles = articles[:1]
    if not 1 <= len(articles) <= limit:
        allowed = f"1 to {MAX_ARTICLES} may answer an event, 1 a message"
        raise ValueError(f"the news reply has {len(articles)} articles: {allowed}")
    return {**fields, "ArticleCount": len(articles), "Articles": {"item": articles}}


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
    """Build a music reply with an uploaded picture as thumbnail; empty fields are left out."""
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
    return _complete_news({"MsgType": "news", "Articles": [*articles]}, MAX_ARTICLES)


def transfer_customer_service(kf_account: str = "") -> Message:
    """Hand the chat to a human agent: ``kf_account`` (name@account), by default any free one."""
    fields: Message = {"MsgType": "transfer_customer_service"}
    return fields | {"TransInfo": {"KfAccount": kf_account}} if kf_account else fields


def _filled(**fields: str) -> Message:
    return {name: value for name, value in fields.items() if value}
