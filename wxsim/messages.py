"""Made-up messages and events of followers: every MsgType and Event, with sensible fields.

Sources of the fields: the pages 接收普通消息, 接收事件推送, 自定义菜单事件推送, 模板消息, 群发接口,
发布能力 and 订阅通知 of the platform.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from wechat.message import Message

ACCOUNT = "gh_97417a04a28d"  # the made-up account that all messages are sent to
_NAME = r"[A-Za-z_][\w-]*"  # of an XML element
_SETTING = re.compile(rf"({_NAME}(?:\.{_NAME})*)=(.*)", re.ASCII | re.DOTALL)
_FIELD = re.compile(
    r"<(ToUserName|FromUserName|MsgType|Encrypt)>(?:<!\[CDATA\[)?([^][<>]*)", re.ASCII
)
_MEDIA = "MediaId=bHVjayBpcyB3aGF0IGhhcHBlbnMgd2hlbiB5b3UgYXJlIHJlYWR5"
_THUMB = "ThumbMediaId=eWRhZXIgZXJhIHVveSBuZWh3IHNuZXBwYWggdGFodyBzaSBrY3Vs"
_PLACE = "{0}Location_X=23.134521|{0}Location_Y=113.358803|{0}Scale=20|{0}Label=广州"
_PHOTO = "SendPicsInfo.PicList.item.PicMd5Sum=1b5f7c23b5bf75682a53e7b6d163e185"
_PHOTOS = f"EventKey=menu1|SendPicsInfo.Count=1|{_PHOTO}"
_TEMPLATE = "TemplateId=VRR0UEO9VJOLs0MHlU0OilqX6MVFDwH3_3gz3Oc0NIc"
_TICKET = "Ticket=gQFwTICKET"
_PUBLISHED = "PublishEventInfo.article_detail"

# The fields of each MsgType and Event beside the common ones, as --set takes them.
MESSAGES = {
    "text": "Content=hello",
    "image": f"PicUrl=https://mmbiz.qpic.cn/example.jpg|{_MEDIA}",
    "voice": f"{_MEDIA}|Format=amr|MediaId16K=eWRhZXIgZXJhIHVveSBuZWh3IHNuZXBwYWggdGFodw",
    "video": f"{_MEDIA}|{_THUMB}",
    "shortvideo": f"{_MEDIA}|{_THUMB}",
    "location": _PLACE.format(""),
    "link": "Title=微信公众平台|Description=开发者文档|Url=https://mp.weixin.qq.com/",
}
EVENTS = {
    "subscribe": "EventKey=",
    "unsubscribe": "EventKey=",
    "SCAN": f"EventKey=42|{_TICKET}",
    "LOCATION": "Latitude=23.137466|Longitude=113.352425|Precision=119.385040",
    "CLICK": "EventKey=menu1",
    "VIEW": "EventKey=https://example.com/|MenuId=429108107",
    "view_miniprogram": "EventKey=pages/index/index|MenuId=429108107",
    "scancode_push": "EventKey=menu1|ScanCodeInfo.ScanType=qrcode"
    "|ScanCodeInfo.ScanResult=https://example.com/",
    "scancode_waitmsg": "EventKey=menu1|ScanCodeInfo.ScanType=qrcode|ScanCodeInfo.ScanResult=1",
    "pic_sysphoto": _PHOTOS,
    "pic_photo_or_album": _PHOTOS,
    "pic_weixin": _PHOTOS,
    "location_select": f"EventKey=menu1|{_PLACE.format('SendLocationInfo.')}"
    "|SendLocationInfo.Poiname=",
    "TEMPLATESENDJOBFINISH": "MsgID=200163836|Status=success",
    "MASSSENDJOBFINISH": "MsgID=1000001625|Status=send success|TotalCount=100|FilterCount=80"
    "|SentCount=75|ErrorCount=5",
    "PUBLISHJOBFINISH": "PublishEventInfo.publish_id=2247503051|PublishEventInfo.publish_status=0"
    f"|PublishEventInfo.article_id=b5O2OUs25HBxRceL7hfReg|{_PUBLISHED}.count=1"
    f"|{_PUBLISHED}.item.idx=1|{_PUBLISHED}.item.article_url=https://mp.weixin.qq.com/s/example",
    "subscribe_msg_popup_event": f"SubscribeMsgPopupEvent.List.{_TEMPLATE}"
    "|SubscribeMsgPopupEvent.List.SubscribeStatusString=accept"
    "|SubscribeMsgPopupEvent.List.PopupScene=2",
    "subscribe_msg_change_event": f"SubscribeMsgChangeEvent.List.{_TEMPLATE}"
    "|SubscribeMsgChangeEvent.List.SubscribeStatusString=reject",
    "subscribe_msg_sent_event": f"SubscribeMsgSentEvent.List.{_TEMPLATE}"
    "|SubscribeMsgSentEvent.List.MsgID=1700827132819554304"
    "|SubscribeMsgSentEvent.List.ErrorCode=0|SubscribeMsgSentEvent.List.ErrorStatus=success",
}


@dataclass(frozen=True)
class Outgoing:
    """A message on its way to the account.

    ``xml`` may be what no parser can read; ``fields`` is what the sender knows of it all the same.
    ``openid`` is the follower whom the query of the request names. A ``raw`` message is never
    encrypted.
    """

    xml: bytes
    fields: Message
    openid: str
    raw: bool = False


def openid(name: str) -> str:
    """Return the OpenID of the made-up follower ``name``: 28 characters, always the same."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    return "o" + base64.urlsafe_b64encode(digest).decode()[:27]


