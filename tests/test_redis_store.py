"""What Redis adds: being lost, being found again, addresses with secrets, and several machines."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import APPID, APPSECRET, ROOT, TOKEN, Run, account, config_for, message_xml
from serving import RedisServer, Server, free_port, gunicorn, until
from test_once import WAIT, Counted, message, write

import wechat.api
import wechat.config
import wechat.late
import wechat.redis_store
from token_store import TokenError, TokenStore
from wechat.config import ConfigError
from wechat.late import LateAnswers
from wechat.message import from_xml
from wechat.once import ReplyOnce
from wechat.redis_store import RedisAnswers, RedisLate, RedisPlace
from wxsim.fake_api import FakeApi


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A redis-server that the test may harm."""
    server = RedisServer()
    yield server
    server.kill()


class Clock:
    def __init__(self, api: FakeApi) -> None:
        self.passed = 0.0
        api.clock = self

    def __call__(self) -> float:
        return time.time() + self.passed


@pytest.fixture
def clock(fake_api: FakeApi) -> Clock:
    return Clock(fake_api)


Make = Callable[..., TokenStore]


@pytest.fixture
def make(fake_api: FakeApi, clock: Clock, tmp_path: Path) -> Make:
    def make(url: str, endpoint: str = "stable_token", **more: Any) -> TokenStore:
        fetch = partial(wechat.api.fetch_token, account(fake_api, tmp_path, endpoint=endpoint))
        return TokenStore(APPID, RedisPlace(url, APPID), fetch, **{"clock": clock, **more})

    return make


LOSSES = pytest.mark.parametrize("lose", [RedisServer.kill, RedisServer.freeze])


def bring_back(server: RedisServer) -> None:
    if server.process.returncode is None:
        server.thaw()
    else:
        server.start()


def once_over(url: str) -> ReplyOnce:
    late = LateAnswers(RedisLate(url, APPID))
    return ReplyOnce(RedisAnswers(url, APPID), late, write, WAIT.decode())


@LOSSES
def test_without_redis_messages_are_answered_without_the_guarantee_and_it_heals(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture, lose: Callable[[RedisServer], None]
) -> None:
    once, other, bot = once_over(own_redis.url), once_over(own_redis.url), Counted(b"answer")
    assert once.answer(message(0), bot) == other.answer(message(0), bot) == b"answer"
    lose(own_redis)
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        came = list(pool.map(lambda n: once.answer(message(n), bot), range(1, 41)))
    assert came == [b"answer"] * 40
    assert time.monotonic() - began < 5.0  # which WeChat waits for one of them; alone it took 40
    assert bot.runs == 41
    assert caplog.text.count("would run reply() again") == 1
    assert f"Redis at 127.0.0.1:{own_redis.port}" in caplog.text
    bring_back(own_redis)

    def guaranteed() -> bool:
        number, runs = time.monotonic_ns(), bot.runs
        assert once.answer(message(number), bot) == other.answer(message(number), bot) == b"answer"
        return bot.runs == runs + 1

    until(guaranteed)


@LOSSES
def test_redis_that_is_lost_while_a_reply_runs_costs_no_answer(
    own_redis: RedisServer, lose: Callable[[RedisServer], None]
) -> None:
    once = once_over(own_redis.url)

    def run() -> list[bytes]:
        lose(own_redis)
        return [b"answer", b"more"]

    assert once.answer(message(1), run) == b"answer"
    bring_back(own_redis)


@LOSSES
def test_without_redis_the_token_last_known_is_given_while_it_lives_and_nobody_asks_wechat(
    own_redis: RedisServer,
    make: Make,
    clock: Clock,
    fake_api: FakeApi,
    caplog: pytest.LogCaptureFixture,
    lose: Callable[[RedisServer], None],
) -> None:
    store, newcomer = make(own_redis.url, endpoint="token"), make(own_redis.url, endpoint="token")
    token = store.get()
    lose(own_redis)
    clock.passed += 7200 - 300
    until(lambda: store.get() == token and "the access_token last known" in caplog.text)
    clock.passed += 200  # near its end
    assert [store.get() for _ in range(20)] == [token] * 20
    for ask in (newcomer.get, lambda: store.refresh(token)):
        with pytest.raises(TokenError, match=r"cannot (read|write) Redis at 127\.0\.0\.1:\d+: "):
            ask()
    clock.passed += 200
    with pytest.raises(TokenError, match="cannot read Redis"):
        store.get()
    assert len(fake_api.fetches) == 1
    assert token not in caplog.text
    bring_back(own_redis)

    def healed(store: TokenStore) -> bool:
        try:
            return store.get() == fake_api.token
        except TokenError:
            return False

    until(lambda: healed(store))
    until(lambda: healed(newcomer))
    assert fake_api.token != token
    assert len(fake_api.fetches) == 2


