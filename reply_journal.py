"""What ``reply_once`` remembers, on one machine: a journal that all processes append to and read.

A record is one write to a file opened with O_APPEND, which the kernel never mixes with another. So
everybody reads the same records in the same order, and whose claim of a message is the first is its
owner. That takes no lock, which a thread that waits for its turn in Python would keep from all
other processes. A record begins with NUL and ends with STX; one that is torn is nobody's:

    ? NAME OWNER       a copy of the message has come, and is its owner if it has none
    > NAME OWNER DEAD  its owner was DEAD, and has died
    + FOLLOWER         a part of an answer waits for the follower, in a folder of its own
    / NEXT OWNER       the end: a message that is not here yet has its place in file NEXT

Beside it is a file of answers, which only they read who have another copy of a message:

    = NAME PARTS       the answer, its parts divided by SOH
    ! NAME             the follower was told to wait: an answer from here on is late

XML can hold none of these three characters. An owner is a run of ``reply()`` in a process, and each
process holds the flock of a file of its own as long as it lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from reply_once import KEEP, KEEP_LATE, Found, Parts

PAGE = 1024  # bytes that are read at first; there are seldom more

# What nearly every message finds: it is new, and something waits for its follower, or nothing.
_FIRST = (Found(1, mine=True), Found(1, mine=True, waiting=True))

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class _Records:
    """A file of records, and how far this process has read it."""

    def __init__(self, path: str, flags: int) -> None:
        self._end, self._lock = 0, threading.Lock()
        self._fd = _open(path, flags)
        # When no thread needs it any more, but not at exit, under the threads that still run.
        weakref.finalize(self, os.close, self._fd).atexit = False

    def take(self, kind: bytes, name: bytes, rest: bytes) -> None:
        """Remember what a record says."""
        raise NotImplementedError

    def append(self, kind: bytes, name: bytes, rest: bytes = b"") -> bytes:
        record = b"\0%b %b %b\2" % (kind, name, rest)
        if os.write(self._fd, record) < len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return record

    def add(self, kind: bytes, name: bytes, rest: bytes = b"") -> None:
        """Append a record, and take it and what was appended before it."""
        own = self.append(kind, name, rest)
        end = self._end
        data = os.pread(self._fd, PAGE, end)
        if data.endswith(own):  # as nearly always
            with self._lock:  # held during no system call
                if self._end == end:
                    self._end = end + len(data)
                    if len(data) > len(own):
                        self._take_all(data[: -len(own)])
                    self.take(kind, name, rest)
                    return
        self.read()  # it is not the last any more, or taken already

    def read(self) -> None:
        """Take what was appended since the last time."""
        while True:
            size, end = PAGE, self._end
            while len(data := os.pread(self._fd, size, end)) == size:
                size *= 4
            whole = data[: data.rfind(b"\2") + 1]  # the rest is being written
            with self._lock:
                if self._end == end:
                    self._end = end + len(whole)
                    return self._take_all(whole)

    def _take_all(self, data: bytes) -> None:
        for record in data.split(b"\0"):
            words = record.split(b" ", 2)
            if len(words) == 3 and record[-1] == 2:  # STX
                kind, name, rest = words
                self.take(kind, name, rest[:-1])


class _Claims(_Records):
    """Whose the messages are."""

    def __init__(self, path: str, flags: int, waiting: set[bytes]) -> None:
        super().__init__(path, flags)
        self.owners: dict[bytes, bytes] = {}  # by the names of messages
        self.copies: Counter[bytes] = Counter()  # after the first
        self.next, self.closer, self._waiting = 0, b"", waiting

    def take(self, kind: bytes, name: bytes, rest: bytes) -> None:
        if kind == b"?":
            if name in self.owners:
                self.copies[name] += 1
            elif not self.next:
                self.owners[name] = rest
        elif kind == b">":
            owner, _, dead = rest.partition(b" ")
            if self.owners.get(name) == dead:
                self.owners[name] = owner
        elif kind == b"+":
            self._waiting.add(name)
        elif kind == b"/" and not self.next and name.isdigit():
            self.next, self.closer = int(name), rest


class _Answers(_Records):
    """What they were answered."""

    def __init__(self, path: str, flags: int) -> None:
        super().__init__(path, flags)
        self.parts: dict[bytes, bytes] = {}  # by the names of messages
        self.late: set[bytes] = set()

    def take(self, kind: bytes, name: bytes, rest: bytes) -> None:
        if kind == b"=":
            self.parts.setdefault(name, rest)
        elif kind == b"!" and name not in self.parts:
            self.late.add(name)


class _File:
    """One file of the journal and its answers."""

    def __init__(self, folder: str, number: int, waiting: set[bytes], flags: int = 0) -> None:
        self.number, self.opened, self.closed = number, time.monotonic(), math.inf
        self.claims = _Claims(f"{folder}/journal.{number}", flags, waiting)
        # Made after the journal, and removed after it: whoever has that one finds this one.
        self.answers = _Answers(f"{folder}/answers.{number}", os.O_CREAT)

    def found(self, name: bytes, mine: bool, waiting: bool = False) -> Found:
        """Return what is known of a message."""
        answer, late = self.answers.parts.get(name), name in self.answers.late
        parts = None if answer is None else answer.split(b"\1") if answer else []
        return Found(1 + self.claims.copies[name], mine, late, parts, waiting)


class Journal:
    """Remembers answers for all threads and processes of this machine; see ``reply_once.Answers``.

    Args:
        folder: for the files; on a local disk, better in memory.
        keep: seconds that a message is known at least; shorter in tests.
    """

    poll = 0.03

    def __init__(self, folder: Path, keep: float = KEEP) -> None:
        self._folder, self._late_folder, self._keep = str(folder), str(folder / "late"), keep
        self._files: list[_File] = []  # all but the last are closed
        self._waiting: set[bytes] = set()  # followers for whom there may be something
        self._process, self._flock = b"", -1
        self._runs = itertools.count()
        self._lock = threading.RLock()  # of the files that are open
        _journals.add(self)

    def come(self, name: str, who: str) -> Found:
        """Count a copy, and make the message its own if it is nobody's or its owner has died."""
        key, owner, last = name.encode(), self._owner(), self._last()
        while True:
            file = self._file_of(key) or last  # which may have just been opened and read
            file.claims.add(b"?", key, owner)
            if key in file.claims.owners:
                break
            if not file.claims.next:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            last = self._follow(file)
        waiting = bool(self._waiting) and who.encode() in self._waiting
        if file.claims.owners[key] == owner:  # as nearly always
            found = _FIRST[waiting]
        else:
            found = file.found(key, self._inherit(file, key, owner), waiting)
        if time.monotonic() - file.opened > self._keep / 2:
            with contextlib.suppress(OSError, RuntimeError):  # later, then
                self._turn(owner)
        return found

    def look(self, name: str) -> Found:
        """Look again, and make the message the caller's if its owner has died."""
        key = name.encode()
        if not (file := self._file_of(key)):
            return Found(0, late=True)
        file.claims.read()
        return file.found(key, self._inherit(file, key, self._owner()))

    def tell_late(self, name: str) -> Found:
        """Note that the follower was told to wait, if the answer is not there yet."""
        key = name.encode()
        if not (file := self._file_of(key)):  # it ran so long that no copy will ask for it
            return Found(0, late=True)
        file.answers.add(b"!", key)
        return file.found(key, mine=False)

    def keep(self, name: str, parts: Parts) -> None:
        """Leave the answer for the copies."""
        key = name.encode()
        if file := self._file_of(key):
            try:
                file.answers.append(b"=", key, b"\1".join(parts))
            except OSError:
                self._die()  # or the copies would wait for an answer that nobody will give
                raise

    def put(self, who: str, order: str, part: bytes) -> None:
        """Let a part wait for the follower, behind those of lesser ``order``."""
        folder = f"{self._late_folder}/{who}"
        new, path = f"{folder}/.{order}", f"{folder}/{order}"
        while True:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            try:
                with open(_open(new, os.O_CREAT | os.O_TRUNC), "wb") as successor:
                    successor.write(part)
                os.rename(new, path)
                break
            except FileNotFoundError:  # somebody has just removed the empty folder
                continue
        file = self._last()
        file.claims.add(b"+", who.encode())
        while file.claims.next:
            file = self._follow(file)
            file.claims.add(b"+", who.encode())

    @contextlib.contextmanager
    def waiting(self, who: str) -> Iterator[bytes | None]:
        """Yield the first part that waits for the follower; it is gone when the block succeeds."""
        folder = f"{self._late_folder}/{who}"
        # Before the look, for whoever puts a part there adds the follower after that.
        self._waiting.discard(who.encode())
        names = sorted(name for name in _list(folder) if name[0] != ".")
        if names:
            self._waiting.add(who.encode())
        with contextlib.ExitStack() as stack:
            for name in names:
                path = f"{folder}/{name}"
                try:
                    fd = _open(path)
                except FileNotFoundError:  # somebody else was quicker
                    continue
                stack.callback(_unlock, fd)
                if _lock(fd) and (stat := os.fstat(fd)).st_nlink:
                    yield os.pread(fd, stat.st_size, 0)
                    os.unlink(path)
                    if len(names) == 1:
                        with contextlib.suppress(OSError):  # there is more by now
                            os.rmdir(folder)
                    return
            yield None

    def after_fork(self) -> None:
        """Leave the parent's locks to the parent."""
        self._lock, self._files = threading.RLock(), []
        self._die()

    def _die(self) -> None:
        """Let what this process runs look as if it had died."""
        with self._lock:
            if self._flock >= 0:
                os.close(self._flock)
            self._process, self._flock = b"", -1

    def _owner(self) -> bytes:
        return b"%b/%d" % (self._process or self._begin(), next(self._runs))

    def _begin(self) -> bytes:
        """Make the file whose lock shows that this process lives; return its name."""
        with self._lock:
            if not self._process:
                name = f"process.{os.getpid()}.{time.time_ns()}"
                path = f"{self._folder}/{name}"
                os.makedirs(self._folder, mode=0o700, exist_ok=True)
                fd = _open(path, os.O_CREAT | os.O_EXCL)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX)
                except OSError:
                    os.close(fd)
                    os.unlink(path)
                    raise
                self._process, self._flock = name.encode(), fd
            return self._process

    def _lives(self, owner: bytes) -> bool:
        process = owner.partition(b"/")[0]
        if process == self._process:
            return True
        try:
            fd = _open(f"{self._folder}/{process.decode()}")
        except FileNotFoundError:
            return False
        except OSError:  # too many open files: who looks again may see
            return True
        try:
            return not _lock(fd)
        finally:
            _unlock(fd)

    def _inherit(self, file: _File, key: bytes, owner: bytes) -> bool:
        """Look for the answer; make ``owner`` the owner if that of the message died without one."""
        file.answers.read()
        if key in file.answers.parts or self._lives(dead := file.claims.owners[key]):
            return False
        file.claims.add(b">", key, b"%b %b" % (owner, dead))
        file.answers.read()  # it may have been given just before its owner's death
        return file.claims.owners[key] == owner and key not in file.answers.parts

    def _file_of(self, key: bytes) -> _File | None:
        for file in self._files:
            if key in file.claims.owners:
                return file
        return None

    def _last(self) -> _File:
        if not self._files:
            with self._lock:  # two who open them would not see what the other one reads
                return (self._files or self._open_all())[-1]
        return self._files[-1]

    def _open_all(self) -> list[_File]:
        """Open the files that are there, or the first one, and read them."""
        with self._lock:
            self._waiting.update(map(str.encode, _list(self._late_folder)))
            files: list[_File] = []
            if not (numbers := sorted(self._numbers())):
                numbers = [self._open(1, os.O_CREAT).number]
            for number in numbers:
                try:
                    file = self._open(number)
                except FileNotFoundError:  # it was removed meanwhile: it must not be made again
                    continue
                files.append(file)
                file.claims.read()
                if not file.claims.next:  # a later one is not in use yet
                    break
                file.closed = file.opened
                if number == numbers[-1]:
                    numbers.append(file.claims.next)
            self._files = files or self._open_all()
        return self._files

    def _open(self, number: int, flags: int = 0) -> _File:
        return _File(self._folder, number, self._waiting, flags)

    def _follow(self, file: _File) -> _File:
        """Return the last file, after ``file`` was closed."""
        with self._lock:
            if file is self._files[-1]:  # else another thread was quicker
                try:
                    following = self._open(file.claims.next)
                except FileNotFoundError:  # this process has slept, and it is gone by now
                    return self._open_all()[-1]
                following.claims.read()
                file.closed = now = following.opened
                files = [each for each in self._files if now - each.closed < self._keep]
                self._files = [*files, following]
            return self._files[-1]

    def _turn(self, owner: bytes) -> None:
        """Close the last file if it is time; who is the first to do so removes old files too."""
        with self._lock:
            file = self._files[-1]
            if time.monotonic() - file.opened <= self._keep / 2:
                return
            os.makedirs(self._folder, mode=0o700, exist_ok=True)  # whoever removed it
            if not os.path.exists(f"{self._folder}/{self._process.decode()}"):
                self._die()  # as it looks to the others; the next run begins a new one
            number = max(self._numbers(), default=0)
            if number <= file.number:  # else it is there: its maker was killed, or began anew
                number = file.number + 1
                self._open(number, os.O_CREAT)
            file.claims.add(b"/", b"%d" % number, owner)
            self._follow(file)
            self._waiting.clear()  # those whose part another process gave
            self._waiting.update(map(str.encode, _list(self._late_folder)))
        if file.claims.closer == owner:
            threading.Thread(target=self._sweep, args=(number,), daemon=True).start()

    def _sweep(self, last: int) -> None:
        """Remove what is old: files before the last one, of dead processes, and what waits."""
        before = time.time() - self._keep
        for name in sorted(_list(self._folder), reverse=True):  # a journal before its answers
            path, (kind, _, number) = f"{self._folder}/{name}", name.partition(".")
            with contextlib.suppress(OSError):  # somebody else was quicker
                if os.stat(path).st_mtime >= before:
                    continue
                if kind in ("journal", "answers") and number.isdecimal() and int(number) < last:
                    if kind == "journal" or not os.path.exists(f"{self._folder}/journal.{number}"):
                        os.unlink(path)
                elif kind == "process":
                    fd = _open(path)
                    try:
                        if _lock(fd):
                            os.unlink(path)
                    finally:
                        _unlock(fd)
        before = time.time() - KEEP_LATE
        for who in _list(self._late_folder):
            folder = f"{self._late_folder}/{who}"
            with contextlib.suppress(OSError):
                if os.stat(folder).st_mtime < before:  # of its newest name
                    for name in os.listdir(folder):
                        os.unlink(f"{folder}/{name}")
                    os.rmdir(folder)

    def _numbers(self) -> list[int]:
        names = (name[8:] for name in _list(self._folder) if name[:8] == "journal.")
        return [int(number) for number in names if number.isdecimal()]


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _open(path: str, flags: int = 0) -> int:
    return os.open(path, flags | _FLAGS, 0o600)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough while a forked child lives
    finally:
        os.close(fd)


_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _after_fork() -> None:
    for journal in _journals:
        journal.after_fork()


os.register_at_fork(after_in_child=_after_fork)
