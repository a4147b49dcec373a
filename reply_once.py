"""One message, one run of ``reply()``, one answer, however often and wherever WeChat asks.

WeChat waits five seconds, hangs up and sends the same message again, three times in all, and every
copy may meet another thread, process or machine. So the first copy makes the message its own and
runs ``reply()``; the others wait for its answer, and if it dies, one of them runs it again. What
they all know of a message is kept by an ``Answers``: ``reply_journal`` for one machine,
``redis_store`` for several. Source of the rules: the platform's 接收普通消息 (when it sends again,
and what tells copies apart).
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Thread, Timer
from typing import Any, NamedTuple, Protocol, TypeAlias

Message: TypeAlias = dict[str, Any]
Parts: TypeAlias = list[bytes]  # of an answer, each of them XML: none is silence

PATIENCE = 5.0  # seconds until WeChat hangs up on a copy
COPIES = 3  # of a message, all in all
LAST_WORD = 0.9  # of that time, until the last copy is told to wait: this has to reach WeChat yet
KEEP = 20.0  # seconds that a message is known at least: WeChat's copies take 15
KEEP_LATE = 48 * 3600.0  # seconds: as long as WeChat lets an account answer a message
APART = 10.0  # seconds between two errors in the log

_SAFE = re.compile("[A-Za-z0-9_+-]{1,120}")
log = logging.getLogger("reply_once")


class Found(NamedTuple):
    """What is known of a message.

    ``copies`` of it have come; ``mine``: this very call made it the caller's to run; ``late``: its
    follower was told to wait before the answer was there; ``parts``: the answer, if it is there;
    ``waiting``: there may be a part of another answer for the follower.
    """

    copies: int
    mine: bool = False
    late: bool = False
    parts: Parts | None = None
    waiting: bool = False


class Answers(Protocol):
    """Where copies find one another. All methods raise OSError when it cannot be reached.

    All copies of a message have the same ``name``, all messages of a follower the same ``who``.
    """

    poll: float  # seconds between two looks for an answer

    def come(self, name: str, who: str) -> Found:
        """Count a copy. The message is its own when it is nobody's, or its owner has died."""

    def look(self, name: str) -> Found:
        """Look again. The message is the caller's when its owner has died."""

    def tell_late(self, name: str) -> Found:
        """Note that the follower was told to wait, if the answer is not there yet."""

    def keep(self, name: str, parts: Parts) -> object:
        """Leave the answer for the copies."""

    def put(self, who: str, order: str, part: bytes) -> None:
        """Let a part wait for the follower's next messages, behind those of lesser ``order``."""

    def waiting(self, who: str) -> AbstractContextManager[bytes | None]:
        """Yield the first part that waits for the follower; it is gone when the block succeeds."""


@dataclass(slots=True)
class _Asked:
    """One copy of a message: how to run it, its names, and when it came, by two clocks."""

    message: Message
    run: Callable[[], Parts]
    who: str
    name: str
    came: float
    order: float


