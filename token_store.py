"""The account's access_token: kept in a file-locked JSON file, refreshed when near expiry.

    store = TokenStore("wx…", FilePlace("state/access_token.json"), fetch)
    token = store.get()

This file works when copied out alone, on any POSIX system, given a function that fetches.
``TokenStore`` decides when to fetch; a ``Place`` keeps what is known and has the lock.
``python token_store.py`` prints a valid token of the account of config.ini.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

try:
    import fcntl
except ModuleNotFoundError:
    sys.exit("The token store needs Linux or macOS; on Windows use WSL")

POLL = 0.02  # seconds between two tries to get the lock
FIRST_WAIT, LONGEST_WAIT = 5.0, 60.0  # seconds from a failed fetch to the next; doubled each time
REFUSED_APART = 30.0  # seconds between two refused tokens; the platform's rule for force_refresh
LONGEST_LIFE = 7200  # seconds; the platform's limit for expires_in
CLOCK_STEP = 60.0  # seconds; a clock that was set back further says nothing of a token's age
FILE_SIZE = 8192  # bytes; a token needs 512

_ACCESS_TOKEN = re.compile("[!-~]{1,1024}")
_WRITE = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_lock_holders: dict[tuple[int, str], int] = {}  # the thread, by process id and lock file
# Nobody can set this clock back. CLOCK_BOOTTIME also counts while the machine is suspended.
uptime = functools.partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)
log = logging.getLogger("token_store")


class ApiError(Exception):
    """A call failed. One line: why, and what to do. ``errcode`` is WeChat's, None without one."""

    def __init__(self, message: str, errcode: int | None = None) -> None:
        super().__init__(message)
        self.errcode = errcode


class TokenError(ApiError):
    """There is no access_token to give."""


# Fetches a token; returns it and the seconds it lives. The argument is "", or a token that WeChat
# refused and yet returned again, so that a new one must be forced. Raises ApiError or OSError.
Fetch = Callable[[str], tuple[str, int]]
Replace = Callable[[bytes], None]  # replaces the state as a whole


class Place(Protocol):
    """Keeps the state for all threads and processes. Its methods raise OSError when they fail."""

    name: str  # for errors
    one_machine: bool  # False: several machines use it, each with its own uptime

    def read(self, latest: bool, /) -> bytes:
        """Return the state, empty if there is none. ``latest``: do not use a cache."""

    def lock(self) -> contextlib.AbstractContextManager[Replace | None]:
        """Try once to lock the state until the block or this process ends; None if it is locked."""


@dataclass(frozen=True)
class _State:
    """What a place keeps, as JSON. Times are Unix time in seconds, except ``uptime``."""

    appid: str
    access_token: str = field(default="", repr=False)
    expires_in: int = 0
    fetched_at: float = 0.0
    uptime: float = 0.0  # at ``fetched_at``
    refused_at: float = 0.0  # when WeChat was last asked to replace a token that it had refused
    failure: str = ""  # why the last fetch failed
    errcode: int | None = None  # of this failure
    wait: float = 0.0  # seconds from this failure to ``retry_at``
    retry_at: float = 0.0


