"""WeChat's XML as plain dicts, and plain dicts as XML.

Nested elements are dicts, repeated ones lists, every leaf a str. Sources of the rules: the
platform's 接收普通消息 and 接收事件推送.

WeChat puts what a follower typed into a CDATA section without escaping it. Here a follower typed
``1]]></Content>2``:

    <xml><MsgType><![CDATA[text]]></MsgType><Content><![CDATA[1]]></Content>2]]></Content></xml>

No XML parser reads this. ``from_xml`` may end a CDATA section at any end mark of its element, here
at either ``]]></Content>``. After the first one stands ``2``, which is no tag, so Content ends at
the second. Each choice of ends is a reading of the body. Of the readings that make sense of the
whole body, the simplest one is right: the one with the lowest ``_cost``.
"""

from __future__ import annotations

import html
import re
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]

MAX_DEPTH = 16  # elements inside one another; WeChat's own messages stay far below
MAX_STEPS = 10_000  # tags read in all readings of one body; WeChat's messages have some dozens

# The fields that a follower is known to fill. There are others, so these are only preferred.
FILLED_BY_FOLLOWERS = frozenset(
    {"Content", "Title", "Description", "Url", "Label", "Poiname", "Recognition", "ScanResult"}
)

_ALLOWED = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
# Attributes are skipped, here and below: WeChat sends none.
_BODY = re.compile(r"\ufeff?\s*(?:<\?xml\s[^>]*\?>\s*)?<xml(?:\s[^<>]*)?>(.*)</xml>\s*", re.DOTALL)
# A whole leaf, or the start tag or end tag of an element that holds others. The last group that
# matches names the kind; in a leaf it is the text.
_TAG = re.compile(
    rf"\s*<(?:/(?P<end>{_NAME.pattern})"
    rf"|(?P<start>{_NAME.pattern})(?:\s[^<>]*?)?(?:(?P<empty>)/"
    r"|>(?:(?P<bare>[^<]*)</(?P=start)|<!\[CDATA\[(?P<cdata>.*?)\]\]></(?P=start)))?)>",
    re.ASCII | re.DOTALL,
)
_ESCAPED_END = "]]]]><![CDATA[>"  # "]]>" in a CDATA section of a sender that escapes it

# An element: the name and position of each element from the outermost one down to it.
_Path: TypeAlias = tuple[tuple[str, int], ...]
# An element with a text, the text, and the position of a CDATA text in the body (-1: it is bare).
_Leaf: TypeAlias = tuple[_Path, str, int]
# How far a reading has come: the innermost open element, and the position in the body.
_Place: TypeAlias = tuple[_Path, int]


class MessageError(ValueError):
    """The bytes are no message of WeChat's. The text says why and quotes nothing of them."""


def from_xml(body: bytes) -> Message:
    """Read ``<xml>…</xml>`` into a dict.

    Bytes that are not UTF-8 are replaced, characters that XML 1.0 forbids are dropped, and every
    end of line becomes LF.

    Raises:
        MessageError: the body is not WeChat's XML. The text says what it looks like instead.
    """
    text = drop_forbidden(body.decode(errors="replace"))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    whole = _BODY.fullmatch(text)
    if not whole:
        raise MessageError(f"the body is {_description(text)}")
    return _tree(_simplest_reading(whole[1].rstrip()))


def _simplest_reading(body: str) -> list[_Leaf]:
    """Return the leaves of the simplest reading of the elements of a message.

    The first reading ends every CDATA section at its first end mark. When a reading is complete or
    makes no sense, the next one moves the end of the last section that has another end mark.

    Raises:
        MessageError: there is no reading.
    """
    simplest: list[_Leaf] | None = None
    lowest_cost = (0, 0, 0)
    leaves: list[_Leaf] = []
    place: _Place = ((), 0)
    complete: _Place = ((), len(body))
    for _ in range(MAX_STEPS):
        after = None
        if simplest is None or _cost(leaves) < lowest_cost:
            if place == complete:
                simplest, lowest_cost = leaves.copy(), _cost(leaves)
                if lowest_cost[1] == 0:  # no other reading is simpler: moving an end adds a "]]>"
                    break
            after = _read_tag(body, place, leaves)
        after = after or _move_last_end(body, leaves)
        if not after:
            break
        place = after
    if simplest is None:
        raise MessageError("the body is not WeChat's XML")
    return simplest


