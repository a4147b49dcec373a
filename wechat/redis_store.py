"""The access_token and the answers in Redis, for several machines.

The rules are those of ``token_store`` and ``once``; here is only where they keep what they
know. Whoever fetches a token or runs ``reply()`` has a lock of redis-py's, renewed as long as its
process lives, so that it is free seconds after its death. Every key has the AppID and ends by
itself:

    wxserver:APPID:token             the state of the token, as in the file
    wxserver:APPID:message:NAME      what is known of a message: tries, told, answer
    wxserver:APPID:seen:NAME         set with its first try: what is left of its life tells the age
    wxserver:APPID:late:FOLLOWER     the late answers of a follower, by message name
    ….lock                           the lock of a token, message or follower
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
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from token_store import LONGEST_LIFE, LONGEST_WAIT, Replace
from wechat.answers import REMEMBER, Answers, State
from wechat.config import ConfigError
from wechat.late import KEEP_LATE, LateStore

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import LockError
    from redis.lock import Lock
    from redis.retry import Retry
except ModuleNotFoundError:
    raise ConfigError("[shared] redis needs the package redis: pip install '.[redis]'") from None

if TYPE_CHECKING:
    from wechat.config import Config

TIMEOUT = 1.0  # seconds to connect, and to answer: WeChat waits five for everything
PAUSE = 1.0  # seconds that a Redis is left alone after a failure, so that not all wait for it
LEASE = 3.0  # seconds until the lock of a dead process is free; renewed three times as often
LOOK = 0.1  # seconds between two looks, at the token or for an answer
KEEP_TOKEN = LONGEST_LIFE + int(2 * LONGEST_WAIT)  # seconds; a wait after a failure is kept too
CONNECTIONS = 1024  # more than a process has threads; redis-py's own limit may be less

_OPTION = re.compile("db|username|password|ssl_.*")

log = logging.getLogger("wechat.redis_store")


class _Redis:
    """One Redis, asked with a time limit; and the locks that this process holds there.

    Raises:
        ConfigError: the URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            # Without this a piece of a password with / in it would be taken for a port or a path.
            is_cut = "@" in url and "@" not in parts.netloc
            is_nameless = parts.username and not parts.password
            # redis-py lets every option of the URL win over those below.
            if is_cut or is_nameless or not all(map(_OPTION.fullmatch, parse_qs(parts.query))):
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
                " password and ssl_…; a password stands after a colon, redis://:PASSWORD@HOST, and"
                " in it / is written %2F, ? %3F, @ %40 and # %23"
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


class RedisPlace:
    """Keeps the state of the access_token, for all machines; see ``token_store.Place``.

    Without Redis a token that is known goes on being given out while it lives, and nobody asks
    WeChat for another: it could not be shared, and the others' token would die of it. The clocks of
    the machines have to agree within a minute.

    Args:
        url: of Redis.
        appid: the account's AppID.

    Raises:
        ConfigError: the URL cannot be used.
    """

    one_machine = False

    def __init__(self, url: str, appid: str) -> None:
        self._redis, self._key = _Redis(url), f"wxserver:{appid}:token"
        self.name = self._redis.where
        self._data, self._failure = b"", ""  # what the last read brought, or why it failed
        self._read_at = self._lock_at = 0.0  # when to ask Redis again

    def read(self, latest: bool, /) -> bytes:
        """Return what Redis holds, asked at most once in ``LOOK`` unless ``latest``."""
        now = time.monotonic()
        if latest or now >= self._read_at:
            self._read_at = now + LOOK
            try:
                with self._redis.asked() as client:
                    self._data, self._failure = client.get(self._key) or b"", ""
            except OSError as error:
                self._failure = str(error.strerror)
        if self._failure:
            raise self._redis.error(self._failure)
        return self._data

    @contextlib.contextmanager
    def lock(self) -> Iterator[Replace | None]:
        """Try once to get the lock, for all threads at most once in ``LOOK``."""
        lock = None
        if time.monotonic() >= self._lock_at:
            lock = self._redis.lock(self._key)
            self._lock_at = 0.0 if lock else time.monotonic() + LOOK
        if lock is None:
            yield None
            return

        def replace(data: bytes) -> None:
            if not self._redis.has(lock):
                raise self._redis.error("the lock was lost")
            with self._redis.asked() as client:
                client.set(self._key, data, ex=KEEP_TOKEN)
            self._data = data

        try:
            yield replace
        finally:
            self._redis.unlock(self._key, lock)


