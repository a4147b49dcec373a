"""What the tries of a message share, how they wait for its answer, and how failures are logged.

``Answers`` is the interface of what they share: ``journal`` has it for one machine, ``redis_store``
for several.
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
        is_mine: the caller has to run ``reply()``: this call has just made it the owner.
        told_to_wait: the follower was told to wait before the answer was there.
        answer: its XML, empty for silence, None while there is none.
    """

    tries: int
    age: float
    owner: str
    is_mine: bool = False
    told_to_wait: bool = False
    answer: bytes | None = None


class Answers(Protocol):
    """What the tries of a message know of each other, by the message's name.

    All methods raise OSError when the place cannot be reached.
    """

    poll_interval: float  # seconds between two looks for answers of other processes

    def claim(self, name: str) -> State:
        """Count a try. The caller owns the message if nobody did or its owner process died."""

    def poll(self, name: str) -> State:
        """Read again. The caller owns the message if its owner process died without an answer."""

    def answered(self, names: list[str]) -> list[str]:
        """Return those of the names that have an answer."""

    def tell_to_wait(self, name: str) -> State:
        """Note that the follower was told to wait, unless the answer is there."""

    def save(self, name: str, answer: bytes) -> None:
        """Save the answer for the other tries."""

    def is_alive(self, owner: str) -> bool:
        """Tell whether the owner of a message can still answer it."""


class Waiters:
    """The threads of this process that wait for answers. One of them polls for all."""

    def __init__(self, answers: Answers) -> None:
        self._answers, self._polling = answers, Lock()
        self._events: dict[str, Event] = {}  # by message name

    def wait(self, name: str, seconds: float) -> None:
        """Wait until the message may have an answer, or less; raise OSError as ``Answers`` do."""
        event = self._events.setdefault(name, Event())
        try:
            if self._polling.acquire(blocking=False):
                try:
                    event.wait(min(seconds, self._answers.poll_interval))
                    for answered in self._answers.answered(list(self._events)):
                        self.wake(answered)
                finally:
                    self._polling.release()
            else:
                event.wait(seconds)
        finally:
            self.wake(name)  # other threads may wait for the same event

    def wake(self, name: str) -> None:
        """Wake the threads that wait for a message."""
        if event := self._events.pop(name, None):
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
