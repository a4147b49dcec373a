"""What the follower would see of an answer, and why nothing, tried with every kind of bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from conftest import APPID, KEY, TOKEN, message_xml
from hypothesis import given
from hypothesis import strategies as st

import wechat.crypto
from wechat.crypto import MessageCipher
from wechat.message import MAX_TEXT, from_xml, to_xml
from wxsim import follower
from wxsim.client import Account
from wxsim.follower import APOLOGY, Shown

MESSAGE = from_xml(message_xml())
REPLY = {
    "ToUserName": MESSAGE["FromUserName"],
    "FromUserName": MESSAGE["ToUserName"],
    "CreateTime": 1714112445,
    "MsgType": "text",
    "Content": "hello",
}
ACCOUNTS = {
    mode: Account(
        "http://127.0.0.1/wx", TOKEN, None if mode == "plain" else MessageCipher(KEY, APPID), mode
    )
    for mode in ("plain", "compatible", "safe")
}


def envelope(xml: bytes, token: str = TOKEN) -> bytes:
    encrypt = MessageCipher(KEY, APPID).encrypt(xml)
    signature = wechat.crypto.sign(token, "1714112445", "n", encrypt)
    return to_xml(
        {"Encrypt": encrypt, "MsgSignature": signature, "TimeStamp": 1714112445, "Nonce": "n"}
    )


def read(body: bytes, mode: str = "plain") -> Shown:
    return follower.show(ACCOUNTS[mode], MESSAGE, body)


@pytest.mark.parametrize("body", [b"", b"success"])
@pytest.mark.parametrize("mode", ACCOUNTS)
def test_the_empty_answer_and_success_show_nothing_in_every_mode(mode: str, body: bytes) -> None:
    assert read(body, mode) == Shown(None)


def test_an_encrypted_answer_is_read_in_the_encrypted_modes() -> None:
    for mode in ("compatible", "safe"):
        shown = read(envelope(to_xml(REPLY)), mode)
        assert (shown.text, shown.problem, shown.xml) == ("hello", "", to_xml(REPLY))


KINDS = ("text", "image", "voice", "video", "music", "news", "transfer_customer_service")
MARKUP = b"< </ > ]]> <![CDATA[ &amp; <?xml?> 1 ToUserName <Content> </xml> <!DOCTYPE success {} \0"
PIECES = st.binary(max_size=60) | st.sampled_from(MARKUP.split(b" "))
VALUES: st.SearchStrategy[object] = st.recursive(
    st.text(max_size=20) | st.integers() | st.sampled_from(["1714112445", "x" * (MAX_TEXT + 1)]),
    lambda inner: (
        st.dictionaries(
            st.sampled_from(["MediaId", "Title", "Url", "item", "ThumbMediaId"]), inner, max_size=3
        )
        | st.lists(inner.filter(lambda item: not isinstance(item, list)), max_size=9)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [*REPLY, "Image", "Voice", "Video", "Music", "Articles", "ArticleCount", "TransInfo"]
)
MEDIA = st.sampled_from([{"MediaId": "m"}, {"MediaId": ""}, {"ThumbMediaId": "m"}, {}, "m"])
ITEMS = st.lists(st.sampled_from([{"Title": "t"}, {}, "t"]), max_size=9)
KIND = st.fixed_dictionaries(
    {"MsgType": st.sampled_from(KINDS)},
    optional={
        **dict.fromkeys(("Image", "Voice", "Video", "Music"), MEDIA),
        "Articles": st.fixed_dictionaries({"item": ITEMS}),
        "ArticleCount": st.integers(0, 9),
        "CreateTime": st.integers() | st.text("1\u0661\uff11", min_size=1),
    },
)
ANSWERS = st.one_of(
    st.binary(),
    st.lists(PIECES, max_size=8).map(b"".join),
    st.tuples(st.binary(max_size=9), st.integers(0, 250), st.integers(0, 9)).map(
        lambda t: to_xml(REPLY)[: t[1]] + t[0] + to_xml(REPLY)[t[1] + t[2] :]
    ),
    st.tuples(KIND, st.dictionaries(FIELDS, VALUES, max_size=4)).map(
        lambda t: to_xml({**REPLY, **t[0], **t[1]})
    ),
)


def usable(body: bytes) -> bool:
    """Tell by another parser, and by the platform's page alone, whether ``body`` is a reply."""
    root = ElementTree.fromstring(body)
    leaf = {child.tag: child.text or "" for child in root if not len(child)}
    kind = leaf.get("MsgType", "")
    inside: dict[str, Callable[[], object]] = {
        "text": lambda: "Content" in leaf and len(leaf["Content"].encode()) <= MAX_TEXT,
        "image": lambda: root.findtext("Image/MediaId"),
        "voice": lambda: root.findtext("Voice/MediaId"),
        "video": lambda: root.findtext("Video/MediaId"),
        "music": lambda: root.findtext("Music/ThumbMediaId"),
        "news": lambda: leaf.get("ArticleCount") == str(len(root.findall("Articles/item"))) != "0",
        "transfer_customer_service": lambda: True,
    }
    return (
        root.tag == "xml"
        and all(leaf.get(name) == REPLY[name] for name in ("ToUserName", "FromUserName"))
        and re.fullmatch("[0-9]+", leaf.get("CreateTime", "")) is not None
        and kind in inside
        and bool(inside[kind]())
    )


@given(ANSWERS, st.sampled_from([*ACCOUNTS]), st.booleans())
def test_no_answer_crashes_the_reader_or_passes_for_a_reply_that_it_is_not(
    body: bytes, mode: str, sealed: bool
) -> None:
    shown = read(envelope(body) if sealed else body, mode)
    if shown.problem:
        assert shown.text == APOLOGY
    elif shown.text is None:
        assert body in (b"", b"success")
        assert not sealed
    else:
        assert sealed is (mode == "safe") or mode == "compatible"
        assert usable(body)


@given(st.binary(max_size=40), st.integers(0, 800), st.integers(0, 40))
def test_no_mangled_envelope_passes_for_another_reply(piece: bytes, start: int, gone: int) -> None:
    whole = envelope(to_xml(REPLY))
    shown = read(whole[:start] + piece + whole[start + gone :], "safe")
    assert shown.problem or shown.text in (None, "hello")


@pytest.mark.parametrize(
    "body",
    [
        to_xml(REPLY).replace(b"hello", b"a\x1dc"),
        to_xml(REPLY).replace(b"hello", b"]]><b>"),
        to_xml(REPLY).replace(b"hello", b"\xff"),
        to_xml(REPLY).replace(b"hello", b"\0"),
        b"<a>" * 100_000 + b"</a>" * 100_000,
    ],
    ids=["control", "cdata", "utf-8", "nul", "deep"],
)
def test_an_answer_that_is_not_well_formed_cannot_be_used_by_wechat(body: bytes) -> None:
    assert read(body).problem.startswith("it is not XML: ")
