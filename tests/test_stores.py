"""The promises that both stores keep: the one of a machine's disk, and the one of Redis.

Machines are processes and objects that share nothing but the store: one state_dir, or one Redis.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import APPID, APPSECRET, TOKEN, Run, config_for
from serving import until
from test_once import PATIENCE, WAIT, Counted, event, message, send, write

import wechat.api
import wechat.journal
import wechat.redis_store
from token_store import TokenError, TokenStore
from wechat.answers import Answers
from wechat.config import Config
from wechat.late import LateAnswers, LateStore
from wechat.late_files import LateFiles
from wechat.once import ReplyOnce
from wxsim.fake_api import FakeApi

NAME, WHO = "gh_1+alice+1", "gh_1+alice"


class Shared:
    """What several machines share, and machines that share it."""

    def __init__(self, folder: Path, api: FakeApi, redis: str) -> None:
        self.folder, self.api, self.redis, self.machines = folder, api, redis, 0
        self.passed = 0.0  # seconds, for the machines and for WeChat
        api.clock = self.clock

    def clock(self) -> float:
        return time.time() + self.passed

    def _folder(self) -> Path:
        """Return the folder of another machine: its own, if what is shared is in Redis."""
        self.machines += 1
        folder = self.folder / (f"machine {self.machines}" if self.redis else "machine")
        folder.mkdir(exist_ok=True)
        return folder

    def config(self, **more: Any) -> Config:
        return Config(
            token=TOKEN,
            appid=APPID,
            appsecret=APPSECRET,
            api_base=self.api.base,
            state_dir=self._folder() / "state",
            redis=self.redis,
            **more,
        )

    def tokens(self, **more: Any) -> TokenStore:
        return wechat.api.token_store(self.config(**more), self.clock)

    def answers(self) -> Answers:
        return answers(self.config())

    def late(self) -> LateAnswers:
        return LateAnswers(late_store(self.config(), self.folder))

    def once(self, **more: Any) -> ReplyOnce:
        settings = {"timeout": PATIENCE, "late": self.late(), **more}
        late, answers = settings.pop("late"), self.answers()
        return ReplyOnce(answers, late, write, WAIT.decode(), **settings)

    def process(self, run: Run, script: str, *arguments: str) -> Any:
        """Start a process on another machine, and wait until it says that it is ready."""
        env = config_for(self.api, self._folder(), WX_REDIS=self.redis)
        process = run("-c", BEGIN + script, *arguments, env=env)
        assert process.stdout.readline() == "ready\n"
        return process


BEGIN = """
import os, sys, time
import wechat.redis_store, wechat.journal, wechat.api, wechat.config
from pathlib import Path
from wechat.late import LateAnswers
from wechat.late_files import LateFiles
from wechat.once import ReplyOnce
config = wechat.config.load()
if config.redis:
    answers, store = wechat.redis_store.stores(config)
else:
    answers = wechat.journal.Journal(config.state_dir / "replies")
    store = LateFiles(config.state_dir.parent.parent / "late")
late = LateAnswers(store)
def write(message, reply, late):
    return [reply.encode()] if isinstance(reply, str) else reply
once = ReplyOnce(answers, late, write, "wait", timeout=8)
def message(number=1):
    account = {"ToUserName": "gh_97417a04a28d", "FromUserName": "alice"}
    return {**account, "MsgType": "text", "MsgId": str(number)}
def ready():
    print("ready", flush=True)
    return sys.stdin.readline()
