"""The simulator's made-up followers: every MsgType and Event of the platform's tables."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import APPID, KEY, TOKEN
from hypothesis import given
from hypothesis import strategies as st
from webtest import TestApp

from wxsim import messages
from wxsim import client
from wxconfig import Config
from wxmessage import Message, from_xml, to_xml
from wxserver import create_application

ME = messages.openid("me")
NOW = 1714036504

# The platform's own tables, field by field; a dot leads to what is inside.
PAGES = {
    "text": "Content MsgId",
    "image": "PicUrl MediaId MsgId",
    "voice": "MediaId Format MediaId16K MsgId",
    "video": "MediaId ThumbMediaId MsgId",
    "shortvideo": "MediaId ThumbMediaId MsgId",
    "location": "Location_X Location_Y Scale Label MsgId",
    "link": "Title Description Url MsgId",
    "subscribe": "EventKey",
    "unsubscribe": "",
    "SCAN": "EventKey Ticket",
    "LOCATION": "Latitude Longitude Precision",
    "CLICK": "EventKey",
    "VIEW": "EventKey MenuId",
    "view_miniprogram": "EventKey MenuId",
    "scancode_push": "EventKey ScanCodeInfo.ScanType ScanCodeInfo.ScanResult",
    "scancode_waitmsg": "EventKey ScanCodeInfo.ScanType ScanCodeInfo.ScanResult",
    "pic_sysphoto": "EventKey SendPicsInfo.Count SendPicsInfo.PicList.item.PicMd5Sum",
    "pic_photo_or_album": "EventKey SendPicsInfo.Count SendPicsInfo.PicList.item.PicMd5Sum",
    "pic_weixin": "EventKey SendPicsInfo.Count SendPicsInfo.PicList.item.PicMd5Sum",
    "location_select": "EventKey SendLocationInfo.Location_X SendLocationInfo.Location_Y"
    " SendLocationInfo.Scale SendLocationInfo.Label SendLocationInfo.Poiname",
    "TEMPLATESENDJOBFINISH": "MsgID Status",
    "MASSSENDJOBFINISH": "MsgID Status TotalCount FilterCount SentCount ErrorCount",
    "PUBLISHJOBFINISH": "PublishEventInfo.publish_id PublishEventInfo.article_detail.item.idx",
    "subscribe_msg_popup_event": "SubscribeMsgPopupEvent.List.TemplateId",
    "subscribe_msg_change_event": "SubscribeMsgChangeEvent.List.TemplateId",
    "subscribe_msg_sent_event": "SubscribeMsgSentEvent.List.TemplateId",
}


def field(message: Any, path: str) -> Any:
    for name in path.split("."):
        message = message[name]
    return message


def received(message: Message, encryption: str = "plain") -> dict[str, Any]:
    """Send ``message`` as the simulator does; return what ``reply()`` gets of it."""
    config = Config(
        token=TOKEN, appid=APPID, encoding_aes_key=KEY, encryption=encryption, once=False
    )
    got: list[dict[str, Any]] = []
    app = TestApp(create_application(config, got.append))
    account = client.account(config, "http://localhost/wx")
    url, body = client.wrap(account, to_xml(message), message["FromUserName"])
    assert app.post(url, body).body == b"success"
    (only,) = got
    return only


@pytest.mark.parametrize("kind", PAGES)
def test_a_message_reaches_reply_with_the_fields_of_its_page(kind: str) -> None:
    message = received(messages.make(kind, ME, NOW + 0.9))
    assert message["ToUserName"].startswith("gh_")
    assert (message["FromUserName"], message["CreateTime"]) == (ME, str(NOW))
    if kind in messages.EVENTS:
        assert (message["MsgType"], message["Event"]) == ("event", kind)
        assert "MsgId" not in message
    else:
        assert message["MsgType"] == kind
        assert 0 < int(message["MsgId"]) < 2**63
    for path in PAGES[kind].split():
        assert isinstance(field(message, path), str), path


def test_there_is_no_kind_beside_those_of_the_tables() -> None:
    assert {*messages.MESSAGES, *messages.EVENTS} == set(PAGES)


@pytest.mark.parametrize("encryption", ["plain", "compatible", "safe"])
def test_in_every_mode_reply_gets_the_same(encryption: str) -> None:
    message = messages.make("pic_weixin", ME, NOW, "菜单 ]]> <&")
    assert received(message, encryption) == from_xml(to_xml(message))


def test_a_subscription_by_qr_code_has_its_scene_and_a_ticket() -> None:
    plain, scanned = (messages.make("subscribe", ME, NOW, key) for key in (None, "qrscene_1"))
    assert "Ticket" not in plain
    assert scanned["EventKey"] == "qrscene_1"
    assert scanned["Ticket"]


def test_every_message_has_a_msgid_of_its_own() -> None:
    assert len({messages.make("text", ME, NOW)["MsgId"] for _ in range(100)}) == 100


@given(st.text())
def test_a_follower_of_any_name_has_one_openid_that_looks_like_one(name: str) -> None:
    assert messages.openid(name) == messages.openid(name)
    assert len(messages.openid(name)) == 28
    assert messages.openid(name) != messages.openid(name + "x")


def test_a_field_can_be_set_added_or_set_inside_another() -> None:
    made = messages.make("scancode_waitmsg", ME, NOW)
    settings = ["EventKey=a=b", "Idx=1", "ScanCodeInfo.ScanResult=", "A.B.C=d"]
    message = messages.with_fields(made, settings)
    assert (message["EventKey"], message["Idx"]) == ("a=b", "1")
    assert message["ScanCodeInfo"] == {"ScanType": "qrcode", "ScanResult": ""}
    assert message["A"] == {"B": {"C": "d"}}
    for unchanged in (made, messages.make("scancode_waitmsg", ME, NOW)):
        assert (unchanged["EventKey"], unchanged["ScanCodeInfo"]["ScanResult"]) == ("menu1", "1")


@pytest.mark.parametrize(
    "setting", ["", "=", "Content", "=x", ".=x", "A.=x", ".A=x", "Content.A=x"]
)
def test_what_is_no_setting_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=r"is not NAME=VALUE|has no elements inside"):
        messages.with_fields(messages.make("text", ME, NOW), [setting])