def test_a_token_that_cannot_be_written_after_all_is_not_lost_to_its_process(
    own_redis: RedisServer,
    make: Make,
    fake_api: FakeApi,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake_api.on_fetch = own_redis.kill
    store = make(own_redis.url, endpoint="token")
    assert store.get() == store.get() == fake_api.token
    assert len(fake_api.fetches) == 1
    assert "known to this process alone" in caplog.text


def test_a_redis_that_takes_no_writes_is_found_out_before_wechat_is_asked(
    own_redis: RedisServer, make: Make, fake_api: FakeApi
) -> None:
    own_redis.ask("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(TokenError, match=r"cannot write Redis .*maxmemory"):
        make(own_redis.url).get()
    assert fake_api.fetches == []


def test_a_redis_that_comes_back_empty_costs_one_fetch(
    own_redis: RedisServer, make: Make, fake_api: FakeApi
) -> None:
    store = make(own_redis.url)
    token = store.get()
    own_redis.kill()
    own_redis.start()
    assert make(own_redis.url).get() == token  # which stable_token gives again
    assert make(own_redis.url).get() == store.get() == token
    assert len(fake_api.fetches) == 2


def test_get_asks_redis_now_and_then_and_not_each_time(
    redis_server: RedisServer, redis_url: str, make: Make
) -> None:
    store = make(redis_url)
    token = store.get()

    def asked() -> int:
        stats = redis_server.ask("INFO", "commandstats").decode()
        return int(stats.partition("cmdstat_get:calls=")[2].partition(",")[0] or 0)

    before, began = asked(), time.monotonic()
    assert {store.get() for _ in range(5000)} == {token}
    assert asked() - before <= (time.monotonic() - began) / wechat.redis_store.LOOK + 1


def test_every_key_has_the_appid_and_an_end(
    redis_server: RedisServer, redis_url: str, make: Make
) -> None:
    make(redis_url).get()
    answers = RedisAnswers(redis_url, APPID)
    answers.claim("a")
    answers.save("a", b"1")
    answers.claim("b")
    answers.tell_to_wait("b")
    late = LateAnswers(RedisLate(redis_url, APPID))
    late.mark_pending("who", "b", "owner")
    late.save("who", "c", [b"2"], 1.0, 0.0)
    keys = redis_server.ask("KEYS", "*").decode().split("\r\n")[2::2]
    names = ["late:who", "message:a", "message:a.lock", "message:b", "message:b.lock"]
    names += ["seen:a", "seen:b", "token"]
    assert sorted(keys) == [f"wxserver:{APPID}:{name}" for name in names]
    for key in keys:
        assert 0 < int(redis_server.ask("TTL", key)[1:]) <= wechat.late.KEEP_LATE, key


def test_accounts_of_one_redis_know_nothing_of_each_other(redis_url: str) -> None:
    one, other = RedisAnswers(redis_url, "wx1"), RedisAnswers(redis_url, "wx2")
    assert (one.claim("a").tries, other.claim("a").tries) == (1, 1)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b'{"appid": "wxelse", "access_token": "T", "expires_in": 7200}', b"\xff"],
)
def test_what_is_no_token_of_the_account_counts_as_none(
    redis_url: str, make: Make, fake_api: FakeApi, content: bytes
) -> None:
    store = make(redis_url)
    with redis.Redis.from_url(redis_url) as client:
        client.set(f"wxserver:{APPID}:token", content)
    assert store.get() == make(redis_url).get() == fake_api.token
    assert len(fake_api.fetches) == 1


def test_a_clock_set_back_does_not_keep_a_dead_token(
    redis_url: str, make: Make, fake_api: FakeApi, clock: Clock
) -> None:
    passed = {"up": 1000.0}
    store = make(redis_url, endpoint="token", uptime=lambda: passed["up"])
    first = store.get()
    clock.passed, passed["up"] = -50.0, passed["up"] + 7201
    assert store.get() == fake_api.token != first


def test_machines_that_started_at_different_times_share_a_token(
    redis_url: str, make: Make, fake_api: FakeApi
) -> None:
    tokens = {make(redis_url, uptime=lambda up=up: up).get() for up in (10.0, 1e7, 5.0)}
    assert tokens == {fake_api.token}
    assert len(fake_api.fetches) == 1


FETCH = """
import sys, wechat.api, wechat.config
store = wechat.api.token_store(wechat.config.load())
print("ready", flush=True)
sys.stdin.readline()
print(store.get(), flush=True)
sys.stdin.readline()
print(store.get(), flush=True)
"""