"""


def answers(config: Config) -> Answers:
    places = wechat.redis_store.stores if config.redis else wechat.journal.stores
    return places(config)[0]


def late_store(config: Config, folder: Path) -> LateStore:
    return wechat.redis_store.stores(config)[1] if config.redis else LateFiles(folder / "late")


def go(processes: list[Any]) -> list[str]:
    """Let processes that are ready go on at one moment; return what they print."""
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=40) for process in processes]
    assert {errors for _, errors in outputs} == {""}
    return [out.strip() for out, _ in outputs]


@pytest.fixture(params=["file", "redis"])
def shared(request: pytest.FixtureRequest, tmp_path: Path, fake_api: FakeApi) -> Shared:
    redis = request.getfixturevalue("redis_url") if request.param == "redis" else ""
    return Shared(tmp_path, fake_api, redis)


# The access_token

ASK = """
stale = sys.argv[1]
store = wechat.api.token_store(config)
ready()
print(store.refresh(stale) if stale else store.get())
"""


@pytest.mark.parametrize("endpoint", ["stable_token", "token"])
def test_a_token_is_fetched_once_for_all_machines(
    shared: Shared, fake_api: FakeApi, endpoint: str
) -> None:
    assert {shared.tokens(endpoint=endpoint).get() for _ in range(5)} == {fake_api.token}
    assert len(fake_api.fetches) == 1


def test_many_processes_at_once_make_one_fetch(shared: Shared, fake_api: FakeApi, run: Run) -> None:
    fake_api.delay = 0.2
    processes = [shared.process(run, ASK, "") for _ in range(8)]
    assert go(processes) == [fake_api.token] * 8
    assert len(fake_api.fetches) == 1


def test_many_processes_told_40001_at_once_make_one_fetch(
    shared: Shared, fake_api: FakeApi, run: Run
) -> None:
    stale = shared.tokens().get()
    fake_api.delay = 0.2
    fake_api.expire()
    processes = [shared.process(run, ASK, stale) for _ in range(8)]
    assert go(processes) == [fake_api.token] * 8
    assert fake_api.token != stale
    assert len(fake_api.fetches) == 2


def test_threads_of_one_store_share_one_fetch(shared: Shared, fake_api: FakeApi) -> None:
    fake_api.delay = 0.2
    store = shared.tokens()
    with ThreadPoolExecutor(100) as pool:
        assert set(pool.map(lambda _: store.get(), range(100))) == {fake_api.token}
    assert len(fake_api.fetches) == 1


def test_a_token_that_another_machine_replaced_is_not_fetched_again(
    shared: Shared, fake_api: FakeApi
) -> None:
    one, other = shared.tokens(), shared.tokens()
    first = one.get()
    assert other.get() == first
    second = one.refresh(first)
    assert other.refresh(first) == second != first
    assert len([asked for asked in fake_api.fetches if not asked.get("force_refresh")]) == 2


def test_tokens_that_are_refused_are_not_burned_by_any_machine(
    shared: Shared, fake_api: FakeApi
) -> None:
    store = shared.tokens()
    second = store.refresh(store.get())
    fetches = len(fake_api.fetches)
    for _ in range(5):
        with pytest.raises(TokenError, match="once in 30 s"):
            shared.tokens().refresh(second)
    assert shared.tokens().get() == second
    assert len(fake_api.fetches) == fetches


def test_whoever_refuses_two_tokens_within_30_s_is_told_so_and_holds_nobody_else_back(
    shared: Shared, fake_api: FakeApi
) -> None:
    fake_api.expires_in = 20
    store = shared.tokens()
    second = store.refresh(store.get())
    shared.passed += 18
    with pytest.raises(TokenError, match=r"once in 30 s at most, so again in 1\d s") as caught:
        store.refresh(second)
    assert caught.value.errcode == 45011
    assert "appsecret" not in str(caught.value)
    shared.passed += 3
    assert shared.tokens().get() == fake_api.token != second


def test_near_expiry_one_fetches_and_the_others_go_on_with_the_old_token(
    shared: Shared, fake_api: FakeApi
) -> None:
    one, other = shared.tokens(), shared.tokens()
    first = one.get()
    shared.passed += 7200 - 100
    asked, go_on = threading.Event(), threading.Event()

    def fetch() -> None:
        asked.set()
        assert go_on.wait(10)

    fake_api.on_fetch = fetch
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(one.get)
        assert asked.wait(10)
        assert other.get() == shared.tokens().get() == first
        go_on.set()
        assert fetching.result() == fake_api.token != first
    assert shared.tokens().get() == until(lambda: other.get() != first and other.get())
    assert len(fake_api.fetches) == 2


def test_past_expiry_the_others_wait_for_the_one_that_fetches(
    shared: Shared, fake_api: FakeApi
) -> None:
    first = shared.tokens().get()
    shared.passed += 7201
    fake_api.delay = 0.3
    with ThreadPoolExecutor(20) as pool:
        tokens = set(pool.map(lambda _: shared.tokens().get(), range(20)))
    assert tokens == {fake_api.token} != {first}
    assert len(fake_api.fetches) == 2


def test_a_fetch_of_a_process_that_dies_is_taken_over_within_seconds(
    shared: Shared, fake_api: FakeApi, run: Run
) -> None:
    asked = threading.Event()
    fake_api.on_fetch, fake_api.drip, fake_api.failure = asked.set, 1.0, b" " * 60
    owner = shared.process(run, ASK, "")
    owner.stdin.write("\n")
    owner.stdin.flush()
    until(lambda: fake_api.calls or fake_api.fetches or asked.is_set())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shared.tokens().get)
        assert not waiting.done()
        fake_api.drip, fake_api.failure = 0.0, None
        owner.kill()
        assert waiting.result() == fake_api.token


def test_a_failure_is_shared_and_not_repeated_by_another_machine(
    shared: Shared, fake_api: FakeApi
) -> None:
    fake_api.failure = b'{"errcode": 40164, "errmsg": "invalid ip 1.2.3.4"}'
    for _ in range(5):
        with pytest.raises(TokenError, match=r"errcode 40164 .*next try in 5 s") as caught:
            shared.tokens().get()
        assert caught.value.errcode == 40164
    assert len(fake_api.calls) == 1
    fake_api.failure = None
    shared.passed += 6
    assert shared.tokens().get() == fake_api.token


def test_while_wechat_is_down_every_machine_goes_on_with_the_old_token(
    shared: Shared, fake_api: FakeApi
) -> None:
    first = shared.tokens().get()
    shared.passed += 7200 - 100
    fake_api.failure = b"<html>"
    assert [shared.tokens().get() for _ in range(5)] == [first] * 5
    assert len(fake_api.calls) == 1
    shared.passed += 101
    with pytest.raises(TokenError, match="something else than WeChat's JSON"):
        shared.tokens().get()


# The answers

COPIES = """
def run():
    with open(sys.argv[1], "a") as runs:
        runs.write("run\\n")
    time.sleep(0.3)
    return [b"the answer"]
