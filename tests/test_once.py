"""One message, one run, one answer: real processes, real locks, WeChat's time made shorter."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
from conftest import ROOT, Run, message_xml
from serving import until

import wechat.late
import wechat.once
from wechat.journal import Journal
from wechat.late import LateAnswers
from wechat.late_files import LateFiles
from wechat.message import from_xml
from wechat.once import ReplyOnce

PATIENCE = 0.4  # seconds, in place of WeChat's five
WAIT = b"please wait"
Message = dict[str, Any]
Bot = Callable[[], list[bytes]]


def message(number: int = 1, follower: str = "alice", **fields: str) -> Message:
    return from_xml(message_xml(FromUserName=follower, MsgId=str(number), **fields))


def event(follower: str = "alice", **fields: str) -> Message:
    whole = {"MsgType": "event", "Event": "CLICK", "EventKey": "a", "CreateTime": "1", **fields}
    found = message(0, follower, **whole)
    del found["MsgId"]
    return found


class Counted:
    """A ``reply()`` that counts its runs, and takes as long as a test wants."""

    def __init__(self, *parts: bytes, seconds: float = 0.0) -> None:
        self.runs, self.parts, self.seconds = 0, list(parts), seconds

    def __call__(self) -> list[bytes]:
        self.runs += 1
        time.sleep(self.seconds)
        return self.parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "replies"


def write(message: Message, reply: Any, late: bool) -> list[bytes]:
    return [reply.encode()] if isinstance(reply, str) else reply


def once_with(journal: Journal, folder: Path, **more: Any) -> ReplyOnce:
    settings = {"timeout": PATIENCE, **more}
    late_settings = {key: settings.pop(key) for key in ("push", "drop") if key in settings}
    late = LateAnswers(LateFiles(folder / "late"), **late_settings)
    return ReplyOnce(journal, late, write, WAIT.decode(), **settings)


def make(folder: Path, **more: Any) -> ReplyOnce:
    return once_with(Journal(folder), folder, **more)


def send(once: ReplyOnce, sent: Message, run: Bot) -> list[bytes | None]:
    """Send a message as WeChat does, and return what came of each copy until one was answered."""
    with ThreadPoolExecutor() as threads:
        came: list[Future[bytes | None]] = []
        for _ in range(wechat.once.TRIES):
            came.append(threads.submit(once.answer, dict(sent), run))
            try:
                if came[-1].result(timeout=PATIENCE) is not None:
                    break
            except futures.TimeoutError:  # WeChat hangs up
                pass
        return [future.result() for future in came]


def files(folder: Path) -> set[str]:
    paths = {path for path in folder.rglob("*") if path.is_file()}
    return {path.name for path in paths}


def late_answers(folder: Path) -> int:
    """Count the late answers that are there."""
    return sum(p.read_bytes().startswith(b"answer") for p in folder.glob("late/*/[!.]*"))


def few(folder: Path, most: int) -> bool:
    return len(files(folder)) < most


def journals(folder: Path) -> list[Path]:
    """Return the journal's files in their order."""
    return sorted(folder.glob("journal.*[0-9]"))


def claims(folder: Path) -> int:
    return journals(folder)[-1].read_bytes().count(b"\0? ")


def test_every_copy_gets_the_same_bytes_from_one_run(folder: Path) -> None:
    bot = Counted(b"answer \n=+.! \xff")
    answers = {make(folder).answer(message(), bot) for _ in range(5)}
    assert answers == {b"answer \n=+.! \xff"}
    assert bot.runs == 1


@pytest.mark.parametrize("size", [1000, 1010, 1020, 1024, 5000, 600_000])
def test_an_answer_of_any_size_is_remembered_whole(folder: Path, size: int) -> None:
    bot = Counted(b"x" * size, b"y" * size)
    assert [make(folder).answer(message(), bot) for _ in range(2)] == [b"x" * size] * 2
    assert make(folder).answer(message(2), bot) == b"y" * size
    assert bot.runs == 1


def test_silence_is_remembered_too(folder: Path) -> None:
    bot = Counted()
    assert [make(folder).answer(message(), bot) for _ in range(3)] == [b""] * 3
    assert bot.runs == 1


def test_other_messages_and_the_same_id_of_another_follower_run_for_themselves(
    folder: Path,
) -> None:
    once, bot = make(folder), Counted(b"a")
    for each in (message(1), message(2), message(1, "bob"), message(1, ToUserName="gh_2")):
        once.answer(each, bot)
    assert bot.runs == 4


