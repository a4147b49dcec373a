"""The simulator's messages: every MsgType and Event of the tables, as WeChat writes them."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import APPID, KEY, TOKEN, message_xml
from hypothesis import given
from hypothesis import strategies as st
from webtest import TestApp

from wechat.config import Config
from wechat.message import Message, from_xml
from wxserver import create_application
from wxsim import client, messages

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


def made(kind: str, now: float = NOW, key: str | None = None) -> Message:
    """Make a message or an event of the tables."""
    if kind in messages.MESSAGES:
        return messages.make(kind, ME, now)
    return messages.make("event", ME, now, kind, [] if key is None else [f"EventKey={key}"])


def received(message: Message, encryption: str = "plain") -> dict[str, Any]:
    """Send ``message`` as the simulator does; return what ``reply()`` gets of it."""
    config = Config(
        token=TOKEN, appid=APPID, encoding_aes_key=KEY, encryption=encryption, once=False
    )
    got: list[dict[str, Any]] = []
    app = TestApp(create_application(config, got.append))
    account = client.from_config(config, "http://localhost/wx")
    url, body = client.request(account, messages.outgoing(message))
    assert app.post(url, body).body == b"success"
    (only,) = got
    return only


@pytest.mark.parametrize("kind", PAGES)
def test_a_message_reaches_reply_with_the_fields_of_its_page(kind: str) -> None:
    message = received(made(kind, NOW + 0.9))
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


def test_an_event_beside_those_of_the_tables_has_the_common_fields_alone() -> None:
    message = received(messages.make("event", ME, NOW, "user_authorization_revoke"))
    assert set(message) == {"ToUserName", "FromUserName", "CreateTime", "MsgType", "Event"}
    assert (message["MsgType"], message["Event"]) == ("event", "user_authorization_revoke")


def test_an_event_may_be_called_as_a_msgtype_is() -> None:
    assert messages.make("event", ME, NOW, "text")["MsgType"] == "event"


@pytest.mark.parametrize("encryption", ["plain", "compatible", "safe"])
def test_in_every_mode_reply_gets_the_same(encryption: str) -> None:
    message = made("pic_weixin", key="菜单 <&")
    assert received(message, encryption) == {**message, "CreateTime": str(NOW)}


def test_a_subscription_by_qr_code_has_its_scene_and_a_ticket() -> None:
    plain, scanned = (made("subscribe", key=key) for key in (None, "qrscene_1"))
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
    message = made("scancode_waitmsg")
    settings = ["EventKey=a=b", "Idx=1", "ScanCodeInfo.ScanResult=", "A.B.C=d\n"]
    messages.set_fields(message, settings)
    assert (message["EventKey"], message["Idx"]) == ("a=b", "1")
    assert message["ScanCodeInfo"] == {"ScanType": "qrcode", "ScanResult": ""}
    assert message["A"] == {"B": {"C": "d\n"}}
    unchanged = made("scancode_waitmsg")
    assert unchanged["ScanCodeInfo"]["ScanResult"]


@pytest.mark.parametrize(
    "setting", ["", "=", "Content", "=x", ".=x", "A.=x", ".A=x", "a b=x", "<A>=x"]
)
def test_what_is_no_setting_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=VALUE"):
        messages.set_fields(made("text"), [setting])


TYPED = [
    "x]]></Content><Event><![CDATA[subscribe]]></Event><Content><![CDATA[y",
    "<![CDATA[ <a>b</a> <!DOCTYPE xml> &amp; &nosuch; ]]>",
    "a\x1dc \0 \x08 \x1b \ufffe \uffff",
    "two\r\nlines\tand a tab",
    "\udcff\udc80 are two bytes",  # as sys.argv holds the bytes FF and 80
]


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_typed_goes_out_as_it_is(typed: str) -> None:
    message = made("text") | {"Content": typed}
    as_bytes = typed.encode(errors="surrogateescape")
    xml = messages.outgoing(message).xml
    assert xml.count(b"<Content><![CDATA[" + as_bytes + b"]]></Content>") == 1
    assert xml.startswith(b"<xml><ToUserName><![CDATA[gh_")
    assert xml.endswith(b"]]></Content><MsgId>%d</MsgId></xml>" % message["MsgId"])


@given(st.text())
def test_any_text_goes_out_as_it_is_in_a_nested_field_too(typed: str) -> None:
    message = made("location_select")
    messages.set_fields(message, [f"SendLocationInfo.Label={typed}"])
    xml = messages.to_unescaped_xml(message)
    assert f"<Label><![CDATA[{typed}]]></Label>".encode() in xml


def test_what_needs_no_escape_is_read_as_it_was() -> None:
    for kind in PAGES:
        message = made(kind)
        read = from_xml(messages.to_unescaped_xml(message))
        assert read == {k: str(v) if isinstance(v, int) else v for k, v in message.items()}


@pytest.mark.parametrize("body", [b"", b"\xff\0 no XML", b"<MsgType>text</MsgType>"])
def test_a_raw_body_that_nobody_can_read_is_a_message_too(body: bytes) -> None:
    assert messages.outgoing_raw(body, ME) == messages.Outgoing(body, {}, ME, raw=True)


def test_the_fields_of_a_raw_body_are_read_as_the_server_reads_them() -> None:
    body = message_xml("\0]]>")
    assert messages.outgoing_raw(body, ME) == messages.Outgoing(body, from_xml(body), ME, raw=True)
