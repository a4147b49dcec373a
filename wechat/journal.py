"""What ``once`` remembers on one machine: a journal that all processes append to and read.

A record is one write to a file that was opened with O_APPEND. The kernel puts such writes one after
another, so all processes read the same records in the same order, and need no lock. The first
claim of a message decides who owns it. A record is NUL, its kind, a space, a word, a space, the
rest, and STX:

    ? NAME OWNER SEEN   a try of the message came at SEEN (Unix time); OWNER runs reply(), unless
                        the message has an owner
    > NAME OWNER DEAD   the process of DEAD, who owned the message, died; OWNER runs reply() again
    ! NAME              the follower was told to wait; it counts only before the answer
    = NAME ANSWER       the answer: XML, which holds neither NUL nor STX; empty for silence
    /                   the end: a message that has no record yet is claimed in the next file

Readers skip what is no record, such as half a record that a full disk left behind. A file is
named after the time when it was made, journal.MILLISECONDS. Messages are claimed in the newest
file; a process that makes a new one ends all the others. An owner is PROCESS/N, the Nth run of
``reply()`` in a process. Each process holds the flock of a file of its own, process.PID.TIME, as
long as it is alive.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from wechat.answers import REMEMBER, Answers, State
from wechat.config import Config, make_state_dir
from wechat.late import LateStore
from wechat.late_files import LateFiles, locked_file

PAGE = 4096  # bytes to read at first; new records seldom take more
CHECK_INTERVAL = 1.0  # seconds between two looks at this process's own files

_RECORD = re.compile(rb"\x00([?>!=/]) ([^ \x00\x02]*) ([^\x00\x02]*)\x02")
_UNIX_TIME = re.compile(rb"[0-9]+\.[0-9]+")
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(slots=True)
class _Message:
    """What the records say about one message."""

    owner: bytes
    seen: float  # Unix time of the first try
    tries: int = 0
    told_to_wait: bool = False
    answer: tuple[int, int] | None = None  # its place in the file: length, offset
    unsaved: bytes | None = None  # an answer of this process that could not be written


class _File:
    """One file of the journal, as far as this process has read it."""

    def __init__(self, path: str) -> None:
        self.messages: dict[bytes, _Message] = {}
        self.ended_at: float | None = None  # by time.monotonic(): when this process saw the end
        self._read_to, self._lock = 0, threading.Lock()
        self.path, self.fd = path, os.open(path, _FLAGS)
        # Other threads may still use the fd. It is closed when no thread has the object any more.
        weakref.finalize(self, os.close, self.fd).atexit = False

    def append(self, kind: bytes, name: bytes = b"", rest: bytes = b"") -> None:
        record = b"\0%b %b %b\2" % (kind, name, rest)
        if os.write(self.fd, record) < len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def append_and_read(self, kind: bytes, name: bytes = b"", rest: bytes = b"") -> None:
        self.append(kind, name, rest)
        self.read()

    def read(self) -> None:
        """Read the records that were appended since the last time."""
        while True:
            start, size = self._read_to, PAGE
            while len(data := os.pread(self.fd, size, start)) == size:
                size *= 4
            # No thread holds the lock during the system call: all others would wait for it.
            with self._lock:
                if self._read_to == start:  # else another thread has read the same records
                    for record in _RECORD.finditer(data):
                        self._apply(record[1], record[2], record[3], start + record.start(3))
                    self._read_to += data.rfind(b"\2") + 1  # the rest is still being written
                    return

    def detect_damage(self) -> None:
        """End the file if it was removed or cut short: others may claim its messages elsewhere."""
        status = os.fstat(self.fd)
        if not status.st_nlink or status.st_size < self._read_to:
            self.ended_at = self.ended_at or time.monotonic()

    def _apply(self, kind: bytes, name: bytes, rest: bytes, offset: int) -> None:
        message = self.messages.get(name)
        if kind == b"?":
            owner, _, seen = rest.partition(b" ")
            if not message and self.ended_at is None and _UNIX_TIME.fullmatch(seen):
                message = self.messages[name] = _Message(owner, float(seen))
            if message:
                message.tries += 1
        elif kind == b"/" and not name:
            self.ended_at = self.ended_at or time.monotonic()
        elif message and message.answer is None:
            if kind == b"=":
                message.answer = (len(rest), offset)
            elif kind == b"!":
                message.told_to_wait = True
            elif kind == b">":
                owner, _, dead = rest.partition(b" ")
                message.owner = owner if message.owner == dead else message.owner


class Journal:
    """Remembers messages for all threads and processes of a machine; see ``answers.Answers``.

    Args:
        folder: for the files; on a local disk, better in memory.
        remember: seconds that a message is remembered at least; shorter in tests.
    """

    poll_interval = 0.03

    def __init__(self, folder: Path, remember: float = REMEMBER) -> None:
        self._folder, self._remember = str(folder), remember
        self._runs = itertools.count()
        self._reset()
        _journals.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._files: list[_File] = []  # all but the last are ended
        self._locks: dict[bytes, int] = {}  # fds of this process's files, by their names
        self._process = b""  # the name of the last of them
        self._check_at = self._renew_at = 0.0  # by time.monotonic()

    def claim(self, name: str) -> State:
        """Count a try. The caller owns the message if nobody did or its owner process died."""
        if time.monotonic() >= self._check_at:
            self._check()
        key, owner = name.encode(), self._new_owner()
        while True:
            newest = (self._files or self._open_files())[-1]
            file = self._file_of(key) or newest
            file.append_and_read(b"?", key, b"%b %.3f" % (owner, time.time()))
            if key in file.messages:
                return self._state(file, key, owner)
            file.detect_damage()
            if file.ended_at is None:
                raise OSError(errno.EIO, "another program changed the journal")
            self._open_files()

    def poll(self, name: str) -> State:
        """Read again. The caller owns the message if its owner process died without an answer."""
        key = name.encode()
        if not (file := self._file_of(key)):  # this process slept too long
            return State(tries=0, age=0.0, owner="")
        file.read()
        return self._state(file, key, self._new_owner())

    def answered(self, names: list[str]) -> list[str]:
        """Return those of the names that have an answer."""
        for file in self._files:
            file.read()
        answered = []
        for name in names:
            key = name.encode()
            if (found := self._file_of(key)) and found.messages[key].answer is not None:
                answered.append(name)
        return answered

    def tell_to_wait(self, name: str) -> State:
        """Note that the follower was told to wait, unless the answer is there."""
        key = name.encode()
        if not (file := self._file_of(key)):
            return State(tries=0, age=0.0, owner="")
        file.append_and_read(b"!", key)
        return self._state(file, key)

    def save(self, name: str, answer: bytes) -> None:
        """Save the answer for the other tries."""
        key = name.encode()
        if not (file := self._file_of(key)):  # reply() ran so long that no try comes any more
            return
        try:
            file.append(b"=", key, answer)
        except OSError:
            file.messages[key].unsaved = answer  # for the tries that reach this process
            raise

    def is_alive(self, owner: str) -> bool:
        """Tell whether the owner's process is alive."""
        process = owner.encode().partition(b"/")[0]
        if process in self._locks:
            return True
        try:
            with locked_file(f"{self._folder}/{process.decode()}") as is_locked:
                return is_locked is False
        except OSError:  # perhaps this process has too many open files
            return True

    def after_fork(self) -> None:
        """Close the parent's locks: a child that lives on must not keep the parent alive."""
        for fd in self._locks.values():
            os.close(fd)
        self._reset()

    def _state(self, file: _File, key: bytes, heir: bytes = b"") -> State:
        """Return the state of a message. ``heir`` owns it from now on if its owner has died."""
        message = file.messages[key]
        answer = message.unsaved
        if answer is None and not message.answer and heir and heir != message.owner:
            dead = message.owner
            if not self.is_alive(dead.decode()):
                file.append_and_read(b">", key, heir + b" " + dead)
        if message.answer:
            answer = os.pread(file.fd, *message.answer)
        is_mine = message.owner == heir and answer is None
        age = max(time.time() - message.seen, 0.0)
        tries, owner = message.tries, message.owner.decode()
        return State(tries, age, owner, is_mine, message.told_to_wait, answer)

    def _new_owner(self) -> bytes:
        """Return a name for a run of ``reply()`` in this process."""
        return b"%b/%d" % (self._process or self._register(), next(self._runs))

    def _register(self) -> bytes:
        """Make the file whose lock shows that this process is alive; return its name."""
        with self._lock:
            if not self._process:
                name = f"process.{os.getpid()}.{time.time_ns()}"
                os.makedirs(self._folder, mode=0o700, exist_ok=True)
                fd = os.open(f"{self._folder}/{name}", _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
                fcntl.flock(fd, fcntl.LOCK_EX)
                self._process = name.encode()
                self._locks[self._process] = fd
            return self._process

    def _file_of(self, key: bytes) -> _File | None:
        for file in self._files:
            if key in file.messages:
                return file
        return None

    def _check(self) -> None:
        """See that this process's files are still there; make a new journal file if it is time."""
        with self._lock:
            now = time.monotonic()
            self._check_at = now + min(CHECK_INTERVAL, self._remember / 2)
            if self._process and not os.fstat(self._locks[self._process]).st_nlink:
                self._process = b""
            if self._files:
                self._files[-1].detect_damage()
            if self._files and now >= self._renew_at:
                self._renew_at = now + self._remember / 2  # should it fail, for example on ENOSPC
                with contextlib.suppress(OSError):
                    self._open_files(renew=self._files[-1])

    def _open_files(self, renew: _File | None = None) -> list[_File]:
        """Open and read all files, and end all but the newest.

        A new one is made first if the newest is ended, or is ``renew``.
        """
        with self._lock:
            known = {file.path: file for file in self._files if os.fstat(file.fd).st_nlink}
            while True:
                numbers, files = self._sweep(), list[_File]()
                for path in map(self._path, numbers):
                    with contextlib.suppress(FileNotFoundError):  # another process removed it
                        files.append(known.get(path) or _File(path))
                for file in files:
                    file.read()
                    if file is not files[-1] and file.ended_at is None:
                        file.append_and_read(b"/")
                if files and files[-1].ended_at is None and files[-1] is not renew:
                    break
                number = max([int(time.time() * 1000), *(number + 1 for number in numbers)])
                os.close(os.open(self._path(number), _FLAGS | os.O_CREAT, 0o600))
            now = time.monotonic()
            removed = [file for file in self._files if file not in files]
            for file in removed:
                file.ended_at = file.ended_at or now
            self._files = [
                file for file in removed + files if now - (file.ended_at or now) < self._remember
            ]
            self._renew_at = now + self._remember / 2
            return self._files

    def _path(self, number: int) -> str:
        return f"{self._folder}/journal.{number}"

    def _sweep(self) -> list[int]:
        """Remove old journals and the files of dead processes; return the journals' numbers."""
        before, numbers = time.time() - self._remember, list[int]()
        for name in os.listdir(self._folder):
            kind, _, number = name.partition(".")
            path = f"{self._folder}/{name}"
            if kind == "journal" and number.isdecimal():
                numbers.append(int(number))
            elif kind == "process":
                # A younger one may be made at this moment, and not be locked yet.
                with contextlib.suppress(OSError), locked_file(path) as is_locked:
                    if is_locked and os.stat(path).st_mtime < before:
                        os.unlink(path)
        numbers.sort()
        # A file's mtime is no measure: a write that fails for lack of room changes it.
        while len(numbers) > 1 and numbers[1] < before * 1000:
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                os.unlink(self._path(numbers.pop(0)))
        return numbers


def stores(config: Config) -> tuple[Answers, LateStore]:
    """Return where the account of config.ini keeps messages and late answers.

    Raises:
        ConfigError: ``state_dir`` cannot be made.
    """
    make_state_dir(config)
    folder = config.runtime_dir or config.state_dir
    return Journal(folder / "replies"), LateFiles(config.state_dir / "late")


_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _after_fork() -> None:
    for journal in _journals:
        journal.after_fork()


os.register_at_fork(after_in_child=_after_fork)
