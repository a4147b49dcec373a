"""WeChat's XML as plain dicts, and plain dicts as XML.

Nested elements are dicts, repeated ones lists, every leaf a str. Sources of the rules: the
platform's 接收普通消息 and 接收事件推送.
"""

from __future__ import annotations

import html
import re
from typing import Any, NamedTuple, TypeAlias

Message: TypeAlias = dict[str, Any]

MAX_DEPTH = 16  # elements inside one another; WeChat's own messages stay far below
MAX_STEPS = 10_000  # tags that are looked at to read one body; WeChat's messages have some dozens

# The fields that a follower is known to fill. There are others: when it is unclear to which field a
# text belongs, these are only preferred.
FILLED_BY_FOLLOWERS = frozenset(
    {"Content", "Title", "Description", "Url", "Label", "Poiname", "Recognition", "ScanResult"}
)

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
# Attributes are passed over, here and below: WeChat sends none.
_BODY = re.compile(r"\ufeff?\s*(?:<\?xml\s[^>]*\?>\s*)?<xml(?:\s[^<>]*)?>(.*)</xml>\s*", re.DOTALL)
# A whole element with a text, or a tag of one with elements. The last group that matches tells
# which. A CDATA section is taken up to its first end mark.
_TAG = re.compile(
    rf"\s*<(?:/({_NAME.pattern})"
    rf"|({_NAME.pattern})(?:\s[^<>]*?)?(?:(/)"
    r"|>(?:([^<]*)</\2|<!\[CDATA\[(.*?)\]\]></\2))?)>",
    re.ASCII | re.DOTALL,
)
_END_TAG, _START_TAG, _EMPTY, _BARE, _CDATA = 1, 2, 3, 4, 5
_ESCAPED_END = "]]]]><![CDATA[>"  # of a CDATA section, in the text of a sender that escapes it

# An element: the names and positions of those around it, from the outside, and then its own.
_Path: TypeAlias = tuple[tuple[str, int], ...]


class MessageError(ValueError):
    """The bytes are no message of WeChat's. The text says why and quotes nothing of them."""


class _Leaf(NamedTuple):
    """An element with a text."""

    path: _Path
    text: str
    start: int  # position of the text in a CDATA section, 0 if it stands bare


def from_xml(body: bytes) -> Message:
    """Read ``<xml>…</xml>`` into a dict.

    WeChat puts what a follower typed into a CDATA section as it is, be it a control character,
    ``]]></Content>`` or a whole message. All of that is text here: bytes that are not UTF-8 are
    replaced, characters that XML 1.0 forbids are dropped, and a CDATA section ends where the rest
    of the body makes sense. Every end of line becomes LF.

    Raises:
        MessageError: the body is not WeChat's XML. The text says what it looks like instead.
    """
    text = drop_forbidden(body.decode(errors="replace"))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    whole = _BODY.fullmatch(text)
    if not whole:
        raise MessageError(f"the body is {_description(text)}")
    return _read(whole[1].rstrip())


def _read(body: str) -> Message:
    """Read the elements of a message.

    A CDATA section is first taken to end at its first end mark. Where the reading cannot go on, the
    last section that has another end mark ends there, and the reading goes on after it. Of all
    readings the simplest is right.

    Raises:
        MessageError: there is no reading.
    """
    leaves: list[_Leaf] = []
    parents: _Path = ()
    position, message, lowest_cost = 0, None, (0, 0, 0)
    for _ in range(MAX_STEPS):
        tag = None
        if message is None or _cost(leaves) < lowest_cost:
            if parents or position < len(body):
                tag = _TAG.match(body, position)
            else:
                message, lowest_cost = _tree(leaves), _cost(leaves)
                if not lowest_cost[1]:  # no text looks like XML: there is no simpler reading
                    break
        after = tag and _after(tag, parents, leaves)
        if tag and after is not None:
            parents, position = after, tag.end()
        elif place := _end_elsewhere(body, leaves):
            parents, position = place
        else:
            break
    if message is None:
        raise MessageError("the body is not WeChat's XML")
    return message


def _after(tag: re.Match[str], parents: _Path, leaves: list[_Leaf]) -> _Path | None:
    """Add the leaf that ``tag`` is, if any.

    Returns:
        The elements that are open after the tag; None if it cannot stand here.
    """
    kind = tag.lastindex
    if kind == _END_TAG:
        return parents[:-1] if parents and parents[-1][0] == tag[1] else None
    path = (*parents, (tag[2], tag.start()))
    if kind == _START_TAG:
        return path if len(path) <= MAX_DEPTH else None
    if kind == _CDATA:
        if _is_typed(path, leaves):
            return None
        leaves.append(_Leaf(path, tag[5], tag.start(5)))
    else:
        if "]]>" in (tag[4] or ""):
            return None
        leaves.append(_Leaf(path, tag[4] or "", 0))
    return parents


