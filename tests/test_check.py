"""The doctor: every point that it looks at, in real processes, against a fake API over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import APPID, APPSECRET, KEY, ROOT, Run, config_for, skip
from serving import Server, free_port, gunicorn

from wxsim import fake_api
from wxsim.fake_api import FakeApi

PROGRAM = ("-m", "wxsim")
CALLBACK_TOKEN = "Secret0fTheCallback"
ACCOUNT = {
    "WX_TOKEN": CALLBACK_TOKEN,
    "WX_APPID": APPID,
    "WX_APPSECRET": APPSECRET,
    "WX_ENCODING_AES_KEY": KEY,
}
POINTS = ["config", "permissions", "state directory", "clock", "callback", "token"]
POINTS += ["getcallbackip", "callback/check"]
FULL_DISK = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
runpy.run_module("wxsim", run_name="__main__", alter_sys=True)
"""


class Api(FakeApi):
    """The fake API, with answers of the test's own at some paths."""

    def __init__(self) -> None:
        super().__init__(APPID, APPSECRET)
        self.own: dict[str, bytes] = {}

    def answer(self, method: str, target: str, body: bytes) -> tuple[bytes, str]:
        own = self.own.get(target.partition("?")[0].removeprefix("/cgi-bin/"))
        return super().answer(method, target, body) if own is None else (own, "application/json")


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    with api:
        yield api


@pytest.fixture
def folder(api: Api, tmp_path: Path) -> Path:
    """The folder of a config.ini for ``api``, whose secrets are in the environment."""
    config_for(api, tmp_path)
    (tmp_path / "config.ini").chmod(0o644)
    return tmp_path


@pytest.fixture
def server(run: Run, folder: Path) -> Server:
    return gunicorn(run, folder, WEB_CONCURRENCY="1", **ACCOUNT).ready()


@pytest.fixture
def url(server: Server) -> str:
    return f"{server.base}/wx"


class Findings(dict[str, str]):
    """The text of each point, those that failed, and the exit status."""

    def __init__(self, out: str, status: int) -> None:
        self.failed, self.status = [], status
        for line in out.splitlines():
            name, separator, self[name] = line[6:].partition(": ")
            assert separator, line
            assert line[:6] in ("ok    ", "FAIL  ")
            self.failed += [name] * line.startswith("FAIL")


Check = Callable[..., Findings]


@pytest.fixture
def check(run: Run, api: Api, folder: Path) -> Check:
    """Run the doctor and read what it prints, in which there is never a secret."""

    def check(*arguments: str, program: tuple[str, ...] = PROGRAM, **env: str) -> Findings:
        environ = {"WXSERVER_CONFIG": str(folder / "config.ini"), **ACCOUNT, **env}
        process = run(*program, "check", *arguments, env=environ)
        out, err = process.communicate()
        made = [path.read_text().strip() for path in folder.glob("state/callback_token")]
        for secret in (CALLBACK_TOKEN, APPSECRET, KEY, api.token, *made):
            assert not secret or secret not in out
        assert err == ""
        findings = Findings(out, process.returncode)
        assert list(findings) == (POINTS if len(findings) > 1 else POINTS[:1])
        assert findings.status == (1 if findings.failed else 0)
        return findings

    return check


def give_away(path: Path) -> None:
    """Make a file another user's."""
    if os.geteuid() != 0:
        skip("only root can give files away")
    os.chown(path, 65534, -1)


def test_all_is_ok_when_all_holds(check: Check, url: str, api: Api, folder: Path) -> None:
    found = check("--url", url)
    assert found.failed == []
    assert found.status == 0
    assert found["config"] == f"{folder}/config.ini, encryption safe, Token from WX_TOKEN"
    assert found["callback"].startswith("echostr came back")
    assert found["token"] == f"{len(api.token)} characters"
    assert found["getcallbackip"].endswith(": 1")
    assert "127.0.0.1 from UNICOM" in found["callback/check"]


def test_no_secret_is_ever_printed_even_when_wechat_quotes_it(
    check: Check, url: str, api: Api, folder: Path
) -> None:
    def quote(path: str, secret: str) -> None:
        api.own[path] = json.dumps({"errcode": 40125, "errmsg": f"{secret} is bad"}).encode()

    assert check("--url", url).failed == []
    quote("getcallbackip", api.token)
    quote("callback/check", api.token)
    found = check("--url", url)
    assert found.failed == ["getcallbackip", "callback/check"]
    assert "*** is bad" in found["callback/check"]
    (folder / "state" / "access_token.json").unlink()
    quote("stable_token", APPSECRET)
    assert "*** is bad" in check("--url", url)["token"]


