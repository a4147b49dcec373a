"""The token store: threads, processes, kill -9, full disks, wrong clocks, and a WeChat that fails.

The API is a fake one over real HTTP; processes, locks and files are real; clocks are passed in.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import APPID, APPSECRET, ROOT, Run, account, config_for

import token_store
import wechat.api
from token_store import Fetch, FilePlace, TokenError, TokenStore
from wxsim.fake_api import FakeApi


class Clock:
    """A wall clock and an uptime that the test moves, and the clock of WeChat, which just goes."""

    def __init__(self) -> None:
        self.now, self.up, self.wechat = 1_800_000_000.0, 1000.0, 1_800_000_000.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.up += seconds
        self.wechat += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fake_api(clock: Clock) -> Iterator[FakeApi]:
    with FakeApi(APPID, APPSECRET, clock=lambda: clock.wechat) as api:
        yield api


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "access_token.json"


class Maker:
    """Makes stores of one account as other processes would have them: nothing shared but files."""

    def __init__(self, path: Path, api: FakeApi, clock: Clock) -> None:
        self.path, self.api, self.clock = path, api, clock

    def __call__(self, fetch: Fetch | None = None, **more: Any) -> TokenStore:
        """Make a store with the settings of an account, or with ``fetch``."""
        settings: dict[str, Any] = {
            "clock": lambda: self.clock.now,
            "uptime": lambda: self.clock.up,
        }
        settings |= {name: more.pop(name) for name in ("margin", "give_up_after") if name in more}
        config = account(self.api, self.path.parent, **more)
        fetch = fetch or functools.partial(wechat.api.fetch_token, config)
        return TokenStore(config.appid, FilePlace(self.path), fetch, **settings)


@pytest.fixture
def make(path: Path, fake_api: FakeApi, clock: Clock) -> Maker:
    return Maker(path, fake_api, clock)


@pytest.mark.parametrize("endpoint", ["stable_token", "token"])
def test_a_token_is_fetched_once_and_shared(make: Maker, fake_api: FakeApi, endpoint: str) -> None:
    tokens = {make(endpoint=endpoint).get() for _ in range(5)}
    assert tokens == {fake_api.token}
    assert [asked["appid"] for asked in fake_api.fetches] == [APPID]
    assert len(fake_api.token) == 512


def test_the_file_is_private_and_says_nothing_but_the_token(make: Maker, path: Path) -> None:
    token = make().get()
    assert sorted(os.listdir(path.parent)) == ["access_token.json", "access_token.json.lock"]
    for entry in path.parent.iterdir():
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text())["access_token"] == token
    assert APPSECRET not in path.read_text()


def write(path: Path, data: bytes) -> None:
    times = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path, data: bytes) -> None:
    path.with_suffix(".other").write_bytes(data)
    path.with_suffix(".other").replace(path)


def remove(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def rename(path: Path, data: bytes) -> None:
    path.rename(path.with_suffix(".old"))
    path.write_bytes(data)


@pytest.mark.parametrize("change", [write, replace, remove, rename])
def test_get_sees_whatever_is_done_to_the_file(
    make: Maker, path: Path, fake_api: FakeApi, change: Callable[[Path, bytes], None]
) -> None:
    store = make()
    token = store.get()
    change(path, path.read_bytes().replace(token[:4].encode(), b"ELSE"))
    assert store.get() == "ELSE" + token[4:]
    assert len(fake_api.fetches) == 1


def test_a_folder_that_was_renamed_costs_nobody_a_token(
    make: Maker, path: Path, fake_api: FakeApi
) -> None:
    one, other = make(endpoint="token"), make(endpoint="token")
    old = one.get()
    assert one.get() == old  # from the file, that is
    path.parent.rename(path.parent.with_suffix(".old"))
    new = other.get()
    assert one.refresh(old) == one.get() == new != old
    assert len(fake_api.fetches) == 2


def test_another_file_at_the_end_of_a_link_is_seen_at_once(make: Maker, path: Path) -> None:
    first, second = (path.parent.with_name(name) for name in ("first", "second"))
    for folder, kind in ((first, "F"), (second, "S")):
        path.parent.mkdir()
        assert make().get()
        path.write_bytes(
            re.sub(
                rb'"access_token": "....',
                b'"access_token": "' + kind.encode() * 4,
                path.read_bytes(),
            )
        )
        path.parent.rename(folder)
    path.parent.symlink_to(first)
    store = make()
    assert store.get().startswith("FFFF")
    path.parent.unlink()
    path.parent.symlink_to(second)
    assert store.get().startswith("SSSS")


def test_a_link_that_the_first_fetch_replaces_is_followed_no_longer(
    make: Maker, path: Path, fake_api: FakeApi
) -> None:
    path.parent.mkdir()
    old = make(endpoint="token").get()
    path.rename(path.with_suffix(".old"))
    path.symlink_to(path.with_suffix(".old"))
    store = make(endpoint="token")
    assert store.get() == old
    new = store.refresh(old)
    assert new == store.get() == fake_api.token != old


def test_no_file_stays_open(make: Maker, path: Path) -> None:
    store = make()
    token, before = store.get(), set(os.listdir("/proc/self/fd"))
    for _ in range(50):
        replace(path, path.read_bytes())
        assert store.get() == token
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("endpoint", ["stable_token", "token"])
def test_near_expiry_the_token_is_renewed_and_not_before(
    make: Maker, fake_api: FakeApi, clock: Clock, endpoint: str
) -> None:
    store = make(endpoint=endpoint)
    first = store.get()
    clock.sleep(7200 - 241)
    assert store.get() == first
    clock.sleep(2)
    assert store.get() == fake_api.token != first
    assert len(fake_api.fetches) == 2


class Holder:
    """Another process that holds the lock, as while it fetches."""

    SCRIPT = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )

    def __init__(self, run: Run, path: Path) -> None:
        self.process = run("-c", self.SCRIPT, f"{path}.lock")
        assert self.process.stdout.readline() == "held\n"


def test_near_expiry_the_others_go_on_with_the_token_that_is_still_good(
    make: Maker, path: Path, fake_api: FakeApi, clock: Clock, run: Run
) -> None:
    store = make()
    first = store.get()
    clock.sleep(7200 - 100)
    Holder(run, path)
    assert store.get() == first
    assert len(fake_api.fetches) == 1


def test_past_expiry_the_others_wait_for_the_one_that_fetches(
    make: Maker, fake_api: FakeApi
) -> None:
    fake_api.delay = 0.3
    with ThreadPoolExecutor(20) as pool:
        tokens = set(pool.map(lambda _: make().get(), range(20)))
    assert tokens == {fake_api.token}
    assert len(fake_api.fetches) == 1


def test_the_wait_has_a_limit(make: Maker, path: Path, run: Run) -> None:
    path.parent.mkdir()
    Holder(run, path)
    with pytest.raises(TokenError, match="another process fetches for over"):
        make(give_up_after=0.1).get()


def test_a_lock_dies_with_its_holder(make: Maker, path: Path, fake_api: FakeApi, run: Run) -> None:
    path.parent.mkdir()
    holder = Holder(run, path)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make().get)
        time.sleep(0.1)
        assert not waiting.done()
        holder.process.kill()
        assert waiting.result(timeout=5) == fake_api.token


BEGIN = f"""
import os, resource, sys, threading, time
from pathlib import Path
import token_store, wechat.api
from token_store import FilePlace, TokenError, TokenStore
from wechat.config import Config
path, api_base, *rest = sys.argv[1:]
settings = dict(appid={APPID!r}, appsecret={APPSECRET!r}, api_base=api_base)
config = Config(**settings, state_dir=Path(path).parent)
"""


def start(run: Run, script: str, path: Path, api: FakeApi, *arguments: str) -> Any:
    """Start another process with the ``config`` of an account."""
    return run("-c", BEGIN + script, str(path), api.base, *arguments)


ASK = """
store = wechat.api.token_store(config)
print("ready", flush=True)
sys.stdin.readline()
print(store.refresh(rest[0]) if rest else store.get())
"""


def ask_at_once(run: Run, count: int, path: Path, api: FakeApi, *stale: str) -> list[str]:
    """Let ``count`` processes ask at one moment."""
    processes = [start(run, ASK, path, api, *stale) for _ in range(count)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate()[0].strip() for process in processes]


def test_fifty_processes_at_once_make_one_fetch(path: Path, fake_api: FakeApi, run: Run) -> None:
    fake_api.delay = 0.2
    assert ask_at_once(run, 50, path, fake_api) == [fake_api.token] * 50
    assert len(fake_api.fetches) == 1


@pytest.mark.parametrize("endpoint", ["stable_token", "token"])
def test_a_hundred_told_40001_at_once_make_one_fetch(
    make: Maker, fake_api: FakeApi, endpoint: str
) -> None:
    stale = make(endpoint=endpoint).get()
    fake_api.delay = 0.1
    fake_api.expire()
    with ThreadPoolExecutor(100) as pool:
        tokens = set(pool.map(lambda _: make(endpoint=endpoint).refresh(stale), range(100)))
    assert tokens == {fake_api.token}
    assert stale not in tokens
    assert len(fake_api.fetches) == 2


def test_ten_processes_told_40001_at_once_make_one_fetch(
    make: Maker, path: Path, fake_api: FakeApi, run: Run, clock: Clock
) -> None:
    clock.now, clock.up = time.time(), token_store.uptime()
    stale = make().get()
    fake_api.delay = 0.2
    fake_api.expire()
    assert ask_at_once(run, 10, path, fake_api, stale) == [fake_api.token] * 10
    assert len(fake_api.fetches) == 2


def test_a_token_that_somebody_already_replaced_is_not_fetched_again(
    make: Maker, fake_api: FakeApi
) -> None:
    first = make().get()
    assert make().refresh("an older one") == first
    assert len(fake_api.fetches) == 1


def test_a_stable_token_that_is_given_again_is_forced(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    store = make()
    first = store.get()
    second = store.refresh(first)
    assert second != first
    assert [asked.get("force_refresh") for asked in fake_api.fetches] == [None, None, True]
    clock.sleep(31)
    assert store.refresh(second) not in (first, second)


def test_a_lease_says_how_long_the_token_lives(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    first, left = make().lease()
    assert (first, left) == (fake_api.token, 7200)
    clock.sleep(100)
    assert make().lease() == (first, 7100)
    assert make().lease(first) == (fake_api.token, 7200)
    assert fake_api.token != first


@pytest.mark.parametrize("endpoint", ["stable_token", "token"])
def test_tokens_that_are_refused_one_after_another_are_not_burned(
    make: Maker, fake_api: FakeApi, clock: Clock, endpoint: str
) -> None:
    store = make(endpoint=endpoint)
    second = store.refresh(store.get())
    fetches = len(fake_api.fetches)
    for _ in range(10):
        clock.sleep(0.1)
        with pytest.raises(TokenError, match="once in 30 s") as caught:
            make(endpoint=endpoint).refresh(second)
        assert caught.value.errcode == 45011
    assert store.get() == second
    assert len(fake_api.fetches) == fetches
    clock.sleep(31)
    assert store.refresh(second) == fake_api.token != second


def test_a_token_that_has_ended_is_not_one_that_is_refused_too_soon(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    fake_api.expires_in = 20
    store = make()
    second = store.refresh(store.get())
    clock.sleep(21)
    assert store.refresh(second) == fake_api.token != second


@pytest.mark.parametrize("endpoint", ["stable_token", "token"])
def test_one_failure_at_a_refresh_costs_one_short_wait(
    make: Maker, fake_api: FakeApi, clock: Clock, endpoint: str
) -> None:
    token = make(endpoint=endpoint).get()
    fake_api.failure = b'{"errcode": -1, "errmsg": "system error"}'
    with pytest.raises(TokenError, match="errcode -1"):
        make(endpoint=endpoint).refresh(token)
    fake_api.failure = None
    clock.sleep(5.1)
    assert make(endpoint=endpoint).refresh(token) == fake_api.token != token


def test_a_force_that_failed_is_not_repeated_within_thirty_seconds(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    token = make().get()
    answers = iter([7200, 0])  # the same token again, and nonsense when it is forced
    fake_api.on_fetch = lambda: vars(fake_api).update(expires_in=next(answers))
    with pytest.raises(TokenError, match="how long it lives"):
        make().refresh(token)
    asked = len(fake_api.fetches)
    clock.sleep(6)
    with pytest.raises(TokenError, match="once in 30 s"):
        make().refresh(token)
    assert len(fake_api.fetches) == asked


GET_FOREVER = """
fast = lambda: time.time() * 1000  # a token of one second is renewed after half a millisecond
config = Config(**settings, endpoint="token", state_dir=Path(path).parent)
store = wechat.api.token_store(config, fast)
while True:
    print(store.get(), flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_whole_file_and_a_free_lock(
    path: Path, fake_api: FakeApi, run: Run
) -> None:
    fake_api.length, fake_api.expires_in = 60, 1
    dice = random.Random(20241121)
    config = account(fake_api, path.parent, endpoint="token")
    store = wechat.api.token_store(config, lambda: time.time() * 1000)
    for _ in range(15):
        process = start(run, GET_FOREVER, path, fake_api)
        assert process.stdout.readline()
        time.sleep(dice.uniform(0, 0.05))
        process.kill()
        process.wait()
        content = json.loads(path.read_text())
        assert re.fullmatch(r"\d+_[\w-]+", content["access_token"])
        assert len(content["access_token"]) == 60
        assert store.get() == fake_api.token != content["access_token"]
        assert sorted(os.listdir(path.parent)) == ["access_token.json", "access_token.json.lock"]


FORKED = """
parent = os.getpid()
place = FilePlace(path)
def fetch(refused):
    if os.fork():
        print("forked", flush=True)
        time.sleep(60)
    while os.getppid() == parent:
        time.sleep(0.01)
    print(TokenStore(config.appid, place, lambda refused: ("CHILDS", 7200)).get(), flush=True)
    time.sleep(60)
TokenStore(config.appid, place, fetch).get()
"""


@pytest.mark.parametrize("who", ["another process", "the child"])
def test_a_fetcher_killed_while_a_child_that_it_forked_lives_holds_nobody_up(
    path: Path, fake_api: FakeApi, run: Run, who: str
) -> None:
    process = start(run, FORKED, path, fake_api)
    assert process.stdout.readline() == "forked\n"
    if who == "another process":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGSTOP)
    process.kill()
    process.wait()
    if who == "another process":
        assert wechat.api.token_store(account(fake_api, path.parent)).get() == fake_api.token
        os.kill(int(children[0]), 0)  # it lives
    else:
        assert process.stdout.readline() == "CHILDS\n"