def _is_typed(path: _Path, leaves: list[_Leaf]) -> bool:
    """Tell whether what seems to be an element with a CDATA section is part of a follower's text.

    WeChat never puts a CDATA section beside an element of the same name, nor into an element of the
    message itself whose name is repeated. ``to_xml`` writes such lists without CDATA.
    """
    field, parents, name = path[0], path[:-1], path[-1][0]
    for other, _, _ in leaves:
        if other[0][0] == field[0] and (
            other[0] != field or (other[:-1] == parents and other[-1][0] == name)
        ):
            return True
    return False


def _cost(leaves: list[_Leaf]) -> tuple[int, int, int]:
    """Return how far a reading is from the simplest one.

    Few texts look like XML, above all few that no follower is known to type, and there are few
    elements: what can be a part of a text is one.
    """
    like_xml = [path[-1][0] for path, text, _ in leaves if "]]>" in text]
    unlikely = sum(name not in FILLED_BY_FOLLOWERS for name in like_xml)
    return unlikely, len(like_xml), len(leaves)


def _end_elsewhere(body: str, leaves: list[_Leaf]) -> tuple[_Path, int] | None:
    """Let the last CDATA section that can do so end at its next end mark.

    Returns:
        The elements that are open after it, and the position there; None if there is no section.
    """
    while leaves:
        path, text, start = leaves.pop()
        end_mark = f"]]></{path[-1][0]}>"
        if start and (end := body.find(end_mark, start + len(text) + 1)) >= 0:
            leaves.append(_Leaf(path, body[start:end], start))
            return path[:-1], end + len(end_mark)
    return None


def _tree(leaves: list[_Leaf]) -> Message:
    """Return the leaves as nested dicts and lists."""
    dicts: dict[_Path, Message] = {(): {}}
    for path, text, start in leaves:
        _add(dicts, path, text.replace(_ESCAPED_END, "]]>") if start else html.unescape(text))
    return dicts[()]


def _add(dicts: dict[_Path, Message], path: _Path, value: Any) -> None:
    """Put ``value`` at ``path``; ``dicts`` are the elements that hold others, by their paths."""
    parents, name = path[:-1], path[-1][0]
    if parents not in dicts:
        dicts[parents] = {}
        _add(dicts, parents, dicts[parents])
    fields = dicts[parents]
    if name not in fields:
        fields[name] = value
    elif isinstance(fields[name], list):
        fields[name].append(value)
    else:
        fields[name] = [fields[name], value]


def _description(text: str) -> str:
    """Say what a body looks like that is not WeChat's XML."""
    start = text.lstrip("\ufeff \t\n")[:500].lower()
    if not start:
        return "empty"
    if start[0] in "{[":
        return "JSON; choose XML as 数据格式 in the console"
    if "<html" in start or start.startswith("<!doctype html"):
        return "an HTML page"
    if "<!doctype" in start:
        return "XML with a DOCTYPE, which is not allowed"
    return "not WeChat's XML"


def to_xml(message: Message) -> bytes:
    """Write a dict as ``<xml>…</xml>`` in UTF-8; ``from_xml`` reads the same dict back.

    A str becomes CDATA, an int stands bare. Characters that XML 1.0 forbids are dropped. What XML
    cannot tell apart is read as the simpler: an int as a str, an empty dict as "", a list of one
    as its item, an empty list not at all, and every end of line as LF.

    Raises:
        ValueError: a key that cannot be the name of an element.
        TypeError: a value that is no str, int, dict, or list of these.
    """
    return f"<xml>{_elements(message, in_message=True)}</xml>".encode()


def _elements(fields: Message, *, in_message: bool = False, bare: bool = False) -> str:
    """Write the elements in one; ``in_message``: in the message itself; ``bare``: without CDATA."""
    parts = []
    for name, value in fields.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of an XML element")
        items = value if isinstance(value, list) else [value]
        for item in items:
            # from_xml takes repeated elements with CDATA for something that a follower typed.
            is_bare = bare or (items is value and (in_message or isinstance(item, str)))
            if isinstance(item, dict):
                content = _elements(item, bare=is_bare)
            elif isinstance(item, str):
                content = _text(item, is_bare)
            elif type(item) is int:
                content = str(item)
            else:
                what = f"an item of {name}" if items is value else name
                raise TypeError(f"{what} is a {type(item).__name__}, not a str, int, dict or list")
            parts.append(f"<{name}>{content}</{name}>")
    return "".join(parts)


def _text(text: str, bare: bool) -> str:
    # First of all: without the characters that are dropped, a new "]]>" may stand there.
    text = drop_forbidden(text)
    if bare:
        return html.escape(text, quote=False)
    return f"<![CDATA[{text.replace(']]>', _ESCAPED_END)}]]>"


def drop_forbidden(text: str) -> str:
    """Return the text without the characters that XML 1.0 forbids."""
    return _NOT_XML.sub("", text)