def test_a_config_that_cannot_be_read_is_all_that_is_told(check: Check, folder: Path) -> None:
    (folder / "config.ini").write_text("[server]\nmax_agee = 1\n")
    found = check()
    assert list(found) == found.failed == ["config"]
    assert "[server] max_agee: unknown key" in found["config"]


def test_an_account_without_appsecret_has_no_token_and_the_rest_is_looked_at(
    check: Check, url: str
) -> None:
    found = check("--url", url, WX_APPSECRET="")
    assert found.failed == ["config", "token", "getcallbackip", "callback/check"]
    assert "set [wechat] appid and appsecret" in found["config"]
    assert found["token"] == "needs config"
    assert found["getcallbackip"] == found["callback/check"] == "needs token"


def test_encryption_without_cryptography_says_what_to_install(check: Check, folder: Path) -> None:
    (folder / "cryptography.py").write_text("raise ModuleNotFoundError('cryptography')")
    found = check(PYTHONPATH=f"{folder}:{ROOT}")
    assert "pip install '.[safe]'" in found["config"]


@pytest.mark.parametrize(
    ("mode", "secret"),
    [
        (0o644, f"[wechat]\nappsecret = {APPSECRET}\n"),
        (0o640, "[central]\nshop = shop0123456789abcdef\n"),
        (0o620, "[shared]\nredis = redis://:p4ss@127.0.0.1\n"),
    ],
)
def test_a_config_with_a_secret_is_its_owners_alone(
    check: Check, folder: Path, mode: int, secret: str
) -> None:
    path = folder / "config.ini"
    path.write_text(path.read_text() + secret)
    path.chmod(mode)
    found = check()
    assert "permissions" in found.failed
    assert found["permissions"].endswith(f": chmod 600 {path}")
    path.chmod(0o600)
    assert "permissions" not in check().failed


def test_a_config_with_a_secret_stays_readable_for_the_server(check: Check, folder: Path) -> None:
    path = folder / "config.ini"
    path.write_text(path.read_text() + f"[wechat]\nappsecret = {APPSECRET}\n")
    give_away(path)
    assert f": chown root {path}; chmod 600 {path}" in check()["permissions"]


def test_nobody_else_may_change_where_the_secrets_are_sent(check: Check, folder: Path) -> None:
    (folder / "config.ini").chmod(0o666)
    found = check()
    assert "permissions" in found.failed
    assert f"chmod 644 {folder}/config.ini" in found["permissions"]


@pytest.mark.parametrize("name", ["callback_token", "access_token.json"])
def test_a_secret_that_is_kept_is_its_owners_alone(check: Check, folder: Path, name: str) -> None:
    check()
    path = folder / "state" / name
    path.touch()
    path.chmod(0o604)
    found = check()
    assert "permissions" in found.failed
    assert found["permissions"].endswith(f": chmod 600 {path}")


def test_the_state_directory_is_made_for_its_owner_alone(check: Check, folder: Path) -> None:
    assert "state directory" not in check().failed
    assert (folder / "state").stat().st_mode & 0o777 == 0o700


def test_the_state_directory_is_open_to_nobody_else(check: Check, folder: Path) -> None:
    (folder / "state").mkdir()
    (folder / "state").chmod(0o770)
    found = check()
    assert found["state directory"].endswith(f": chmod 700 {folder}/state")
    assert found.failed[:1] == ["state directory"]


def test_the_state_directory_is_no_file(check: Check, folder: Path) -> None:
    (folder / "state").touch()
    assert "it must be a folder" in check()["state directory"]


def test_the_state_directory_has_room(check: Check, api: Api) -> None:
    found = check(program=("-c", FULL_DISK))
    assert "state directory" in found.failed
    assert "state: File too large; it must be a folder" in found["state directory"]


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_into_the_folder_of_another_user(
    check: Check, api: Api, folder: Path, there: bool
) -> None:
    place = Path("/usr")  # root's
    if os.geteuid() == 0:
        place = folder / "others"
        place.mkdir()
        os.chown(place, 65534, -1)
    state = place if there else place / "state"
    path = folder / "config.ini"
    path.write_text(f"{path.read_text()}[server]\nstate_dir = {state}\n")
    before = sorted(place.iterdir())
    found = check("--url", f"http://127.0.0.1:{free_port()}/wx", WX_TOKEN="")
    assert found.failed == ["state directory", *POINTS[4:]]
    if there:
        assert "run it as the server's user" in found["state directory"]
    assert found["token"] == "needs state directory"
    assert sorted(place.iterdir()) == before
    assert api.fetches == []


