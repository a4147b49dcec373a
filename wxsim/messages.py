"""Made-up messages and events of followers: every MsgType and Event, with sensible fields.

Sources of the fields: the pages 接收普通消息, 接收事件推送, 自定义菜单事件推送, 模板消息, 群发接口,
发布能力 and 订阅通知 of the platform.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from wxmessage import Message

ACCOUNT = "gh_97417a04a28d"  # the made-up account that all messages are sent to
_NAME = r"[A-Za-z_][\w-]*"  # of an XML element
_SETTING = re.compile(rf"({_NAME}(?:\.{_NAME})*)=(.*)", re.ASCII | re.DOTALL)
_FIELD = re.compile(
    r"<(ToUserName|FromUserName|MsgType|Encrypt)>(?:<!\[CDATA\[)?([^][<>]*)", re.ASCII
)
_URL = "https://mmbiz.qpic.cn/example"
_MEDIA = "bHVjayBpcyB3aGF0IGhhcHBlbnMgd2hlbiB5b3UgYXJlIHJlYWR5"
_PHOTOS = {"Count": "1", "PicList": {"item": {"PicMd5Sum": "1b5f7c23b5bf75682a53e7b6d163e185"}}}
_PLACE = {"Location_X": "23.134521", "Location_Y": "113.358803", "Scale": "20", "Label": "广州"}
_TEMPLATE = {"TemplateId": "VRR0UEO9VJOLs0MHlU0OilqX6MVFDwH3_3gz3Oc0NIc"}

MESSAGES: dict[str, dict[str, Any]] = {
    "text": {"Content": "hello"},
    "image": {"PicUrl": f"{_URL}.jpg", "MediaId": _MEDIA},
    "voice": {"MediaId": _MEDIA, "Format": "amr", "MediaId16K": _MEDIA[::-1]},
    "video": {"MediaId": _MEDIA, "ThumbMediaId": _MEDIA[::-1]},
    "shortvideo": {"MediaId": _MEDIA, "ThumbMediaId": _MEDIA[::-1]},
    "location": _PLACE,
    "link": {
        "Title": "微信公众平台",
        "Description": "开发者文档",
        "Url": "https://mp.weixin.qq.com/",
    },
}
EVENTS: dict[str, dict[str, Any]] = {
    "subscribe": {"EventKey": ""},
    "unsubscribe": {"EventKey": ""},
    "SCAN": {"EventKey": "42", "Ticket": "gQFwTICKET"},
    "LOCATION": {"Latitude": "23.137466", "Longitude": "113.352425", "Precision": "119.385040"},
    "CLICK": {"EventKey": "menu1"},
    "VIEW": {"EventKey": "https://example.com/", "MenuId": "429108107"},
    "view_miniprogram": {"EventKey": "pages/index/index", "MenuId": "429108107"},
    "scancode_push": {
        "EventKey": "menu1",
        "ScanCodeInfo": {"ScanType": "qrcode", "ScanResult": "https://example.com/"},
    },
    "scancode_waitmsg": {
        "EventKey": "menu1",
        "ScanCodeInfo": {"ScanType": "qrcode", "ScanResult": "1"},
    },
    "pic_sysphoto": {"EventKey": "menu1", "SendPicsInfo": _PHOTOS},
    "pic_photo_or_album": {"EventKey": "menu1", "SendPicsInfo": _PHOTOS},
    "pic_weixin": {"EventKey": "menu1", "SendPicsInfo": _PHOTOS},
    "location_select": {"EventKey": "menu1", "SendLocationInfo": {**_PLACE, "Poiname": ""}},
    "TEMPLATESENDJOBFINISH": {"MsgID": "200163836", "Status": "success"},
    "MASSSENDJOBFINISH": {
        "MsgID": "1000001625",
        "Status": "send success",
        "TotalCount": "100",
        "FilterCount": "80",
        "SentCount": "75",
        "ErrorCount": "5",
    },
    "PUBLISHJOBFINISH": {
        "PublishEventInfo": {
            "publish_id": "2247503051",
            "publish_status": "0",
            "article_id": "b5O2OUs25HBxRceL7hfReg",
            "article_detail": {
                "count": "1",
                "item": {"idx": "1", "article_url": "https://mp.weixin.qq.com/s/example"},
            },
        }
    },
    "subscribe_msg_popup_event": {
        "SubscribeMsgPopupEvent": {
            "List": {**_TEMPLATE, "SubscribeStatusString": "accept", "PopupScene": "2"}
        }
    },
    "subscribe_msg_change_event": {
        "SubscribeMsgChangeEvent": {"List": {**_TEMPLATE, "SubscribeStatusString": "reject"}}
    },
    "subscribe_msg_sent_event": {
        "SubscribeMsgSentEvent": {
            "List": {
                **_TEMPLATE,
                "MsgID": "1700827132819554304",
                "ErrorCode": "0",
                "ErrorStatus": "success",
            }
        }
    },
}


@dataclass(frozen=True)
class Outgoing:
    """A message on its way to the account.

    ``xml`` is what goes out, which no parser may be able to read. ``fields`` is what the sender
    knows of it all the same. ``openid`` is the follower whom the query of the request names.
    """

    xml: bytes
    fields: Message
    openid: str


def openid(name: str) -> str:
    """Return the OpenID of the made-up follower ``name``: 28 characters, always the same."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    return "o" + base64.urlsafe_b64encode(digest).decode()[:27]


def make(kind: str, follower: str, now: float) -> Message:
    """Make a message of ``follower`` to the account, by its MsgType in ``MESSAGES``.

    Args:
        kind: the MsgType.
        follower: an OpenID.
        now: Unix time in seconds, for CreateTime.

    Raises:
        KeyError: there is no such MsgType.
    """
    msg_id = 24 * 10**15 + secrets.randbelow(10**15)
    common = {"ToUserName": ACCOUNT, "FromUserName": follower, "CreateTime": int(now)}
    return {**common, "MsgType": kind, **copy.deepcopy(MESSAGES[kind]), "MsgId": msg_id}


def make_event(event: str, follower: str, now: float, key: str | None = None) -> Message:
    """Make an event of ``follower``; one that is not in ``EVENTS`` has no fields of its own.

    Args:
        event: the Event.
        follower: an OpenID.
        now: Unix time in seconds, for CreateTime.
        key: the EventKey; a subscribe with one came by a QR code and has a Ticket.
    """
    message = {"ToUserName": ACCOUNT, "FromUserName": follower, "CreateTime": int(now)}
    message |= {"MsgType": "event", "Event": event, **copy.deepcopy(EVENTS.get(event, {}))}
    if key is not None:
        message["EventKey"] = key
        if event == "subscribe" and key:
            message["Ticket"] = EVENTS["SCAN"]["Ticket"]
    return message


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
    return Outgoing(body, dict(reversed(found)), follower)


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
