"""One message, one run, one answer: real processes, real locks, WeChat's time made shorter."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from conftest import ROOT, Run, message_xml
from serving import until

import reply_once
from reply_once import ReplyOnce
from wxmessage import from_xml

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


def make(folder: Path, **more: Any) -> ReplyOnce:
    return ReplyOnce(folder, lambda _: WAIT, **{"patience": PATIENCE, **more})


def send(once: ReplyOnce, sent: Message, run: Bot) -> list[bytes | None]:
    """Send a message as WeChat does, and return what came of each copy until one was answered."""
    with ThreadPoolExecutor() as threads:
        came: list[Future[bytes | None]] = []
        for _ in range(reply_once.COPIES):
            came.append(threads.submit(once.answer, dict(sent), run))
            try:
                if came[-1].result(timeout=PATIENCE) is not None:
                    break
            except futures.TimeoutError:  # WeChat hangs up
                pass
        return [future.result() for future in came]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()} - {"swept"}


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


def test_events_are_told_apart_by_follower_second_event_and_key(folder: Path) -> None:
    once, bot = make(folder), Counted(b"a")
    different = [
        event(),
        event("bob"),
        event(CreateTime="2"),
        event(Event="VIEW"),
        event(EventKey="b"),
    ]
    for each in different * 3:
        once.answer(dict(each), bot)
    assert bot.runs == len(different)


def test_a_message_that_nothing_tells_apart_runs_every_time(folder: Path) -> None:
    once, bot, nameless = make(folder), Counted(b"a"), message()
    del nameless["MsgId"]
    assert [once.answer(nameless, bot) for _ in range(3)] == [b"a"] * 3
    assert bot.runs == 3


@pytest.mark.parametrize(
    "msg_id", ["../../etc/passwd", "a/b", "x" * 5000, "\0", "你", ".", "swept"]
)
def test_no_id_leads_out_of_the_folder(folder: Path, msg_id: str) -> None:
    once, bot = make(folder), Counted(b"a")
    for _ in range(2):
        assert once.answer(message() | {"MsgId": msg_id}, bot) == b"a"
    assert bot.runs == 1
    assert [path for path in folder.parent.rglob("*") if path.is_file()] == [
        path for path in folder.iterdir() if path.is_file()
    ]


COPIES = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
from reply_once import ReplyOnce
from test_reply_once import message
once = ReplyOnce(Path(sys.argv[1]), lambda _: b"wait", patience=8)
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
    assert came == [b"answer", *[None] * (int(seconds) - 1), b"answer"]
    assert bot.runs == 1


def test_a_copy_is_never_told_that_there_is_no_reply_while_it_still_runs(folder: Path) -> None:
    once, bot = make(folder), Counted(b"answer", seconds=1.5 * PATIENCE)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(once.answer, message(), bot)
        until(lambda: bot.runs)
        assert once.answer(message(), bot) is None
        assert first.result() == b"answer"
    assert bot.runs == 1


def test_the_last_copy_is_told_to_wait_in_time_and_the_answer_waits_for_the_next_message(
    folder: Path,
) -> None:
    once, bot = make(folder), Counted(b"late", seconds=4 * PATIENCE)
    assert send(once, message(1), bot) == [b"late", None, WAIT]
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
    once, bot = make(folder, keep_late=False), Counted(b"late", seconds=4 * PATIENCE)
    assert send(once, message(1), bot)[-1] == WAIT
    assert once.answer(message(2), Counted(b"other")) == b"other"


def test_silence_that_is_late_keeps_nothing_waiting(folder: Path) -> None:
    once = make(folder)
    assert send(once, message(1), Counted(seconds=4 * PATIENCE))[-1] == WAIT
    assert once.answer(message(2), Counted(b"other")) == b"other"
    assert files(folder / "late") == set()


def test_an_answer_that_nobody_came_back_for_waits_as_well(folder: Path) -> None:
    once = make(folder)
    assert once.answer(message(1), Counted(b"late", seconds=3.5 * PATIENCE)) == b"late"
    assert once.answer(message(2), Counted(b"other")) == b"late"


def test_the_moment_of_the_last_word_and_of_the_answer_is_one_or_the_other(folder: Path) -> None:
    """The answer comes around the last word: it is got at once or with the next message."""
    at = (2 + reply_once.LAST_WORD) * PATIENCE
    with ThreadPoolExecutor(30) as threads:

        def follow(number: int) -> tuple[bytes | None, bytes | None, int]:
            follower, bot = f"f{number}", Counted(b"answer", seconds=at + (number - 15) * 0.005)
            once = make(folder)
            came = send(once, message(1, follower), bot)[-1]
            return came, once.answer(message(2, follower), Counted(b"other")), bot.runs

        results = list(threads.map(follow, range(30)))
    assert set(results) <= {(b"answer", b"other", 1), (WAIT, b"answer", 1)}


OWNER = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from reply_once import ReplyOnce
from test_reply_once import message
once = ReplyOnce(Path(sys.argv[1]), lambda _: b"wait")
def run():
    print("running", flush=True)
    time.sleep(60)
once.answer(message(), run)
"""