def test_a_file_that_another_user_left_is_told(check: Check, folder: Path) -> None:
    check()
    path = folder / "state" / "access_token.json.lock"
    give_away(path)
    found = check()
    assert found["state directory"].endswith(f"'s: sudo chown root {path}")


class Dated(BaseHTTPRequestHandler):
    """Answers as ``api`` does, with the Date of a clock that is ``ahead`` or has none."""

    api: FakeApi
    ahead: float | None = 0

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        answer, _ = self.api.answer(self.command, self.path, body)
        self.send_response_only(200)
        if self.ahead is not None:
            self.send_header("Date", formatdate(time.time() + self.ahead, usegmt=True))
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_POST(self) -> None:
        self.do_GET()


@pytest.fixture
def dated(api: Api, folder: Path) -> Iterator[Callable[[float | None], None]]:
    """Let the API that config.ini names have another clock."""

    class Handler(Dated):
        pass

    Handler.api = api
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        path = folder / "config.ini"
        path.write_text(path.read_text().replace(api.base, f"http://127.0.0.1:{http.server_port}"))
        yield lambda ahead: setattr(Handler, "ahead", ahead)
        http.shutdown()


@pytest.mark.parametrize(
    ("ahead", "told"),
    [
        (400.0, r"(399|40\d) s behind 127\.0\.0\.1:\d+, so messages are refused \(max_age is 300"),
        (-400.0, r"40\d s ahead of 127\.0\.0\.1:\d+, so messages are refused \(max_age is 300 s"),
        (60.0, r"(59|6\d) s behind 127\.0\.0\.1:\d+; timedatectl set-ntp true$"),
        (None, r"gives no time to compare with; look at timedatectl$"),
    ],
)
def test_a_clock_that_is_wrong_is_told(
    dated: Callable[[float | None], None], url: str, check: Check, ahead: float | None, told: str
) -> None:
    dated(ahead)
    found = check("--url", url)
    assert found.failed == ["clock"]
    assert re.search(told, found["clock"])


def test_a_clock_may_be_some_seconds_off(
    dated: Callable[[float | None], None], url: str, check: Check
) -> None:
    dated(25)
    assert check("--url", url).failed == []


def test_a_clock_may_be_off_by_less_than_max_age(
    dated: Callable[[float | None], None], url: str, check: Check, folder: Path
) -> None:
    path = folder / "config.ini"
    path.write_text(f"{path.read_text()}[server]\nmax_age = 10\n")
    dated(25)
    assert "(max_age is 10 s)" in check("--url", url)["clock"]


def test_no_api_is_told_at_each_point_that_needs_it(check: Check, url: str, folder: Path) -> None:
    (folder / "config.ini").write_text(
        f"[access_token]\napi_base = http://127.0.0.1:{free_port()}\n"
    )
    found = check("--url", url)
    assert found.failed == ["clock", "token", "getcallbackip", "callback/check"]
    assert "gives no time to compare with: the connection was refused" in found["clock"]
    assert "no answer from 127.0.0.1" in found["token"]


def test_a_callback_that_is_not_named_is_not_ok(check: Check) -> None:
    found = check()
    assert found.failed == ["callback"]
    assert found["callback"] == "not checked; add --url https://YOUR.NAME/wx"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://a.example/wx", "must be http://"),
        ("a.example/wx", "must be http://"),
        ("https:///wx", "must be http://"),
        ("http://[::1/wx", "must be http://"),
        ("http://a.example:port/wx", "must be http://"),
        ("http://127.0.0.1:1/wx", "refused"),
        ("http://..example/wx", ""),
    ],
)
def test_a_callback_that_wechat_could_not_call_is_told(check: Check, url: str, told: str) -> None:
    found = check("--url", url)
    assert found.failed == ["callback"]
    assert told in found["callback"]


