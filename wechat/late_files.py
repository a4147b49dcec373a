"""Late answers on one machine: a folder for each follower, in it a file for each message.

A file is written beside its place and renamed, so it is always whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from wechat.late import KEEP_LATE

SWEEP_INTERVAL = 600.0  # seconds


class LateFiles:
    """Keeps late answers in files; see ``late.LateStore``.

    Args:
        folder: for the folders; on a local disk, not in memory: it has to survive a reboot.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._sweep_at = str(folder), 0.0
        self._writes = itertools.count()

    def read(self, follower: str) -> dict[str, bytes]:
        """Return the entries of a follower."""
        if time.monotonic() > self._sweep_at:
            self._sweep()
        folder, entries = f"{self._folder}/{follower}", dict[str, bytes]()
        if not os.access(folder, os.F_OK):  # as for nearly all followers
            return entries
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            for name in os.listdir(folder):
                with contextlib.suppress(FileNotFoundError):
                    if not name.startswith("."):
                        entries[name] = Path(f"{folder}/{name}").read_bytes()
        return entries

    def write(self, follower: str, name: str, entry: bytes, replace: bool = True) -> None:
        """Write an entry; if it may not ``replace``, one that is there stays."""
        folder = f"{self._folder}/{follower}"
        new, fd = f"{folder}/.{name}.{os.getpid()}.{next(self._writes)}", -1
        while fd < 0:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process removed the folder
                fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(entry)
            with contextlib.suppress(FileExistsError):
                (os.replace if replace else os.link)(new, f"{folder}/{name}")
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
        """Remove what is older than ``KEEP_LATE``."""
        self._sweep_at = time.monotonic() + SWEEP_INTERVAL
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        for folder in Path(self._folder).iterdir():
            with contextlib.suppress(OSError):  # another process was quicker, or it is no folder
                for path in folder.iterdir():
                    if path.stat().st_mtime < time.time() - KEEP_LATE:
                        path.unlink()
                folder.rmdir()


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