def test_a_process_that_slept_while_it_fetched_does_not_replace_a_newer_token(
    redis_url: str, make: Make, fake_api: FakeApi, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "config.ini").write_text(
        f"[access_token]\napi_base = {fake_api.base}\nendpoint = token\n"
    )
    asked, answer = threading.Event(), threading.Event()

    def fetch() -> None:
        if not asked.is_set():
            asked.set()
            sleeper.send_signal(signal.SIGSTOP)

    fake_api.on_fetch = fetch
    secrets = {"WX_APPID": APPID, "WX_APPSECRET": APPSECRET, "WX_REDIS": redis_url}
    env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini"), **secrets}
    sleeper = run("-c", FETCH, env=env)
    assert sleeper.stdout.readline() == "ready\n"
    sleeper.stdin.write("\n")
    sleeper.stdin.flush()
    assert asked.wait(10)
    token = make(redis_url, endpoint="token").get()
    assert len(fake_api.fetches) == 2
    sleeper.send_signal(signal.SIGCONT)
    sleeper.stdout.readline()
    answer.set()
    assert make(redis_url, endpoint="token").get() == token
    out, _ = sleeper.communicate("\n")
    assert out == f"{token}\n"


def test_a_thread_that_lost_its_lock_does_not_take_another_threads_for_its_own(
    redis_server: RedisServer, redis_url: str, make: Make, fake_api: FakeApi
) -> None:
    store, got = make(redis_url, endpoint="token"), list[Future[str]]()
    lock = f"wxserver:{APPID}:token.lock"

    def fetch() -> None:
        if len(got) == 2:  # the other thread, which has the lock, waits for the first one's end
            got[0].result()
            return
        redis_server.ask("DEL", lock)
        got.append(pool.submit(store.get))
        until(lambda: redis_server.ask("EXISTS", lock).startswith(b":1"))

    fake_api.on_fetch = fetch
    with ThreadPoolExecutor() as pool:
        got.append(pool.submit(store.get))
        got[0].result()
    assert make(redis_url).get() == got[1].result() == fake_api.token != got[0].result()
    assert len(fake_api.fetches) == 2


def test_the_command_prints_the_token_of_redis(
    redis_url: str, fake_api: FakeApi, tmp_path: Path, run: Run
) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = run(
            str(ROOT / "token_store.py"), env=config_for(fake_api, folder, WX_REDIS=redis_url)
        )
        assert process.communicate() == (fake_api.token + "\n", "")
        assert [path.name for path in folder.iterdir()] == ["config.ini"]
    assert len(fake_api.fetches) == 1