def test_a_callback_at_another_port_than_wechat_calls_is_told(
    check: Check, run: Run, folder: Path
) -> None:
    arguments = ("-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "-b", "0.0.0.0:{port}")
    server = Server(run, folder, *arguments, "wxserver", **ACCOUNT).ready()
    found = check("--url", f"http://127.0.0.2:{server.port}/wx")  # a name that is not this machine
    assert found.failed == ["callback"]
    assert found["callback"].endswith("but WeChat calls http at port 80 alone")


def test_a_callback_with_another_token_is_told(check: Check, url: str) -> None:
    found = check("--url", url, WX_TOKEN="AnotherToken")
    assert found.failed == ["callback"]
    assert "HTTP status 403" in found["callback"]
    assert "the Token is not the server's" in found["callback"]


def test_the_token_that_the_server_made_is_used(check: Check, run: Run, folder: Path) -> None:
    server = gunicorn(run, folder, WEB_CONCURRENCY="1").ready()
    server.token()
    found = check("--url", f"{server.base}/wx", WX_TOKEN="")
    assert found.failed == []
    assert found["config"].endswith(f"Token from {folder}/state/callback_token")


def test_to_make_a_token_is_left_to_the_server(check: Check, folder: Path) -> None:
    (folder / "state").mkdir(mode=0o700)
    (folder / "state" / "callback_token").touch(mode=0o600)
    found = check("--url", f"http://127.0.0.1:{free_port()}/wx", WX_TOKEN="")
    assert found.failed == ["callback"]
    assert "there is no Token" in found["callback"]
    assert (folder / "state" / "callback_token").read_text() == ""


def test_no_token_is_told_with_what_to_do(check: Check, url: str, api: Api) -> None:
    api.own["stable_token"] = fake_api.error(40164)
    found = check("--url", url)
    assert found.failed == ["token", "getcallbackip", "callback/check"]
    assert "add 127.0.0.1 to the account's IP whitelist" in found["token"]
    assert found["getcallbackip"] == found["callback/check"] == "needs token"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (fake_api.error(48001), "errcode 48001"),
        (b'{"ip_list": []}', "no addresses"),
        (fake_api.GARBAGE, "something else than WeChat's JSON"),
    ],
)
def test_a_getcallbackip_that_fails_is_told(
    check: Check, url: str, api: Api, answer: bytes, told: str
) -> None:
    api.own["getcallbackip"] = answer
    found = check("--url", url)
    assert found.failed == ["getcallbackip"]
    assert told in found["getcallbackip"]


def checked(loss: str, dns: Any = ({"ip": "8.8.8.8", "real_operator": "CAP"},)) -> bytes:
    """Return an answer of callback/check, in which one ping of two has this loss."""
    pings = [
        {"ip": "8.8.8.8", "from_operator": "CAP", "package_loss": "0%", "time": "1.5ms"},
        {"ip": "8.8.4.4", "from_operator": "CAP", "package_loss": loss, "time": ""},
    ]
    return json.dumps({"dns": dns, "ping": pings}).encode()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (checked("100%"), "ping to 8.8.4.4 is lost"),
        (checked("0%", dns=[]), "cannot resolve"),
        (b'{"dns": [{"ip": "8.8.8.8"}], "ping": []}', "no ping"),
        (b"{}", "cannot resolve"),
        (fake_api.error(40201), "developers.weixin.qq.com/platform → 我的业务"),
        (fake_api.error(45009), "errcode 45009"),
    ],
)
def test_what_wechats_own_check_finds_is_told(
    check: Check, url: str, api: Api, answer: bytes, told: str
) -> None:
    api.own["callback/check"] = answer
    found = check("--url", url)
    assert found.failed == ["callback/check"]
    assert told in found["callback/check"]


def test_wechat_is_asked_for_its_whole_check(check: Check, api: Api) -> None:
    assert "callback/check" not in check().failed
    method, target, body = api.calls[-1]
    assert (method, target.partition("?")[0]) == ("POST", "/cgi-bin/callback/check")
    assert json.loads(body) == {"action": "all", "check_operator": "DEFAULT"}


def test_ctrl_c_ends_it_without_a_traceback(run: Run, api: Api, folder: Path) -> None:
    api.delay = 30
    env = {"WXSERVER_CONFIG": str(folder / "config.ini"), **ACCOUNT}
    process = run(*PROGRAM, "check", env=env)
    while "state directory" not in process.stdout.readline():
        pass
    time.sleep(0.5)  # until it waits for the clock
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (out, err, process.returncode) == ("FAIL  clock: interrupted\n", "", 1)
