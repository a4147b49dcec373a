"""Late answers: what a follower did not get in time waits here for the follower's next message.

``LateAnswers`` has the rules. Where the entries are kept is a ``LateStore``: ``LateFiles`` here for
one machine, ``redis_store`` for several. A follower has one entry for each message that is answered
late. It begins with a line, KIND OWNER SEEN FREE_AT GIVEN, of this KIND:

    pending   the follower was told to wait, and OWNER runs ``reply()``
    dropped   the same, but the follower has left: the answer is not wanted
    answer    the answer is there; other messages may get it from FREE_AT on; GIVEN is 1 if its
              first part was given

The message was seen at SEEN; both are Unix times. After the line come the parts of the answer that
were not given yet, divided by SOH, a character that XML cannot hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import mmap
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from wechat.answers import ErrorLog

KEEP_LATE = 48 * 3600.0  # seconds: as long as WeChat lets an account write to a follower
PENDING_FOR = 3600.0  # seconds that a follower's next message waits for a pending answer at most
SWEEP_INTERVAL = 600.0  # seconds
MARKS = 65536  # as many followers are told apart by the marks
PUSH_DELAY = 1.0  # seconds, so that what is pushed comes after the answer itself
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
    """One entry: see above."""

    kind: str
    owner: str
    seen: float
    free_at: float = 0.0
    given: int = 0
    parts: tuple[bytes, ...] = ()

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        """Read an entry; what is none counts as dropped."""
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


class LateAnswers:
    """The late answers of all followers. An OSError of the store is logged, and nothing is done.

    Args:
        store: where they are kept.
        push: sends one part to an OpenID by 客服消息, and raises when WeChat refuses it.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        store: LateStore,
        push: Callable[[str, bytes], object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._push, self._clock = store, push, clock
        self._log = ErrorLog(clock)

    def put_pending(self, follower: str, name: str, owner: str) -> None:
        """Note that the follower was told to wait, unless the answer is here already."""
        with self._log.caught(MAY_BE_LOST):
            entry = Entry("pending", owner, self._clock())
            self._store.write(follower, name, entry.to_bytes(), replace=False)

    def put(
        self, follower: str, name: str, parts: list[bytes], seen: float, free_at: float
    ) -> None:
        """Keep an answer, in place of what was here for its message.

        Another message gets it from ``free_at`` on; at once, if it was pending. If the follower has
        left meanwhile, it is dropped.
        """
        with self._log.caught(MAY_BE_LOST):
            before = self._entry(follower, name)
            kind = before.kind if before else ""
            if kind == "dropped":
                return
            if not parts:
                self._store.remove(follower, name)
                return
            free_at = 0.0 if kind == "pending" else free_at
            entry = Entry("answer", "-", seen, free_at, parts=tuple(parts))
            self._store.write(follower, name, entry.to_bytes())

    def find(self, follower: str, name: str) -> list[bytes]:
        """Return the answer of a message if none of it was given yet, else an empty list."""
        entry = None
        with self._log.caught("reply() may run twice"):
            entry = self._entry(follower, name)
        return list(entry.parts) if entry and not entry.given else []

    def give_first(self, follower: str, name: str) -> None:
        """Remove the first part, since a try gets it; other messages get the rest from now on."""
        with self._log.caught(MAY_BE_GIVEN_TWICE):
            entry = self._entry(follower, name)
            if entry and entry.kind == "answer" and not entry.given:
                self._remove_first(follower, name, entry)
            elif entry and entry.kind == "pending":  # this was the whole answer
                self._store.remove(follower, name)

    def clear(self, follower: str) -> None:
        """Drop the answers of a follower who has left, those too that are not here yet."""
        with self._log.caught("answers are kept for a follower who has left"):
            for name, entry in self._entries(follower).items():
                if entry.kind == "pending":
                    entry = entry._replace(kind="dropped")
                    self._store.write(follower, name, entry.to_bytes())
                else:
                    self._store.remove(follower, name)

    def count(self, follower: str, is_alive: Callable[[str], bool]) -> tuple[int, int, int]:
        """Count the answers that are here, that will come, and that never will; forget the last."""
        ready = alive = dead = 0
        try:
            for name, entry in self._entries(follower).items():
                if entry.kind == "answer":
                    ready += 1
                elif entry.kind == "pending":
                    if self._clock() - entry.seen < PENDING_FOR and is_alive(entry.owner):
                        alive += 1
                    else:
                        dead += 1
                        self._store.remove(follower, name)
        except OSError as error:
            self._log(MAY_BE_LOST, error)
        return ready, alive, dead

    def give_next(self, follower: str, give: Callable[[bytes], object]) -> bool:
        """Give away the first part that is free; return whether there was one.

        It is removed when ``give`` has returned, and stays if ``give`` raises or the process dies.
        Nobody else gets it meanwhile.
        """
        given = False
        with self._log.caught(MAY_BE_GIVEN_TWICE):
            now, entries = self._clock(), self._entries(follower)
            free = [(e.seen, name) for name, e in entries.items() if e.parts and e.free_at <= now]
            for _, name in sorted(free):
                with self._store.lock(follower, name) as is_locked:
                    entry = self._entry(follower, name) if is_locked else None
                    if entry and entry.parts:  # else another thread or process was quicker
                        give(entry.parts[0])
                        given = True
                        self._remove_first(follower, name, entry)
                        break
        return given

    def push_later(self, follower: str, message: dict[str, Any], free_at: float) -> None:
        """Push what waits for the follower of a message, soon after ``free_at``."""
        if self._push:
            delay = max(free_at - self._clock(), 0.0) + PUSH_DELAY
            timer = threading.Timer(delay, self._push_parts, (follower, message, self._push))
            with contextlib.suppress(RuntimeError):  # too many threads: they wait for a message
                timer.start()

    def _push_parts(
        self, follower: str, message: dict[str, Any], push: Callable[[str, bytes], object]
    ) -> None:
        """Push as many parts as WeChat takes; the others wait for the next message."""
        try:
            for _ in range(max_pushes(message)):
                if not self.give_next(follower, partial(push, message["FromUserName"])):
                    return
        except Exception as error:  # noqa: BLE001  whatever push raises, its part stays
            log.error("a late answer waits for the follower's next message: %s", error)

    def _entries(self, follower: str) -> dict[str, Entry]:
        return {name: Entry.from_bytes(e) for name, e in self._store.read(follower).items()}

    def _entry(self, follower: str, name: str) -> Entry | None:
        return self._entries(follower).get(name)

    def _remove_first(self, follower: str, name: str, entry: Entry) -> None:
        if rest := entry.parts[1:]:
            left = entry._replace(free_at=0.0, given=1, parts=rest)
            self._store.write(follower, name, left.to_bytes())
        else:
            self._store.remove(follower, name)


def max_pushes(message: dict[str, Any]) -> int:
    """Return how many 客服消息 WeChat takes after a message or an event."""
    return 3 if message.get("MsgType") == "event" else 5


class NothingLate:
    """A ``LateStore`` that keeps nothing, for those who want late answers to be dropped."""

    def read(self, _follower: str) -> dict[str, bytes]:
        """Return no entries."""
        return {}

    def write(self, _follower: str, _name: str, _entry: bytes, replace: bool = True) -> None:
        """Do nothing."""

    def remove(self, _follower: str, _name: str) -> None:
        """Do nothing."""

    def lock(self, _follower: str, _name: str) -> AbstractContextManager[bool]:
        """Lock nothing."""
        return contextlib.nullcontext(False)


class LateFiles:
    """Late answers in files: a folder for each follower, in it a file for each message.

    A file is written beside its place and renamed, so it is always whole. Nearly all followers have
    none. To know that without a system call, which costs a process with many threads a lot, all
    processes share memory with a mark for each follower who may have one: the file .marks.

    Args:
        folder: for the folders; on a local disk, not in memory: it has to survive a reboot.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._sweep_at = str(folder), 0.0
        self._writes = itertools.count()
        self._marks: mmap.mmap | None = None  # None: look into the folders

    def read(self, follower: str) -> dict[str, bytes]:
        """Return the entries of a follower."""
        if time.monotonic() > self._sweep_at:
            self._sweep()
        if self._marks and not self._marks[_mark(follower)]:
            return {}
        entries = {}
        folder = f"{self._folder}/{follower}"
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(folder):
                with contextlib.suppress(FileNotFoundError):
                    if not name.startswith("."):
                        entries[name] = Path(f"{folder}/{name}").read_bytes()
        return entries

    def write(self, follower: str, name: str, entry: bytes, replace: bool = True) -> None:
        """Write an entry; if it may not ``replace``, one that is there stays."""
        folder = f"{self._folder}/{follower}"
        new = f"{folder}/.{name}.{os.getpid()}.{next(self._writes)}"
        while True:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            try:
                fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                break
            except FileNotFoundError:  # another process has just removed the empty folder
                continue
        try:
            with open(fd, "wb") as file:
                file.write(entry)
            with contextlib.suppress(FileExistsError):
                (os.replace if replace else os.link)(new, f"{folder}/{name}")
            if self._marks:
                self._marks[_mark(follower)] = 1
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)

    def remove(self, follower: str, name: str) -> None:
        """Remove an entry if it is there, and the folder if it is empty then."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._folder}/{follower}/{name}")
        with contextlib.suppress(OSError):
            os.rmdir(f"{self._folder}/{follower}")

    @contextlib.contextmanager
    def lock(self, follower: str, name: str) -> Iterator[bool]:
        """Lock an entry until the block ends or the process dies; False: it is locked already."""
        with locked_file(f"{self._folder}/{follower}/{name}") as is_locked:
            yield bool(is_locked)

    def _sweep(self) -> None:
        """Remove what is older than ``KEEP_LATE``, and mark who has entries."""
        self._sweep_at = time.monotonic() + SWEEP_INTERVAL
        before = time.time() - KEEP_LATE
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        self._marks = self._map_marks()
        for follower in os.listdir(self._folder):
            folder = f"{self._folder}/{follower}"
            if self._marks:
                self._marks[_mark(follower)] = 1
            with contextlib.suppress(OSError):  # another process was quicker, or it is no folder
                for name in os.listdir(folder):
                    if os.stat(f"{folder}/{name}").st_mtime < before:
                        os.unlink(f"{folder}/{name}")
                os.rmdir(folder)

    def _map_marks(self) -> mmap.mmap | None:
        """Map the marks, with none set: whoever writes an entry sets its mark after that."""
        with contextlib.suppress(OSError):  # a full disk
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(f"{self._folder}/.marks", flags, 0o600)
            try:
                os.pwrite(fd, bytes(MARKS), 0)  # so that it has its room on the disk
                return mmap.mmap(fd, MARKS)
            finally:
                os.close(fd)
        return None


def _mark(follower: str) -> int:
    return zlib.crc32(follower.encode()) % MARKS


@contextlib.contextmanager
def locked_file(path: str) -> Iterator[bool | None]:
    """Hold the flock of a file until the block ends or the process dies.

    Yields False if another thread or process holds it, None if there is no such file.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Without a link it was removed or replaced meanwhile.
            is_locked = True if os.fstat(fd).st_nlink else None
        except BlockingIOError:
            is_locked = False
        yield is_locked
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough while a forked child lives
        os.close(fd)