WITHOUT_FILES = """
passed = 0
store = wechat.api.token_store(config, lambda: time.time() + passed)
token = store.get()
os.utime(path)  # so that it would have to be read again
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
files = []
try:
    while True:
        files.append(os.dup(0))
except OSError:
    pass
print([store.get() == token for _ in range(3)], flush=True)
passed = 7200 - 100
print([store.get() == token for _ in range(3)], flush=True)
try:
    store.refresh(token)
except TokenError as error:
    print(error, flush=True)
for file in files:
    os.close(file)
passed += 10
print(store.get() == token)
"""


def test_without_a_free_file_descriptor_a_known_token_is_given_out_while_it_lives(
    path: Path, fake_api: FakeApi, run: Run
) -> None:
    out, err = start(run, WITHOUT_FILES, path, fake_api).communicate()
    known, near_expiry, refreshed, renewed = out.splitlines()
    assert known == near_expiry == "[True, True, True]"
    assert refreshed.startswith("cannot write ")
    assert (renewed, len(fake_api.fetches)) == ("True", 2)
    assert err.count("going on with the access_token last known: cannot read") == 1
    assert err.count("going on with the old access_token: cannot write") == 1


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Mock(fsync=Mock(wraps=os.fsync), replace=Mock(wraps=os.replace))
    monkeypatch.setattr(os, "fsync", disk.fsync)
    monkeypatch.setattr(os, "replace", disk.replace)
    make().get()
    done = [name for name, *_ in disk.mock_calls]
    assert done == ["fsync", "replace"] * 2  # the proof that it can be written, and the token