def test_events_that_differ_in_any_field_are_different_and_a_retry_is_the_same(
    folder: Path,
) -> None:
    once, bot = make(folder), Counted(b"a")
    different = [
        event(),
        event("bob"),
        event(CreateTime="2"),
        event(Event="VIEW"),
        event(EventKey="b"),
        event(Event="user_get_card", CardId="c", UserCardCode="1"),
        event(Event="user_get_card", CardId="c", UserCardCode="2"),
        event(Event="TEMPLATESENDJOBFINISH", MsgID="1"),
        event(Event="TEMPLATESENDJOBFINISH", MsgID="2"),
        event(Event="user_authorization_revoke", OpenID="o1"),
        event(Event="user_authorization_revoke", OpenID="o2"),
        event() | {"ScanCodeInfo": {"ScanType": "qrcode", "ScanResult": "1"}},
        event() | {"ScanCodeInfo": {"ScanType": "qrcode", "ScanResult": "2"}},
        event() | {"SendPicsInfo": {"PicList": {"item": [{"PicMd5Sum": "1"}, {"PicMd5Sum": "2"}]}}},
        event() | {"SendPicsInfo": {"PicList": {"item": [{"PicMd5Sum": "2"}, {"PicMd5Sum": "1"}]}}},
    ]
    for each in different * 3:
        once.answer(dict(each), bot)
    assert bot.runs == len(different)


def test_a_message_without_an_id_is_told_apart_by_its_fields(folder: Path) -> None:
    once, bot = make(folder), Counted(b"a")
    for content in ("one", "other", "one"):
        nameless = message(Content=content)
        del nameless["MsgId"]
        assert once.answer(nameless, bot) == b"a"
    assert bot.runs == 2


@pytest.mark.parametrize(
    "msg_id", ["../../etc/passwd", "a/b", "x" * 5000, "\0", "你", ".", "swept"]
)
def test_no_id_leads_out_of_the_folder(folder: Path, msg_id: str) -> None:
    once, bot = make(folder), Counted(b"a")
    for _ in range(2):
        assert once.answer(message() | {"MsgId": msg_id}, bot) == b"a"
    assert bot.runs == 1
    assert files(folder.parent) == {path.name for path in folder.iterdir() if path.is_file()}


COPIES = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
from wechat.journal import Journal
from test_once import make, message, once_with
once = make(Path(sys.argv[1]), timeout=8)
def run():
    with open(sys.argv[2], "a") as runs:
        runs.write("run\\n")
    time.sleep(0.3)
    return [b"the answer"]
print("ready", flush=True)
sys.stdin.readline()
for number in range(5):
    print(once.answer(message(number), run))
