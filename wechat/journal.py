"""What ``once`` remembers on one machine: a journal that all processes append to and read.

A record is one write to a file opened with O_APPEND. The kernel never mixes two of them, so all
processes read the same records in the same order, and no lock is needed. The first claim of a
message is the one that counts. A record is NUL, its kind, two words with a space before each, and
STX:

    ? NAME OWNER SEEN   a try of the message was seen at SEEN (Unix time); OWNER, if nobody owned
                        the message before, runs reply() for it
    > NAME OWNER DEAD   OWNER runs it again, for DEAD, who owned the message, has died
    ! NAME              the follower was told to wait, unless the answer stands before this
    = NAME ANSWER       the answer: XML, which can hold no NUL and no STX; empty for silence
    /                   the end: a message that is not here yet is claimed in the next file

What is no such record, as when the disk was full in the middle of one, is skipped. The files are
named by when they were begun, journal.MILLISECONDS. The last one is written to, and whoever begins
another one ends all those before it. An owner is PROCESS/N, the Nth run of ``reply()`` in a
process. Each process holds the flock of a file of its own, process.PID.TIME, as long as it is
alive.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import math
import os
import re
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from wechat.answers import REMEMBER, State
from wechat.config import Config, make_state_dir
from wechat.late import locked_file

PAGE = 4096  # bytes that are read at first; there are seldom more
CHECK_INTERVAL = 1.0  # seconds

_RECORD = re.compile(rb"\x00([?>!=/]) ([^ \x00\x02]*) ([^\x00\x02]*)\x02")
_NUMBER = re.compile(rb"[0-9]+\.[0-9]+")
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(slots=True)
class _Message:
    """What the records say of one message."""

    owner: bytes
    seen: float  # Unix time of the first try
    tries: int = 0
    told_to_wait: bool = False
    answer: tuple[int, int] | None = None  # where it stands in the file: offset, length
    unsaved: bytes | None = None  # an answer of this process that could not be written


class _File:
    """One file of the journal, as far as this process has read it."""

    def __init__(self, path: str) -> None:
        self.messages: dict[bytes, _Message] = {}
        self.ended_at = math.inf  # by time.monotonic(): when this process saw its end
        self._read_to, self._lock = 0, threading.Lock()
        self.path, self.fd = path, os.open(path, _FLAGS)
        # Other threads may still use the file, so it is closed when none of them needs it.
        weakref.finalize(self, os.close, self.fd).atexit = False

    @property
    def is_ended(self) -> bool:
        return self.ended_at < math.inf

    def append(self, kind: bytes, name: bytes = b"", rest: bytes = b"") -> None:
        """Append a record."""
        record = b"\0%b %b %b\2" % (kind, name, rest)
        if os.write(self.fd, record) < len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def add(self, kind: bytes, name: bytes = b"", rest: bytes = b"") -> None:
        """Append a record, then read it and all before it."""
        self.append(kind, name, rest)
        self.read()

    def end(self) -> None:
        """See to it that no message is claimed in this file from now on."""
        self.read()
        if not self.is_ended:
            self.add(b"/")

    def read(self) -> None:
        """Read what was appended since the last time."""
        while True:
            start, size = self._read_to, PAGE
            while len(data := os.pread(self.fd, size, start)) == size:
                size *= 4
            # No thread holds the lock during a system call: all others would wait for it, and for
            # its turn in Python after that.
            with self._lock:
                if self._read_to == start:
                    for record in _RECORD.finditer(data):
                        self._take(record[1], record[2], record[3], start + record.start(3))
                    self._read_to += data.rfind(b"\2") + 1  # what follows is being written
                    return

    def check(self) -> None:
        """End the file if it was removed or cut short: others may claim its messages elsewhere."""
        status = os.fstat(self.fd)
        if not status.st_nlink or status.st_size < self._read_to:
            self.ended_at = min(self.ended_at, time.monotonic())

    def _take(self, kind: bytes, name: bytes, rest: bytes, offset: int) -> None:
        message = self.messages.get(name)
        if kind == b"?":
            owner, _, seen = rest.partition(b" ")
            if not message and not self.is_ended and _NUMBER.fullmatch(seen):
                message = self.messages[name] = _Message(owner, float(seen))
            if message:
                message.tries += 1
        elif kind == b"/" and not name:
            self.ended_at = min(self.ended_at, time.monotonic())
        elif message and message.answer is None:
            if kind == b"=":
                message.answer = (offset, len(rest))
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

    poll = 0.03

    def __init__(self, folder: Path, remember: float = REMEMBER) -> None:
        self._folder, self._remember = str(folder), remember
        self._runs = itertools.count()
        self._locks: dict[bytes, int] = {}  # of this process's files, by their names
        self._reset()
        _journals.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._files: list[_File] = []  # all but the last are ended
        self._process = b""  # the name of its file
        self._check_at = self._begin_at = 0.0  # by time.monotonic()

    def claim(self, name: str) -> State:
        """Count a try. The caller owns the message if nobody did or its owner process died."""
        if time.monotonic() >= self._check_at:
            self._check()
        key, owner = name.encode(), self._new_owner()
        while True:
            files = self._files or self._open_files()
            file = next((file for file in files if key in file.messages), files[-1])
            file.add(b"?", key, b"%b %.3f" % (owner, time.time()))
            if key in file.messages:
                return self._state(file, key, owner)
            file.check()
            if not file.is_ended:
                raise OSError(errno.EIO, "the journal was changed by another program")
            self._open_files()

    def look(self, name: str) -> State:
        """Look again. The caller owns the message if its owner process died without an answer."""
        key = name.encode()
        file = self._file_of(key)
        if not file:  # this process slept for too long
            return State(tries=0, age=0.0, owner="")
        file.read()
        return self._state(file, key, self._new_owner())

    def answered(self, names: list[str]) -> list[str]:
        """Return those of the names that have an answer."""
        for file in self._files:
            file.read()
        keys = [(name, name.encode()) for name in names]
        return [
            name
            for name, key in keys
            if (found := self._file_of(key)) and found.messages[key].answer is not None
        ]

    def tell_to_wait(self, name: str) -> State:
        """Note that the follower was told to wait, unless the answer is there."""
        key = name.encode()
        if not (file := self._file_of(key)):
            return State(tries=0, age=0.0, owner="", told_to_wait=True)
        file.add(b"!", key)
        return self._state(file, key)

    def save(self, name: str, answer: bytes) -> None:
        """Save the answer for the other tries."""
        key = name.encode()
        if not (file := self._file_of(key)):  # reply() ran so long that no try will come
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
        except OSError:  # too many open files, perhaps: look again later
            return True

    def after_fork(self) -> None:
        """Leave the parent's locks and name to the parent."""
        for fd in self._locks.values():
            os.close(fd)
        self._locks = {}
        self._reset()

    def _state(self, file: _File, key: bytes, heir: bytes = b"") -> State:
        """Return what is known of a message, after ``heir`` has inherited it if it can."""
        message = file.messages[key]
        answer = message.unsaved
        if answer is None and not message.answer and heir and heir != message.owner:
            dead = message.owner
            if not self.is_alive(dead.decode()):
                file.add(b">", key, heir + b" " + dead)
        if message.answer:
            offset, length = message.answer
            answer = os.pread(file.fd, length, offset)
        mine = message.owner == heir and answer is None
        age = max(time.time() - message.seen, 0.0)
        owner = message.owner.decode()
        return State(message.tries, age, owner, mine, message.told_to_wait, answer)

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
        """See that this process's files are there; begin another file if it is time."""
        with self._lock:
            now = time.monotonic()
            if now < self._check_at:  # another thread was quicker
                return
            # If it fails, it is tried again later, and not for each message.
            self._check_at = now + min(CHECK_INTERVAL, self._remember / 2)
            if self._process and not os.fstat(self._locks[self._process]).st_nlink:
                self._process = b""
            if not self._files:
                return
            self._files[-1].check()
            if now < self._begin_at:
                return
            self._begin_at = now + self._remember / 2
            with contextlib.suppress(OSError):
                self._sweep()
                numbers = self._numbers()
                if self._files[-1].path in map(self._path, numbers[-1:]):
                    self._create(numbers)  # else another process was quicker
                self._open_files()

    def _open_files(self) -> list[_File]:
        """Open and read the files that are there, and end all but the last."""
        with self._lock:
            known = {file.path: file for file in self._files if os.fstat(file.fd).st_nlink}
            while True:
                self._sweep()
                numbers = self._numbers()
                files = []
                for path in map(self._path, numbers):
                    with contextlib.suppress(FileNotFoundError):  # another process removed it
                        files.append(known.get(path) or _File(path))
                for file in files[:-1]:
                    file.end()
                if files:
                    files[-1].read()
                if files and not files[-1].is_ended:
                    break
                self._create(numbers)
            now = time.monotonic()
            removed = [file for file in self._files if file not in files]
            for file in removed:
                file.ended_at = min(file.ended_at, now)
            self._files = [file for file in removed + files if now - file.ended_at < self._remember]
            self._begin_at = now + self._remember / 2
            return self._files

    def _create(self, numbers: list[int]) -> None:
        number = max([int(time.time() * 1000), *(number + 1 for number in numbers)])
        os.close(os.open(self._path(number), _FLAGS | os.O_CREAT, 0o600))

    def _path(self, number: int) -> str:
        return f"{self._folder}/journal.{number}"

    def _numbers(self) -> list[int]:
        kinds = (name.partition(".") for name in os.listdir(self._folder))
        return sorted(
            int(number) for kind, _, number in kinds if kind == "journal" and number.isdecimal()
        )

    def _sweep(self) -> None:
        """Make the folder; remove the journals that are too old, and the files of the dead."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        before = time.time() - self._remember
        numbers = self._numbers()
        for number, following in itertools.pairwise(numbers):
            # Its own times do not tell: they change with each try to write to a full disk.
            if following < before * 1000:
                with contextlib.suppress(FileNotFoundError):  # another process was quicker
                    os.unlink(self._path(number))
        for name in os.listdir(self._folder):
            path = f"{self._folder}/{name}"
            with contextlib.suppress(OSError):  # another process was quicker, perhaps
                if name.startswith("process.") and os.stat(path).st_mtime < before:
                    with locked_file(path) as is_locked:
                        if is_locked:
                            os.unlink(path)


def answers(config: Config) -> Journal:
    """Return the journal of the account of config.ini.

    Raises:
        ConfigError: ``state_dir`` cannot be made.
    """
    make_state_dir(config)
    return Journal((config.runtime_dir or config.state_dir) / "replies")


_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _after_fork() -> None:
    for journal in _journals:
        journal.after_fork()


os.register_at_fork(after_in_child=_after_fork)