def _read_tag(body: str, place: _Place, leaves: list[_Leaf]) -> _Place | None:
    """Read a tag, or a whole leaf and add it to ``leaves``.

    Returns:
        The place after it; None if what stands here makes no sense.
    """
    parents, position = place
    tag = _TAG.match(body, position)
    if not tag:
        return None
    kind = tag.lastgroup or ""
    if kind == "end":
        is_open = parents and parents[-1][0] == tag["end"]
        return (parents[:-1], tag.end()) if is_open else None
    path = (*parents, (tag["start"], tag.start()))
    if kind == "start":
        return (path, tag.end()) if len(path) <= MAX_DEPTH else None
    if _is_typed(path, leaves) if kind == "cdata" else "]]>" in tag[kind]:
        return None
    leaves.append((path, tag[kind], tag.start("cdata")))
    return parents, tag.end()


def _is_typed(path: _Path, leaves: list[_Leaf]) -> bool:
    """Tell whether an element with a CDATA section was typed by a follower.

    WeChat never puts a CDATA section beside an element of the same name, nor into an element of the
    message itself whose name is repeated. ``to_xml`` writes such lists without CDATA.
    """
    field, field_name = path[0], path[0][0]
    for other, _, _ in leaves:
        if other[0][0] == field_name:
            is_beside = other[:-1] == path[:-1] and other[-1][0] == path[-1][0]
            if is_beside or other[0] != field:
                return True
    return False


def _cost(leaves: list[_Leaf]) -> tuple[int, int, int]:
    """Return what a simple reading has few of, the most important first.

    First texts that contain "]]>" in fields that no follower is known to fill, then all texts that
    contain "]]>", then elements.
    """
    names = [path[-1][0] for path, text, _ in leaves if "]]>" in text]
    unlikely = sum(name not in FILLED_BY_FOLLOWERS for name in names)
    return unlikely, len(names), len(leaves)


def _move_last_end(body: str, leaves: list[_Leaf]) -> _Place | None:
    """Move the end of the last CDATA section that has another end mark; drop the leaves after it.

    Returns:
        The place after the section; None if no section has another end mark.
    """
    while leaves:
        path, text, start = leaves.pop()
        end_mark = f"]]></{path[-1][0]}>"
        if start >= 0 and (end := body.find(end_mark, start + len(text) + 1)) >= 0:
            leaves.append((path, body[start:end], start))
            return path[:-1], end + len(end_mark)
    return None


def _tree(leaves: list[_Leaf]) -> Message:
    """Return the leaves as nested dicts and lists."""
    elements: dict[_Path, Message] = {(): {}}  # that hold others; () is the message
    for path, text, start in leaves:
        value = html.unescape(text) if start < 0 else text.replace(_ESCAPED_END, "]]>")
        _add(elements, path, value)
    return elements[()]


def _add(elements: dict[_Path, Message], path: _Path, value: Any) -> None:
    """Put ``value`` at ``path``; make the elements around it if they are missing."""
    parents, name = path[:-1], path[-1][0]
    if parents not in elements:
        elements[parents] = {}
        _add(elements, parents, elements[parents])
    fields = elements[parents]
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

    A str becomes CDATA, an int stands bare. Characters that XML 1.0 forbids are dropped. Some
    values are read back as simpler ones: an int as a str, an empty dict as "", a list of one item
    as the item, an empty list as no field, and every end of line as LF.

    Raises:
        ValueError: a key cannot be the name of an element.
        TypeError: a value is no str, int, dict, or list of these.
    """
    return f"<xml>{_elements(message, is_message=True)}</xml>".encode()


def _elements(fields: Message, *, is_message: bool = False, bare: bool = False) -> str:
    """Write the elements of a message, or those in an element; ``bare``: all without CDATA.

    ``from_xml`` takes CDATA in repeated elements for a follower's text, except in a list of dicts
    inside an element, such as Articles. So the others are written bare.
    """
    parts = []
    for name, value in fields.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of an XML element")
        is_list = isinstance(value, list)
        for item in value if is_list else [value]:
            is_bare = bare or (is_list and (is_message or isinstance(item, str)))
            if isinstance(item, dict):
                content = _elements(item, bare=is_bare)
            elif isinstance(item, str):
                content = _text(item, is_bare)
            elif type(item) is int:
                content = str(item)
            else:
                what = f"an item of {name}" if is_list else name
                raise TypeError(f"{what} is a {type(item).__name__}, not a str, int, dict or list")
            parts.append(f"<{name}>{content}</{name}>")
    return "".join(parts)


def _text(text: str, bare: bool) -> str:
    # Drop characters before looking for "]]>": dropping one can make another "]]>".
    text = drop_forbidden(text)
    if bare:
        return html.escape(text, quote=False)
    return f"<![CDATA[{text.replace(']]>', _ESCAPED_END)}]]>"


def drop_forbidden(text: str) -> str:
    """Return the text without the characters that XML 1.0 forbids."""
    return "".join(_ALLOWED.findall(text))