def test_what_a_killed_process_left_is_taken_over(
    make: Maker, path: Path, fake_api: FakeApi
) -> None:
    path.parent.mkdir()
    left = Path(f"{path}.new")
    left.write_text("{" + "half" * 5000)
    left.chmod(0o666)
    assert make().get() == fake_api.token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["access_token"] == fake_api.token
    assert sorted(os.listdir(path.parent)) == ["access_token.json", "access_token.json.lock"]


FULL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    wechat.api.token_store(config).get()
except TokenError as error:
    print(error)
"""


def test_a_disk_with_no_room_is_found_out_before_wechat_is_asked(
    path: Path, fake_api: FakeApi, run: Run
) -> None:
    out, err = start(run, FULL_DISK, path, fake_api).communicate()
    assert out.startswith(f"cannot write {path}: ")
    assert err == ""
    assert fake_api.fetches == []


@pytest.fixture
def readonly() -> Iterator[Path]:
    """A folder that this user may read but not write; root becomes nobody for it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    state = folder / "state"
    state.mkdir()
    yield state
    state.chmod(0o755)
    shutil.rmtree(folder)


READ_ONLY = """
import encodings.idna
store = wechat.api.token_store(Config(**settings, margin=7000, state_dir=Path(path).parent))
if os.geteuid() == 0:
    os.seteuid(65534)
for _ in range(int(rest[0])):
    try:
        print(store.get())
    except TokenError as error:
        print(error)
"""