ready()
for number in range(4):
    print(once.answer(message(number), run))
"""


def test_every_copy_on_any_machine_gets_the_same_bytes_from_one_run(shared: Shared) -> None:
    for bot in (Counted(b"answer \n \xff"), Counted(b"1", b"2"), Counted()):
        number = len(bot.parts)
        came = {shared.once().answer(message(number, str(number)), bot) for _ in range(5)}
        assert came == {(bot.parts or [b""])[0]}
        assert bot.runs == 1


def test_copies_that_race_on_many_processes_are_one_run(
    shared: Shared, tmp_path: Path, run: Run
) -> None:
    runs = tmp_path / "runs"
    processes = [shared.process(run, COPIES, str(runs)) for _ in range(6)]
    assert go(processes) == ["\n".join(["b'the answer'"] * 4)] * 6
    assert runs.read_text().count("run") == 4


def test_each_try_is_counted_wherever_it_comes(shared: Shared) -> None:
    states = [shared.answers().claim(NAME) for _ in range(3)]
    assert [(state.tries, state.is_mine, state.answer) for state in states] == [
        (1, True, None),
        (2, False, None),
        (3, False, None),
    ]
    assert all(0 <= state.age < 5 for state in states)


def test_different_events_of_one_second_run_and_a_retry_does_not(shared: Shared) -> None:
    bot, sent = (
        Counted(b"a"),
        [
            event(Event="user_get_card", CardId="c", UserCardCode="1"),
            event(Event="user_get_card", CardId="c", UserCardCode="2"),
            event(Event="TEMPLATESENDJOBFINISH", MsgID="1"),
            event(Event="TEMPLATESENDJOBFINISH", MsgID="2"),
            event(Event="user_authorization_revoke", OpenID="o1"),
            event(Event="user_authorization_revoke", OpenID="o2"),
            event() | {"ScanCodeInfo": {"ScanType": "qrcode", "ScanResult": "1"}},
            event() | {"ScanCodeInfo": {"ScanType": "qrcode", "ScanResult": "2"}},
        ],
    )
    for _ in range(2):
        for each in sent:
            assert shared.once().answer(dict(each), bot) == b"a"
    assert bot.runs == len(sent)


OWNER = """
def run():
    ready()
    time.sleep(60)
