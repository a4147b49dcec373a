"""One message, one run of ``reply()``, one answer, however often and wherever WeChat sends it.

WeChat sends a message up to three times, five seconds apart. Each of these tries may reach another
thread, process or machine. The first one claims the message and runs ``reply()``; the others wait
for the answer. If the owner process dies, one of them runs ``reply()`` again. An answer that no
try can take any more is late: it waits in a queue for the follower's next message.

What the tries share is kept by ``Answers``, for seconds, and by ``Queue``, for two days:
``reply_journal`` and ``reply_queue`` on one machine, ``redis_store`` on several. Source of the
rules: the platform's 接收普通消息 (when it sends again, and how to tell messages apart).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from threading import Event, Lock, Thread, Timer
from typing import Any, NamedTuple, Protocol, TypeAlias

from reply_late import LateAnswers

Message: TypeAlias = dict[str, Any]
Parts: TypeAlias = list[bytes]  # XML of one or more messages; an empty list is silence

WECHAT_TIMEOUT = 5.0  # seconds that WeChat waits for the answer to one try
TRIES = 3  # of a message, in all
# The next four are in units of WECHAT_TIMEOUT.
ANSWER_WITHIN = 0.9  # a later answer may not reach WeChat before it hangs up
LAST_TRY_AGE = 1.8  # a try that comes this long after the first is the last, if one was lost
REPEAT_NOTICE_AT = 2.8  # of a message that waits for another's answer: before its last try ends
WINDOW = 3.2  # after the first try no other can still be waiting
REMEMBER = 20.0  # seconds that a message is remembered at least; its tries come within 15
PUSH_DELAY = 1.0  # seconds, so that what is pushed comes after the answer itself
LOG_INTERVAL = 10.0  # seconds between two errors in the log: a full disk is full for all messages

_SAFE_NAME = re.compile("[A-Za-z0-9_+-]{1,120}")
log = logging.getLogger("reply_once")


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

    def save(self, name: str, answer: bytes) -> bool:
        """Save the answer for the other tries; return whether the follower was told to wait."""

    def is_alive(self, owner: str) -> bool:
        """Tell whether the owner of a message can still answer it."""


@dataclass(frozen=True, slots=True)
class _Try:
    """One request of WeChat's for a message."""

    message: Message
    run: Callable[[], Any]  # reply()
    client_gone: Callable[[], bool]
    follower: str
    name: str
    seen: float  # Unix time of the first try
    first_at: float  # the same by time.monotonic()
    arrived_at: float  # of this try, by time.monotonic()
    is_last: bool

    def is_heard(self, timeout: float) -> bool:
        """Tell whether an answer that is returned now reaches WeChat."""
        waited = time.monotonic() - self.arrived_at
        return waited < ANSWER_WITHIN * timeout and not self.client_gone()

    @property
    def is_event(self) -> bool:
        return self.message.get("MsgType") == "event"


