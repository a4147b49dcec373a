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

from wechat.message import Message, MessageError, from_xml

ACCOUNT = "gh_97417a04a28d"  # the made-up account that all messages are sent to
_NAME = r"[A-Za-z_][\w-]*"  # of an XML element
_SETTING = re.compile(rf"({_NAME}(?:\.{_NAME})*)=(.*)", re.ASCII | re.DOTALL)
_TICKET = "gQFwTICKET"
_MEDIA = {"MediaId": "bHVjayBpcyB3aGF0IGhhcHBlbnMgd2hlbiB5b3UgYXJlIHJlYWR5"}
_VIDEO = {**_MEDIA, "ThumbMediaId": "eWRhZXIgZXJhIHVveSBuZWh3IHNuZXBwYWggdGFodyBzaSBrY3Vs"}
_PLACE = {"Location_X": "23.134521", "Location_Y": "113.358803", "Scale": "20", "Label": "广州"}
_PHOTO = {"item": {"PicMd5Sum": "1b5f7c23b5bf75682a53e7b6d163e185"}}
_PHOTOS = {"EventKey": "menu1", "SendPicsInfo": {"Count": "1", "PicList": _PHOTO}}
_SCAN = {"ScanType": "qrcode", "ScanResult": "https://example.com/"}
_TEMPLATE = {"TemplateId": "VRR0UEO9VJOLs0MHlU0OilqX6MVFDwH3_3gz3Oc0NIc"}
_SENT = {"MsgID": "1700827132819554304", "ErrorCode": "0", "ErrorStatus": "success"}
_ARTICLE = {"idx": "1", "article_url": "https://mp.weixin.qq.com/s/example"}

# The fields of each MsgType and Event beside the common ones.
MESSAGES: dict[str, Message] = {
    "text": {"Content": "hello"},
    "image": {"PicUrl": "https://mmbiz.qpic.cn/example.jpg", **_MEDIA},
    "voice": {**_MEDIA, "Format": "amr", "MediaId16K": "eWRhZXIgZXJhIHVveSBuZWh3"},
    "video": _VIDEO,
    "shortvideo": _VIDEO,
    "location": _PLACE,
    "link": {"Title": "公众平台", "Description": "开发文档", "Url": "https://mp.weixin.qq.com/"},
}
EVENTS: dict[str, Message] = {
    "subscribe": {"EventKey": ""},
    "unsubscribe": {"EventKey": ""},
    "SCAN": {"EventKey": "42", "Ticket": _TICKET},
    "LOCATION": {"Latitude": "23.137466", "Longitude": "113.352425", "Precision": "119.385040"},
    "CLICK": {"EventKey": "menu1"},
    "VIEW": {"EventKey": "https://example.com/", "MenuId": "429108107"},
    "view_miniprogram": {"EventKey": "pages/index/index", "MenuId": "429108107"},
    "scancode_push": {"EventKey": "menu1", "ScanCodeInfo": _SCAN},
    "scancode_waitmsg": {"EventKey": "menu1", "ScanCodeInfo": _SCAN},
    "pic_sysphoto": _PHOTOS,
    "pic_photo_or_album": _PHOTOS,
    "pic_weixin": _PHOTOS,
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
            "article_detail": {"count": "1", "item": _ARTICLE},
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
    "subscribe_msg_sent_event": {"SubscribeMsgSentEvent": {"List": {**_TEMPLATE, **_SENT}}},
}


@dataclass(frozen=True)
class Outgoing:
    """A message on its way to the account.

    ``fields`` is empty if nobody can read ``xml``. ``openid`` is the follower whom the query of the
    request names. A ``raw`` message is never encrypted.
    """

    xml: bytes
    fields: Message
    openid: str
    raw: bool = False


def openid(name: str) -> str:
    """Return the OpenID of the made-up follower ``name``: 28 characters, always the same."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    return "o" + base64.urlsafe_b64encode(digest).decode()[:27]


def make(
    kind: str, follower: str, now: float, event: str = "", settings: Iterable[str] = ()
) -> Message:
    """Make a message or an event.

    Args:
        kind: a MsgType of ``MESSAGES``, or "event".
        follower: the OpenID of the sender.
        now: Unix time in seconds.
        event: the Event; one that is not in ``EVENTS`` has no fields of its own.
        settings: other values of fields, and other fields; see ``set_fields``.

    Raises:
        ValueError: one of ``settings`` is wrong.
    """
    names = {"ToUserName": ACCOUNT, "FromUserName": follower}
    message: Message = {**names, "CreateTime": int(now), "MsgType": kind}
    if kind == "event":
        message |= {"Event": event, **copy.deepcopy(EVENTS.get(event, {}))}
    else:
        message |= {**MESSAGES[kind], "MsgId": 24 * 10**15 + secrets.randbelow(10**15)}
    set_fields(message, settings)
    if event == "subscribe" and message["EventKey"]:  # the follower came by a QR code
        message.setdefault("Ticket", _TICKET)
    return message


def set_fields(message: Message, settings: Iterable[str]) -> None:
    """Set each ``Name=value`` or ``Name.Inner=value`` of ``settings`` in ``message``.

    Raises:
        ValueError: a setting without ``=``, or a name that no XML element can have.
    """
    for setting in settings:
        match = _SETTING.fullmatch(setting)
        if not match:
            raise ValueError(f"{setting!r} is not NAME=VALUE")
        *outer, name = match[1].split(".")
        inside = message
        for part in outer:
            if not isinstance(inside.get(part), dict):
                inside[part] = {}
            inside = inside[part]
        inside[name] = match[2]


def outgoing(message: Message) -> Outgoing:
    """Return ``message`` as WeChat sends it."""
    return Outgoing(to_unescaped_xml(message), message, message["FromUserName"])


def outgoing_raw(body: bytes, follower: str) -> Outgoing:
    """Return any bytes as a message of ``follower``, an OpenID."""
    try:
        fields = from_xml(body)
    except MessageError:
        fields = {}
    return Outgoing(body, fields, follower, raw=True)


def to_unescaped_xml(message: Message) -> bytes:
    """Write ``<xml>…</xml>`` as WeChat does, which escapes nothing that a follower typed.

    ``]]>`` ends the CDATA section early and control characters stand as they are, so the XML may be
    malformed. Bytes that are not UTF-8 are written as those bytes; in a str they are surrogates, as
    in sys.argv.
    """
    return f"<xml>{_content(message)}</xml>".encode(errors="surrogateescape")


def _content(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"<{name}>{_content(inner)}</{name}>" for name, inner in value.items())
    return str(value) if isinstance(value, int) else f"<![CDATA[{value}]]>"