class TokenStore:
    """Gives out the account's access_token, which is fetched once for all threads and processes.

    Args:
        appid: the account's AppID; a state of another account is never used.
        place: keeps the token and what else is known of it.
        fetch: fetches a token.
        margin: seconds before its expiry at which a token is renewed, but at most half its life.
        give_up_after: seconds to wait while another process fetches, in up to two exchanges.
        clock: Unix time in seconds.
        uptime: seconds since this machine started, the same for all its processes.
    """

    def __init__(
        self,
        appid: str,
        place: Place,
        fetch: Fetch,
        *,
        margin: float = 240,
        give_up_after: float = 15,
        clock: Callable[[], float] = time.time,
        uptime: Callable[[], float] = uptime,
    ) -> None:
        self._place, self._fetch = place, fetch
        self._margin, self._give_up_after = max(margin, 0), give_up_after
        self._clock, self._uptime = clock, uptime
        self._empty = _State(appid)
        # What the place holds (None: it cannot be read), and the state that this process uses. They
        # differ when the place cannot be written. In one tuple, since threads share it.
        self._known: tuple[bytes | None, _State] = (b"", self._empty)

    def get(self) -> str:
        """Return a valid token: from memory, from the place or from WeChat.

        Near expiry one process fetches; the others use the token that is still valid.

        Raises:
            TokenError: there is none, and none can be fetched now.
        """
        state = self._read()
        return (state if self._is_fresh(state) else self._renew()).access_token

    def refresh(self, stale: str) -> str:
        """Return another token than ``stale``, which WeChat refused with 40001, 40014 or 42001.

        The first caller causes a fetch; later callers with the same ``stale`` get its token.

        Raises:
            TokenError: none can be fetched now, or another token was refused within
                ``REFUSED_APART`` (45011). ``get`` still returns ``stale`` until it expires.
        """
        return self._renew(stale).access_token

    def lease(self, stale: str | None = None) -> tuple[str, float]:
        """Return a token like ``get`` or ``refresh(stale)``, and the seconds until it expires."""
        state = self._renew(stale)
        return state.access_token, self._seconds_left(state)

    def _renew(self, stale: str | None = None) -> _State:
        """Return a state with a token that is valid and not ``stale``; fetch one if needed."""
        give_up_at = time.monotonic() + self._give_up_after
        if stale is not None:
            self._read(latest=True)  # another process may have replaced it already
        while True:
            state = self._read()
            if state.access_token != stale and self._is_fresh(state):
                return state
            if not self._seconds_to_wait(state):
                self._limit_refusals(state, stale)
                if fetched := self._try_fetch(state, stale):
                    if not fetched.failure:
                        return fetched
                    state = fetched
            # While another process fetches, and after a failure, any token that is valid will do.
            if state.access_token != stale and self._seconds_left(state) > 0:
                return state
            if wait := self._seconds_to_wait(state):
                failure = f"{state.failure} (next try in {math.ceil(wait)} s)"
                raise TokenError(failure, state.errcode)
            if time.monotonic() > give_up_at:
                raise TokenError(f"another process fetches for over {self._give_up_after:.0f} s")
            time.sleep(POLL)

    def _seconds_left(self, state: _State) -> float:
        """Return the seconds until the token expires, 0 if its age is unknown."""
        age, uptime_age = self._clock() - state.fetched_at, self._uptime() - state.uptime
        if age < -CLOCK_STEP or uptime_age < 0:  # the clock was set back, or the machine restarted
            return 0.0
        return state.expires_in - max(age, uptime_age)

    def _is_fresh(self, state: _State) -> bool:
        left = self._seconds_left(state)
        # A token that lives less than margin is renewed at half its life, not at every call.
        return left > self._margin or left > state.expires_in / 2

    def _seconds_to_wait(self, state: _State) -> float:
        """Return the seconds until the next fetch is allowed after a failure, or 0."""
        wait = state.retry_at - self._clock()
        return wait if 0 < wait <= LONGEST_WAIT else 0.0  # longer: the clock was set back

    def _limit_refusals(self, state: _State, stale: str | None) -> None:
        """Raise TokenError if another valid token was refused less than ``REFUSED_APART`` ago."""
        again = REFUSED_APART - abs(self._clock() - state.refused_at)
        if again > 0 and state.access_token == stale and self._seconds_left(state) > 0:
            why = "if it refuses even the latest, something else fetches them too"
            raise TokenError(
                f"WeChat is asked for another access_token once in {REFUSED_APART:.0f} s at"
                f" most, so again in {math.ceil(again)} s; {state.failure or why}",
                45011,
            )

    def _try_fetch(self, state: _State, stale: str | None) -> _State | None:
        """Fetch a token and save it, or the failure. None: another process does, or has done so."""
        fetched = None
        try:
            with self._place.lock() as replace_state:
                if replace_state is None or self._read(latest=True) != state:
                    return None
                self._save(state, replace_state)  # proves that the fetched token can be saved
                fetched = self._ask(state, stale)
                self._save(fetched, replace_state)
        except OSError as error:
            failure = f"cannot write {error.filename or self._place.name}: {error.strerror}"
            if fetched is None:
                fetched = self._failed(state, ApiError(failure))
            elif not fetched.failure:
                log.error("%s; the token that was fetched is known to this process alone", failure)
            self._known = (self._known[0], fetched)
        return fetched

    def _save(self, state: _State, replace_state: Replace) -> None:
        data = json.dumps(asdict(state)).encode()
        replace_state(data)
        self._known = (data, state)

    def _ask(self, state: _State, stale: str | None) -> _State:
        """Ask WeChat for a token; return the next state, with the token or with the failure."""
        now, uptime = self._clock(), self._uptime()  # a token's life begins before it arrives
        try:
            token, life = self._fetch_valid("")
            if stale == state.access_token:
                state = replace(state, refused_at=now)
            if token == stale:
                token, life = self._fetch_valid(stale)
        except (ApiError, OSError) as error:
            return self._failed(state, error)
        log.info("fetched an access_token, good for %d s", life)
        return _State(state.appid, token, life, now, uptime, state.refused_at)

    def _fetch_valid(self, refused: str) -> tuple[str, int]:
        token, expires_in = self._fetch(refused)
        life = min(expires_in, LONGEST_LIFE) if type(expires_in) is int else 0
        if not _is_valid(token, life):
            raise ApiError("WeChat's answer has no access_token, or not how long it lives")
        return token, life

    def _failed(self, state: _State, error: ApiError | OSError) -> _State:
        if self._seconds_left(state) > 0:
            log.warning("going on with the old access_token: %s", error)
        wait = min(max(FIRST_WAIT, state.wait * 2), LONGEST_WAIT)
        failure, errcode = str(error), getattr(error, "errcode", None)
        retry_at = self._clock() + wait
        return replace(state, failure=failure, errcode=errcode, wait=wait, retry_at=retry_at)

    def _read(self, latest: bool = False) -> _State:
        """Read the place. If it cannot be read, return the last known state while it is valid."""
        data, state = self._known
        try:
            data_now = self._place.read(latest)
        except OSError as error:
            failure = f"cannot read {self._place.name}: {error.strerror}"
            if self._seconds_left(state) <= 0:
                raise TokenError(failure) from None
            if data is not None:
                log.error("going on with the access_token last known: %s", failure)
                self._known = (None, state)
            return state
        if data_now != data:
            state = self._parse(data_now)
            self._known = (data_now, state)
        return state

    def _parse(self, data: bytes) -> _State:
        if not data:
            return self._empty
        with contextlib.suppress(ValueError, TypeError, ArithmeticError, RecursionError):
            state = _State(**json.loads(data))
            token, life = state.access_token, state.expires_in
            numbers = (state.fetched_at, state.uptime, state.refused_at, state.wait, state.retry_at)
            if (
                state.appid == self._empty.appid
                and ((token, life) == ("", 0) or _is_valid(token, life))
                and all(map(math.isfinite, numbers))
                and isinstance(state.failure, str)
            ):
                if self._place.one_machine:
                    return state
                age = max(self._clock() - state.fetched_at, 0)  # by the clocks of two machines
                return replace(state, uptime=self._uptime() - age)
        log.warning("%s holds no token of this account; taken as empty", self._place.name)
        return self._empty


