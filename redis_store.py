"""The access_token and the answers in Redis, for several machines.

The rules are those of ``token_store`` and ``reply_once``; here is only where they keep what they
know. Whoever fetches a token or runs ``reply()`` has a lock of redis-py's, renewed as long as its
process lives, so that it is free seconds after its death. Every key has the AppID and ends by
itself:

    wxserver:APPID:token             the state of the token, as in the file
    wxserver:APPID:message:NAME      what is known of a message: copies, late, parts
    wxserver:APPID:waiting:FOLLOWER  what waits for a follower, in order
    ….lock                           the lock of each
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import token_store
from reply_once import KEEP, KEEP_LATE, Found, Parts
from token_store import LONGEST_WAIT, TokenStore
from wxconfig import ConfigError

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import LockError
    from redis.lock import Lock
    from redis.retry import Retry
except ModuleNotFoundError:
    raise ConfigError("[shared] redis needs the package redis: pip install '.[redis]'") from None

if TYPE_CHECKING:
    from wxconfig import Config

TIMEOUT = 1.0  # seconds to connect, and to answer: WeChat waits five for everything
PAUSE = 1.0  # seconds that a Redis is left alone after a failure, so that not all wait for it
LEASE = 3.0  # seconds until the lock of a dead process is free; renewed three times as often
LOOK = 0.1  # seconds between two looks, at the token or for an answer
CONNECTIONS = 1024  # more than a process has threads; redis-py's own limit may be less

_OPTION = re.compile("db|username|password|ssl_.*")

log = logging.getLogger("redis_store")


class _Redis:
    """One Redis, asked with a time limit; and the locks that this process holds there.

    Raises:
        ConfigError: the URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        try:
            # redis-py lets every option of the URL win over those below.
            if not all(map(_OPTION.fullmatch, parse_qs(urlsplit(url).query))):
                raise ValueError
            # No retries: they take their time, and a copy of a message must not count twice.
            self.client: Any = redis.Redis.from_url(
                url,
                protocol=2,
                socket_timeout=TIMEOUT,
                socket_connect_timeout=TIMEOUT,
                retry=Retry(NoBackoff(), 0),
                max_connections=CONNECTIONS,
            )
            at: Any = self.client.connection_pool.make_connection()  # which connects later
        except (ValueError, TypeError, redis.RedisError):  # their texts may quote the password
            raise ConfigError(
                "[shared] redis: no URL of a Redis, or with another option than db, username,"
                " password and ssl_…; in a password / is written %2F, ? %3F, @ %40 and # %23"
            ) from None
        self.where = f"Redis at {getattr(at, 'path', '') or f'{at.host}:{at.port}'}"
        self._failure, self._try_at = "", 0.0
        self.after_fork()
        _all.add(self)

    def after_fork(self) -> None:
        """Leave the parent's locks to the parent."""
        self._mutex, self._held, self._renewing = threading.Lock(), dict[str, Lock](), False

    @contextlib.contextmanager
    def asked(self) -> Iterator[Any]:
        """Yield the client; what fails is an OSError, at once if it failed just now."""
        now = time.monotonic()
        if self._failure and now < self._try_at:
            raise self.error(self._failure)
        self._try_at = now + PAUSE  # while this one tries, after a failure, the others do not
        try:
            yield self.client
        except (redis.RedisError, UnicodeError) as error:
            # Of a pipeline, without the command: it has the follower and the answer.
            why = str(error).rpartition("of pipeline caused error: ")[2]
            self._failure = " ".join(why.split()).rstrip(".") or type(error).__name__
            self._try_at = time.monotonic() + PAUSE
            raise self.error(self._failure) from None
        self._failure = ""

    def error(self, why: str) -> OSError:
        return OSError(errno.EIO, why, self.where)

    def lock(self, name: str) -> Lock | None:
        """Try once for the lock of ``name``, which dies with this process; None: it is taken."""
        if name in self._held:
            return None
        lock = Lock(self.client, f"{name}.lock", timeout=LEASE, thread_local=False)
        with self.asked():
            if not lock.acquire(blocking=False):
                return None
        with self._mutex:
            self._held[name] = lock
            if not self._renewing:
                with contextlib.suppress(RuntimeError):  # too many threads: it lasts for LEASE
                    threading.Thread(target=self._renew, daemon=True).start()
                    self._renewing = True
        return lock

    def has(self, lock: Lock) -> bool:
        """Tell whether the lock is still the caller's: this process may have slept for too long."""
        with self.asked():
            return bool(lock.owned())

    def leave(self, name: str) -> None:
        """Let the lock end by itself."""
        self._held.pop(name, None)

    def unlock(self, name: str, lock: Lock) -> None:
        """Let the next one have the lock at once, if Redis is there."""
        if self._held.get(name) is lock:  # else it was lost, and may be another thread's now
            self.leave(name)
        with contextlib.suppress(OSError), self.asked(), contextlib.suppress(LockError):
            lock.release()

    def _renew(self) -> None:
        while True:
            time.sleep(LEASE / 3)
            with self._mutex:
                held = list(self._held.items())
                self._renewing = bool(held)
            if not held:
                return
            for name, lock in held:
                with contextlib.suppress(OSError), self.asked():
                    try:
                        lock.reacquire()
                    except LockError:  # it was lost, or is no longer needed
                        if self._held.get(name) is lock:
                            self.leave(name)