def nowhere() -> str:
    """Return the URL of a Redis that is not there, with a password."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"redis://:s3cret@127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("command", ["token_store", "wechat.api", "wxserver"])
def test_a_command_without_its_redis_says_so_in_one_line(
    fake_api: FakeApi, tmp_path: Path, run: Run, command: str
) -> None:
    env = config_for(fake_api, tmp_path, WX_REDIS=nowhere(), WX_TOKEN=TOKEN)
    arguments = ["getcallbackip"] if command == "wechat.api" else []
    process = run("-m", command, *arguments, env=env)
    out, err = process.communicate()
    assert (out, process.returncode, err.strip().count("\n")) == ("", 1, 0)
    assert "Redis at 127.0.0.1:" in err
    assert "s3cret" not in err
    assert fake_api.fetches == []


def test_check_says_what_is_wrong_with_redis_and_what_it_needs(
    fake_api: FakeApi, tmp_path: Path, run: Run
) -> None:
    env = config_for(fake_api, tmp_path, WX_REDIS=nowhere())
    command = ("-m", "wxsim", "check", "--url", "http://127.0.0.1:1/wx")
    out, err = run(*command, env=env).communicate()
    assert "FAIL  token: cannot read Redis at 127.0.0.1:" in out
    assert "FAIL  callback: [wechat] token: with [shared] redis set it" in out
    assert "s3cret" not in out + err
    assert err == ""


def test_what_a_full_redis_refuses_stands_in_no_log(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    once = once_over(own_redis.url)

    def run() -> list[bytes]:
        own_redis.ask("CONFIG", "SET", "maxmemory", "1")
        return [b"first secret", b"second secret"]

    assert once.answer(message(1, "alice"), run) == b"first secret"
    assert "used memory" in caplog.text
    assert "secret" not in caplog.text
    assert "alice" not in caplog.text


def test_a_lease_that_refuses_the_latest_token_gets_no_older_one(
    redis_url: str, make: Make
) -> None:
    one, other = make(redis_url), make(redis_url)
    first = one.get()
    time.sleep(wechat.redis_store.LOOK)
    assert other.get() == first
    second = one.refresh(first)
    with pytest.raises(TokenError, match="once in 30 s"):  # two in 30 s; but not the first again
        other.lease(second)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:pass/word@127.0.0.1:1",
        "redis://:12/pass/word@h",
        "redis://:12?password@h",
        "redis://password@h",
        "redis://h:port",
        "redis://:pass#word@h",
        "redis://h:99999",
        "redis://h?passwort=word",
        "redis://h?protocol=9",
        "redis://h?decode_responses=true",
        "redis://h?db=1&socket_timeout=60",
        "redis://h?retry_on_timeout=true",
        "redis://h?max_connections=1",
        "unix:///run/redis.sock?encoding=password",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"\[shared\] redis: no URL") as caught:
        wechat.redis_store.check(wechat.config.Config(appid=APPID, redis=url))
    assert "word" not in str(caught.value).replace("password", "")


def test_a_url_may_say_the_database_who_asks_and_how_tls_is_checked(redis_url: str) -> None:
    base = redis_url.removesuffix("/0")
    RedisAnswers(f"{base}?db=1&username=default", APPID).claim("a")
    assert RedisAnswers(redis_url, APPID).claim("a").tries == 1
    assert RedisAnswers(f"{base}/1", APPID).claim("a").tries == 2
    RedisAnswers("rediss://h?password=p4ss&ssl_cert_reqs=none&ssl_check_hostname=no", APPID)


def test_a_password_is_used_and_a_wrong_one_is_named_without_being_shown() -> None:
    server = RedisServer("--requirepass", "s3cret")
    try:
        right, wrong = (server.url.replace("//", f"//:{word}@") for word in ("s3cret", "wr0ng"))
        wechat.redis_store.check(wechat.config.Config(appid=APPID, redis=right))
        for url in (wrong, server.url):
            with pytest.raises(ConfigError, match=r"\[shared\] redis: Redis at .*") as caught:
                wechat.redis_store.check(wechat.config.Config(appid=APPID, redis=url))
            assert "wr0ng" not in str(caught.value)
            assert "\n" not in str(caught.value)
    finally:
        server.kill()


def test_a_redis_cluster_is_refused_by_its_name(tmp_path: Path) -> None:
    options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    server = RedisServer(*options, "--dir", str(tmp_path))
    try:
        with pytest.raises(ConfigError, match=r"\[shared\] redis: .* is part of a Redis Cluster"):
            wechat.redis_store.check(wechat.config.Config(appid=APPID, redis=server.url))
    finally:
        server.kill()


def test_without_the_package_the_owner_is_told_what_to_install(
    fake_api: FakeApi, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "redis.py").write_text("raise ModuleNotFoundError")
    env = config_for(fake_api, tmp_path, WX_REDIS="redis://h", WX_TOKEN=TOKEN)
    env["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    for command in ("token_store.py", "wxserver.py"):
        _, err = run(str(ROOT / command), env=env).communicate()
        assert "[shared] redis needs the package redis: pip install '.[redis]'" in err
        assert "Traceback" not in err


def test_it_is_not_imported_unless_it_is_set(run: Run, tmp_path: Path) -> None:
    script = (
        "import sys, wxserver, wechat.api, wechat.config;"
        "wxserver.create_application(wechat.config.load());"
        "wechat.api.token_store(wechat.config.load());"
        "print(*{'redis', 'wechat.redis_store'} & set(sys.modules))"
    )
    (tmp_path / "config.ini").write_text("[wechat]\ntoken = AAAAA\nappid = wx1\nappsecret = s\n")
    process = run("-c", script, env={"WXSERVER_CONFIG": str(tmp_path / "config.ini")})
    assert process.communicate() == ("\n", "")


# Two gunicorns with two state directories are two machines.

BOT = """
import os, time
import wechat.config
from wxserver import create_application

def reply(message):
    with open(os.environ["RUNS"], "a") as runs:
        runs.write(f"{message['Content']} {os.getpid()}\\n")
    if message["Content"].startswith("slow"):
        time.sleep(float(message["Content"].split()[1]))
    if message["Content"] == "long":
        return "long " * 700
    return "to " + message["Content"]