once.answer(message(), run)
"""


@pytest.mark.parametrize("waits", [True, False])
def test_a_killed_owners_message_is_taken_over_within_seconds(
    shared: Shared, run: Run, waits: bool
) -> None:
    """By a copy that waits, or by one that comes later."""
    owner, bot, once = shared.process(run, OWNER), Counted(b"again"), shared.once(timeout=5.0)
    if not waits:
        os.kill(owner.pid, signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(once.answer, message(), bot)
        assert not waiting.done()
        os.kill(owner.pid, signal.SIGKILL)
        assert waiting.result() == b"again"
    assert bot.runs == 1


def test_a_run_is_its_owners_however_long_it_takes(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wechat.redis_store, "LEASE", 0.5)  # which is renewed
    bot = Counted(b"answer", seconds=2.0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(shared.once(timeout=8.0).answer, message(), bot)
        until(lambda: bot.runs)
        assert shared.once(timeout=8.0).answer(message(), Counted(b"other")) == b"answer"
        assert first.result() == b"answer"


def test_a_late_answer_is_picked_up_from_another_machine(shared: Shared) -> None:
    bot, other = Counted(b"late", seconds=4 * PATIENCE), Counted(b"other")
    assert send(shared.once(), message(1), bot) == [None, None, WAIT]
    assert shared.once().answer(message(2, "bob"), other) == b"other"
    assert shared.once().answer(message(3), other) == b"late"
    assert shared.once().answer(message(3), other) == b"late"
    assert shared.once().answer(message(4), other) == b"other"
    assert (bot.runs, other.runs) == (1, 2)


def test_an_answer_whose_rest_cannot_be_kept_is_there_for_the_other_tries(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full, bot = late_store(shared.config(), shared.folder), Counted(b"1", b"2")
    monkeypatch.setattr(full, "write", write)
    once = shared.once(late=LateAnswers(full))
    assert once.answer(message(), bot) == shared.once().answer(message(), bot) == b"1"
    assert bot.runs == 1


def test_a_text_in_parts_goes_on_on_any_machine(shared: Shared) -> None:
    bot, other = Counted(b"1", b"2", b"3"), Counted(b"other")
    came = [shared.once().answer(message(1), bot)]
    came += [shared.once().answer(message(number), other) for number in (2, 3, 3, 2, 4)]
    assert came == [b"1", b"2", b"3", b"3", b"2", b"other"]


def test_the_wait_notice_or_the_answer_is_first_for_all_who_look(shared: Shared) -> None:
    def meet(number: int) -> set[bool]:
        name, one, other = f"{NAME}{number}", shared.answers(), shared.answers()
        one.claim(name)
        other.claim(name)
        barrier = threading.Barrier(2)

        def tell() -> bool:
            barrier.wait()
            return one.tell_to_wait(name).told_to_wait

        def save() -> bool:
            barrier.wait()
            other.save(name, b"answer")
            return other.poll(name).told_to_wait

        with ThreadPoolExecutor(2) as pool:
            told, saved = pool.submit(tell), pool.submit(save)
        states = [one.poll(name), other.poll(name), shared.answers().claim(name)]
        assert {state.answer for state in states} == {b"answer"}
        return {told.result(), saved.result(), *(state.told_to_wait for state in states)}

    for number in range(20):
        assert len(meet(number)) == 1


def give_next(late: LateAnswers, follower: str, give: Callable[[bytes], object]) -> bool:
    """Give away a follower's next part; return whether there was one."""
    with late.next_part(follower) as part:
        if part is not None:
            give(part)
    return part is not None


def test_late_answers_come_in_order_for_their_follower_alone(shared: Shared) -> None:
    one, other = shared.late(), shared.late()
    one.save(WHO, "2", [b"c", b"d"], seen=2.0, free_at=0.0)
    one.save(WHO, "1", [b"a\n\xff", b"b"], seen=1.0, free_at=0.0)
    one.save(WHO, "0", [b"not yet"], seen=0.0, free_at=time.time() + 60)
    given: list[bytes] = []
    assert not give_next(other, f"{WHO}2", given.append)
    assert [give_next(late, WHO, given.append) for late in (one, other) * 3] == [True] * 4 + [
        False
    ] * 2
    assert given == [b"a\n\xff", b"b", b"c", b"d"]


