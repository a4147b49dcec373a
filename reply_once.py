"""One message, one run of ``reply()``, one answer, however often and wherever WeChat asks.

WeChat waits five seconds, hangs up and sends the same message again, three times in all, and every
copy may meet another thread or process. So each message has a file, and whoever holds its flock
runs ``reply()``; the lock dies with its holder, and the next copy runs it again. The file is only
ever appended to, so that the order of its marks tells what was first:

    .        another copy has come; the first one made the file
    !        the follower was told to wait: an answer from here on is late
    = … LF   the answer is here; how many bytes each of its parts has
    …        the parts: none is silence, more than one a text that is too long for WeChat
    +        one of them was given to a later message, or pushed

A file with parts to give has a second name, in a folder of the follower's. Source of the rules: the
platform's 接收普通消息 (when it sends again, and what tells copies apart).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
Parts: TypeAlias = list[bytes]  # of an answer, in whatever form the caller gives them

PATIENCE = 5.0  # seconds until WeChat hangs up on a copy
COPIES = 3  # of a message, all in all
LAST_WORD = 0.9  # of that time, until the last copy is told to wait: this has to reach WeChat yet
POLL = 0.03  # seconds between two looks at the lock: flock itself knows no time limit
KEEP = 30.0  # seconds that a file is kept: twice what WeChat's copies take
KEEP_LATE = 48 * 3600.0  # seconds: as long as WeChat lets an account answer a message
SWEEP = 5.0  # seconds between two sweeps
APART = 10.0  # seconds between two errors in the log
PAGE = 1024  # bytes of a file that are read at first; there are seldom more

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
_SAFE = re.compile("[A-Za-z0-9_+-]{1,120}")
log = logging.getLogger("reply_once")


@dataclass(frozen=True)
class _Found:
    """What a file says. ``given`` counts the parts that were given later than the answer."""

    copies: int
    late: bool
    parts: Parts | None = None
    given: int = 0

    @property
    def rest(self) -> Parts:
        """The parts that nobody has: the first went out with the answer, if it was not late."""
        return (self.parts or [])[self.given + (not self.late) :]


@dataclass
class _Asked:
    """One copy of a message: how to run it, its file, its follower's folder, and when it came."""

    message: Message
    run: Callable[[], Parts]
    path: str
    folder: str
    came: float