application = create_application(wechat.config.load(), reply)
"""


class Machines:
    def __init__(self, run: Run, tmp_path: Path, url: str) -> None:
        self.runs_path = tmp_path / "runs"
        self.all: list[Server] = []
        for name in ("one", "other"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "bot.py").write_text(BOT)
            env = {"RUNS": str(self.runs_path), "WX_REDIS": url, "WX_TOKEN": TOKEN}
            (folder / "config.ini").write_text("[wechat]\nappid = wx1\n")
            self.all.append(gunicorn(run, folder, "bot", **env).ready())
        self.number = 0

    def xml(self, content: str, follower: str = "alice") -> bytes:
        self.number += 1
        return message_xml(content, MsgId=str(self.number), FromUserName=follower)

    def ask(self, machine: int, xml: bytes) -> str:
        status, body = self.all[machine].ask(xml)
        return str(from_xml(body)["Content"]) if status == 200 else str(status)

    def runs(self) -> list[str]:
        return self.runs_path.read_text().splitlines() if self.runs_path.exists() else []


@pytest.fixture
def machines(run: Run, tmp_path: Path, redis_url: str) -> Machines:
    return Machines(run, tmp_path, redis_url)


def test_copies_of_one_message_at_two_machines_are_one_run(machines: Machines) -> None:
    for content in ("hello", "slow 1"):
        before, xml = len(machines.runs()), machines.xml(content)
        with ThreadPoolExecutor(6) as pool:
            copies = [pool.submit(machines.ask, number % 2, xml) for number in range(6)]
        assert {copy.result() for copy in copies} == {f"to {content}"}
        assert len(machines.runs()) == before + 1


def test_what_is_late_or_long_goes_on_at_the_other_machine(machines: Machines) -> None:
    xml = machines.xml("slow 6")
    with ThreadPoolExecutor(3) as pool:
        copies = [pool.submit(machines.ask, number % 2, xml) for number in range(3)]
        came = sorted(copy.result() for copy in copies)
    assert "还在处理，请稍后发送任意消息查看结果。" in came
    assert machines.ask(1, machines.xml("what of it?")) == "to slow 6"
    long = machines.ask(0, machines.xml("long")).removesuffix("…（未完，发送任意消息继续）")
    assert long + machines.ask(1, machines.xml("go on")) == "long " * 700
    assert machines.ask(0, machines.xml("and now?")) == "to and now?"
    assert len(machines.runs()) == 3


def test_a_machine_that_dies_leaves_its_message_to_the_other(machines: Machines) -> None:
    xml = machines.xml("slow 2")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(machines.ask, 0, xml)
        until(machines.runs)
        second = pool.submit(machines.ask, 1, xml)
        os.killpg(machines.all[0].process.pid, signal.SIGKILL)
        assert second.exception() is None
        came = second.result()
        came = machines.ask(1, xml) if came == "503" else came  # its time was up: the next copy
        assert came == "to slow 2"
        assert first.exception() is not None
    assert len({line.split()[-1] for line in machines.runs()}) == len(machines.runs()) == 2


def test_gunicorn_goes_on_without_redis_and_its_workers_can_be_replaced(
    run: Run, tmp_path: Path, own_redis: RedisServer
) -> None:
    machines = Machines(run, tmp_path, own_redis.url)
    server = machines.all[0]
    assert machines.ask(0, machines.xml("a")) == "to a"
    own_redis.kill()
    before = until(lambda: len(server.workers()) == 2 and server.workers())
    for worker in before:
        os.kill(worker, signal.SIGKILL)
    until(lambda: len(server.workers()) == 4)
    assert [machines.ask(0, machines.xml(str(n))) for n in range(10)] == [
        f"to {n}" for n in range(10)
    ]
    assert "would run reply() again" in server.log
    assert "Traceback" not in server.log
    own_redis.start()

    def guaranteed() -> bool:
        xml, before = machines.xml("copies"), len(machines.runs())
        assert {machines.ask(0, xml), machines.ask(1, xml)} == {"to copies"}
        return len(machines.runs()) == before + 1

    until(guaranteed)


@pytest.mark.parametrize(
    ("environ", "error"),
    [
        ({"WX_TOKEN": TOKEN}, "wxserver: [shared] redis: Redis at 127.0.0.1:"),
        ({}, "wxserver: [wechat] token: with [shared] redis set it, the same on every machine"),
    ],
)
def test_without_redis_or_a_token_gunicorn_does_not_start(
    run: Run, tmp_path: Path, environ: dict[str, str], error: str
) -> None:
    server = gunicorn(run, tmp_path, WX_APPID=APPID, WX_REDIS=nowhere(), **environ)
    assert server.process.wait(timeout=15) != 0
    assert error in server.log
    assert "s3cret" not in server.log
    assert "Traceback" not in server.log
    assert len([line for line in server.log.splitlines() if "INFO" not in line]) == 1