class ReplyOnce:
    """Runs ``reply()`` once for a message.

    Args:
        answers: what the tries share.
        late: where late answers wait; None: they are dropped.
        write: makes the XML of what ``reply()`` returned for a message: as its answer, or (third
            argument) as a late answer, which another message gets. Raises nothing.
        wait_notice: what the follower reads while ``reply()`` still runs.
        push: sends one part to an OpenID by 客服消息, and raises when WeChat refuses it.
        typing: shows an OpenID that an answer is being written.
        timeout: seconds that WeChat waits; shorter in tests.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        answers: Answers,
        late: LateAnswers | None,
        write: Callable[[Message, Any, bool], Parts],
        wait_notice: str,
        *,
        push: Callable[[str, bytes], object] | None = None,
        typing: Callable[[str], object] | None = None,
        timeout: float = WECHAT_TIMEOUT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._answers, self._late, self._write = answers, late, write
        self._wait_notice, self._push, self._typing = wait_notice, push, typing
        self._timeout, self._clock = timeout, clock
        self._waiters = _Waiters(answers)
        self._next_log_at = 0.0

    def answer(
        self,
        message: Message,
        run: Callable[[], Any],
        client_gone: Callable[[], bool] = lambda: False,
    ) -> bytes | None:
        """Return the XML to answer a try with, empty for silence.

        None: there is no answer yet, or nobody listens for it. The try must then fail (503), since
        WeChat sends no other one after any 200, even an empty one.

        Args:
            message: the message.
            run: calls ``reply()``; raises nothing.
            client_gone: tells whether WeChat has hung up on this try.
        """
        follower, name = _names(message)
        if self._late and message.get("Event") == "unsubscribe":
            with self._logged("answers wait for a follower who has left"):
                self._late.clear(follower)
        try:
            state = self._answers.claim(name)
        except OSError as error:
            self._log("another try of this message would run reply() again", error)
            return _first(self._write(message, run(), False))
        now = time.monotonic()
        first, seen = now - state.age, self._clock() - state.age
        is_last = state.tries >= TRIES or state.age >= LAST_TRY_AGE * self._timeout
        this = _Try(message, run, client_gone, follower, name, seen, first, now, is_last)
        return self._run(this) if state.mine and state.tries == 1 else self._wait(this, state)

    def _wait(self, this: _Try, state: State) -> bytes | None:
        """Wait for the answer; become the owner if the owner process died."""
        until = this.arrived_at + self._timeout
        if this.is_last:  # which may have waited for its thread: WeChat hangs up earlier, then
            until = min(
                this.arrived_at + ANSWER_WITHIN * self._timeout,
                this.first_at + (TRIES - 1 + ANSWER_WITHIN) * self._timeout,
            )
        if self._typing and not state.mine and state.answer is None:
            _start(Thread(target=self._typing, args=(this.message["FromUserName"],)))
        while True:
            if state.told_to_wait:
                return self._notice(this)
            if state.answer is not None:
                return self._hand_over(this, state.answer)
            # The last try runs reply() in another thread, so that this one can tell to wait.
            if state.mine and not (this.is_last and self._run_beside(this)):
                return self._run(this, inherited=True)
            if this.client_gone():
                return None
            left = until - time.monotonic()
            if left <= 0:
                return self._tell_to_wait(this, state) if this.is_last else None
            try:
                self._waiters.wait(this.name, min(left, self._timeout / 5))
                state = self._answers.look(this.name)
            except OSError as error:
                state = state._replace(mine=False)
                self._log("a try waits for an answer that cannot be read", error)

    def _run_beside(self, this: _Try) -> bool:
        unheard = replace(this, client_gone=lambda: True)
        return _start(Thread(target=self._run, args=(unheard,), kwargs={"inherited": True}))

    def _run(self, this: _Try, inherited: bool = False) -> bytes | None:
        """Make the answer of a message, as its owner."""
        if self._late and inherited:  # from a process that may have died with its answer ready
            with self._logged("reply() may run twice"):
                if parts := self._late.find(this.follower, this.name):
                    return self._finish(this, lambda _late: parts)
        if self._late and not this.is_event:
            is_answered, answer = False, None
            consequence = "a late answer may be lost, or given twice"
            with self._logged(consequence), self._late_answer(this, self._late) as write:
                if write:
                    answer, is_answered = self._finish(this, write), True
            if is_answered:
                return answer
        return self._finish(this, partial(self._write, this.message, this.run()))

    @contextlib.contextmanager
    def _late_answer(
        self, this: _Try, late: LateAnswers
    ) -> Iterator[Callable[[bool], Parts] | None]:
        """Yield what a message gets instead of ``reply()``; None: there is nothing.

        A follower who was told to wait and writes again asks for that answer. So the message waits
        until the answer is there, or until its own last try has to be told to wait again.
        """
        has_waited = False
        while True:
            with late.next_part(this.follower) as part:
                if part is not None:
                    yield lambda _late: [part]
                    return
            alive, dead = late.pending(this.follower, self._answers.is_alive)
            if has_waited and not alive and not dead:  # another message got the answer
                yield lambda _late: []
                return
            if not alive:
                yield None
                return
            if time.monotonic() > this.first_at + REPEAT_NOTICE_AT * self._timeout:
                yield lambda is_late: [] if is_late else [self._notice(this)]
                return
            has_waited = True
            time.sleep(self._timeout / 25)

    def _finish(self, this: _Try, write: Callable[[bool], Parts]) -> bytes | None:
        """Save the answer for the other tries, and keep it as late if this try does not take it.

        It is kept before it is saved, so that a worker that is killed here loses nothing.
        """
        heard = this.is_heard(self._timeout)
        parts = write(False)
        late_parts = parts if heard else write(True)
        free_at = this.seen + WINDOW * self._timeout
        told_to_wait = False
        if not heard or len(parts) > 1:
            self._keep_late(this, late_parts, free_at)
        with self._logged("another try of this message may get no answer"):
            told_to_wait = self._answers.save(this.name, _first(parts))
        self._waiters.wake(this.name)
        if told_to_wait:
            self._keep_late(this, late_parts, free_at=0.0)
            heard = False  # the last try was told: this one must be over
        elif heard and len(parts) > 1:
            self._give_first(this)
        if not heard:
            at_once = told_to_wait or self._clock() > free_at
            self._push_later(this, 0 if at_once else free_at - self._clock())
        return _first(parts) if heard else None

    def _hand_over(self, this: _Try, answer: bytes) -> bytes | None:
        """Give the answer to a try that waited for it, if WeChat still listens."""
        if not this.is_heard(self._timeout):
            return None
        self._give_first(this)
        return answer

    def _keep_late(self, this: _Try, parts: Parts, free_at: float) -> None:
        if self._late:
            with self._logged("a late answer may be lost"):
                self._late.put(this.follower, this.name, parts, this.seen, free_at)

    def _give_first(self, this: _Try) -> None:
        """Remove the part that a try gets from what is late, and push the rest."""
        if self._late:
            with self._logged("a late answer may be given twice"):
                self._late.give_first(this.follower, this.name)
            self._push_later(this, 0)

    def _tell_to_wait(self, this: _Try, state: State) -> bytes | None:
        """Tell the follower to wait, unless the answer comes at this very moment."""
        with self._logged("a late answer may be lost"):
            if self._late:
                self._late.put_pending(this.follower, this.name, state.owner)
            state = self._answers.tell_to_wait(this.name)
        if state.answer is None or state.told_to_wait:
            return self._notice(this)
        self._give_first(this)
        return state.answer

    def _notice(self, this: _Try) -> bytes:
        return self._write(this.message, self._wait_notice, False)[0]

    def _push_later(self, this: _Try, seconds: float) -> None:
        if self._push and self._late:
            _start(Timer(seconds + PUSH_DELAY, self._push_parts, (this, self._push, self._late)))

    def _push_parts(
        self, this: _Try, push: Callable[[str, bytes], object], late: LateAnswers
    ) -> None:
        """Push as many queued parts as WeChat takes. The others wait for the next message."""
        try:
            for _ in range(max_pushes(this.message)):
                with late.next_part(this.follower) as part:
                    if part is None:
                        return
                    push(this.message["FromUserName"], part)
        except Exception as error:  # noqa: BLE001  whatever fails, the part stays in the queue
            log.error("a late answer waits for the follower's next message: %s", error)

    @contextlib.contextmanager
    def _logged(self, consequence: str) -> Iterator[None]:
        """Log an OSError of the answers or the queue instead of raising it."""
        try:
            yield
        except OSError as error:
            self._log(consequence, error)

    def _log(self, consequence: str, error: OSError) -> None:
        if not 0 <= self._next_log_at - self._clock() <= LOG_INTERVAL:
            self._next_log_at = self._clock() + LOG_INTERVAL
            log.error("%s, and so may others: %s", consequence, error)


def max_pushes(message: Message) -> int:
    """Return how many 客服消息 WeChat takes after a message or an event."""
    return 3 if message.get("MsgType") == "event" else 5


class _Waiters:
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


def _start(thread: Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:  # the process has too many
        return False
    return True


def _first(parts: Parts) -> bytes:
    return parts[0] if parts else b""


def _names(message: Message) -> tuple[str, str]:
    """Return a name for the follower and one for the message.

    A message has a MsgId. An event has none: its tries are alike in every field, and another event
    differs in one.
    """
    follower = f"{message.get('ToUserName')}+{message.get('FromUserName')}"
    identity = None if message.get("MsgType") == "event" else message.get("MsgId")
    if not identity:
        identity = _digest(json.dumps(message, sort_keys=True))
    return _safe(follower), _safe(f"{follower}+{identity}")


def _safe(name: str) -> str:
    """Return the name itself if it can be part of a file's name, else its digest."""
    return name if _SAFE_NAME.fullmatch(name) else _digest(name)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