def test_a_place_that_cannot_be_written_is_tried_again_after_a_wait(
    make: Maker, path: Path, clock: Clock, fake_api: FakeApi
) -> None:
    Path(f"{path}.new").mkdir(parents=True)  # in the way
    store = make()
    with pytest.raises(TokenError, match=r"cannot write .* \(next try in 5 s\)"):
        store.get()
    Path(f"{path}.new").rmdir()
    clock.sleep(2)
    with pytest.raises(TokenError, match=r"cannot write .* \(next try in 3 s\)"):
        store.get()
    clock.sleep(4)
    assert store.get() == fake_api.token


def test_a_read_only_place_is_found_out_before_wechat_is_asked(
    readonly: Path, fake_api: FakeApi, run: Run
) -> None:
    readonly.chmod(0o555)
    out, _ = start(run, READ_ONLY, readonly / "access_token.json", fake_api, "1").communicate()
    assert "cannot write" in out
    assert "Permission denied" in out
    assert fake_api.fetches == []


def test_in_a_read_only_place_the_old_token_is_served_and_the_failure_logged_once(
    readonly: Path, fake_api: FakeApi, run: Run
) -> None:
    path = readonly / "access_token.json"
    clock = Clock()
    clock.now, clock.up = time.time() - 4000, token_store.uptime() - 4000
    token = Maker(path, fake_api, clock)().get()
    for entry in readonly.iterdir():
        entry.chmod(0o644)
    readonly.chmod(0o555)
    out, err = start(run, READ_ONLY, path, fake_api, "20").communicate()
    assert out.split() == [token] * 20
    assert err.count("going on with the old access_token: cannot write") == 1
    assert len(fake_api.fetches) == 1