class RedisTokenStore(TokenStore):
    """Gives out the account's access_token, fetched once for every machine.

    Without Redis, the token last known is given as long as it lives, and nobody asks WeChat: what
    could not be shared would be the end of the others' token. The clocks of the machines have to
    agree within a minute.

    Args:
        url: of Redis.
        appid: the account's AppID.
        appsecret: the account's AppSecret.
        settings: as those of TokenStore.

    Raises:
        ValueError: no AppID or AppSecret, or an unknown endpoint.
        ConfigError: the URL cannot be used.
    """

    def __init__(self, url: str, appid: str, appsecret: str, **settings: Any) -> None:
        super().__init__("", appid, appsecret, **settings)
        self._redis, self._name = _Redis(url), f"wxserver:{appid}:token"
        self._path = self._redis.where  # for what is said of it
        self._look_at = self._lock_at = 0.0
        self._lost = False
        self._own = threading.local()  # its lock is the one that the thread has

    def _renew(self, stale: str = "") -> token_store._State:
        if stale:
            self._look_at = 0.0  # whoever refuses a token may know more than the last look
        return super()._renew(stale)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[bool]:
        if time.monotonic() < self._lock_at:
            yield False
            return
        lock = self._own.lock = self._redis.lock(self._name)
        if not lock:
            self._lock_at = time.monotonic() + LOOK  # for all threads that wait for it
            yield False
            return
        try:
            self._look()
            yield True
        finally:
            self._redis.unlock(self._name, lock)

    def _write(self, state: token_store._State) -> None:
        if not self._redis.has(self._own.lock):
            raise self._redis.error("the lock was lost")
        data, life = token_store._bytes(state), max(self._left(state), 0) + 2 * LONGEST_WAIT
        with self._redis.asked() as client:
            client.set(self._name, data, px=int(life * 1000))
        self._cache = (data, state)

    def _origin(self) -> Any:
        """Return what the state was read from."""
        return self._cache[0]

    def _read(self) -> token_store._State:
        if time.monotonic() >= self._look_at:
            try:
                self._look()
            except OSError as error:
                if not self._lost and self._cache[1].access_token:
                    log.error("going on with the access_token last known: %s", error)
                self._lost = True
        return self._cache[1]

    def _look(self) -> None:
        self._look_at = time.monotonic() + LOOK
        with self._redis.asked() as client:
            data = client.get(self._name)
        if data != self._cache[0] or self._lost:  # if lost, what failed without it is forgotten
            state = self._parse(data) if data else self._nothing
            # Uptime is each machine's own: here it begins with what the clocks tell.
            age = max(self._clock() - state.fetched_at, 0)
            self._cache, self._lost = (data, replace(state, uptime=self._uptime() - age)), False


