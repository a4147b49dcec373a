"""One message, one run of ``reply()``, one answer, however often and wherever WeChat sends it.

WeChat sends a message up to three times, five seconds apart. Each of these tries may reach another
thread, process or machine. The first one claims the message and runs ``reply()``; the others wait
for the answer. If the owner process dies, one of them runs ``reply()`` again. An answer that no
try can take any more is late: it waits for the follower's next message.

Source: the platform's 接收普通消息 (when WeChat sends again, and what tells messages apart).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Thread
from typing import Any, NamedTuple, TypeAlias

from wechat.answers import Answers, ErrorLog, State, Waiters
from wechat.config import Config
from wechat.late import LateAnswers, Waiting
from wechat.message import Message, from_xml

Parts: TypeAlias = list[bytes]  # XML of one or more messages; an empty list is silence

WECHAT_TIMEOUT = 5.0  # seconds that WeChat waits for the answer to one try
TRIES = 3  # of a message, in all
# The next four are in units of WECHAT_TIMEOUT.
ANSWER_WITHIN = 0.9  # a later answer may not reach WeChat before it hangs up
LAST_TRY_AGE = 1.8  # a try that comes this long after the first is the last, if one was lost
REPEAT_NOTICE_AT = 2.8  # of a message that waits for another's answer: before its last try ends
WINDOW = 3.2  # after the first try no other can still be waiting

_SAFE_NAME = re.compile("[A-Za-z0-9_+-]{1,120}")


class _Try(NamedTuple):
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
        """Tell whether an answer that is returned now reaches WeChat.

        The last try gets it as late as the notice that it would get instead.
        """
        waited = time.monotonic() - self.arrived_at
        return (waited < ANSWER_WITHIN * timeout or self.is_last) and not self.client_gone()


class ReplyOnce:
    """Runs ``reply()`` once for a message.

    Args:
        answers: what the tries share.
        late: the answers that wait for their follower's next message.
        write: makes the XML of what ``reply()`` returned for a message: as its answer, or (third
            argument) as a late answer, which another message gets. Raises nothing.
        wait_notice: what the follower reads while ``reply()`` still runs.
        typing: shows an OpenID that an answer is being written.
        timeout: seconds that WeChat waits; shorter in tests.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        answers: Answers,
        late: LateAnswers,
        write: Callable[[Message, Any, bool], Parts],
        wait_notice: str,
        *,
        typing: Callable[[str], object] | None = None,
        timeout: float = WECHAT_TIMEOUT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._answers, self._late, self._write = answers, late, write
        self._wait_notice, self._typing = wait_notice, typing
        self._timeout, self._clock = timeout, clock
        self._waiters, self._log = Waiters(answers), ErrorLog(clock)

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
            message: as WeChat sent it.
            run: calls ``reply()``; raises nothing.
            client_gone: tells whether WeChat has hung up on this try.
        """
        follower, name = _names(message)
        if (message.get("MsgType"), message.get("Event")) == ("event", "unsubscribe"):
            self._late.clear(follower)
        try:
            state = self._answers.claim(name)
        except OSError as error:
            self._log("another try of this message would run reply() again", error)
            state = State(tries=1, age=0.0, owner="", is_mine=True)
        now = time.monotonic()
        first, seen = now - state.age, self._clock() - state.age
        is_last = state.tries >= TRIES or state.age >= LAST_TRY_AGE * self._timeout
        this = _Try(message, run, client_gone, follower, name, seen, first, now, is_last)
        return self._run(this) if state.is_mine and state.tries == 1 else self._wait(this, state)

    def _wait(self, this: _Try, state: State) -> bytes | None:
        """Wait for the answer; become the owner if the owner process died."""
        until = this.arrived_at + self._timeout
        if this.is_last:  # it may have waited for a thread: then WeChat hangs up earlier
            last_began = this.first_at + (TRIES - 1) * self._timeout
            until = min(this.arrived_at, last_began) + ANSWER_WITHIN * self._timeout
        if self._typing and not state.is_mine and state.answer is None:
            _start_thread(self._typing, this.message["FromUserName"])
        while True:
            if state.told_to_wait:
                return self._notice(this)
            if state.answer is not None:
                heard = this.is_heard(self._timeout)
                return self._give_first(this, state.answer) if heard else None
            if state.is_mine:
                # The last try runs reply() in another thread, so that this one can tell to wait.
                unheard = this._replace(client_gone=lambda: True)
                if not (this.is_last and _start_thread(self._run, unheard, True)):
                    return self._run(this, is_heir=True)
            if this.client_gone():
                return None
            left = until - time.monotonic()
            if left <= 0:
                return self._tell_to_wait(this, state) if this.is_last else None
            state = state._replace(is_mine=False)
            with self._log.caught("a try waits for an answer that cannot be read"):
                self._waiters.wait(this.name, min(left, self._timeout / 5))
                state = self._answers.poll(this.name)

    def _run(self, this: _Try, is_heir: bool = False) -> bytes | None:
        """Make the answer of a message, as its owner, or as the heir of an owner that died."""
        if is_heir and (parts := self._late.find(this.follower, this.name)):
            return self._finish(this, lambda _late: parts)
        has_waited, waiting = False, Waiting.NOTHING
        # A follower who was told to wait and writes again asks for that answer.
        while this.message.get("MsgType") != "event":
            waiting = self._late.waiting(this.follower, self._answers.is_alive)
            if waiting < Waiting.PENDING:
                break
            with self._late.next_part(this.follower) as part:
                if part is not None:
                    return self._finish(this, lambda _late: [part])
            if time.monotonic() > this.first_at + REPEAT_NOTICE_AT * self._timeout:
                return self._finish(this, lambda late: [] if late else [self._notice(this)])
            has_waited = True
            time.sleep(self._timeout / 25)
        if has_waited and waiting == Waiting.NOTHING:  # another message or a push has given it
            return self._finish(this, lambda _late: [])
        return self._finish(this, partial(self._write, this.message, this.run()))

    def _finish(self, this: _Try, write: Callable[[bool], Parts]) -> bytes | None:
        """Save the answer for the other tries, and keep it as late if this try does not take it.

        It is kept before it is saved, so that a worker that is killed here loses nothing.
        """
        heard = this.is_heard(self._timeout)
        parts = write(False)
        first = parts[0] if parts else b""
        late_parts = parts if heard else write(True)
        free_at, told_to_wait = this.seen + WINDOW * self._timeout, False
        if not heard or len(parts) > 1:
            self._late.save(this.follower, this.name, late_parts, this.seen, free_at)
        try:
            self._answers.save(this.name, first)
            if time.monotonic() > this.first_at + ANSWER_WITHIN * self._timeout:  # not before
                told_to_wait = self._answers.poll(this.name).told_to_wait
        except OSError as error:
            self._log("another try of this message may get no answer", error)
        self._waiters.wake(this.name)
        if told_to_wait:  # by a try that came later: WeChat has given up this one
            heard, free_at = False, 0.0
            self._late.save(this.follower, this.name, late_parts, this.seen, free_at)
        if not heard:
            self._late.push_soon(this.follower, this.message, free_at)
            return None
        return self._give_first(this, first) if len(parts) > 1 else first

    def _give_first(self, this: _Try, answer: bytes) -> bytes:
        """Return the answer to a try. What comes after its first part is late from now on."""
        self._late.remove_first(this.follower, this.name)
        self._late.push_soon(this.follower, this.message, free_at=0.0)
        return answer

    def _tell_to_wait(self, this: _Try, state: State) -> bytes | None:
        """Tell the follower to wait, unless the answer comes at this very moment."""
        self._late.mark_pending(this.follower, this.name, state.owner)
        with self._log.caught("a late answer may be lost"):
            state = self._answers.tell_to_wait(this.name)
        if state.answer is None or state.told_to_wait:
            return self._notice(this)
        return self._give_first(this, state.answer)

    def _notice(self, this: _Try) -> bytes:
        return self._write(this.message, self._wait_notice, False)[0]


def from_config(
    config: Config,
    write: Callable[[Message, Any, Sequence[str], bool], Parts],
    clock: Callable[[], float] = time.time,
) -> ReplyOnce:
    """Make what runs ``reply()`` once for each message of the account of config.ini.

    Args:
        config: says where messages are remembered, and what becomes of late answers.
        write: makes the XML of what ``reply()`` returned for a message, as ``message.answer``
            does from the same four arguments; raises nothing.
        clock: Unix time in seconds.

    Raises:
        ConfigError: ``state_dir`` cannot be made, or Redis cannot be used.
    """
    push = typing = None
    if config.late == "push":
        from wechat import api

        account = api.from_config(config)
        typing = account.typing

        def push(openid: str, xml: bytes) -> None:
            account.send(openid, from_xml(xml))

    if config.redis:
        from wechat.redis_store import stores
    else:
        from wechat.journal import stores
    answers, store = stores(config)
    late = LateAnswers(store, push, clock, drop=config.late == "drop")

    def write_parts(message: Message, reply: Any, is_late: bool) -> Parts:
        return write(message, reply, late.endings(message, is_late), is_late)

    return ReplyOnce(answers, late, write_parts, config.late_text, typing=typing, clock=clock)


def _start_thread(target: Callable[..., object], *args: object) -> bool:
    try:
        Thread(target=target, args=args).start()
    except RuntimeError:  # the process has too many
        return False
    return True


def _names(message: Message) -> tuple[str, str]:
    """Return a name for the follower and one for the message.

    A message has a MsgId. An event has none: its tries are alike in every field, and another event
    differs in one.
    """
    follower = f"{message.get('ToUserName')}+{message.get('FromUserName')}"
    identity = None if message.get("MsgType") == "event" else message.get("MsgId")
    identity = identity or json.dumps(message, sort_keys=True)
    return _safe(follower), _safe(f"{follower}+{identity}")


def _safe(name: str) -> str:
    """Return the name itself if it can be part of a file's name, else its digest."""
    return name if _SAFE_NAME.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()
