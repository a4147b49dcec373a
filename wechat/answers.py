"""What the tries of a message share, how they wait for its answer, and what is logged of failures.

``Answers`` is the interface of the place that they share: ``journal`` is that of one machine,
``redis_store`` that of several.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from threading import Event, Lock
from typing import NamedTuple, Protocol

REMEMBER = 20.0  # seconds that a message is remembered at least; its tries come within 15
LOG_INTERVAL = 10.0  # seconds between two errors in the log: a full disk is full for all messages

log = logging.getLogger("wechat.once")


class State(NamedTuple):
    """What is known of a message.

    Args:
        tries: how many of its tries were seen.
        age: seconds since the first of them.
        owner: who runs ``reply()``; see ``Answers.is_alive``.
        mine: the caller has to run ``reply()``: this call has just made it the owner.
        told_to_wait: the follower was told to wait before the answer was there.
        answer: its XML, empty for silence, None while there is none.
    """

    tries: int
    age: float
    owner: str
    mine: bool = False
    told_to_wait: bool = False
    answer: bytes | None = None


class Answers(Protocol):
    """What the tries of a message know of each other, by the message's name.

    All methods raise OSError when the place cannot be reached.
    """

    poll: float  # seconds between two looks for an answer of another process

    def claim(self, name: str) -> State:
        """Count a try. The caller owns the message if nobody did or its owner process died."""

    def look(self, name: str) -> State:
        """Look again. The caller owns the message if its owner process died without an answer."""

    def answered(self, names: list[str]) -> list[str]:
        """Return those of the names that have an answer."""

    def tell_to_wait(self, name: str) -> State:
        """Note that the follower was told to wait, unless the answer is there."""

    def save(self, name: str, answer: bytes) -> None:
        """Save the answer for the other tries."""

    def is_alive(self, owner: str) -> bool:
        """Tell whether the owner of a message can still answer it."""


class Waiters:
    """The threads of this process that wait for answers. One of them reads for all."""

    def __init__(self, answers: Answers) -> None:
        self._answers, self._lock, self._reading = answers, Lock(), Lock()
        self._events: dict[str, list[Event]] = {}  # by message name

    def wait(self, name: str, seconds: float) -> None:
        """Wait until the message may have an answer, or less; raise OSError as ``Answers`` do."""
        event = Event()
        with self._lock:
            self._events.setdefault(name, []).append(event)
        try:
            if self._reading.acquire(blocking=False):
                try:
                    event.wait(min(seconds, self._answers.poll))
                    with self._lock:
                        names = list(self._events)
                    for answered in self._answers.answered(names):
                        self.wake(answered)
                finally:
                    self._reading.release()
            else:
                event.wait(seconds)
        finally:
            with self._lock:
                self._events[name].remove(event)
                if not self._events[name]:
                    del self._events[name]

    def wake(self, name: str) -> None:
        """Wake those who wait for a message."""
        with self._lock:
            for event in self._events.get(name, ()):
                event.set()


class ErrorLog:
    """Logs OSErrors, one in ``LOG_INTERVAL``.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._next_at = clock, 0.0

    def __call__(self, consequence: str, error: OSError) -> None:
        """Log an error, and what it means for the message."""
        if not 0 <= self._next_at - self._clock() <= LOG_INTERVAL:
            self._next_at = self._clock() + LOG_INTERVAL
            log.error("%s, and so may others: %s", consequence, error)

    @contextlib.contextmanager
    def caught(self, consequence: str) -> Iterator[None]:
        """Log an OSError of the block in place of raising it."""
        try:
            yield
        except OSError as error:
            self(consequence, error)