class RedisAnswers:
    """Remembers answers for all machines; see ``reply_once.Answers``.

    A new message takes two questions, and its answer a third. The lock of a message is not undone:
    there is no use for it when the answer is there.

    Args:
        url: of Redis.
        appid: the account's AppID.

    Raises:
        ConfigError: the URL cannot be used.
    """

    poll = LOOK

    def __init__(self, url: str, appid: str) -> None:
        self._redis, self._prefix = _Redis(url), f"wxserver:{appid}"

    def come(self, name: str, who: str) -> Found:
        """Count a copy, and make the message its own if it is nobody's or its owner has died."""
        key = self._message(name)
        mine = self._redis.lock(key) is not None
        with self._pipeline(key if mine else "") as ask:
            ask.hincrby(key, "copies", 1).expire(key, int(KEEP)).exists(self._waiting(who))
            _, _, waiting, fields = ask.hgetall(key).execute()
        return self._found(key, fields, mine, bool(waiting))

    def look(self, name: str) -> Found:
        """Look again, and make the message the caller's if its owner has died."""
        key = self._message(name)
        with self._pipeline() as ask:
            fields, locked = ask.hgetall(key).exists(f"{key}.lock").execute()
        mine = b"parts" not in fields and not locked and self._redis.lock(key) is not None
        if mine:  # the answer may have come in between
            with self._pipeline(key) as ask:
                [fields] = ask.hgetall(key).execute()
        return self._found(key, fields, mine)

    def tell_late(self, name: str) -> Found:
        """Note that the follower was told to wait, if the answer is not there yet."""
        key = self._message(name)
        with self._pipeline() as ask:
            ask.hsetnx(key, "late", 1).expire(key, int(KEEP_LATE))
            *_, fields = ask.hgetall(key).execute()
        return self._found(key, fields)

    def keep(self, name: str, parts: Parts) -> None:
        """Leave the answer for the copies."""
        key = self._message(name)
        try:
            with self._pipeline(whole=True) as ask:  # or an answer could be there and not first
                ask.hsetnx(key, "late", 0).expire(key, int(KEEP))
                ask.hsetnx(key, "parts", b"".join(part + b"\0" for part in parts)).execute()
        finally:
            self._redis.leave(key)

    def put(self, who: str, order: str, part: bytes) -> None:
        """Let a part wait for the follower, behind those of lesser ``order``."""
        key = self._waiting(who)
        with self._pipeline() as ask:  # one score for all, and Redis sorts them by their bytes
            ask.zadd(key, {order.encode() + b"\0" + part: 0}).expire(key, int(KEEP_LATE)).execute()

    @contextlib.contextmanager
    def waiting(self, who: str) -> Iterator[bytes | None]:
        """Yield the first part that waits for the follower; it is gone when the block succeeds."""
        key = self._waiting(who)
        lock = self._redis.lock(key)
        if not lock:
            yield None
            return
        try:
            with self._redis.asked() as client:
                first = client.zrange(key, 0, 0)
            yield first[0].partition(b"\0")[2] if first else None
            if first:
                with self._redis.asked() as client:
                    client.zrem(key, first[0])
        finally:
            self._redis.unlock(key, lock)

    def _message(self, name: str) -> str:
        return f"{self._prefix}:message:{name}"

    def _waiting(self, who: str) -> str:
        return f"{self._prefix}:waiting:{who}"

    @contextlib.contextmanager
    def _pipeline(self, locked: str = "", whole: bool = False) -> Iterator[Any]:
        """Yield questions to ask in one go, ``whole`` with no other's in between.

        If they fail, ``locked`` is not kept so.
        """
        try:
            with self._redis.asked() as client, client.pipeline(transaction=whole) as ask:
                yield ask
        except OSError:
            self._redis.leave(locked)
            raise

    def _found(
        self, key: str, fields: dict[bytes, bytes], mine: bool = False, waiting: bool = False
    ) -> Found:
        parts = fields.get(b"parts")
        if mine and parts is not None:
            self._redis.leave(key)
            mine = False
        return Found(
            int(fields.get(b"copies", 0)),
            mine,
            fields.get(b"late") == b"1",
            None if parts is None else parts.split(b"\0")[:-1],
            waiting,
        )


def answers(config: Config) -> RedisAnswers:
    """Return the answers of the account of config.ini.

    Raises:
        ConfigError: the URL cannot be used.
    """
    return RedisAnswers(config.redis, config.appid)


def check(config: Config) -> None:
    """See at the start that Redis is there and can be written.

    Raises:
        ConfigError: it is not, or cannot.
    """
    link = _Redis(config.redis)
    try:
        with link.asked() as client:
            client.set(f"wxserver:{config.appid}:start", 1, ex=1)
    except OSError as error:
        raise ConfigError(f"[shared] redis: {error.filename}: {error.strerror}") from None
    finally:
        link.client.close()


_all: weakref.WeakSet[_Redis] = weakref.WeakSet()


def _after_fork() -> None:
    for link in _all:
        link.after_fork()


os.register_at_fork(after_in_child=_after_fork)