def test_a_token_that_cannot_be_written_after_all_is_not_lost_to_its_process(
    make: Maker, path: Path, fake_api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    fake_api.on_fetch = lambda: Path(f"{path}.new").mkdir()
    store = make(endpoint="token")
    assert store.get() == store.get() == fake_api.token
    assert len(fake_api.fetches) == 1
    assert "known to this process alone" in caplog.text


def test_a_file_that_cannot_be_read_is_an_error_and_nothing_is_fetched(
    make: Maker, path: Path, fake_api: FakeApi
) -> None:
    token = make().get()
    store = make()
    path.rename(f"{path}.away")
    path.mkdir()
    with pytest.raises(TokenError, match=f"cannot read {path}: "):
        store.get()
    path.rmdir()
    Path(f"{path}.away").rename(path)
    assert store.get() == token
    assert len(fake_api.fetches) == 1


FAILURES: list[tuple[dict[str, Any], str]] = [
    ({"failure": b'{"errcode": -1, "errmsg": "system error"}'}, "errcode -1 .*try again later"),
    ({"failure": b'{"errcode": 40013, "errmsg": "x"}'}, r"errcode 40013 .*\[wechat\] appid"),
    ({"failure": b'{"errcode": 40125, "errmsg": "x"}'}, r"errcode 40125 .*\[wechat\] appsecret"),
    (
        {"failure": b'{"errcode": 40164, "errmsg": "invalid ip 1.2.3.4 ipv6 ::ffff:1.2.3.4"}'},
        r"errcode 40164 .*: add 1\.2\.3\.4 to .*IP白名单",
    ),
    ({"failure": b'{"errcode": 99999, "errmsg": "new"}'}, r"errcode 99999 \(new\): .*全局返回码"),
    ({"failure": b'{"errcode": "40013"}'}, "something else than WeChat's JSON"),
    ({"failure": b'{"errcode": 1' + b"1" * 4200 + b"}"}, "something else than WeChat's JSON"),
    ({"failure": b'{"errcode": [1]}'}, "something else than WeChat's JSON"),
    ({"failure": b'{"errcode": 1, "errmsg": "a\\nb\\u001b\\ud800c"}'}, r"errcode 1 \(a b c\)"),
    ({"failure": b"<html>oops</html>"}, "something else than WeChat's JSON"),
    ({"failure": b"[]"}, "something else than WeChat's JSON"),
    ({"failure": b"[" * 100_000}, "something else than WeChat's JSON"),
    ({"failure": b""}, "something else than WeChat's JSON"),
    ({"failure": b"\xff\xfe"}, "something else than WeChat's JSON"),
    ({"failure": b"{}"}, "no access_token"),
    ({"failure": b'{"access_token": "", "expires_in": 7200}'}, "no access_token"),
    ({"failure": b'{"access_token": "a b", "expires_in": 7200}'}, "no access_token"),
    ({"failure": b'{"access_token": 7, "expires_in": 7200}'}, "no access_token"),
    ({"failure": b'{"access_token": "T"}'}, "not how long it lives"),
    ({"expires_in": "7200"}, "not how long it lives"),
    ({"expires_in": True}, "not how long it lives"),
    ({"expires_in": 0}, "not how long it lives"),
    ({"expires_in": -5}, "not how long it lives"),
    ({"expires_in": 1.5}, "not how long it lives"),
    ({"status": 502, "failure": b"<html>"}, "HTTP status 502"),
    ({"status": 302, "failure": b"", "location": "http://127.0.0.1:1/"}, "HTTP status 302"),
    ({"status": 302, "failure": b"", "location": "http://["}, "HTTP status 302"),
]


@pytest.mark.parametrize(("switches", "error"), FAILURES)
def test_every_failure_is_one_line_that_says_what_happened(
    make: Maker, fake_api: FakeApi, switches: dict[str, Any], error: str
) -> None:
    vars(fake_api).update(switches)
    with pytest.raises(TokenError, match=error) as caught:
        make().get()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("switches", "error"), FAILURES)