class RedisAnswers:
    """Remembers messages for all machines; see ``answers.Answers``.

    A message takes two round trips, and its answer a third. The owner of a message has its lock,
    which lasts a little longer than the answer is needed.

    Args:
        url: of Redis.
        appid: the account's AppID.

    Raises:
        ConfigError: the URL cannot be used.
    """

    poll_interval = LOOK

    def __init__(self, url: str, appid: str) -> None:
        self._redis, self._prefix = _Redis(url), f"wxserver:{appid}"

    def claim(self, name: str) -> State:
        """Count a try. The caller owns the message if nobody did or its owner process died."""
        key = self._key(name)
        mine = self._redis.lock(key) is not None
        with self._pipeline(key if mine else "") as ask:
            ask.hincrby(key, "tries", 1).expire(key, int(REMEMBER))
            fields, age = self._ask(name, ask)
        return self._state(key, fields, age, mine)

    def poll(self, name: str) -> State:
        """Read again. The caller owns the message if its owner process died without an answer."""
        key = self._key(name)
        with self._pipeline() as ask:
            fields, age = self._ask(name, ask.exists(f"{key}.lock"))
        mine = b"answer" not in fields and not self.is_alive(key)
        mine = mine and self._redis.lock(key) is not None
        if mine:  # the answer may have come just before the lock was free
            with self._pipeline(key) as ask:
                fields, age = self._ask(name, ask)
        return self._state(key, fields, age, mine)

    def answered(self, names: list[str]) -> list[str]:
        """Return those of the names that have an answer."""
        # This process's own answers wake those who wait for them.
        elsewhere = [name for name in names if self._key(name) not in self._redis._held]
        with self._pipeline() as ask:
            for name in elsewhere:
                ask.hexists(self._key(name), "answer")
            found = ask.execute()
        return [name for name, is_answered in zip(elsewhere, found, strict=True) if is_answered]

    def tell_to_wait(self, name: str) -> State:
        """Note that the follower was told to wait, unless the answer is there."""
        key = self._key(name)
        with self._pipeline() as ask:
            fields, age = self._ask(name, ask.hsetnx(key, "told", 1).expire(key, int(REMEMBER)))
        return self._state(key, fields, age)

    def save(self, name: str, answer: bytes) -> None:
        """Save the answer for the other tries."""
        key = self._key(name)
        try:
            with self._pipeline(whole=True) as ask:  # an answer that is there was not told to wait
                ask.hsetnx(key, "told", 0).expire(key, int(REMEMBER))
                ask.hsetnx(key, "answer", answer).execute()
        finally:
            self._redis.leave(key)

    def is_alive(self, owner: str) -> bool:
        """Tell whether a message's lock is held."""
        with self._redis.asked() as client:
            return bool(client.exists(f"{owner}.lock"))

    def _key(self, name: str) -> str:
        return f"{self._prefix}:message:{name}"

    def _ask(self, name: str, pipeline: Any) -> tuple[dict[bytes, bytes], float]:
        """Run the pipeline; return the fields of the message, and its age in seconds."""
        life, key = int(REMEMBER * 1000), f"{self._prefix}:seen:{name}"
        pipeline.set(key, 1, px=life, nx=True).pttl(key)
        *_, left, fields = pipeline.hgetall(self._key(name)).execute()
        return fields, (life - left) / 1000

    @contextlib.contextmanager
    def _pipeline(self, locked: str = "", whole: bool = False) -> Iterator[Any]:
        """Yield commands to send in one go, ``whole`` with no other client's in between.

        If they fail, the lock ``locked`` is left to end by itself.
        """
        try:
            with self._redis.asked() as client, client.pipeline(transaction=whole) as ask:
                yield ask
        except OSError:
            self._redis.leave(locked)
            raise

    def _state(self, key: str, fields: dict[bytes, bytes], age: float, mine: bool = False) -> State:
        answer = fields.get(b"answer")
        if mine and answer is not None:
            self._redis.leave(key)
            mine = False
        tries, told = int(fields.get(b"tries", 0)), fields.get(b"told") == b"1"
        return State(tries, age, key, mine, told, answer)


class RedisLate:
    """Keeps late answers for all machines; see ``late.LateStore``.

    A follower has a hash with a field for each message.

    Args:
        url: of Redis.
        appid: the account's AppID.

    Raises:
        ConfigError: the URL cannot be used.
    """

    def __init__(self, url: str, appid: str) -> None:
        self._redis, self._prefix = _Redis(url), f"wxserver:{appid}:late"

    def read(self, follower: str) -> dict[str, bytes]:
        """Return the entries of a follower."""
        with self._redis.asked() as client:
            entries = client.hgetall(f"{self._prefix}:{follower}")
        return {name.decode(): entry for name, entry in entries.items()}

    def write(self, follower: str, name: str, entry: bytes, replace: bool = True) -> None:
        """Write an entry; if it may not ``replace``, one that is there stays."""
        key = f"{self._prefix}:{follower}"
        with self._redis.asked() as client:
            (client.hset if replace else client.hsetnx)(key, name, entry)
            client.expire(key, int(KEEP_LATE))

    def remove(self, follower: str, name: str) -> None:
        """Remove an entry if it is there."""
        with self._redis.asked() as client:
            client.hdel(f"{self._prefix}:{follower}", name)

    @contextlib.contextmanager
    def lock(self, follower: str, name: str) -> Iterator[bool]:
        """Lock an entry until the block ends or the process dies; False: it is locked already."""
        key = f"{self._prefix}:{follower}:{name}"
        lock = self._redis.lock(key)
        try:
            yield lock is not None
        finally:
            if lock:
                self._redis.unlock(key, lock)


def stores(config: Config) -> tuple[Answers, LateStore]:
    """Return where the account of config.ini keeps messages and late answers.

    Raises:
        ConfigError: the URL cannot be used.
    """
    return RedisAnswers(config.redis, config.appid), RedisLate(config.redis, config.appid)


def check(config: Config) -> None:
    """See at the start that Redis is there, is no cluster, and can be written.

    Raises:
        ConfigError: it is not, or cannot.
    """
    link = _Redis(config.redis)
    try:
        with link.asked() as client:
            with contextlib.suppress(redis.ResponseError):  # before Redis 6
                if b"cluster" in client.execute_command("HELLO"):
                    raise ConfigError(
                        f"[shared] redis: {link.where} is part of a Redis Cluster, which keeps the"
                        " keys of one message apart; a Redis that is no cluster is needed"
                    )
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