def make(kind: str, follower: str, now: float) -> Message:
    """Make a message of ``follower``, an OpenID, at ``now`` in Unix seconds.

    Raises:
        KeyError: ``kind`` is no MsgType of ``MESSAGES``.
    """
    message = _common_fields(follower, now, kind)
    set_fields(message, MESSAGES[kind].split("|"))
    return message | {"MsgId": 24 * 10**15 + secrets.randbelow(10**15)}


def make_event(event: str, follower: str, now: float, key: str | None = None) -> Message:
    """Make an event of ``follower``, an OpenID, at ``now`` in Unix seconds.

    An Event that is not in ``EVENTS`` has the common fields alone. ``key`` is the EventKey; a
    subscribe with one came by a QR code and has a Ticket.
    """
    message = _common_fields(follower, now, "event") | {"Event": event}
    if event in EVENTS:
        set_fields(message, EVENTS[event].split("|"))
    if key is not None:
        message["EventKey"] = key
        if event == "subscribe" and key:
            set_fields(message, [_TICKET])
    return message


def _common_fields(follower: str, now: float, kind: str) -> Message:
    names = {"ToUserName": ACCOUNT, "FromUserName": follower}
    return {**names, "CreateTime": int(now), "MsgType": kind}


def set_fields(message: Message, settings: Iterable[str]) -> None:
    """Set each ``Name=value`` or ``Name.Inner=value`` of ``settings`` in ``message``.

    Raises:
        ValueError: a setting without ``=``, a name that no XML element can have, or an ``Inner``
            of a field that is a text.
    """
    for setting in settings:
        if not (parts := _SETTING.fullmatch(setting)):
            raise ValueError(f"{setting!r} is not NAME=VALUE")
        path, value = parts.groups()
        *outer, name = path.split(".")
        inside = message
        for part in outer:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{setting!r}: {part} has no elements inside")
        inside[name] = value


def outgoing(message: Message) -> Outgoing:
    """Return ``message`` as WeChat sends it."""
    return Outgoing(as_wechat_writes(message), message, message["FromUserName"])


def outgoing_raw(body: bytes, follower: str) -> Outgoing:
    """Return any bytes as a message; its fields are those that a pattern finds, if it has any."""
    found = _FIELD.findall(body.decode(errors="surrogateescape"))
    return Outgoing(body, dict(reversed(found)), follower, raw=True)


def as_wechat_writes(message: Message) -> bytes:
    """Write ``<xml>…</xml>`` as WeChat does, which escapes nothing that a follower typed.

    ``]]>`` ends the CDATA early and control characters stand as they are, so the result may be
    not well-formed. A str that holds bytes that are no UTF-8, as sys.argv does, is written as
    those bytes.
    """
    return f"<xml>{_elements(message)}</xml>".encode(errors="surrogateescape")


def _elements(fields: Message) -> str:
    return "".join(f"<{name}>{_content(value)}</{name}>" for name, value in fields.items())


def _content(value: Any) -> str:
    if isinstance(value, dict):
        return _elements(value)
    return str(value) if isinstance(value, int) else f"<![CDATA[{value}]]>"
