"""The shipped reply.py: what a follower of a fresh copy sees."""

from __future__ import annotations

from typing import Any

import pytest

from reply import reply


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"MsgType": "text", "Content": "hello"}, "hello"),
        (
            {"MsgType": "image", "MediaId": "m1", "PicUrl": "http://p"},
            {"MsgType": "image", "Image": {"MediaId": "m1"}},
        ),
        (
            {"MsgType": "voice", "MediaId": "m1", "Format": "amr"},
            {"MsgType": "voice", "Voice": {"MediaId": "m1"}},
        ),
    ],
)
def test_text_image_and_voice_are_echoed(message: dict[str, Any], expected: Any) -> None:
    assert reply(message) == expected


def test_location_and_link_are_answered_with_a_line_of_text() -> None:
    location = {"MsgType": "location", "Location_X": "23.1", "Location_Y": "113.3"}
    assert reply(location) == "你的位置：纬度 23.1，经度 113.3。"
    link = {"MsgType": "link", "Title": "A title", "Url": "http://u"}
    assert reply(link) == "收到链接：A title"


def test_a_new_follower_is_welcomed_with_or_without_a_qr_code() -> None:
    for more in ({}, {"EventKey": ""}, {"EventKey": "qrscene_1", "Ticket": "t"}):
        welcome = reply({"MsgType": "event", "Event": "subscribe", **more})
        assert welcome == "欢迎关注！发文字、图片或语音，我会原样发回。"


@pytest.mark.parametrize(
    "message",
    [
        {"MsgType": "video", "MediaId": "m1"},
        {"MsgType": "shortvideo", "MediaId": "m1"},
        {"MsgType": "event", "Event": "unsubscribe"},
        {"MsgType": "event", "Event": "CLICK", "EventKey": "menu1"},
        {"MsgType": "of a later year"},
        {"MsgType": "text"},
        {"MsgType": "text", "Content": {"not": "text"}},
    ],
)
def test_the_rest_is_met_with_silence(message: dict[str, Any]) -> None:
    assert reply(message) is None
