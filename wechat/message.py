"""What makes a message, the answer to it, and the builders of replies.

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
MAX_ARTICLES = 8  # in a news reply to an event; in one to a message it is 1


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


def answer(
    message: Message, reply: Reply, now: float, signs: Sequence[str] = (), late: bool = False
) -> list[bytes]:
    """Write the whole answer to ``message`` from what ``reply()`` returned.

    A str is a text reply, None and an empty text are no reply: the list is empty. A text over
    ``MAX_TEXT`` bytes is cut between characters and ends in "…", or goes on in other messages. Of a
    news reply, ArticleCount may be missing, and Articles may be the list itself.

    Args:
        message: the message that is answered.
        reply: a str, a dict from a builder, or None.
        now: Unix time in seconds, for CreateTime.
        signs: what stands at the end of the first, second, … part of a text that goes on; after
            as many parts it is cut.
        late: the answer is given to another message, so the first article alone is kept.

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
    kind, contents = fields.get("MsgType"), []
    if not kind or not isinstance(kind, str):
        raise ValueError("the reply has no MsgType")
    if kind == "text":
        if not isinstance(fields.get("Content"), str):
            raise ValueError("the text reply has no Content")
        contents = _split(drop_forbidden(fields["Content"]), signs)
        if not contents:
            return []
    elif kind == "news":
        fields = _complete_news(fields, MAX_ARTICLES if message["MsgType"] == "event" else 1, late)
    whole = {
        "ToUserName": message["FromUserName"],
        "FromUserName": message["ToUserName"],
        "CreateTime": int(now),
    }
    whole = {**whole, **fields, **whole}  # these three first, and never the reply's own
    return [to_xml({**whole, "Content": content}) for content in contents] or [to_xml(whole)]


def _split(content: str, signs: Sequence[str]) -> list[str]:
    contents: list[str] = []
    while len(content.encode()) > MAX_TEXT and len(contents) < len(signs):
        sign = signs[len(contents)]
        part = _cut(content, MAX_TEXT - len(sign.encode()))
        contents.append(part + sign)
        content = content[len(part) :]
    if len(content.encode()) > MAX_TEXT:
        content = _cut(content, MAX_TEXT - len("…".encode())) + "…"
    return [*contents, content] if content else contents


def _cut(content: str, size: int) -> str:
    """Return as many characters as fit into ``size`` bytes."""
    return content.encode()[:size].decode(errors="ignore")


def _complete_news(fields: Message, most: int, only_first: bool = False) -> Message:
    articles = fields.get("Articles")
    if isinstance(articles, dict):
        articles = articles.get("item")
    if isinstance(articles, dict):
        articles = [articles]
    if not isinstance(articles, list) or not all(isinstance(each, dict) for each in articles):
        raise ValueError("the news reply has no Articles, a list of dicts of Title, Url and so on")
    articles = articles[:1] if only_first else articles
    if not 1 <= len(articles) <= most:
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
    return _complete_news({"MsgType": "news", "Articles": [*articles]}, MAX_ARTICLES)


def transfer_customer_service(kf_account: str = "") -> Message:
    """Build the hand-over to a human agent: ``kf_account`` (name@account), or whoever is free."""
    message: Message = {"MsgType": "transfer_customer_service"}
    return message | {"TransInfo": {"KfAccount": kf_account}} if kf_account else message


def _filled(**fields: str) -> Message:
    return {name: value for name, value in fields.items() if value}