def test_a_part_that_is_being_given_is_nobody_elses_and_stays_if_it_fails(shared: Shared) -> None:
    one, other = shared.late(), shared.late()
    one.save(WHO, "1", [b"part"], seen=1.0, free_at=0.0)

    def fail(part: bytes) -> None:
        assert part == b"part"
        assert not give_next(other, WHO, fail)
        raise RuntimeError("errcode 48001")

    with pytest.raises(RuntimeError):
        give_next(one, WHO, fail)
    given: list[bytes] = []
    assert give_next(other, WHO, given.append)
    assert not give_next(one, WHO, given.append)
    assert given == [b"part"]


GIVER = """
with late.next_part("gh_1+alice"):
    ready()
"""


def test_what_a_killed_process_was_giving_stays(shared: Shared, run: Run) -> None:
    mine = shared.late()
    mine.save(WHO, "1", [b"part"], seen=1.0, free_at=0.0)
    giver = shared.process(run, GIVER)
    given: list[bytes] = []
    assert not give_next(mine, WHO, given.append)
    giver.kill()
    assert until(lambda: give_next(mine, WHO, given.append))
    assert given == [b"part"]


def test_a_follower_who_was_told_to_wait_and_writes_again_gets_the_answer_once(
    shared: Shared,
) -> None:
    """It is not run as a question; the next one is."""
    bot, other = Counted(b"late", seconds=4.0 * PATIENCE), Counted(b"other")
    with ThreadPoolExecutor() as pool:
        assert send(shared.once(), message(1), bot) == [None, None, WAIT]
        asked = pool.submit(send, shared.once(), message(2), other)
        assert asked.result()[-1] == b"late"
    assert shared.once().answer(message(2), other) == b"late"
    assert shared.once().answer(message(3), other) == b"other"
    assert (bot.runs, other.runs) == (1, 1)


def test_a_follower_who_writes_again_long_before_the_answer_is_told_to_wait_again(
    shared: Shared,
) -> None:
    bot, other = Counted(b"late", seconds=8.0 * PATIENCE), Counted(b"other")
    with ThreadPoolExecutor() as pool:
        running = pool.submit(send, shared.once(), message(1), bot)
        until(lambda: bot.runs)
        time.sleep(3 * PATIENCE)
        assert send(shared.once(), message(2), other)[-1] == WAIT
        assert running.result()[-1] == WAIT
    assert shared.once().answer(message(3), other) == b"late"
    assert shared.once().answer(message(4), other) == b"other"
    assert (bot.runs, other.runs) == (1, 1)


def test_a_pending_answer_whose_owner_died_holds_nobody_up(shared: Shared, run: Run) -> None:
    owner, other = shared.process(run, OWNER), Counted(b"other")
    assert send(shared.once(), message(1), other)[-1] == WAIT
    owner.kill()
    owner.wait()
    once = shared.once(timeout=5.0)
    assert once.answer(message(2), other) == b"other"
    assert other.runs == 1


@pytest.mark.parametrize("late_by", [1.0, 4.0])
def test_what_waits_for_a_follower_who_leaves_is_dropped_pending_or_not(
    shared: Shared, late_by: float
) -> None:
    bot, other = Counted(b"late", seconds=(3 + late_by) * PATIENCE), Counted(b"other")
    with ThreadPoolExecutor() as pool:
        running = pool.submit(send, shared.once(), message(1), bot)
        until(lambda: bot.runs)
        time.sleep(3 * PATIENCE + (0 if late_by > 2 else 2 * PATIENCE))
        shared.once().answer(event(Event="unsubscribe"), list)
        assert running.result()[-1] == WAIT
    time.sleep(0.2)
    assert shared.once().answer(message(2), other) == b"other"


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # that is the point of it
def test_a_child_that_a_reply_forked_does_not_keep_its_message(shared: Shared, run: Run) -> None:
    owner = shared.process(run, FORKING)
    child = int(owner.stdout.readline())
    bot = Counted(b"again")
    try:
        os.kill(owner.pid, signal.SIGKILL)
        assert shared.once(timeout=5.0).answer(message(), bot) == b"again"
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)


FORKING = """
def run():
    if child := os.fork():
        ready_print(child)
        time.sleep(60)
    once.answer(message(2), lambda: [b""])  # a child may be a server of its own
    time.sleep(60)
def ready_print(child):
    print("ready", flush=True)
    print(child, flush=True)
once.answer(message(), run)
"""
