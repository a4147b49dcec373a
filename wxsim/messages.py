"""Made-up messages and events of followers: every MsgType and Event, with sensible fields.

Sources of the fields: the pages 接收普通消息, 接收事件推送, 自定义菜单事件推送, 模板消息, 群发接口,
发布能力 and 订阅通知 of the platform.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import secrets
from collections.abc import Iterable
from typing import Any

from wxmessage import Message

ACCOUNT = "gh_97417a04a28d"  # the made-up account that all messages are sent to
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
    "location_select": {
        "EventKey": "menu1",
        "SendLocationInfo": {**_PLACE, "Poiname": ""},
    },
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


def openid(name: str) -> str:
    """Return the OpenID of the made-up follower ``name``: 28 characters, always the same."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    return "o" + base64.urlsafe_b64encode(digest).decode()[:27]


def make(kind: str, follower: str, now: float, key: str | None = None) -> Message:
    """Make a message or an event of ``follower`` to the account.

    Args:
        kind: a MsgType of ``MESSAGES``, or an Event of ``EVENTS``.
        follower: an OpenID.
        now: Unix time in seconds, for CreateTime.
        key: the EventKey of an event; a subscribe with one came by a QR code and has a Ticket.

    Raises:
        KeyError: there is no such kind.
    """
    message: Message = {
        "ToUserName": ACCOUNT,
        "FromUserName": follower,
        "CreateTime": int(now),
    }
    if kind in MESSAGES:
        msg_id = 24 * 10**15 + secrets.randbelow(10**15)
        return {**message, "MsgType": kind, **MESSAGES[kind], "MsgId": msg_id}
    message |= {"MsgType": "event", "Event": kind, **EVENTS[kind]}
    if key is not None:
        message["EventKey"] = key
        if kind == "subscribe" and key:
            message["Ticket"] = EVENTS["SCAN"]["Ticket"]
    return message


def with_fields(message: Message, settings: Iterable[str]) -> Message:
    """Return ``message`` with each ``Name=value`` or ``Name.Inner=value`` of ``settings`` in it.

    Raises:
        ValueError: a setting without ``=``, or one inside of what has nothing inside.
    """
    changed = copy.deepcopy(message)
    for setting in settings:
        path, equals, value = setting.partition("=")
        *outer, name = path.split(".")
        if not (equals and name and all(outer)):
            raise ValueError(f"{setting!r} is not NAME=VALUE")
        inside = changed
        for part in outer:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{setting!r}: {part} has no elements inside")
        inside[name] = value
    return changed