def test_while_the_old_token_lives_a_failure_is_logged_and_it_is_served(
    make: Maker,
    fake_api: FakeApi,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    switches: dict[str, Any],
    error: str,
) -> None:
    store = make()
    first = store.get()
    clock.sleep(7200 - 100)
    vars(fake_api).update(switches)
    assert store.get() == first
    assert re.search(error, caplog.text)
    clock.sleep(101)
    with pytest.raises(TokenError, match=error):
        make().get()


def test_the_errcode_is_there_for_programs(make: Maker, fake_api: FakeApi) -> None:
    fake_api.failure = b'{"errcode": 40164, "errmsg": "x"}'
    with pytest.raises(TokenError) as caught:
        make().get()
    assert caught.value.errcode == 40164


def test_a_failing_api_is_left_alone_by_all_for_a_while_that_doubles(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    fake_api.failure = b'{"errcode": -1, "errmsg": "system error"}'
    waits = []
    for _ in range(6):
        asked = len(fake_api.calls)
        with pytest.raises(TokenError) as caught:
            make().get()
        assert len(fake_api.calls) == asked + 1
        for _ in range(10):
            with pytest.raises(TokenError, match="errcode -1"):
                make().get()
        assert len(fake_api.calls) == asked + 1
        match = re.search(r"next try in (\d+) s", str(caught.value))
        assert match
        waits.append(int(match[1]))
        clock.sleep(waits[-1] + 0.1)
    assert waits == [5, 10, 20, 40, 60, 60]
    fake_api.failure = None
    assert make().get() == fake_api.token


def test_a_failure_near_expiry_is_not_tried_again_at_every_call(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    first = make().get()
    clock.sleep(7200 - 100)
    fake_api.failure = b"<html>"
    assert [make().get() for _ in range(20)] == [first] * 20
    assert len(fake_api.calls) == 1


def test_a_clock_set_back_does_not_lengthen_the_wait(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    fake_api.failure = b"<html>"
    with pytest.raises(TokenError):
        make().get()
    clock.now -= 86400
    fake_api.failure = None
    assert make().get() == fake_api.token


@pytest.mark.parametrize("back", [90, 3600, 86400 * 365])
def test_a_clock_set_back_does_not_keep_a_dead_token(
    make: Maker, fake_api: FakeApi, clock: Clock, back: float
) -> None:
    store = make(endpoint="token")
    first = store.get()
    clock.sleep(6000)
    clock.now -= back
    clock.sleep(1300)  # it is dead now, whatever the wall clock says
    assert store.get() == fake_api.token != first
    assert make(endpoint="token").get() == fake_api.token


def test_a_clock_set_back_over_a_restart_of_the_machine_does_not_keep_a_dead_token(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    first = make(endpoint="token").get()
    clock.now, clock.up = clock.now - 3600, 5.0
    assert make(endpoint="token").get() == fake_api.token != first


def test_a_machine_that_starts_anew_costs_one_fetch_for_its_clock_may_have_stood_still(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    make().get()
    clock.up = 5.0
    for _ in range(5):
        assert make().get() == fake_api.token
        clock.sleep(60)
    assert len(fake_api.fetches) == 2


def test_a_clock_set_forward_costs_one_fetch(make: Maker, fake_api: FakeApi, clock: Clock) -> None:
    make().get()
    clock.now += 86400
    for _ in range(5):
        assert make().get() == fake_api.token
        clock.sleep(60)
    assert len(fake_api.fetches) == 2


@pytest.mark.parametrize("life", [1, 10, 240, 300])
def test_a_token_as_short_lived_as_the_margin_is_not_fetched_at_every_call(
    make: Maker, fake_api: FakeApi, clock: Clock, life: int
) -> None:
    fake_api.expires_in = life
    for _ in range(100):
        assert make().get() == fake_api.token
        clock.sleep(life / 100)
    assert len(fake_api.fetches) <= 3


def test_a_margin_over_five_minutes_does_not_loop_on_a_stable_token(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    for _ in range(7200 // 20):
        assert make(margin=3600).get() == fake_api.token
        clock.sleep(20)
    assert len(fake_api.fetches) <= 8


def test_a_life_beyond_the_platforms_is_taken_as_the_platforms(
    make: Maker, fake_api: FakeApi, clock: Clock
) -> None:
    fake_api.expires_in = 10**12
    first = make(endpoint="token").get()
    clock.sleep(7201)
    assert make(endpoint="token").get() != first


def good(**over: Any) -> str:
    whole = {
        "appid": APPID,
        "access_token": "FROMFILE",
        "expires_in": 7200,
        "fetched_at": Clock().now,
        "uptime": Clock().up,
    }
    return json.dumps(whole | over)


def test_a_good_file_is_believed(make: Maker, path: Path, fake_api: FakeApi) -> None:
    path.parent.mkdir()
    path.write_text(good())
    assert make().get() == "FROMFILE"
    assert fake_api.fetches == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"text"',
        "[" * 5000,
        "\0" * 4096,
        "{}",
        good(appid="wxsomebodyelse"),
        good(access_token=""),
        good(access_token=7),
        good(access_token="a b"),
        good(access_token="a" * 2000),
        good(expires_in=10**9),
        good(expires_in=-1),
        good(expires_in="7200"),
        good(expires_in=None),
        good(access_token="", expires_in=None),
        good(access_token="", expires_in=[]),
        good(failure=7),
        good(expires_in=float("nan")),
        good(fetched_at=0),
        good(fetched_at=Clock().now + 86400),
        good(fetched_at=Clock().now - 7201),
        good(fetched_at=float("nan")),
        good(fetched_at=float("-inf")),
        good(fetched_at="yesterday"),
        good(fetched_at=10**400),
        good(uptime=None),
        good(unknown=1),
    ],
)
def test_a_corrupt_empty_foreign_or_absurd_file_counts_as_no_token(
    make: Maker, path: Path, fake_api: FakeApi, content: str
) -> None:
    path.parent.mkdir()
    path.write_text(content)
    assert make().get() == fake_api.token != ""
    assert make().get() == fake_api.token
    assert len(fake_api.fetches) == 1


def test_a_file_of_bytes_that_are_no_text_counts_as_no_token(
    make: Maker, path: Path, fake_api: FakeApi
) -> None:
    path.parent.mkdir()
    path.write_bytes(bytes(range(128, 256)))
    assert make().get() == fake_api.token


def test_the_secret_and_the_token_never_show(
    make: Maker, fake_api: FakeApi, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = make()
    token = store.get()
    for secret in (APPSECRET, "wrong" + APPSECRET):  # in an answer that quotes what was sent
        for endpoint in ("stable_token", "token"):
            clock.sleep(7300)
            fake_api.failure = json.dumps({"errcode": 1, "errmsg": f"bad {secret}"}).encode()
            with pytest.raises(TokenError) as caught:
                make(appsecret=secret, endpoint=endpoint).get()
            assert secret not in str(caught.value)
            assert secret not in make.path.read_text()
    assert APPSECRET not in caplog.text + repr(store) + str(vars(caught.value))
    assert token not in caplog.text + repr(store)


def test_the_command_prints_the_token_alone(fake_api: FakeApi, tmp_path: Path, run: Run) -> None:
    env = config_for(fake_api, tmp_path)
    for _ in range(2):
        process = run(token_store.__file__, env=env)
        out, err = process.communicate()
        assert (out, err, process.returncode) == (fake_api.token + "\n", "", 0)
    assert len(fake_api.fetches) == 1


@pytest.mark.parametrize(
    ("environ", "error"),
    [
        ({"WX_APPSECRET": "wrong"}, "token_store: errcode 40125"),
        ({"WX_APPID": ""}, "token_store: set [wechat] appid and appsecret"),
        ({"WXSERVER_CONFIG": "/does/not/exist.ini"}, "token_store: /does/not/exist.ini"),
    ],
)
def test_the_command_says_errors_on_stderr_and_exits_1(
    fake_api: FakeApi, tmp_path: Path, run: Run, environ: dict[str, str], error: str
) -> None:
    process = run(token_store.__file__, env=config_for(fake_api, tmp_path, **environ))
    out, err = process.communicate()
    assert (out, process.returncode) == ("", 1)
    assert err.startswith(error)
    assert err.count("\n") == 1


def test_a_margin_below_zero_is_none(make: Maker, fake_api: FakeApi) -> None:
    assert make(margin=-1000).get() == fake_api.token != ""


ALONE = """
import sys
sys.path.insert(0, ".")
from token_store import ApiError, FilePlace, TokenStore

asked = []
def fetch(refused):
    asked.append(refused)
    if len(asked) == 3:
        raise OSError("no network")
    return ("TOKEN", 7200) if len(asked) < 3 else (f"TOKEN{len(asked)}", 7200)

store = TokenStore("wx1", FilePlace("t.json"), fetch)
print(store.get(), store.get(), asked)
try:
    store.refresh("TOKEN")
except ApiError as error:
    print(error, asked)
"""


def test_it_works_when_copied_out_alone_given_a_function_that_fetches(tmp_path: Path) -> None:
    shutil.copy(ROOT / "token_store.py", tmp_path)
    options: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True}
    isolated = subprocess.run([sys.executable, "-IS", "-c", ALONE], **options, check=False)
    assert isolated.stdout.splitlines() == [
        "TOKEN TOKEN ['']",
        "no network (next try in 5 s) ['', '', 'TOKEN']",
    ]
    alone = [sys.executable, "-S", "token_store.py"]
    result = subprocess.run(alone, **options, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "needs wechat/api.py and wechat/config.py" in result.stderr


@pytest.mark.parametrize("fetched", [("", 7200), ("T", 0), (None, 7200), ("T", None), ("T", True)])
def test_what_is_no_token_is_never_kept(make: Maker, path: Path, fetched: Any) -> None:
    with pytest.raises(TokenError, match="no access_token, or not how long it lives"):
        make(lambda refused: fetched).get()
    assert json.loads(path.read_text())["access_token"] == ""


def test_threads_of_one_store_share_one_fetch(make: Maker, fake_api: FakeApi) -> None:
    fake_api.delay = 0.2
    store, barrier = make(), threading.Barrier(30)

    def ask(_: int) -> str:
        barrier.wait()
        return store.get()

    with ThreadPoolExecutor(30) as pool:
        assert set(pool.map(ask, range(30))) == {fake_api.token}
    assert len(fake_api.fetches) == 1


@pytest.mark.parametrize("program", ["wxserver.py", "token_store.py"])
def test_without_fcntl_as_on_windows_one_line_says_what_is_needed(
    run: Run, tmp_path: Path, program: str
) -> None:
    (tmp_path / "config.ini").touch()
    without = "import runpy, sys; sys.modules['fcntl'] = None; sys.argv = sys.argv[1:];"
    without += "runpy.run_path(sys.argv[0], run_name='__main__')"
    process = run(
        *("-c", without, str(ROOT / program)),
        env={"WXSERVER_CONFIG": str(tmp_path / "config.ini"), "WX_TOKEN": "AAAAA"},
    )
    out, errors = process.communicate(timeout=20)
    assert errors == f"{program[:-3]}: needs Linux or macOS; on Windows use WSL\n"
    assert (out, process.returncode) == ("", 1)
