"""Late answers: what a follower did not get in time waits for the follower's next message.

``LateAnswers`` has the rules. A ``LateStore`` keeps the entries: ``late_files`` for one machine,
``redis_store`` for several. Each message that is answered late has an entry. The entry begins with
a line, KIND OWNER SEEN FREE_AT GIVEN, of this KIND:

    pending   the follower was told to wait, and OWNER runs ``reply()``
    dropped   the same, but the follower has left since: the answer is not wanted
    answer    the answer is there; other messages may get it from FREE_AT on; GIVEN is 1 once
              the first part was given

SEEN is when the message came first; it and FREE_AT are Unix times. After the line come the parts of
the answer that were not given yet, divided by SOH, a character that XML cannot hold.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from wechat.answers import ErrorLog

KEEP_LATE = 48 * 3600.0  # seconds: as long as WeChat lets an account write to a follower
PENDING_FOR = 3600.0  # seconds that the follower's messages ask for a pending answer at most
PUSH_DELAY = 1.0  # seconds, so that what is pushed comes after the answer itself
MAX_PARTS = 10  # messages that a long text may go on in
# The sign at the end of a text that goes on: by itself, or with the follower's next message.
PUSHED_ENDING, NEXT_ENDING = "…（未完）", "…（未完，发送任意消息继续）"
MAY_BE_LOST = "a late answer may be lost"
MAY_BE_GIVEN_TWICE = "a late answer may be given twice"

log = logging.getLogger("wechat.once")


class LateStore(Protocol):
    """Keeps entries by follower and message name, for ``KEEP_LATE``.

    All methods raise OSError when the place cannot be reached.
    """

    def read(self, follower: str) -> dict[str, bytes]:
        """Return the entries of a follower."""

    def write(self, follower: str, name: str, entry: bytes, replace: bool = True) -> None:
        """Write an entry; if it may not ``replace``, one that is there stays."""

    def remove(self, follower: str, name: str) -> None:
        """Remove an entry if it is there."""

    def lock(self, follower: str, name: str) -> AbstractContextManager[bool]:
        """Lock an entry until the block ends or the process dies; False: it is locked already."""


class Entry(NamedTuple):
    """What is known of one late answer; the module describes the fields."""

    kind: str
    owner: str
    seen: float
    free_at: float = 0.0
    given: int = 0
    parts: tuple[bytes, ...] = ()

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        """Read an entry; anything else counts as dropped."""
        line, _, rest = data.partition(b"\n")
        try:
            kind, owner, seen, free_at, given = line.decode().split(" ")
            parts = tuple(rest.split(b"\1")) if rest else ()
            return cls(kind, owner, float(seen), float(free_at), int(given), parts)
        except ValueError:
            return cls("dropped", "", 0.0)

    def to_bytes(self) -> bytes:
        """Write the entry."""
        line = f"{self.kind} {self.owner} {self.seen:.3f} {self.free_at:.3f} {self.given}\n"
        return line.encode() + b"\1".join(self.parts)


class Waiting(IntEnum):
    """What waits for a follower's next message. The highest counts if there are several."""

    NOTHING = 0
    LOST = 1  # an answer that never comes, since its owner process died
    PENDING = 2  # an answer for which ``reply()`` still runs
    FREE = 3  # an answer that is here; it may be given away at this moment


