"""What is a message, what answers it, and what the builders make."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import message_xml
from hypothesis import given
from hypothesis import strategies as st

import wechat.message
from wechat.message import MessageError, from_xml


def answer(*arguments: Any) -> bytes | None:
    """Return the first or only part of an answer."""
    return next(iter(wechat.message.answer(*arguments)), None)


MESSAGE = from_xml(message_xml())
EVENT = MESSAGE | {"MsgType": "event", "Event": "CLICK", "EventKey": "menu1"}


@pytest.mark.parametrize("missing", ["ToUserName", "FromUserName", "MsgType"])
@pytest.mark.parametrize("value", [None, "", {"a": "b"}, ["text", "text"]])
def test_a_message_that_cannot_be_answered_is_refused(missing: str, value: Any) -> None:
    wechat.message.check(MESSAGE)
    with pytest.raises(MessageError, match=missing):
        wechat.message.check(MESSAGE | {missing: value})


def replied(reply: wechat.message.Reply, message: dict[str, Any] = MESSAGE) -> dict[str, Any]:
    whole = answer(message, reply, 1714112446.9)
    assert whole is not None
    read = from_xml(whole)
    assert read.pop("ToUserName") == message["FromUserName"]
    assert read.pop("FromUserName") == message["ToUserName"]
    assert read.pop("CreateTime") == "1714112446"
    return read


def test_the_official_reply_of_every_kind() -> None:
    assert (
        replied("hi") == replied(wechat.message.text("hi")) == {"MsgType": "text", "Content": "hi"}
    )
    assert replied(wechat.message.image("m1")) == {"MsgType": "image", "Image": {"MediaId": "m1"}}
    assert replied(wechat.message.voice("m1")) == {"MsgType": "voice", "Voice": {"MediaId": "m1"}}
    assert replied(wechat.message.video("m1")) == {"MsgType": "video", "Video": {"MediaId": "m1"}}
    assert replied(wechat.message.video("m1", "t", "d")) == {
        "MsgType": "video",
        "Video": {"MediaId": "m1", "Title": "t", "Description": "d"},
    }
    assert replied(wechat.message.music("m1")) == {
        "MsgType": "music",
        "Music": {"ThumbMediaId": "m1"},
    }
    assert replied(wechat.message.music("m1", "u", "t", "d", "hq")) == {
        "MsgType": "music",
        "Music": {
            "Title": "t",
            "Description": "d",
            "MusicUrl": "u",
            "HQMusicUrl": "hq",
            "ThumbMediaId": "m1",
        },
    }
    article = {"Title": "t", "Description": "d", "PicUrl": "p", "Url": "u"}
    assert replied(wechat.message.news([article])) == {
        "MsgType": "news",
        "ArticleCount": "1",
        "Articles": {"item": article},
    }
    assert replied(wechat.message.transfer_customer_service()) == {
        "MsgType": "transfer_customer_service"
    }
    assert replied(wechat.message.transfer_customer_service("a@b")) == {
        "MsgType": "transfer_customer_service",
        "TransInfo": {"KfAccount": "a@b"},
    }


@given(st.text(max_size=600) | st.text("a]>&<\n\u3000", max_size=9), st.text("ab]>\0", min_size=1))
def test_a_text_is_written_as_any_other_reply_is(content: str, openid: str) -> None:
    message = MESSAGE | {"FromUserName": openid}
    assert answer(message, content, 0) == answer(message, wechat.message.text(content), 0)


def test_numbers_stand_bare_and_text_in_cdata() -> None:
    whole = answer(MESSAGE, wechat.message.news([{"Title": "t"}]), 1.0)
    assert whole is not None
    assert b"<ArticleCount>1</ArticleCount>" in whole
    assert b"<CreateTime>1</CreateTime>" in whole
    assert b"<Title><![CDATA[t]]></Title>" in whole


def test_eight_articles_answer_an_event_and_one_a_message() -> None:
    eight = wechat.message.news([{"Title": str(n)} for n in range(8)])
    assert len(replied(eight, EVENT)["Articles"]["item"]) == 8
    with pytest.raises(ValueError, match="8 articles: 1 to 8 may answer an event, 1 a message"):
        answer(MESSAGE, eight, 0)
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"{count} articles: 1 to 8 may answer an event"):
            wechat.message.news([{"Title": "t"}] * count)
    by_hand = {"MsgType": "news", "ArticleCount": 1, "Articles": {"item": [{"Title": "t"}] * 9}}
    with pytest.raises(ValueError, match="9 articles"):
        answer(EVENT, by_hand, 0)


@pytest.mark.parametrize("articles", [[{"Title": "t"}], {"item": {"Title": "t"}}])
def test_a_news_reply_by_hand_is_completed(articles: Any) -> None:
    whole = wechat.message.news([{"Title": "t"}])
    assert replied({"MsgType": "news", "Articles": articles}) == replied(whole)
    assert replied({"MsgType": "news", "ArticleCount": 5, "Articles": articles}) == replied(whole)


def test_of_a_late_news_reply_the_first_article_is_kept() -> None:
    two = wechat.message.news([{"Title": "a"}, {"Title": "b"}])
    (late,) = wechat.message.answer(EVENT, two, 0, late=True)
    read = from_xml(late)
    assert (read["ArticleCount"], read["Articles"]) == ("1", {"item": {"Title": "a"}})


def test_a_reply_goes_to_the_follower_whatever_names_it_has() -> None:
    assert replied({**MESSAGE, "Content": "x"})["Content"] == "x"


@pytest.mark.parametrize("reply", [None, "", wechat.message.text(""), "\0"])
def test_none_and_an_empty_text_are_no_reply(reply: wechat.message.Reply) -> None:
    assert answer(MESSAGE, reply, 0) is None


@pytest.mark.parametrize("reply", [7, b"bytes", ["a"], object()])
def test_a_reply_of_another_type_is_a_clear_error(reply: Any) -> None:
    with pytest.raises(TypeError, match=r"reply\(\) returned a"):
        answer(MESSAGE, reply, 0)


@pytest.mark.parametrize("reply", [{}, {"Content": "x"}, {"MsgType": ""}, {"MsgType": 1}])
def test_a_reply_without_msgtype_is_a_clear_error(reply: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no MsgType"):
        answer(MESSAGE, reply, 0)


@pytest.mark.parametrize(
    "reply",
    [
        {"MsgType": "text"},
        {"MsgType": "text", "Content": 5},
        {"MsgType": "news"},
        {"MsgType": "news", "Articles": {"item": "x"}},
        {"MsgType": "news", "Articles": ["x"]},
    ],
)
def test_a_reply_by_hand_without_its_content_is_a_clear_error(reply: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"reply has no (Content|Articles)"):
        answer(MESSAGE, reply, 0)


def test_an_encrypted_message_is_refused_with_what_to_do() -> None:
    with pytest.raises(MessageError, match="is encrypted; set"):
        wechat.message.check({"ToUserName": "gh_1", "Encrypt": "abc"})


@pytest.mark.parametrize("character", ["a", "é", "你", "😀"])
@pytest.mark.parametrize("shift", range(4))
def test_a_long_text_is_cut_between_characters_and_says_so(character: str, shift: int) -> None:
    content = "a" * shift + character * 2100
    sent = replied(content)["Content"]
    size = len(sent.encode())
    assert sent.endswith("…")
    assert content.startswith(sent[:-1])
    assert 2048 - len(character.encode()) < size <= 2048


def test_a_text_of_exactly_the_limit_is_left_alone() -> None:
    assert replied("a" * 2048)["Content"] == "a" * 2048
    assert replied({"MsgType": "text", "Content": "a" * 2049})["Content"] == "a" * 2045 + "…"


def test_characters_that_are_dropped_do_not_count() -> None:
    assert replied("a" * 2000 + "\0" * 100)["Content"] == "a" * 2000


@given(st.text(min_size=1, max_size=3000))
def test_no_text_is_too_long_or_breaks_the_reply(content: str) -> None:
    whole = answer(MESSAGE, "a" + content, 0)
    assert whole is not None
    assert len(from_xml(whole)["Content"].encode()) <= 2048
