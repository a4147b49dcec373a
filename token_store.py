"""The account's access_token: a file-locked JSON file, refreshed lazily when near expiry.

This one file works when copied out alone: the standard library, any POSIX system, any number of
threads and processes that share a folder on a local disk.

    store = TokenStore("state/access_token.json", appid, appsecret)
    token = store.get()

``python token_store.py`` prints a valid token for the account of config.ini. Sources of the rules:
the platform's 获取 Access token, 获取稳定版接口调用凭据 and 全局返回码.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import math
import os
import queue
import re
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

if TYPE_CHECKING:
    from wechat.config import Config

TIMEOUT = 5.0  # seconds for all of an exchange with WeChat
PATIENCE = 15.0  # seconds to wait for whoever fetches: two exchanges, and some
LOOK = 1.0  # seconds between two looks at the path of the file, which is kept open
POLL = 0.02  # seconds between two looks at the lock: flock itself knows no time limit
FIRST_WAIT, LONGEST_WAIT = 5.0, 60.0  # seconds to leave WeChat alone after a failure, doubling
REFUSED_APART = 30.0  # seconds between two refused tokens; the platform's rule for force_refresh
LONGEST_LIFE = 7200  # seconds, the platform's bound for expires_in
CLOCK_STEP = 60.0  # seconds that a clock set back may hide of a token's age
ROOM = 8192  # bytes the file takes; a token needs 512
LARGEST_ANSWER = 4 * 1048576  # bytes; a list of 10,000 followers takes 0.3 MB

_TOKEN = re.compile("[!-~]{1,1024}")
_MARK = 0x5AFEF11E  # where the open file stands: at a place that no other has
_WRITE = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
# Unlike time.time() nobody can set it; where it exists, it counts a suspended machine's time.
_uptime = functools.partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)
log = logging.getLogger("token_store")


class ApiError(Exception):
    """WeChat's API refused, or did not answer. One line: what happened and what the owner can do.

    ``errcode`` is WeChat's; None when there was no answer.
    """

    def __init__(self, message: str, errcode: int | None = None) -> None:
        super().__init__(message)
        self.errcode = errcode


class TokenError(ApiError):
    """There is no access_token to give."""


@dataclass(frozen=True)
class _State:
    """What the file holds. Moments are Unix seconds, but ``uptime``, read with ``fetched_at``."""

    appid: str
    access_token: str = field(default="", repr=False)
    expires_in: int = 0
    fetched_at: float = 0.0
    uptime: float = 0.0
    refused_at: float = 0.0
    failure: str = ""
    errcode: int | None = None
    wait: float = 0.0
    retry_at: float = 0.0


class _Open:
    """The file, kept open: fstat takes half the time of stat, which has to find it first."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(self.fd)
        self._path, self._inode, self._ctime = path, (stat.st_dev, stat.st_ino), stat.st_ctime_ns
        self._look_at = time.monotonic() + LOOK
        os.lseek(self.fd, _MARK, os.SEEK_SET)
        weakref.finalize(self, _close, self.fd).atexit = False  # when no thread needs it any more

    def is_current(self) -> bool:
        """Tell whether it is as it was when it was opened, and at its path.

        It is known within ``LOOK`` if the path leads elsewhere though nobody touched the file:
        another folder has taken the place of its own.
        """
        try:
            stat = os.fstat(self.fd)
        except OSError:
            return False
        if stat.st_ctime_ns != self._ctime or not stat.st_nlink:  # changed, renamed, removed
            return False
        return time.monotonic() < self._look_at or self.is_at_path()

    def is_at_path(self) -> bool:
        """Look whether it is what its path leads to."""
        self._look_at = time.monotonic() + LOOK
        try:
            stat = os.stat(self._path)
        except OSError:
            return False
        return (stat.st_dev, stat.st_ino) == self._inode


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        if os.lseek(fd, 0, os.SEEK_CUR) == _MARK:  # else a daemon closed all: it is another file
            os.close(fd)