"""


def test_copies_that_race_on_many_processes_are_one_run(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    arguments = ("-c", COPIES, str(folder), str(tmp_path / "runs"), str(ROOT / "tests"))
    processes = [run(*arguments) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=30) for process in processes]
    assert outputs == [("b'the answer'\n" * 5, "")] * 8
    assert (tmp_path / "runs").read_text().count("run") == 5


@pytest.mark.parametrize("seconds", [1.5, 2.3])
def test_the_copy_that_waits_gets_the_answer_when_it_is_there(folder: Path, seconds: float) -> None:
    bot = Counted(b"answer", seconds=seconds * PATIENCE)
    came = send(make(folder), message(), bot)
    assert came == [*[None] * int(seconds), b"answer"]
    assert bot.runs == 1


def test_a_copy_is_never_told_that_there_is_no_reply_while_it_still_runs(folder: Path) -> None:
    once, bot = make(folder), Counted(b"answer", seconds=1.5 * PATIENCE)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(once.answer, message(), bot)
        until(lambda: bot.runs)
        assert once.answer(message(), bot) is None
        assert first.result() is None
    assert bot.runs == 1


def test_the_last_copy_is_told_to_wait_in_time_and_the_answer_waits_for_the_next_message(
    folder: Path,
) -> None:
    once, bot = make(folder), Counted(b"late", seconds=4 * PATIENCE)
    assert send(once, message(1), bot) == [None, None, WAIT]
    other = Counted(b"other")
    assert once.answer(message(2, "bob"), other) == b"other"
    assert once.answer(event(), other) == b"other"
    assert once.answer(message(3), other) == b"late"
    assert make(folder).answer(message(3), other) == b"late"
    assert once.answer(message(4), other) == b"other"
    assert (bot.runs, other.runs) == (1, 3)


def test_what_an_event_is_answered_late_waits_as_well(folder: Path) -> None:
    once, clicked = make(folder), event(EventKey="https://example.com/?a=菜单")
    assert send(once, clicked, Counted(b"late", seconds=4 * PATIENCE))[-1] == WAIT
    assert once.answer(message(2), Counted(b"other")) == b"late"


def test_a_copy_that_comes_after_the_last_word_hears_it_again(folder: Path) -> None:
    once, bot = make(folder), Counted(b"late", seconds=4 * PATIENCE)
    send(once, message(), bot)
    assert once.answer(message(), bot) == WAIT
    assert bot.runs == 1


def test_dropped_is_dropped(folder: Path) -> None:
    once, bot = make(folder, drop=True), Counted(b"late", seconds=4 * PATIENCE)
    assert send(once, message(1), bot)[-1] == WAIT
    assert once.answer(message(2), Counted(b"other")) == b"other"


def test_silence_that_is_late_keeps_nothing_waiting(folder: Path) -> None:
    once = make(folder)
    assert send(once, message(1), Counted(seconds=4 * PATIENCE))[-1] == WAIT
    assert once.answer(message(2), Counted(b"other")) == b"other"
    assert files(folder / "late") == set()


def test_an_answer_that_nobody_came_back_for_waits_as_well(folder: Path) -> None:
    once = make(folder)
    assert once.answer(message(1), Counted(b"late", seconds=3.5 * PATIENCE)) is None
    assert once.answer(message(2), Counted(b"other")) == b"late"


def test_the_moment_of_the_last_word_and_of_the_answer_is_one_or_the_other(folder: Path) -> None:
    """The answer comes around the last word: it is got at once or with the next message."""
    at = (2 + wechat.once.ANSWER_WITHIN) * PATIENCE
    with ThreadPoolExecutor(30) as threads:

        def follow(number: int) -> tuple[bytes | None, bytes | None, int]:
            follower, bot = f"f{number}", Counted(b"answer", seconds=at + (number - 15) * 0.005)
            once = make(folder)
            came = send(once, message(1, follower), bot)[-1]
            return came, once.answer(message(2, follower), Counted(b"other")), bot.runs

        results = list(threads.map(follow, range(30)))
    assert set(results) <= {(b"answer", b"other", 1), (WAIT, b"answer", 1)}


LOST = [set[int](), {1}, {2}, {3}, {1, 2}, {1, 3}, {2, 3}]
MOMENTS = (0.5, 0.85, 0.95, 1.05, 1.5, 1.85, 1.95, 2.05, 2.5, 2.85, 2.95, 3.05, 3.15, 3.3, 4.0)


def test_whichever_tries_are_lost_and_however_long_it_takes_the_answer_is_given_once(
    folder: Path,
) -> None:
    """By a try while WeChat waits for it, or else with the follower's next message."""
    timeout = 1.0
    once, began = make(folder, timeout=timeout), time.monotonic() + 0.5

    def send_try(sent: Message, bot: Counted) -> bytes | None:
        gone = Event()
        answering = threads.submit(once.answer, sent, bot, gone.is_set)
        try:
            return answering.result(timeout)
        except futures.TimeoutError:  # WeChat hangs up
            gone.set()
            return None

    def follow(lost: set[int], moment: float) -> list[bytes]:
        follower = f"{moment}-{lost}".encode().hex()
        bot = Counted(b"answer", seconds=moment * timeout)
        sent, shown = message(1, follower), list[bytes]()
        for number in (1, 2, 3):
            time.sleep(max(began + (number - 1) * timeout - time.monotonic(), 0))
            if number not in lost and (answer := send_try(sent, bot)) is not None:
                shown.append(answer)
                break
        time.sleep(began + 7 * timeout - time.monotonic())
        for number in (2, 3):
            if answer := send_try(message(number, follower), Counted(b"other")):
                shown.append(answer)
        assert bot.runs == 1
        return shown

    with ThreadPoolExecutor(500) as threads:
        cases = [(lost, moment) for lost in LOST for moment in MOMENTS]
        results = [threads.submit(follow, *case) for case in cases]
        for case, result in zip(cases, results, strict=True):
            shown = result.result()
            assert shown.count(b"answer") == 1, (case, shown)
            told = [WAIT] if WAIT in shown else []
            late = [b"answer", b"other"]
            assert shown in ([b"answer", b"other", b"other"], told + late), (case, shown)


def test_the_try_that_comes_when_the_last_is_due_is_told_to_wait(folder: Path) -> None:
    """The second one was lost, so this is the second that is seen."""
    once, bot = make(folder), Counted(b"late", seconds=4 * PATIENCE)
    with ThreadPoolExecutor() as threads:
        threads.submit(once.answer, message(1), bot)
        time.sleep(2 * PATIENCE)
        assert once.answer(message(1), bot) == WAIT
    assert once.answer(message(2), Counted(b"other")) == b"late"


