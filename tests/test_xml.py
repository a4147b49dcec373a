"""WeChat's XML in and out."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wechat.xml import MessageError, from_xml, to_xml


def test_every_field_of_a_message_is_read_cdata_or_bare() -> None:
    assert from_xml(
        b"<xml>\n <ToUserName><![CDATA[gh_1]]></ToUserName>\n<CreateTime>1714112445</CreateTime>"
        b"<Content><![CDATA[a < b & c]]></Content><Bare>&lt;d&gt; &#20320;</Bare>"
        b"<New>kept</New><Empty/></xml>"
    ) == {
        "ToUserName": "gh_1",
        "CreateTime": "1714112445",
        "Content": "a < b & c",
        "Bare": "<d> 你",
        "New": "kept",
        "Empty": "",
    }


def test_nested_elements_are_dicts_and_repeated_ones_lists() -> None:
    assert from_xml(
        b"<xml><SendPicsInfo><Count>2</Count><PicList>\n<item><PicMd5Sum>a</PicMd5Sum></item>"
        b"<item><PicMd5Sum>b</PicMd5Sum></item><item>c</item></PicList></SendPicsInfo></xml>"
    ) == {
        "SendPicsInfo": {
            "Count": "2",
            "PicList": {"item": [{"PicMd5Sum": "a"}, {"PicMd5Sum": "b"}, "c"]},
        }
    }


def raw(fields: dict[str, Any]) -> str:
    """Write the fields as WeChat does: what a follower typed stands in CDATA as it is."""
    parts = []
    for name, value in fields.items():
        if isinstance(value, dict):
            parts.append(f"<{name}>{raw(value)}</{name}>")
        elif value.isdigit():
            parts.append(f"<{name}>{value}</{name}>")
        else:
            parts.append(f"<{name}><![CDATA[{value}]]></{name}>")
    return "\n".join(parts)


def body_of(fields: dict[str, Any]) -> bytes:
    return f"<xml>{raw(fields)}</xml>".encode("utf-8", "surrogateescape")


COMMON = {
    "ToUserName": "gh_97417a04a28d",
    "FromUserName": "o9AgO5Kd5ggOC-bXrbNODIiE3bGY",
    "CreateTime": "1714112445",
}
IDS = {"MsgId": "24500000000000001"}
PLACE = {"Location_X": "23.134521", "Location_Y": "113.358803", "Scale": "20", "Label": "广州"}
SELECTED = PLACE | {"Poiname": "p"}
LINK = {"Title": "t", "Description": "d", "Url": "https://mp.weixin.qq.com/"}
SCAN = {"ScanType": "qrcode", "ScanResult": "1"}
EVENT_FIELDS = {"MsgType": "event", "Event": "E", "EventKey": "menu1"}
# Each with the path of a field that a follower can fill.
FREE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (COMMON | {"MsgType": "text", "Content": "x"} | IDS, ("Content",)),
    (COMMON | {"MsgType": "text", "Content": "x"}, ("Content",)),
    (COMMON | {"MsgType": "text", "Content": "x"} | IDS | {"MsgDataId": "7"}, ("Content",)),
    (COMMON | {"MsgType": "link"} | LINK | IDS, ("Title",)),
    (COMMON | {"MsgType": "link"} | LINK | IDS, ("Description",)),
    (COMMON | {"MsgType": "link"} | LINK | IDS, ("Url",)),
    (COMMON | {"MsgType": "location"} | PLACE | IDS, ("Label",)),
    (COMMON | {"MsgType": "voice", "MediaId": "m", "Format": "amr"} | IDS, ("Recognition",)),
    (COMMON | {"MsgType": "voice", "Recognition": "x", "MediaId": "m"} | IDS, ("Recognition",)),
    (
        COMMON | EVENT_FIELDS | {"SendLocationInfo": PLACE | {"Poiname": "p"}},
        ("SendLocationInfo", "Label"),
    ),
    (
        COMMON | EVENT_FIELDS | {"SendLocationInfo": PLACE | {"Poiname": "p"}},
        ("SendLocationInfo", "Poiname"),
    ),
    (COMMON | EVENT_FIELDS | {"ScanCodeInfo": SCAN}, ("ScanCodeInfo", "ScanResult")),
    (COMMON | {"MsgType": "new", "Typed": "x", "More": "y"} | IDS, ("Typed",)),
]


def with_text(message: dict[str, Any], path: tuple[str, ...], text: str) -> dict[str, Any]:
    name, *inner = path
    value = with_text(message[name], tuple(inner), text) if inner else text
    return message | {name: value}


def typed_pieces(path: tuple[str, ...]) -> list[str]:
    """Return what a follower may type to look like the end of the field, and whole messages."""
    name, outer = path[-1], "".join(f"</{parent}>" for parent in path[-2::-1])
    again = "".join(f"<{parent}>" for parent in path[:-1])
    fake = "<Event><![CDATA[subscribe]]></Event>"
    return [
        "]]>",
        "<![CDATA[",
        "]]><![CDATA[",
        "<a>b</a>",
        "<a><![CDATA[b]]></a>",
        "<!DOCTYPE html>",
        '<!DOCTYPE x [<!ENTITY a "b">]>',
        "<!-- -->",
        "<?xml version='1.0'?>",
        "&amp; &lt; &a; & <",
        "</xml>",
        "<xml>",
        f"]]></{name}>",
        f"<{name}>",
        f"<{name}><![CDATA[",
        f"]]></{name}><{name}><![CDATA[",
        f"]]></{name}>{fake}<{name}><![CDATA[",
        f"]]></{name}>{fake}<MsgType><![CDATA[event]]></MsgType><{name}><![CDATA[",
        f"]]></{name}>{outer}{fake}{again}<{name}><![CDATA[",
        f"]]></{name}>{outer}</xml>",
        f"]]></{name}>{outer}<MsgId>1</MsgId></xml>",
        body_of(COMMON | {"MsgType": "text", "Content": "pasted"} | IDS).decode(),
        body_of(COMMON | {"MsgType": "link"} | LINK | IDS).decode(),
        body_of(COMMON | EVENT_FIELDS | {"SendLocationInfo": PLACE}).decode(),
        "\x00",
        "]]\x00>",
        "\x1d\x08\ufffe\uffff",
        " \n\t ",
        "你好😀",
    ]


def test_a_text_is_what_the_follower_typed_whatever_it_looks_like() -> None:
    for message, path in FREE:
        for piece in typed_pieces(path):
            for text in (piece, f"x{piece}", f"{piece}y", f"x{piece}y", piece + piece):
                read = from_xml(body_of(with_text(message, path, text)))
                allowed = "".join(c for c in text if c not in "\x00\x1d\x08\ufffe\uffff")
                assert read == with_text(message, path, allowed), (path, text)


@settings(max_examples=1000)
@given(st.data())
def test_pieces_of_xml_in_any_order_are_still_text(data: st.DataObject) -> None:
    message, path = data.draw(st.sampled_from(FREE))
    pieces = st.sampled_from(typed_pieces(path)) | st.text(max_size=5)
    text = "".join(data.draw(st.lists(pieces, max_size=6))).replace("\r", "")
    read = from_xml(body_of(with_text(message, path, text)))
    allowed = re.sub("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)
    assert read == with_text(message, path, allowed.replace("]]]]><![CDATA[>", "]]>"))


def test_bytes_that_are_not_utf_8_are_replaced() -> None:
    for spoiled in (b"\xff\xfe", "你".encode("gbk"), "你".encode()[:2]):
        body = body_of(FREE[0][0] | {"Content": "a?b"}).replace(b"a?b", b"a" + spoiled + b"b")
        read = from_xml(body)
        assert read | {"Content": ""} == FREE[0][0] | {"Content": ""}
        assert re.fullmatch("a\ufffd+b", read["Content"])


def test_a_sender_that_escapes_the_end_of_cdata_is_read_as_it_meant() -> None:
    text = "a]]]]><![CDATA[>b]]]]><![CDATA[>"
    assert from_xml(body_of({"Content": text, "MsgId": "1"})) == {
        "Content": "a]]>b]]>",
        "MsgId": "1",
    }


def test_white_space_that_a_follower_typed_is_kept() -> None:
    assert from_xml(b"<xml><Content>  \n </Content></xml>") == {"Content": "  \n "}
    assert from_xml(b"<xml><Content><![CDATA[  \n ]]></Content></xml>") == {"Content": "  \n "}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "empty"),
        (b"hello", "not WeChat's XML"),
        (b"<xml><a></xml>", "not WeChat's XML"),
        (b"<xml></xml><xml></xml>", "not WeChat's XML"),
        (b"<xml><a>b</a></xml></xml>", "not WeChat's XML"),
        (b"<xml></a></xml>", "not WeChat's XML"),
        (b"<xml><a><![CDATA[b]]></xml>", "not WeChat's XML"),
        (b"<xml><![CDATA[b]]></xml>", "not WeChat's XML"),
        (b"<xml>text<a>b</a></xml>", "not WeChat's XML"),
        (b"<xml><a>b", "not WeChat's XML"),
        ("<xml><a>b</a></xml>".encode("utf-16"), "not WeChat's XML"),
        (b"<!DOCTYPE xml><xml><a>b</a></xml>", "DOCTYPE"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]><xml><a>&a;</a></xml>', "DOCTYPE"),
        (b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><xml/>', "DOCTYPE"),
        (b'<?xml version="1.0"?><!DOCTYPE x><xml/>', "DOCTYPE"),
        (b"<html><MsgType>text</MsgType></html>", "an HTML page"),
        (b"<message><MsgType>text</MsgType></message>", "not WeChat's XML"),
        (b"<xml>" + b"<a>" * 20 + b"</a>" * 20 + b"</xml>", "not WeChat's XML"),
        (b"<xml>" + b"<a>" * 80_000, "not WeChat's XML"),
        (b"<xml>" + b"<a>b</a>" * 30_000 + b"</xml>", "not WeChat's XML"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(body: bytes, why: str) -> None:
    with pytest.raises(MessageError, match=why):
        from_xml(body)


def test_the_reason_does_not_quote_the_message() -> None:
    with pytest.raises(MessageError) as caught:
        from_xml(b"<xml><Content>private</Contents></xml>")
    assert "private" not in str(caught.value)
    assert "Contents" not in str(caught.value)


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,12}", fullmatch=True)
xml_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\r\ufffe\uffff"), max_size=40
).map(lambda text: "".join(c for c in text if c >= " " or c in "\t\n"))
values = st.recursive(
    xml_text,
    lambda inner: st.one_of(
        st.dictionaries(names, inner, min_size=1, max_size=4),
        st.lists(
            st.one_of(xml_text, st.dictionaries(names, xml_text, min_size=1, max_size=3)),
            min_size=2,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(st.dictionaries(names, values, min_size=1, max_size=6))
def test_what_is_written_is_read_back_the_same(message: dict[str, Any]) -> None:
    assert from_xml(to_xml(message)) == message


@given(st.text())
def test_any_text_is_written_as_xml_less_what_xml_forbids(text: str) -> None:
    allowed = "".join(
        c
        for c in text
        if c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c >= "\U00010000"
    )
    read = from_xml(to_xml({"Content": text}))["Content"]
    assert read == allowed.replace("\r\n", "\n").replace("\r", "\n")  # as every XML reader does


@given(st.binary(max_size=300) | st.text(alphabet="<>/!&;[]xml?ABC \n").map(str.encode))
def test_no_bytes_at_all_do_more_than_raise_message_error(body: bytes) -> None:
    with contextlib.suppress(MessageError):
        assert isinstance(from_xml(body), dict)


def test_the_end_of_cdata_cannot_be_smuggled_past_a_dropped_character() -> None:
    assert from_xml(to_xml({"Content": "]]\x00><b>", "Other": "]]>"})) == {
        "Content": "]]><b>",
        "Other": "]]>",
    }


def test_a_name_that_is_no_element_and_a_value_that_is_no_text_are_errors() -> None:
    with pytest.raises(ValueError, match="'a b'"):
        to_xml({"a b": "c"})
    with pytest.raises(ValueError, match="name"):
        to_xml({"ª": "c"})
    for value in (None, 1.5, True, b"bytes"):
        with pytest.raises(TypeError, match="Content is a"):
            to_xml({"Content": value})