class TokenStore:
    """Gives out the account's access_token, fetched once for every thread and process.

    Args:
        path: the JSON file, shared by all that use this account; its lock is ``path`` + .lock.
        appid: the account's AppID.
        appsecret: the account's AppSecret.
        endpoint: ``stable_token``, or ``token`` for the classic kind.
        margin: seconds before its end at which a token is renewed, but at most half its life.
        api_base: the API's address, without a slash at the end.
        clock: Unix time in seconds.
        uptime: seconds since a moment that is the same for all processes; never set back.

    Raises:
        ValueError: no AppID or AppSecret, or an unknown endpoint.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        appid: str,
        appsecret: str,
        *,
        endpoint: str = "stable_token",
        margin: float = 240,
        api_base: str = "https://api.weixin.qq.com",
        clock: Callable[[], float] = time.time,
        uptime: Callable[[], float] = _uptime,
    ) -> None:
        if not appid or not appsecret:
            raise ValueError("appid and appsecret are needed")
        if endpoint not in ("stable_token", "token"):
            raise ValueError("endpoint must be stable_token or token")
        self._path = os.path.abspath(path)
        self._appsecret, self._endpoint, self._margin = appsecret, endpoint, max(margin, 0)
        self._api_base, self._clock, self._uptime = api_base, clock, uptime
        self._nothing = _State(appid)
        self._cache: tuple[Any, _State] = (None, self._nothing)  # what it was read from, too

    def get(self) -> str:
        """Return a token that is good now: from memory, the file or WeChat.

        Near expiry one process fetches, and the others go on with the token that is still good.

        Raises:
            TokenError: there is none, and none can be had now.
        """
        state = self._read()
        return (state if self._is_fresh(state, self._left(state)) else self._renew()).access_token

    def refresh(self, stale: str) -> str:
        """Return another token than ``stale``, of which WeChat said 40001, 40014 or 42001.

        Whoever says so first causes a fetch; all who say it later get what that fetch brought.

        Raises:
            TokenError: none can be had now, or another one was refused within ``REFUSED_APART``
                (45011); ``get`` still gives the old one as long as it should live.
        """
        return self._renew(stale).access_token

    def lease(self, stale: str = "") -> tuple[str, float]:
        """Return a token as ``get`` does, or as ``refresh(stale)``, and the seconds it still lives.

        Raises:
            TokenError: as theirs.
        """
        state = self._renew(stale)
        return state.access_token, self._left(state)

    def _renew(self, stale: str = "") -> _State:
        give_up = time.monotonic() + PATIENCE
        while True:
            state = self._read()
            left = self._left(state) if state.access_token != stale else 0.0
            if self._is_fresh(state, left):
                return state
            wait = self._wait(state)
            again = REFUSED_APART - abs(self._clock() - state.refused_at)
            refused = stale and stale == state.access_token and self._left(state) > 0
            if refused and again > 0 and not wait:
                why = "if it refuses even the latest, something else fetches them too"
                raise TokenError(  # and nothing is written, for it holds nobody else back
                    f"WeChat is asked for another access_token once in {REFUSED_APART:.0f} s at"
                    f" most, so again in {math.ceil(again)} s; {state.failure or why}",
                    45011,
                )
            if not wait and (fetched := self._try_fetch(state, stale)):
                if not fetched.failure:
                    return fetched
                if left > 0:
                    log.warning("going on with the old access_token: %s", fetched.failure)
                state, wait = fetched, fetched.wait
            if left > 0:
                return state
            if wait:
                raise TokenError(
                    f"{state.failure} (next try in {math.ceil(wait)} s)", state.errcode
                )
            if time.monotonic() > give_up:
                raise TokenError(f"another process has been fetching it for over {PATIENCE:.0f} s")
            time.sleep(POLL)

    def _left(self, state: _State) -> float:
        """Return the seconds that the token still lives, 0 when nobody can know."""
        age, up = self._clock() - state.fetched_at, self._uptime() - state.uptime
        if age < -CLOCK_STEP or up < 0:  # the clock was set back, or the machine started anew
            return 0.0
        return state.expires_in - (age if age > up else up)

    def _is_fresh(self, state: _State, left: float) -> bool:
        # Half of its life at least, or a short-lived token would be fetched at every call.
        return left > self._margin or left > state.expires_in / 2

    def _wait(self, state: _State) -> float:
        """Return the seconds for which a failure still holds everybody back, or 0."""
        wait = state.retry_at - self._clock()
        return wait if 0 < wait <= LONGEST_WAIT else 0.0  # longer: the clock was set back

    def _try_fetch(self, state: _State, stale: str) -> _State | None:
        """Fetch a token, or note the failure. None: somebody else is at it, or was quicker."""
        fetched, origin = state, self._cache[0]  # of what is remembered if it cannot be written
        try:
            with self._lock() as locked:
                if not locked or self._read() != state:
                    return None
                self._write(state)  # proves room and rights before WeChat is asked and a token dies
                origin = self._origin()
                fetched = self._fetch(state, stale)
                self._write(fetched)
        except OSError as error:
            failure = f"cannot write {error.filename or self._path}: {error.strerror}"
            if fetched is state:
                fetched = self._failed(state, ApiError(failure))
            elif not fetched.failure:
                log.error("%s; the token that was fetched is known to this process alone", failure)
            self._cache = (origin, fetched)
        return fetched

    def _fetch(self, state: _State, stale: str) -> _State:
        now, uptime = self._clock(), self._uptime()  # a token's life begins before it arrives
        refused, refused_at = bool(stale) and stale == state.access_token, state.refused_at
        try:
            token, expires_in = self._ask()
            refused_at = now if refused else refused_at
            if token == stale:  # stable_token gives the same one again, unless it is forced
                token, expires_in = self._ask(stale)
        except ApiError as error:
            return self._failed(replace(state, refused_at=refused_at), error)
        log.info("fetched an access_token, good for %d s", expires_in)
        return _State(state.appid, token, expires_in, now, uptime, refused_at)

    def _failed(self, state: _State, error: ApiError) -> _State:
        wait = min(max(FIRST_WAIT, state.wait * 2), LONGEST_WAIT)
        return replace(
            state,
            failure=str(error),
            errcode=error.errcode,
            wait=wait,
            retry_at=self._clock() + wait,
        )

    def _ask(self, stale: str = "") -> tuple[str, int]:
        """Ask WeChat for a token, other than ``stale``; return it and the seconds it lives."""
        url = f"{self._api_base}/cgi-bin/{self._endpoint}"
        fields = {
            "grant_type": "client_credential",
            "appid": self._nothing.appid,
            "secret": self._appsecret,
        }
        if stale and ".weixin.qq.com" not in self._api_base:  # wechat/central.py takes it
            fields["stale_token"] = stale
        force = {"force_refresh": True} if stale else {}
        if self._endpoint == "token":
            answer = fetch_json(f"{url}?{urlencode(fields)}", None, self._appsecret, TIMEOUT)
        else:
            answer = fetch_json(url, {**fields, **force}, self._appsecret, TIMEOUT)
        token, expires_in = answer.get("access_token"), answer.get("expires_in")
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise ApiError("WeChat's answer has no access_token")
        if type(expires_in) is not int or expires_in <= 0:
            raise ApiError("WeChat's answer has an access_token, but not how long it lives")
        return token, min(expires_in, LONGEST_LIFE)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[bool]:
        """Try once for the lock, which dies with its holder; tell whether this process has it."""
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        # A file of its own, never unlinked: else two processes could lock two files of one name.
        fd = os.open(self._path + ".lock", _WRITE | os.O_CREAT, 0o600)
        try:
            locked = False
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
                # Who has the lock must not go by the file of a folder that was replaced.
                if (opened := self._cache[0]) and not opened.is_at_path():
                    self._cache = (None, self._nothing)
            yield locked
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough while a forked child lives
            os.close(fd)

    def _write(self, state: _State) -> None:
        """Replace the file: whole, safe from a power loss, and always of the same size."""
        successor = self._path + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(successor)  # the leftover of a process that was killed
        with open(os.open(successor, _WRITE | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(_bytes(state).ljust(ROOM))
            file.flush()
            os.fsync(file.fileno())
        os.replace(successor, self._path)
        self._cache = (None, self._nothing)

    def _read(self) -> _State:
        """Return what the file holds. It is only ever replaced whole, so this needs no lock."""
        opened, state = self._cache
        if opened and opened.is_current():
            return state
        try:
            if (now := self._origin()) or opened:
                state = self._parse(os.pread(now.fd, ROOM, 0)) if now else self._nothing
                self._cache = (now, state)
        except OSError as error:  # it may hold a good token all the same
            raise TokenError(f"cannot read {self._path}: {error.strerror}") from None
        return state

    def _origin(self) -> Any:
        """Open what the state is read from; None if it is not there."""
        try:
            return _Open(self._path)
        except FileNotFoundError:
            return None

    def _parse(self, data: bytes) -> _State:
        with contextlib.suppress(ValueError, TypeError, ArithmeticError, RecursionError):
            state = _State(**json.loads(data))
            token, life = state.access_token, state.expires_in
            numbers = (state.fetched_at, state.uptime, state.refused_at, state.wait, state.retry_at)
            if (
                state.appid == self._nothing.appid
                and (
                    (_TOKEN.fullmatch(token) and 0 < life <= LONGEST_LIFE)
                    or (token, life) == ("", 0)
                )
                and all(map(math.isfinite, numbers))
                and isinstance(state.failure, str)
            ):
                return state
        log.warning("%s holds no token of this account; taken as empty", self._path)
        return self._nothing


def _bytes(state: _State) -> bytes:
    return json.dumps(asdict(state)).encode()


def fetch_json(
    url: str, payload: dict[str, Any] | None, secret: str, timeout: float
) -> dict[str, Any]:
    """GET ``url``, or POST ``payload`` to it as JSON; return the JSON object that comes back.

    Args:
        url: never shown in an error, since it may hold a secret.
        payload: None for GET.
        secret: what must not stand in an error, whoever wrote it there.
        timeout: seconds for all of it.

    Raises:
        ApiError: an errcode; or nothing, an HTTP error or no JSON object in ``timeout`` seconds.
        TypeError, ValueError: ``payload`` cannot be JSON in UTF-8.
    """
    # ensure_ascii=False, for WeChat shows a follower what it is sent, even as \u escapes.
    data = None if payload is None else json.dumps(payload, ensure_ascii=False).encode()
    host = url.partition("://")[2].partition("/")[0]
    results: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    # A thread, for neither DNS nor a dripping server heeds a socket's timeout.
    threading.Thread(target=_exchange, args=(url, data, timeout, results), daemon=True).start()
    try:
        result = results.get(timeout=timeout)
    except queue.Empty:
        result = TimeoutError(f"timed out after {timeout:.0f} s")
    if isinstance(result, Exception):
        why = getattr(result, "reason", None) or result
        if isinstance(result, urllib.error.HTTPError):
            why = f"HTTP status {result.code}"
        elif isinstance(result, ValueError):
            why = type(result).__name__  # its text quotes the URL
        raise ApiError(f"no answer from {host}: {_line(why, secret)}")
    answer = None
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(result)
    errcode = answer.get("errcode", 0) if isinstance(answer, dict) else None
    if not isinstance(answer, dict) or type(errcode) is not int or abs(errcode) > 10**9:
        raise ApiError(f"{host} answered with something else than WeChat's JSON")
    if errcode:
        errmsg = _line(answer.get("errmsg"), secret)
        ip = re.search(r"[0-9]+(\.[0-9]+){3}", errmsg)
        advice = ADVICE.get(errcode, "its meaning is in WeChat's 全局返回码")
        advice = advice.format(ip=ip.group() if ip else "this machine's public address")
        raise ApiError(f"errcode {errcode} ({errmsg}): {advice}", errcode)
    return answer


def _exchange(
    url: str, data: bytes | None, timeout: float, results: queue.SimpleQueue[bytes | Exception]
) -> None:
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with _opener().open(request, timeout=timeout) as response:
            results.put(response.read(LARGEST_ANSWER))
    except Exception as error:  # noqa: BLE001  a thread hands them all to fetch_json
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        results.put(error)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Return an opener of http(s) that follows no redirect: the secrets go nowhere else."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _line(text: object, secret: str) -> str:
    """Return the text as one line that can be logged, without the secret."""
    shown = str(text).replace(secret, "***")
    return " ".join("".join(c if c.isprintable() else " " for c in shown).split())[:200]


ADVICE = {
    -1: "WeChat is busy; try again later",
    40001: "check [wechat] appsecret; or something else fetches tokens for this account",
    40002: "the grant_type is wrong",
    40013: "check [wechat] appid",
    40014: "the access_token is invalid",
    40125: "check [wechat] appsecret, or reset it in the console",
    40164: "add {ip} to the account's IP whitelist: 设置与开发 → 基本配置 → IP白名单",
    40243: "the AppSecret is frozen; unfreeze it in the console",
    41002: "the AppID is missing",
    41004: "the AppSecret is missing",
    42001: "the access_token has expired",
    43002: "this call needs a body to POST",
    45009: "the day's quota is used up; wait for tomorrow, or call clear_quota",
    45011: "too many calls; slow down",
    48001: "the account has no right to this call; it needs verification (认证)",
    50004: "the account is banned or logged out",
    89503: "the administrator has to confirm this IP on the phone",
    89506: "the administrator refused this IP; it has to be confirmed on the phone",
    89507: "the administrator blocked this IP; it has to be confirmed on the phone",
}


def from_config(config: Config) -> TokenStore:
    """Return the store of the account of config.ini, in its ``state_dir`` or in Redis.

    Raises:
        TokenError: AppID or AppSecret is not set.
        ConfigError: ``[shared] redis`` needs a package that is not installed.
    """
    if not config.appid or not config.appsecret:
        raise TokenError("set [wechat] appid and appsecret, or WX_APPID and WX_APPSECRET")
    kind: Callable[..., TokenStore] = TokenStore
    place: object = config.state_dir / "access_token.json"
    if config.redis:
        from wechat.redis_store import RedisTokenStore

        kind, place = RedisTokenStore, config.redis
    return kind(
        place,
        config.appid,
        config.appsecret,
        endpoint=config.endpoint,
        margin=config.margin,
        api_base=config.api_base,
    )


def main() -> None:
    """Print a valid access_token of the account of config.ini, and nothing else."""
    import argparse

    try:
        import wechat.config
    except ModuleNotFoundError:
        sys.exit("token_store: the command needs wechat/config.py; the class TokenStore does not")
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    try:
        print(from_config(wechat.config.load()).get())
    except (TokenError, wechat.config.ConfigError) as error:
        sys.exit(f"token_store: {error}")


if __name__ == "__main__":
    sys.modules["token_store"] = sys.modules["__main__"]  # which wechat.redis_store extends
    main()