class ReplyOnce:
    """Runs ``reply()`` once for a message, and remembers the answer for the copies.

    Args:
        folder: for the files; on a local disk, better in memory.
        please_wait: makes what the last copy is answered while ``reply()`` still runs.
        keep_late: whether what is late waits for the follower's next message.
        push: sends one part to an OpenID in another way, and raises when it cannot.
        typing: lets an OpenID see that an answer is being written.
        patience: seconds until a copy is given up; shorter in tests.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        folder: Path,
        please_wait: Callable[[Message], bytes],
        *,
        keep_late: bool = True,
        push: Callable[[str, bytes], object] | None = None,
        typing: Callable[[str], object] | None = None,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._late = str(folder), str(folder / "late")
        self._please_wait, self._keep_late = please_wait, keep_late
        self._push, self._typing = push, typing
        self._patience, self._clock = patience, clock
        self._sweep_at = self._complain_at = 0.0

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
        path, folder = f"{self._folder}/{name}", f"{self._late}/{who}"
        asked = _Asked(message, run, path, folder, time.monotonic())
        try:
            fd = self._come(path)
        except OSError as error:
            self._complain("a copy of this message would run reply() again", error)
            return _first(run())
        self._sweep_now_and_then()
        copy, typing = 0, False
        try:
            while True:
                locked = _lock(fd)
                if not (data := os.pread(fd, PAGE, 0)) and locked:  # as nearly always
                    return self._run(fd, asked)
                found = _parse(data) if len(data) < PAGE else _read(fd)
                copy = copy or found.copies
                if found.parts is not None:
                    return self._please_wait(message) if found.late else _first(found.parts)
                if locked and copy < COPIES:
                    return self._run(fd, asked)
                if locked:  # whoever runs reply() could not say the last word
                    try:
                        fd = self._run_beside(fd, asked)
                    except (OSError, RuntimeError):  # no more files or threads
                        return self._run(fd, asked)
                waited = time.monotonic() - asked.came
                if copy >= COPIES and waited >= LAST_WORD * self._patience:
                    return self._last_word(fd, asked)
                if waited >= self._patience:
                    return None
                if self._typing and copy > 1 and not typing:
                    typing = True
                    _start(threading.Thread(target=self._typing, args=(message["FromUserName"],)))
                time.sleep(POLL)
        finally:
            _unlock(fd)

    def _come(self, path: str) -> int:
        """Make the file of the message, or open it and count this copy."""
        try:
            return _open(path, os.O_CREAT | os.O_EXCL)
        except FileNotFoundError:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            return self._come(path)
        except FileExistsError:
            fd = _open(path, os.O_CREAT)
        try:
            os.write(fd, b".")
        except OSError:
            os.close(fd)
            raise
        return fd

    def _run(self, fd: int, asked: _Asked) -> bytes:
        """Make the answer and leave it in the file, which is locked."""
        message = asked.message.get("MsgType") != "event"  # an event is nobody's words
        if self._keep_late and message and os.access(asked.folder, os.F_OK):
            with self._waiting_part(asked.folder) as part:
                if part is not None:
                    return self._keep(fd, asked, [part])
        return self._keep(fd, asked, asked.run())

    def _keep(self, fd: int, asked: _Asked, parts: Parts) -> bytes:
        took = time.monotonic() - asked.came
        try:
            if took > COPIES * self._patience and not _read(fd).late:  # no copy will come for it
                self._tell_late(fd, asked)
            elif len(parts) > 1:
                _link(asked)
            _append(fd, parts)
        except OSError as error:
            self._complain("a copy of this message would run reply() again", error)
        late = took > LAST_WORD * self._patience and _read(fd).late
        if self._push and (late or len(parts) > 1):
            # After the answer that is being returned: the follower reads them in this order.
            _start(threading.Timer(1.0, self._push_waiting, (asked,)))
        return _first(parts)

    def _run_beside(self, fd: int, asked: _Asked) -> int:
        """Hand the locked file to a thread that makes the answer; return one to wait with."""
        other = _open(asked.path)

        def beside() -> None:
            try:
                self._run(fd, asked)
            finally:
                _unlock(fd)

        try:
            threading.Thread(target=beside).start()
        except RuntimeError:
            os.close(other)
            raise
        return other

    def _last_word(self, fd: int, asked: _Asked) -> bytes:
        """Tell the follower to wait, unless the answer comes at this very moment."""
        try:
            self._tell_late(fd, asked)
        except OSError as error:
            self._complain("a late answer will be lost", error)
        found = _read(fd)
        if found.parts is not None and not found.late:
            return _first(found.parts)
        return self._please_wait(asked.message)

    def _tell_late(self, fd: int, asked: _Asked) -> None:
        if self._keep_late:
            _link(asked)
        os.write(fd, b"!")

    @contextlib.contextmanager
    def _waiting_part(self, folder: str) -> Iterator[bytes | None]:
        """Yield the oldest part that waits for the follower, and note that it was given."""
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = os.listdir(folder)
        with contextlib.ExitStack() as stack:
            waiting = []
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):  # somebody else was quicker
                    fd = _open(path)
                    stack.callback(_unlock, fd)
                    if not _lock(fd):  # reply() still runs, or somebody else gives a part
                        continue
                    found = _read(fd)
                    if found.rest:
                        waiting.append((os.fstat(fd).st_ctime_ns, path, fd, found.rest))
                    else:  # all is given, or its owner was killed
                        os.unlink(path)
            if not waiting:
                yield None
            else:
                _, path, fd, rest = min(waiting)
                yield rest[0]
                try:
                    os.write(fd, b"+")
                    if len(rest) == 1:
                        os.unlink(path)
                except OSError as error:
                    self._complain("a late answer will be given twice", error)
            if names:
                with contextlib.suppress(OSError):  # there is more
                    os.rmdir(folder)

    def _push_waiting(self, asked: _Asked) -> None:
        """Push what waits for the follower, part by part; what cannot be pushed goes on waiting."""
        try:
            part: bytes | None = b""
            while part is not None:
                with self._waiting_part(asked.folder) as part:
                    if part is not None and self._push:
                        self._push(asked.message["FromUserName"], part)
        except Exception as error:  # noqa: BLE001  whatever it is, nothing is lost
            log.error("a late answer waits for the follower's next message: %s", error)

    def _complain(self, what: str, error: OSError) -> None:
        if not 0 <= self._complain_at - self._clock() <= APART:  # a full disk is full for all
            self._complain_at = self._clock() + APART
            log.error("%s, and more may: %s", what, error)

    def _sweep_now_and_then(self) -> None:
        now = self._clock()
        if not 0 <= self._sweep_at - now <= SWEEP:  # also when the clock was set back
            self._sweep_at = now + SWEEP
            _start(threading.Thread(target=self._sweep, args=(now,), daemon=True))

    def _sweep(self, now: float) -> None:
        """Forget what is old. One process does, at most once in ``SWEEP`` seconds."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            fd = _open(os.path.join(self._folder, "swept"), os.O_CREAT)
            stack.callback(_unlock, fd)
            if not _lock(fd) or 0 <= now - os.fstat(fd).st_mtime < SWEEP:
                return
            _forget(self._folder, now - KEEP)
            for entry in os.scandir(self._late):
                if entry.stat().st_mtime < now - KEEP_LATE:  # of the folder: its newest name
                    _forget(entry.path, now - KEEP_LATE)
                    os.rmdir(entry.path)
            os.utime(fd)