def test_an_answer_for_which_a_try_may_still_come_is_no_other_messages(folder: Path) -> None:
    once, bot = make(folder), Counted(b"answer", seconds=1.2 * PATIENCE)
    assert once.answer(message(1), bot) is None
    assert once.answer(message(2), Counted(b"other")) == b"other"
    assert once.answer(message(1), bot) == b"answer"
    assert files(folder / "late") == set()


def test_a_try_whose_client_has_gone_takes_no_answer(folder: Path) -> None:
    once, bot, gone = make(folder), Counted(b"answer"), Event()

    def run() -> list[bytes]:
        gone.set()
        return bot()

    assert once.answer(message(1), run, gone.is_set) is None
    assert once.answer(message(1), bot, lambda: True) is None
    assert once.answer(message(1), bot) == b"answer"
    assert bot.runs == 1


OWNER = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from wechat.journal import Journal
from test_once import make, message, once_with
once = make(Path(sys.argv[1]), timeout=5)
def run():
    print("running", flush=True)
    time.sleep(60)
once.answer(message(), run)
"""


def test_a_killed_owner_frees_the_message_and_the_copy_that_waits_runs_it_again(
    folder: Path, run: Run
) -> None:
    owner = run("-c", OWNER, str(folder), str(ROOT / "tests"))
    assert owner.stdout.readline() == "running\n"
    bot = Counted(b"again")
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(make(folder, timeout=5.0).answer, message(), bot)
        until(lambda: claims(folder) == 2)
        os.kill(owner.pid, signal.SIGKILL)
        assert waiting.result() == b"again"
    assert bot.runs == 1


def test_a_child_of_reply_that_outlives_the_killed_owner_holds_nothing(
    folder: Path, run: Run
) -> None:
    forking = OWNER.replace("time.sleep(60)", "os.fork(); os.write(1, b'0\\n'); time.sleep(60)")
    owner = run("-c", "import os" + forking, str(folder), str(ROOT / "tests"))
    assert [owner.stdout.readline() for _ in range(3)] == ["running\n", "0\n", "0\n"]
    os.kill(owner.pid, signal.SIGKILL)
    assert make(folder, timeout=5.0).answer(message(), Counted(b"again")) == b"again"


def test_the_last_copy_can_run_it_and_still_say_the_last_word(folder: Path, run: Run) -> None:
    """Two copies met workers that died: the third runs reply(), and must be answered in time."""
    for _ in range(2):
        owner = run("-c", OWNER, str(folder), str(ROOT / "tests"))
        assert owner.stdout.readline() == "running\n"
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    once, bot = make(folder), Counted(b"late", seconds=2 * PATIENCE)
    began = time.monotonic()
    assert once.answer(message(), bot) == WAIT
    assert time.monotonic() - began < 2 * PATIENCE
    until(lambda: late_answers(folder))
    assert once.answer(message(2), Counted(b"other")) == b"late"
    assert bot.runs == 1


def test_an_owner_that_was_killed_after_the_last_word_leaves_nothing_waiting(
    folder: Path, run: Run
) -> None:
    owner = run("-c", OWNER, str(folder), str(ROOT / "tests"))
    assert owner.stdout.readline() == "running\n"
    once, other = make(folder), Counted(b"other")
    assert once.answer(message(), other) is None
    assert once.answer(message(), other) == WAIT
    os.kill(owner.pid, signal.SIGKILL)
    assert once.answer(message(2), other) == b"other"
    assert other.runs == 1


def test_a_text_in_parts_goes_on_with_each_next_message(folder: Path) -> None:
    once, bot, other = make(folder), Counted(b"1", b"2", b"3"), Counted(b"other")
    assert once.answer(message(1), bot) == b"1"
    assert once.answer(message(1), bot) == b"1"
    assert [make(folder).answer(message(n), other) for n in (2, 3, 3, 2, 4)] == [
        b"2",
        b"3",
        b"3",
        b"2",
        b"other",
    ]
    assert files(folder / "late") == set()


def test_a_late_text_in_parts_goes_out_from_its_beginning(folder: Path) -> None:
    once, bot = make(folder), Counted(b"1", b"2", seconds=4 * PATIENCE)
    assert send(once, message(1), bot)[-1] == WAIT
    assert [once.answer(message(n), Counted(b"other")) for n in (2, 3, 4)] == [b"1", b"2", b"other"]


def test_what_waits_longest_comes_first(folder: Path) -> None:
    once, other = make(folder), Counted(b"other")
    once.answer(message(1), Counted(b"1", b"1 more"))
    once.answer(message(2), other)  # takes the rest of the first
    with ThreadPoolExecutor() as threads:  # two that run at once, and are late one after the other
        for number in (3, 4):
            bot = Counted(b"%d" % number, seconds=(number + 1) * PATIENCE)
            threads.submit(send, once, message(number), bot)
    assert [once.answer(message(n), other) for n in (5, 6, 7)] == [b"3", b"4", b"other"]


def test_two_messages_at_once_share_no_part(folder: Path) -> None:
    once = make(folder)
    once.answer(message(1), Counted(*[b"%d" % n for n in range(9)]))
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(lambda n: once.answer(message(n), Counted(b"other")), range(2, 10))
        )
    given = [answer for answer in answers if answer != b"other"]
    assert given
    assert len(given) == len(set(given))


class Pushed:
    """The other way to a follower, and what went there."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.sent, self.done = fails, [], Event()  # type: int, list[Any], Event

    def __call__(self, openid: str, part: bytes) -> None:
        if self.fails:
            self.fails -= 1
            self.done.set()
            raise RuntimeError("errcode 48001")
        self.sent.append((openid, part))
        self.done.set()