class ReplyOnce:
    """Runs ``reply()`` once for a message, and remembers the answer for the copies.

    Args:
        answers: where copies find one another.
        please_wait: makes what the last copy is answered while ``reply()`` still runs.
        keep_late: whether what is late waits for the follower's next message.
        push: sends one part to an OpenID in another way, and raises when it cannot.
        typing: lets an OpenID see that an answer is being written.
        patience: seconds until a copy is given up; shorter in tests.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        answers: Answers,
        please_wait: Callable[[Message], bytes],
        *,
        keep_late: bool = True,
        push: Callable[[str, bytes], object] | None = None,
        typing: Callable[[str], object] | None = None,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._answers, self._please_wait, self._keep_late = answers, please_wait, keep_late
        self._push, self._typing = push, typing
        self._patience, self._clock = patience, clock
        self._complain_at = 0.0

    def answer(self, message: Message, run: Callable[[], Parts]) -> bytes | None:
        """Return the answer to ``message``, empty for silence.

        It is None when ``reply()`` still runs and WeChat hangs up now: the next copy may get it.
        What is no answer, even success, would be the end of the copies.

        Args:
            message: one copy of it.
            run: runs ``reply()``, and raises nothing.
        """
        who, name = _names(message)
        if not name:
            return _first(run())
        asked = _Asked(message, run, who, name, time.monotonic(), self._clock())
        try:
            found = self._answers.come(name, who)
        except OSError as error:
            self._complain("a copy of this message would run reply() again", error)
            return _first(run())
        if found.mine and found.copies < COPIES:  # as nearly always
            return self._run(asked, found.waiting)
        return self._wait(asked, found)

    def _wait(self, asked: _Asked, found: Found) -> bytes | None:
        copy, typing = found.copies, False
        while True:
            if found.parts is not None:
                return self._please_wait(asked.message) if found.late else _first(found.parts)
            # The last copy has it run beside, for whoever runs reply() cannot say the last word.
            if found.mine and (
                copy < COPIES or not _start(Thread(target=self._run, args=(asked,)))
            ):
                return self._run(asked)
            waited = time.monotonic() - asked.came
            if copy >= COPIES and waited >= LAST_WORD * self._patience:
                return self._last_word(asked)
            if waited >= self._patience:
                return None
            if self._typing and copy > 1 and not typing:
                typing = True
                openid = asked.message["FromUserName"]
                _start(Thread(target=self._typing, args=(openid,)))
            time.sleep(self._answers.poll)
            try:
                found = self._answers.look(asked.name)
            except OSError as error:
                found = found._replace(mine=False)
                self._complain("a copy waits for an answer that it cannot see", error)

    def _run(self, asked: _Asked, waiting: bool = False) -> bytes:
        """Make the answer and leave it for the copies."""
        answer = None
        if waiting and self._keep_late and asked.message.get("MsgType") != "event":
            try:
                with self._answers.waiting(asked.who) as part:  # an event is nobody's words
                    if part is not None:
                        answer = self._keep(asked, [part])
            except OSError as error:
                self._complain("a late answer may be given twice", error)
        return self._keep(asked, asked.run()) if answer is None else answer

    def _keep(self, asked: _Asked, parts: Parts) -> bytes:
        took, late = time.monotonic() - asked.came, False
        may_be_late = LAST_WORD * self._patience  # before that nobody was told to wait
        try:
            if took > COPIES * self._patience:  # no copy will come for it
                late = self._answers.tell_late(asked.name).late
            elif took > may_be_late:
                late = self._answers.look(asked.name).late
            # What waits is put there first, so that a worker that is killed loses nothing.
            if late or len(parts) > 1:
                self._put(asked, parts, 0 if late else 1)
        except OSError as error:
            self._complain("a late answer may be lost", error)
        try:  # in any case, or the copies would wait for it in vain
            self._answers.keep(asked.name, parts)
            took = time.monotonic() - asked.came
            if not late and took > may_be_late and self._answers.look(asked.name).late:
                late = True  # told meanwhile
                self._put(asked, parts[:1])
        except OSError as error:
            self._complain("an answer cannot be kept for the copies of its message", error)
        if self._push and (late or len(parts) > 1):
            # After the answer that is being returned: the follower reads them in this order.
            _start(Timer(1.0, self._push_waiting, (asked,)))
        return _first(parts)

    def _put(self, asked: _Asked, parts: Parts, first: int = 0) -> None:
        if self._keep_late:
            for number in range(first, len(parts)):
                self._answers.put(asked.who, f"{asked.order:017.6f}.{number}", parts[number])

    def _last_word(self, asked: _Asked) -> bytes:
        """Tell the follower to wait, unless the answer comes at this very moment."""
        try:
            found = self._answers.tell_late(asked.name)
            if found.parts is not None and not found.late:
                return _first(found.parts)
        except OSError as error:
            self._complain("a late answer may be lost", error)
        return self._please_wait(asked.message)

    def _push_waiting(self, asked: _Asked) -> None:
        """Push what waits for the follower, part by part; what cannot be pushed goes on waiting."""
        try:
            part: bytes | None = b""
            while part is not None:
                with self._answers.waiting(asked.who) as part:
                    if part is not None and self._push:
                        self._push(asked.message["FromUserName"], part)
        except Exception as error:  # noqa: BLE001  whatever push raises, its part goes on waiting
            log.error("a late answer waits for the follower's next message: %s", error)

    def _complain(self, what: str, error: OSError) -> None:
        if not 0 <= self._complain_at - self._clock() <= APART:  # a full disk is full for all
            self._complain_at = self._clock() + APART
            log.error("%s, and more may: %s", what, error)


def _start(thread: Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:  # there are too many
        return False
    return True


def _first(parts: Parts) -> bytes:
    return parts[0] if parts else b""


def _names(message: Message) -> tuple[str, str]:
    """Return names that all messages of the follower and all copies of this one share.

    The second is empty when nothing tells the copies apart.
    """
    who = f"{message.get('ToUserName')}+{message.get('FromUserName')}"
    which = message.get("MsgId")
    if message.get("MsgType") == "event":
        which = "+".join(str(message.get(name)) for name in ("CreateTime", "Event", "EventKey"))
    name = f"{who}+{which}" if which else ""
    if _SAFE.fullmatch(name):  # as nearly always
        return who, name
    return who if _SAFE.fullmatch(who) else _digest(who), _digest(name) if name else ""


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