def _is_valid(token: object, life: int) -> bool:
    return (
        isinstance(token, str) and bool(_ACCESS_TOKEN.fullmatch(token)) and 0 < life <= LONGEST_LIFE
    )


class FilePlace:
    """Keeps the state in the file ``path``, for one machine. The lock file is ``path`` + .lock."""

    one_machine = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.path.abspath(path)
        self._last_read: tuple[tuple[int, ...], bytes] = ((), b"")

    def read(self, _latest: bool, /) -> bytes:
        """Return what the file holds; see ``Place``."""
        version, data = self._last_read
        try:
            if _version(os.stat(self.name)) != version:
                with open(self.name, "rb") as file:
                    version = _version(os.fstat(file.fileno()))
                    data = file.read(FILE_SIZE).rstrip(b" ")
                self._last_read = (version, data)
        except FileNotFoundError:
            return b""
        return data

    @contextlib.contextmanager
    def lock(self) -> Iterator[Replace | None]:
        """Try once to get the lock; see ``Place``."""
        # lockf() keeps out other processes, _lock_holders the other threads of this one. flock()
        # would do both, but a forked child would still hold the lock when its parent is killed.
        path, this_thread = self.name + ".lock", threading.get_ident()
        key = (os.getpid(), os.path.realpath(path))
        if _lock_holders.setdefault(key, this_thread) != this_thread:
            yield None
            return
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            # Never unlinked, or two processes could lock two files of the same name.
            with open(os.open(path, _WRITE | os.O_CREAT, 0o600), "wb") as file:
                locked = False
                with contextlib.suppress(BlockingIOError):
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locked = True
                yield self._replace if locked else None
        finally:
            del _lock_holders[key]

    def _replace(self, data: bytes) -> None:
        """Replace the file at once, safe from a power loss. Its size is always ``FILE_SIZE``."""
        new = self.name + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)  # left by a process that was killed
        with open(os.open(new, _WRITE | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data.ljust(FILE_SIZE))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.name)


def _version(stat: os.stat_result) -> tuple[int, ...]:
    # Every change sets st_ctime to now, even one that sets st_mtime back.
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime_ns


def main() -> None:
    """Print a valid access_token of the account of config.ini, and nothing else."""
    import argparse

    try:
        import wechat.api
        import wechat.config
    except ModuleNotFoundError:
        sys.exit("token_store: the command needs wechat/api.py and wechat/config.py")
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    try:
        print(wechat.api.token_store(wechat.config.load()).get())
    except (wechat.api.ApiError, wechat.config.ConfigError) as error:
        sys.exit(f"token_store: {error}")


if __name__ == "__main__":
    main()