@pytest.mark.parametrize("copies", [1, 2])
def test_a_killed_owner_frees_the_message_and_the_next_copy_runs_it_again(
    folder: Path, run: Run, copies: int
) -> None:
    for _ in range(copies):
        owner = run("-c", OWNER, str(folder), str(ROOT / "tests"))
        assert owner.stdout.readline() == "running\n"
        with ThreadPoolExecutor() as threads:
            bot = Counted(b"again")
            waiting = threads.submit(make(folder, patience=5.0).answer, message(), bot)
            until(lambda: (folder / next(iter(files(folder)))).stat().st_size > 0)
            os.kill(owner.pid, signal.SIGKILL)
            if copies == 1:
                assert waiting.result() == b"again"
                assert bot.runs == 1
                return
        assert waiting.result() == b"again"
        break


def test_the_last_copy_can_run_it_and_still_say_the_last_word(folder: Path) -> None:
    """Two copies met workers that died: the third runs reply(), and must be answered in time."""
    folder.mkdir()
    path = folder / reply_once._names(message())[1]
    path.write_bytes(b".")
    once, bot = make(folder), Counted(b"late", seconds=2 * PATIENCE)
    began = time.monotonic()
    assert once.answer(message(), bot) == WAIT
    assert time.monotonic() - began < 2 * PATIENCE
    until(lambda: b"=" in path.read_bytes())
    assert once.answer(message(2), Counted(b"other")) == b"late"
    assert bot.runs == 1


def test_what_a_killed_owner_left_waiting_is_no_answer(folder: Path) -> None:
    once = make(folder)
    path = folder / reply_once._names(message())[1]
    folder.mkdir()
    path.write_bytes(b"..")
    late = folder / "late" / reply_once._names(message())[0]
    late.mkdir(parents=True)
    os.link(path, late / path.name)
    path.write_bytes(b"..!")
    assert once.answer(message(2), Counted(b"other")) == b"other"
    assert files(folder / "late") == set()


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


def test_who_waits_sees_that_an_answer_is_being_written(folder: Path) -> None:
    typing: list[str] = []
    once = make(folder, push=Pushed(), typing=typing.append)
    once.answer(message(1), Counted(b"fast"))
    assert typing == []
    send(once, message(2), Counted(b"slow", seconds=1.5 * PATIENCE))
    assert typing == ["alice"]


def test_old_files_are_swept_and_running_and_new_ones_are_not(folder: Path) -> None:
    now = time.time()
    once = make(folder, clock=lambda: now)
    once.answer(message(1), Counted(b"old"))
    until((folder / "swept").exists)
    with ThreadPoolExecutor() as threads:
        bot = Counted(b"running", seconds=1.0)
        running = threads.submit(once.answer, message(2), bot)
        until(lambda: bot.runs)
        now += reply_once.KEEP + 1
        later = make(folder, clock=lambda: now)
        os.utime(folder / "swept", (0, 0))
        later.answer(message(3), Counted(b"new"))
        until(lambda: reply_once._names(message(1))[1] not in files(folder))
        assert reply_once._names(message(2))[1] in files(folder)
        assert running.result() == b"running"


def test_what_waits_is_kept_for_two_days(folder: Path) -> None:
    now = time.time()
    make(folder).answer(message(1), Counted(b"1", b"2", b"3"))
    for age, kept in ((reply_once.KEEP + 1, True), (reply_once.KEEP_LATE + 60, False)):
        make(folder, clock=lambda age=age: now + age)._sweep(now + age)
        os.utime(folder / "swept", (0, 0))
        assert bool(files(folder / "late")) == kept


def test_one_sweep_serves_all_processes(folder: Path) -> None:
    once = make(folder)
    once.answer(message(1), Counted(b"a"))
    until(lambda: (folder / "swept").exists())
    now = time.time() + reply_once.KEEP + 1
    os.utime(folder / "swept", (now - 1, now - 1))
    once._sweep(now)
    assert files(folder) != set()


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


def test_files_are_private_and_small(folder: Path) -> None:
    make(folder).answer(message(), Counted(b"x" * 500))
    [path] = [folder / name for name in files(folder)]
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_size < 600