def test_a_late_answer_is_pushed_once_to_its_follower_alone(folder: Path) -> None:
    push = Pushed()
    once, bot = make(folder, push=push), Counted(b"late", seconds=4 * PATIENCE)
    assert send(once, message(1), bot)[-1] == WAIT
    assert push.done.wait(10)
    until(lambda: not files(folder / "late"))
    assert push.sent == [("alice", b"late")]
    assert once.answer(message(2), Counted(b"other")) == b"other"


def test_the_rest_of_a_long_text_is_pushed_after_its_beginning(folder: Path) -> None:
    push = Pushed()
    once = make(folder, push=push)
    assert once.answer(message(1), Counted(b"1", b"2", b"3")) == b"1"
    assert push.sent == []
    until(lambda: len(push.sent) == 2)
    assert push.sent == [("alice", b"2"), ("alice", b"3")]


def test_what_cannot_be_pushed_waits_for_the_next_message(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push = Pushed(fails=1)
    once = make(folder, push=push)
    once.answer(message(1), Counted(b"1", b"2"))
    assert push.done.wait(10)
    until(lambda: "errcode 48001" in caplog.text)
    assert once.answer(message(2), Counted(b"other")) == b"2"


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_message_that_comes_while_a_part_is_pushed_asks_for_the_answer(
    folder: Path, is_refused: bool
) -> None:
    """It is no question: it gets the part if WeChat refuses the push, else nothing."""
    pushing, go_on, other = Event(), Event(), Counted(b"other")

    def push(_openid: str, _part: bytes) -> None:
        pushing.set()
        assert go_on.wait(10)
        if is_refused:
            raise RuntimeError("errcode 45047")

    once = make(folder, push=push, timeout=5.0)
    once.answer(message(1), Counted(b"1", b"2"))
    assert pushing.wait(10)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(once.answer, message(2), other)
        until(lambda: claims(folder) == 2)
        time.sleep(0.5)  # in which it would run as a question
        go_on.set()
        assert asked.result() == (b"2" if is_refused else b"")
    assert once.answer(message(3), other) == b"other"
    assert other.runs == 1


def test_who_waits_sees_that_an_answer_is_being_written(folder: Path) -> None:
    typing: list[str] = []
    once = make(folder, push=Pushed(), typing=typing.append)
    once.answer(message(1), Counted(b"fast"))
    assert typing == []
    send(once, message(2), Counted(b"slow", seconds=1.5 * PATIENCE))
    assert typing == ["alice"]


def turn(folder: Path, gone: Path) -> None:
    """Let messages come until a file is gone."""
    journal, numbers = Journal(folder, remember=0.2), itertools.count(1000)

    def turned() -> bool:
        journal.claim(str(next(numbers)))
        return not gone.exists()

    until(turned)


def test_old_files_are_swept_and_those_of_living_processes_are_not(folder: Path, run: Run) -> None:
    def own() -> Any:
        owner = run("-c", OWNER, str(folder), str(ROOT / "tests"))
        assert owner.stdout.readline() == "running\n"
        return owner

    own().kill()
    [dead] = folder.glob("process.*")
    living = own()
    turn(folder, dead)
    assert list(folder.glob(f"process.{living.pid}.*"))
    assert few(folder, 8)


def test_old_files_are_closed_without_the_garbage_collector(folder: Path) -> None:
    journal, numbers, seen = Journal(folder, remember=0.2), itertools.count(1000), set[Path]()

    def turned() -> bool:
        journal.claim(str(next(numbers)))
        seen.update(journals(folder))
        return len(seen) == 12

    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        until(turned)
        assert len(os.listdir("/proc/self/fd")) - before < 15
    finally:
        gc.enable()


def test_what_waits_is_kept_for_two_days(folder: Path) -> None:
    once, other = make(folder), Counted(b"other")
    for follower in ("alice", "bob"):
        once.answer(message(1, follower), Counted(b"1", b"2", b"3"))
    [alices] = folder.glob("late/*alice")
    old = time.time() - wechat.late.KEEP_LATE - 60
    for path in alices.iterdir():
        os.utime(path, (old, old))
    once = make(folder)
    assert once.answer(message(2, "alice"), other) == b"other"
    assert once.answer(message(2, "bob"), other) == b"2"


RACE = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
from wechat.journal import Journal
from test_once import make, message, once_with
once = once_with(Journal(Path(sys.argv[1]), remember=1.0), Path(sys.argv[1]), timeout=5)
print("ready", flush=True)
began = float(sys.stdin.readline())
runs = open(sys.argv[2], "a")
for number in range(600):
    time.sleep(max(began + number * 0.005 - time.time(), 0))
    assert once.answer(message(number), lambda: print(number, file=runs) or [b"a"]) == b"a"
"""


def test_copies_that_race_while_files_are_turned_and_swept_are_one_run(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    arguments = ("-c", RACE, str(folder), str(tmp_path / "runs"), str(ROOT / "tests"))
    processes = [run(*arguments) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    began = time.time() + 0.1
    for process in processes:
        process.stdin.write(f"{began}\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert outputs == [("", "")] * 4
    assert sorted(map(int, (tmp_path / "runs").read_text().split())) == list(range(600))
    assert few(folder, 10)


def test_threads_that_are_the_first_of_a_process_see_one_journal(tmp_path: Path) -> None:
    together = Barrier(8)
    with ThreadPoolExecutor(8) as threads:
        for number in range(40):
            journal = Journal(tmp_path / str(number))

            def claim(name: str, journal: Journal = journal) -> None:
                together.wait()
                journal.claim(name)
                journal.save(name, b"a")

            names = [f"message{n}" for n in range(8)]
            list(threads.map(claim, names))
            other = Journal(tmp_path / str(number))
            assert [other.claim(name).answer for name in names] == [b"a"] * 8


def test_an_owner_that_answers_and_dies_at_once_is_not_run_again(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer comes, and its lock goes, after a copy has read the journal."""
    slow = OWNER.replace("time.sleep(60)", "sys.stdin.readline(); return [b'answer']")
    owner = run("-c", slow, str(folder), str(ROOT / "tests"))
    assert owner.stdout.readline() == "running\n"
    journal, bot = Journal(folder), Counted(b"again")
    is_alive = journal.is_alive

    def slowly(name: str) -> bool:
        if owner.poll() is None:
            owner.communicate("\n")
        return is_alive(name)

    monkeypatch.setattr(journal, "is_alive", slowly)
    assert once_with(journal, folder).answer(message(), bot) == b"answer"
    assert bot.runs == 0


def test_a_file_whose_maker_was_killed_before_it_was_used_divides_nobody(folder: Path) -> None:
    old, bot = make(folder), Counted(b"a")
    old.answer(message(1), bot)
    [used] = journals(folder)
    (folder / f"journal.{int(used.suffix[1:]) + 1}").touch()
    new = make(folder)
    for number in (2, 3):
        assert [each.answer(message(number), bot) for each in (old, new)] == [b"a"] * 2
    assert bot.runs == 3


@pytest.mark.parametrize("name", ["journal.1~", "journal.2.gz", "journal.", "notes.0"])
def test_files_of_somebody_else_do_no_harm(folder: Path, name: str) -> None:
    folder.mkdir()
    (folder / name).write_text("notes")
    once, bot = make(folder), Counted(b"a")
    assert [once.answer(message(), bot) for _ in range(2)] == [b"a"] * 2
    turn(folder, journals(folder)[0])
    assert bot.runs == 1
    assert (folder / name).exists()


def test_a_process_that_slept_through_many_files_finds_the_last_one(folder: Path) -> None:
    sleeper, bot = once_with(Journal(folder, remember=0.2), folder), Counted(b"a")
    sleeper.answer(message(1), bot)
    turn(folder, journals(folder)[0])
    assert [each.answer(message(2), bot) for each in (sleeper, make(folder))] == [b"a"] * 2
    assert bot.runs == 2


def test_a_process_that_has_just_begun_runs_no_message_of_the_last_second(folder: Path) -> None:
    """Every message is somewhere in the two files of that time."""
    bot, others = Counted(b"a"), Counted(b"a")
    came, seen = list[tuple[float, int]](), set[Path]()
    once = once_with(Journal(folder, remember=1.0), folder)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        came.append((time.monotonic(), len(came)))
        once.answer(message(len(came)), bot)
        seen.update(journals(folder))
        time.sleep(0.005)
        began, number = random.choice(came)
        if number > 0 and time.monotonic() - began < 0.8:
            new = once_with(Journal(folder, remember=1.0), folder)
            assert new.answer(message(number), others) == b"a"
    assert len(seen) > 3
    assert others.runs == 0


def test_a_process_that_slept_runs_no_message_of_the_last_file_but_one(folder: Path) -> None:
    sleeper, owner = Journal(folder), Journal(folder, remember=0.2)
    assert sleeper.claim("first").is_mine
    for _ in range(2):
        turn(folder, journals(folder)[0])
    numbers = itertools.count()

    def came() -> str:
        """Return the message after which the file was turned."""
        while True:
            name, before = f"another{next(numbers)}", files(folder)
            assert owner.claim(name).is_mine
            if any(path.startswith("journal") for path in files(folder) - before):
                return name

    name = came()
    assert not sleeper.claim(name).is_mine


def test_a_file_that_is_removed_while_it_is_opened_is_not_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Journal(folder, remember=0.2)
    old.claim("first")
    turn(folder, journals(folder)[0])
    late = Journal(folder)
    sweep = late._sweep
    monkeypatch.setattr(late, "_sweep", lambda: [1, *sweep()])  # as listed before
    assert old.claim("a").is_mine
    assert not late.claim("a").is_mine
    assert not (folder / "journal.1").exists()


def test_a_process_with_too_many_open_files_takes_nobody_for_dead(folder: Path, run: Run) -> None:
    owner = run("-c", OWNER, str(folder), str(ROOT / "tests"))
    assert owner.stdout.readline() == "running\n"
    once, bot = make(folder), Counted(b"a")
    assert once.answer(message(2), bot) == b"a"  # so its files are open
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert once.answer(message(), bot) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert bot.runs == 1


def test_an_answer_that_takes_long_to_keep_waits_for_who_was_told_to_wait_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, other = make(folder), Counted(b"other")
    save = once._answers.save

    def slowly(name: str, answer: bytes) -> None:
        time.sleep(0.3 * PATIENCE)
        save(name, answer)

    monkeypatch.setattr(once._answers, "save", slowly)
    with ThreadPoolExecutor() as threads:
        slow = Counted(b"answer", seconds=0.75 * PATIENCE)
        copies = [threads.submit(once.answer, message(), slow)]
        until(lambda: slow.runs)
        copies += [threads.submit(once.answer, message(), slow) for _ in range(2)]
        assert WAIT in [copy.result() for copy in copies]
    assert slow.runs == 1
    assert once.answer(message(2), other) == b"answer"


def test_processes_meet_again_when_the_folder_was_removed_under_them(folder: Path) -> None:
    bot = Counted(b"a")
    one = once_with(Journal(folder, remember=0.2), folder)
    one.answer(message(1), bot)
    shutil.rmtree(folder)
    other = once_with(Journal(folder, remember=0.2), folder)
    numbers = itertools.count(2)

    def met() -> bool:
        before, sent = bot.runs, message(next(numbers))
        assert [each.answer(sent, bot) for each in (one, other)] == [b"a"] * 2
        return bot.runs == before + 1

    until(met)


@pytest.mark.parametrize(
    "torn",
    [
        b"\0= gh_97417a04a28d+alice+1 torn",
        b"\0" * 100,
        b"\0",
        b"\0? x",
        b"\0\0er\2",  # power was lost: a page is there, the one before is not
        b"\0/ \2",
        b"\0/ x owner\2",
    ],
)
def test_a_torn_record_takes_no_other_along(folder: Path, torn: bytes) -> None:
    before, bot = make(folder), Counted(b"a")
    assert before.answer(message(1), bot) == b"a"
    with journals(folder)[0].open("ab") as file:
        file.write(torn)
    for once in (before, make(folder)):
        assert [once.answer(message(n), bot) for n in (1, 2, 3)] == [b"a"] * 3
    assert bot.runs == 3


def test_a_place_that_cannot_be_written_is_answered_without_the_guarantee(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    once, bot = make(tmp_path / "file" / "replies"), Counted(b"a")
    assert [once.answer(message(), bot) for _ in range(3)] == [b"a"] * 3
    assert caplog.text.count("would run reply() again") == 1


def test_a_full_disk_is_answered_without_the_guarantee(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Past RLIMIT_FSIZE a write is short, then fails, as on a disk that is full."""
    once, bot = make(folder), Counted(b"x" * 100)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in (50, 0):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            assert once.answer(message(room), bot) == b"x" * 100
            assert once.answer(message(room), bot) == b"x" * 100
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert bot.runs == 4
    assert "would run reply() again" in caplog.text
    assert once.answer(message(50), bot) == once.answer(message(50), bot) == b"x" * 100
    assert bot.runs == 5


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: what is over fails as on a full disk."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_disk_that_its_own_files_filled_heals_without_a_restart(folder: Path) -> None:
    once, bot, numbers = once_with(Journal(folder, remember=0.4), folder), Counted(b"a"), count(2)
    once.answer(message(1), Counted(b"x" * 1000))
    with full_disk(journals(folder)[0].stat().st_size):
        once.answer(message(2), bot)
        assert bot.runs == 1

        def is_remembered() -> bool:
            runs, sent = bot.runs, message(next(numbers))
            assert [once.answer(sent, bot) for _ in range(3)] == [b"a"] * 3
            return bot.runs == runs + 1

        until(is_remembered)


def test_old_late_answers_make_room_though_no_message_can_be_remembered(folder: Path) -> None:
    make(folder).answer(message(1), Counted(b"1", b"2"))
    [late] = folder.glob("late/*/*")
    old = time.time() - wechat.late.KEEP_LATE - 60
    os.utime(late, (old, old))
    (folder / "file").write_text("no folder")
    once, other = once_with(Journal(folder / "file"), folder), Counted(b"other")
    assert once.answer(message(2), other) == b"other"
    assert files(folder / "late") == set()


def test_what_waits_is_given_though_no_message_can_be_remembered(folder: Path) -> None:
    make(folder).answer(message(1), Counted(b"1", b"2"))
    (folder / "file").write_text("no folder")
    once, other = once_with(Journal(folder / "file"), folder), Counted(b"other")
    assert [once.answer(message(n), other) for n in (2, 3)] == [b"2", b"other"]


def test_a_failed_write_of_an_answer_touches_its_message_alone(folder: Path) -> None:
    once, other, go_on = make(folder, timeout=5.0), make(folder, timeout=0.1), Event()
    failed, running, again = Counted(b"failed"), Event(), Counted(b"again")

    def long() -> list[bytes]:
        running.set()
        assert go_on.wait(10)
        return [b"long"]

    def fail() -> list[bytes]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        return failed()

    with ThreadPoolExecutor() as threads:
        answering = threads.submit(once.answer, message(1), long)
        assert running.wait(10)
        with full_disk(10_000):
            assert once.answer(message(2), fail) == b"failed"
        assert other.answer(message(1), again) is None  # its owner is alive
        assert once.answer(message(2), again) == b"failed"
        go_on.set()
        assert answering.result() == b"long"
    assert again.runs == 0


def test_a_process_whose_file_was_removed_gets_another_one(
    folder: Path,
) -> None:
    once, other, again = make(folder, timeout=5.0), make(folder, timeout=0.1), Counted(b"again")
    once.answer(message(1), bot := Counted(b"a"))
    for path in folder.glob("process.*"):
        path.unlink()
    numbers = count(3)
    until(lambda: [once.answer(message(next(numbers)), bot), *folder.glob("process.*")][1:])

    def run() -> list[bytes]:
        assert other.answer(message(2), again) is None
        return [b"answer"]

    assert once.answer(message(2), run) == b"answer"
    assert again.runs == 0


def test_a_journal_that_was_removed_or_cut_short_heals(folder: Path) -> None:
    once, bot, numbers = once_with(Journal(folder, remember=0.4), folder), Counted(b"a"), count(9)

    def is_remembered() -> bool:
        runs, sent = bot.runs, message(next(numbers))
        assert once.answer(sent, bot) == b"a"
        return make(folder).answer(sent, bot) == b"a" and bot.runs == runs + 1

    for harm in (Path.unlink, lambda path: os.truncate(path, 10)):
        assert until(is_remembered)
        for path in folder.glob("journal.*"):
            harm(path)
        until(is_remembered)


QUEUES = """
import os, sys, signal
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from wechat.journal import Journal
from test_once import make, message
once = make(Path(sys.argv[1]), timeout=5)
save = once._answers.save
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
once._answers.save = die
once.answer(message(), lambda: [b"answer", b"more"])
"""


def test_an_answer_that_was_kept_by_a_worker_that_was_killed_is_given_and_not_run_again(
    folder: Path, run: Run
) -> None:
    owner, again = run("-c", QUEUES, str(folder), str(ROOT / "tests")), Counted(b"again")
    owner.communicate()
    once = make(folder, timeout=5.0)
    assert once.answer(message(), again) == b"answer"
    assert once.answer(message(2), again) == b"more"
    assert again.runs == 0


def test_files_are_private_and_small(folder: Path) -> None:
    make(folder).answer(message(), Counted(b"x" * 500, b"y"))
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)
        assert path.stat().st_size < 750 or path.is_dir()
    assert folder.stat().st_mode & 0o777 == 0o700