class LateAnswers:
    """The late answers of all followers. An OSError of the store is logged, and nothing is done.

    Args:
        store: where they are kept.
        push: sends one part to an OpenID by 客服消息, and raises when WeChat refuses it.
        clock: Unix time in seconds.
        drop: keep none.
    """

    def __init__(
        self,
        store: LateStore,
        push: Callable[[str, bytes], object] | None = None,
        clock: Callable[[], float] = time.time,
        drop: bool = False,
    ) -> None:
        self._store, self._push, self._clock, self._drop = store, push, clock, drop
        self._log = ErrorLog(clock)

    def endings(self, message: dict[str, Any], is_late: bool) -> list[str]:
        """Return how the parts of a long text end, but for the last; none: it has one part."""
        if self._drop:
            return []
        pushed = 0
        if self._push:
            pushed = max_pushes(message) - is_late  # the first part of a late answer is pushed too
        return [PUSHED_ENDING] * pushed + [NEXT_ENDING] * (MAX_PARTS - 1 - pushed)

    def mark_pending(self, follower: str, name: str, owner: str) -> None:
        """Note that the follower was told to wait, unless the answer is here already."""
        entry = Entry("pending", owner, self._clock())
        with self._log.caught(MAY_BE_LOST):
            self._write(follower, name, entry, replace=False)

    def save(
        self, follower: str, name: str, parts: list[bytes], seen: float, free_at: float
    ) -> None:
        """Save an answer in place of the entry of its message.

        Other messages get it from ``free_at`` on; at once, if it was pending. It is dropped if the
        follower has left meanwhile.
        """
        with self._log.caught(MAY_BE_LOST):
            before = self._entries(follower).get(name)
            kind = before.kind if before else ""
            if kind == "dropped":
                return
            if not parts:
                self._store.remove(follower, name)
                return
            free_at = 0.0 if kind == "pending" else free_at
            self._write(follower, name, Entry("answer", "-", seen, free_at, parts=tuple(parts)))

    def find(self, follower: str, name: str) -> list[bytes]:
        """Return the answer of a message if none of it was given yet, else an empty list."""
        entry = None
        with self._log.caught("reply() may run twice"):
            entry = self._entries(follower).get(name)
        return list(entry.parts) if entry and not entry.given else []

    def remove_first(self, follower: str, name: str) -> None:
        """Remove the first part, since a try gets it. Other messages get the rest from now on."""
        with self._log.caught(MAY_BE_GIVEN_TWICE):
            entry = self._entries(follower).get(name)
            if entry and entry.kind != "dropped" and not entry.given:
                self._remove_part(follower, name, entry)

    def clear(self, follower: str) -> None:
        """Drop the answers of a follower who has left, and those that are still pending."""
        with self._log.caught("answers are kept for a follower who has left"):
            for name, entry in self._entries(follower).items():
                if entry.kind == "pending":
                    self._write(follower, name, entry._replace(kind="dropped"))
                else:
                    self._store.remove(follower, name)

    def waiting(self, follower: str, is_alive: Callable[[str], bool]) -> Waiting:
        """Tell what waits for a follower's next message, and forget what is lost."""
        found, now = Waiting.NOTHING, self._clock()
        try:
            for name, entry in self._entries(follower).items():
                if entry.kind == "answer" and entry.free_at <= now:
                    found = max(found, Waiting.FREE)
                elif entry.kind == "pending":
                    if now - entry.seen < PENDING_FOR and is_alive(entry.owner):
                        found = max(found, Waiting.PENDING)
                    else:
                        found = max(found, Waiting.LOST)
                        self._store.remove(follower, name)
        except OSError as error:
            self._log(MAY_BE_LOST, error)
        return found

    @contextlib.contextmanager
    def next_part(self, follower: str) -> Iterator[bytes | None]:
        """Yield the first part that is free, if there is one that nobody gives away already.

        Nobody else gets it until the block ends. It is removed then, but stays if the block raises
        or the process dies.
        """
        found: tuple[str, Entry] | None = None
        with contextlib.ExitStack() as locks:
            with self._log.caught(MAY_BE_GIVEN_TWICE):
                found = self._lock_next(follower, locks)
            yield found[1].parts[0] if found else None
            if found:
                with self._log.caught(MAY_BE_GIVEN_TWICE):
                    self._remove_part(follower, *found)

    def push_soon(self, follower: str, message: dict[str, Any], free_at: float) -> None:
        """Push what waits for the follower of a message, soon after ``free_at``.

        What WeChat does not take waits for the next message.
        """
        if not (push := self._push):
            return

        def push_parts() -> None:
            try:
                for _ in range(max_pushes(message)):
                    with self.next_part(follower) as part:
                        if part is None:
                            return
                        push(message["FromUserName"], part)
            except Exception as error:  # noqa: BLE001  whatever push raises, its part stays
                log.error("a late answer waits for the follower's next message: %s", error)

        delay = max(free_at - self._clock(), 0.0) + PUSH_DELAY
        with contextlib.suppress(RuntimeError):  # too many threads: a message gets the parts
            threading.Timer(delay, push_parts).start()

    def _lock_next(self, follower: str, locks: contextlib.ExitStack) -> tuple[str, Entry] | None:
        """Lock the oldest answer that is free; return its name and its entry."""
        now, entries = self._clock(), self._entries(follower)
        free = [(e.seen, name) for name, e in entries.items() if e.parts and e.free_at <= now]
        for _, name in sorted(free):
            if locks.enter_context(self._store.lock(follower, name)):
                entry = self._entries(follower).get(name)
                if entry and entry.parts:  # else another thread or process has just given it
                    return name, entry
        return None

    def _entries(self, follower: str) -> dict[str, Entry]:
        if self._drop:
            return {}
        return {name: Entry.from_bytes(e) for name, e in self._store.read(follower).items()}

    def _write(self, follower: str, name: str, entry: Entry, replace: bool = True) -> None:
        if not self._drop:
            self._store.write(follower, name, entry.to_bytes(), replace)

    def _remove_part(self, follower: str, name: str, entry: Entry) -> None:
        if rest := entry.parts[1:]:
            self._write(follower, name, entry._replace(free_at=0.0, given=1, parts=rest))
        else:
            self._store.remove(follower, name)


def max_pushes(message: dict[str, Any]) -> int:
    """Return how many 客服消息 WeChat takes after a message or an event."""
    return 3 if message.get("MsgType") == "event" else 5