def _start(thread: threading.Thread) -> None:
    with contextlib.suppress(RuntimeError):  # there are too many; no answer depends on this one
        thread.start()


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


def _link(asked: _Asked) -> None:
    """Give the file its second name, by which the follower's next message finds it."""
    os.makedirs(asked.folder, mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.link(asked.path, os.path.join(asked.folder, os.path.basename(asked.path)))


def _open(path: str, flags: int = 0) -> int:
    return os.open(path, flags | _FLAGS, 0o600)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough while a forked child lives
    os.close(fd)


def _append(fd: int, parts: Parts) -> None:
    """Append the answer, or leave the file as it was."""
    sizes = " ".join(str(len(part)) for part in parts)
    record = b"=%b\n%b" % (sizes.encode(), b"".join(parts))
    if (written := os.write(fd, record)) < len(record):
        os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read(fd: int) -> _Found:
    return _parse(os.pread(fd, os.fstat(fd).st_size, 0))


def _parse(data: bytes) -> _Found:
    marks, record, rest = data.partition(b"=")
    if not record:
        return _Found(1 + marks.count(b"."), b"!" in marks)
    sizes, _, content = rest.partition(b"\n")
    parts, end = [], 0
    for size in map(int, sizes.split()):
        parts.append(content[end : end + size])
        end += size
    return _Found(1 + marks.count(b"."), b"!" in marks, parts, content.count(b"+", end))


def _forget(folder: str, before: float) -> None:
    """Remove the files of ``folder`` that nobody has touched since ``before``, in Unix seconds."""
    for entry in os.scandir(folder):
        if not entry.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):
            stat = entry.stat()
            if stat.st_mtime >= before:
                continue
            if stat.st_size > 2 * COPIES:  # more than marks: the answer is there
                os.unlink(entry.path)
                continue
            fd = _open(entry.path)
            try:
                if _lock(fd):  # else reply() still runs
                    os.unlink(entry.path)
            finally:
                _unlock(fd)
