"""config.ini and the environment: what is taken, and what stops the start."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from conftest import ROOT, Run

import wechat.config
from wechat.config import Config, ConfigError, callback_token, load

ACCOUNT = "[wechat]\nappid = wx1\nappsecret = 0123456789abcdef\n"


def ini(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.ini"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_shipped_file_says_the_defaults() -> None:
    assert load(ROOT / "config.ini", {}) == load_empty(ROOT)


def load_empty(folder: Path) -> Config:
    """What Config's own defaults are, for a file in ``folder``."""
    return Config(state_dir=folder / "state")


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load(ini(tmp_path, ""), {}) == load_empty(tmp_path)


def test_every_key_is_read(tmp_path: Path) -> None:
    path = ini(
        tmp_path,
        """
        [wechat]
        token = abc123
        appid = wxba5fad812f8e6fb9
        appsecret = 0123456789abcdef
        encoding_aes_key = AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
        encryption = compatible
        [server]
        path = /hook/wx
        max_age = 0
        max_body = 65536
        state_dir = /var/lib/elsewhere
        [reply]
        once = off
        late = drop
        late_text = Please wait, 请稍候
        [access_token]
        endpoint = token
        margin = 600
        api_base = https://token.example.com:8443/proxy/
        [central]
        shop = shop0123456789abcdef
        Re_ports.2-b = reports0123456789abc
        [shared]
        redis = rediss://:p4ss@redis.example.com:6380/0
        """.replace("        ", ""),
    )
    assert load(path, {}) == Config(
        token="abc123",
        appid="wxba5fad812f8e6fb9",
        appsecret="0123456789abcdef",
        encoding_aes_key="A" * 43,
        encryption="compatible",
        path="/hook/wx",
        max_age=0,
        max_body=65536,
        state_dir=Path("/var/lib/elsewhere"),
        once=False,
        late="drop",
        late_text="Please wait, 请稍候",
        endpoint="token",
        margin=600,
        api_base="https://token.example.com:8443/proxy",
        central={"shop": "shop0123456789abcdef", "re_ports.2-b": "reports0123456789abc"},
        redis="rediss://:p4ss@redis.example.com:6380/0",
    )


def test_secrets_in_the_environment_win_unless_they_are_empty(tmp_path: Path) -> None:
    path = ini(tmp_path, "[wechat]\ntoken = fromfile\nappid = wxfile\nappsecret = 1\n")
    config = load(path, {"WX_TOKEN": "fromenv", "WX_APPID": "wxenv\r", "WX_APPSECRET": ""})
    assert (config.token, config.appid, config.appsecret) == ("fromenv", "wxenv", "1")


def test_wxserver_config_names_the_file_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    path = ini(tmp_path, "[server]\nstate_dir = here\n")
    assert load(environ={"WXSERVER_CONFIG": str(path)}).state_dir == tmp_path / "here"


def test_a_file_from_notepad_is_read(tmp_path: Path) -> None:
    path = ini(tmp_path, b"\xef\xbb\xbf[wechat]\r\ntoken = abc123\r\n; \xe4\xbd\xa0\r\n")
    assert load(path, {}).token == "abc123"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[wechat]\ntokens = a\n", "[wechat] tokens: unknown key; there are token, appid"),
        ("[wx]\ntoken = a\n", "unknown section [wx]; there are wechat, server, access_token"),
        ("[DEFAULT]\ntoken = a\n", "unknown section [DEFAULT]"),
        ("[wechat]\ntoken = ab\n", "[wechat] token: must be 3 to 32 letters or digits"),
        ("[wechat]\ntoken = a b c\n", "[wechat] token: must be 3 to 32"),
        (f"[wechat]\ntoken = {'a' * 33}\n", "[wechat] token: must be 3 to 32"),
        ("[wechat]\nappid = a b\n", "[wechat] appid: must be letters and digits"),
        ("[wechat]\nappsecret = a%b\n", "[wechat] appsecret: must be letters and digits"),
        (f"[wechat]\nencoding_aes_key = {'A' * 42}\n", "encoding_aes_key: must be the 43 letters"),
        (f"[wechat]\nencoding_aes_key = {'A' * 44}\n", "encoding_aes_key: must be the 43 letters"),
        (f"[wechat]\nencoding_aes_key = {'A' * 42}-\n", "encoding_aes_key: must be the 43 letters"),
        (f"[wechat]\nencoding_aes_key = {'A' * 43}\n", "encoding_aes_key: needs appid too"),
        ("[wechat]\nencryption = aes\n", "encryption: must be plain, compatible or safe"),
        ("[wechat]\nappid = wx1\nencryption = safe\n", "encryption: safe needs encoding_aes_key"),
        ("[wechat]\nencryption = compatible\n", "encryption: compatible needs encoding_aes_key"),
        ("[server]\npath = wx\n", "[server] path: 'wx': must be a path such as /wx"),
        ("[server]\nmax_age = 5m\n", "[server] max_age: '5m': must be a whole number from 0"),
        ("[server]\nmax_age = -1\n", "[server] max_age: '-1': must be a whole number from 0"),
        ("[server]\nmax_body = 0\n", "[server] max_body: '0': must be a whole number from 1024"),
        ("[server]\npath = /微信\n", "[server] path: '/微信': must be a path such as /wx"),
        ("[server]\nstate_dir = a\n  path = /b\n", "state_dir: 'a\\npath = /b': must be a folder"),
        ("[server]\nstate_dir = ~/a\n", "[server] state_dir: '~/a': must be a folder, without ~"),
        ("[server]\nstate_dir = a ; b\n", "[server] state_dir: 'a ; b': must be a folder"),
        ("[server]\nstate_dir = a\0b\n", "[server] state_dir: 'a\\x00b': must be a folder"),
        ("[access_token]\napi_base = https://[::1\n", "must be https://HOST"),
        ("[server]\nstate_dir =\n", "[server] state_dir: '': must be a folder"),
        ("[access_token]\nendpoint = x\n", "endpoint: 'x': must be stable_token or token"),
        ("[reply]\nonce = yes\n", "[reply] once: 'yes': must be on or off"),
        ("[reply]\nlate = never\n", "[reply] late: 'never': must be pickup, push or drop"),
        ("[reply]\nlate_text =\n", "[reply] late_text: '': must be one line of 1 to 500"),
        ("[reply]\nlate = push\n", "[reply] late: push needs [wechat] appid and appsecret"),
        ("[access_token]\nmargin = 8000\n", "margin: '8000': must be a whole number from 0 to"),
        ("[access_token]\napi_base = http://a.example\n", "api_base: 'http://a.example': must be"),
        ("[access_token]\napi_base = http://localhost.example\n", "must be https://HOST"),
        (f"{ACCOUNT}[central]\na = {'b' * 15}\n", "[central] a: must be a secret of 16 to 128"),
        (f"{ACCOUNT}[central]\na = {'b' * 129}\n", "[central] a: must be a secret of 16"),
        (f"{ACCOUNT}[central]\na = {'b' * 16}&\n", "[central] a: must be a secret of 16"),
        (f"{ACCOUNT}[central]\na =\n", "[central] a: must be a secret of 16"),
        (f"{ACCOUNT}[central]\na b = {'c' * 16}\n", "[central] a b: a client's name has letters,"),
        (f"{ACCOUNT}[central]\n店 = {'c' * 16}\n", "[central] 店: a client's name has letters"),
        (f"{ACCOUNT}[central]\na = {'b' * 16}\nA = {'c' * 16}\n", "[central] a is there twice"),
        (f"[central]\na = {'b' * 16}\n", "[central] needs [wechat] appid and appsecret"),
        (
            f"{ACCOUNT}[central]\na = {'b' * 16}\nc = {'b' * 16}\n",
            "[central] c: must be another secret than a's",
        ),
        (
            f"{ACCOUNT}[central]\na = 0123456789abcdef\n",
            "[central] a: must be another secret than the AppSecret",
        ),
        (
            f"{ACCOUNT}[server]\npath = /cgi-bin/token\n[central]\na = {'b' * 16}\n",
            "[server] path: must be another than [central]'s /cgi-bin/token",
        ),
        ("[shared]\nredis = redis://a\n", "[shared] redis: needs [wechat] appid, or WX_APPID"),
        (f"{ACCOUNT}[shared]\nredis = a:6379\n", "[shared] redis: must be redis://…, rediss://…"),
        (f"{ACCOUNT}[shared]\nsecond = a\n", "[shared] second: unknown key; there are redis"),
        ("[wechat]\ntoken = abc\ntoken = abd\n", "[wechat] token is there twice"),
        ("[wechat]\n[wechat]\n", "[wechat] is there twice"),
        ("token = abc\n", "line 1 stands before any [section]"),
        ("[wechat]\nabc\n", "line 2 is neither [section] nor key = value"),
        ("[server]\npath = /你\n".encode("gbk"), "not UTF-8"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_where_and_what_is_allowed(
    tmp_path: Path, text: str | bytes, error: str
) -> None:
    path = ini(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(error)) as caught:
        load(path, {})
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "appsecret = s3cr!t",
        "s3cr!t",
        "[wechat\ns3cr!t",
        "[central]\nshop = s3cr!t",
        "[shared]\nredis = redis:/s3cr!t",
        "[central]\ns3cr!ts3cr!ts3cr!t = shop",
    ],
)
def test_no_error_shows_a_secret(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(ini(tmp_path, f"[wechat]\n{line}\n"), {})
    assert "s3cr!t" not in str(caught.value)
    with pytest.raises(ConfigError, match="environment: WX_APPSECRET") as caught:
        load(ini(tmp_path, ""), {"WX_APPSECRET": "s3cr!t"})
    assert "s3cr!t" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (f"{'5' * 16} = shop", "must be a secret of 16 to 128 letters and digits: NAME = SECRET"),
        (f"{'5' * 65} = shop", "a client's name has letters, digits, _ . or -"),
        (f"{'5' * 16} = shop\n{'5' * 16} = reports", "is there twice"),
    ],
)
def test_a_secret_in_the_place_of_its_clients_name_is_not_shown(
    tmp_path: Path, lines: str, error: str
) -> None:
    path = ini(tmp_path, f"{ACCOUNT}[central]\n{lines}\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert re.fullmatch(rf"{path}: \[central\] NAME:? {error}", str(caught.value))


def test_the_environments_redis_wins_and_no_error_shows_it(tmp_path: Path) -> None:
    path = ini(tmp_path, "[wechat]\nappid = wx1\n[shared]\nredis = redis://file\n")
    assert load(path, {}).redis == "redis://file"
    assert load(path, {"WX_REDIS": "unix:///run/redis.sock?db=0"}).redis.startswith("unix://")
    with pytest.raises(ConfigError, match="environment: WX_REDIS: must be redis://") as caught:
        load(path, {"WX_REDIS": "http://:s3cr!t@a"})
    assert "s3cr!t" not in str(caught.value)


def test_a_path_of_central_is_free_while_nobody_is_named(tmp_path: Path) -> None:
    path = ini(tmp_path, "[server]\npath = /cgi-bin/token\n[central]\n")
    assert load(path, {}).path == "/cgi-bin/token"


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.ini: No such file"):
        load(tmp_path / "nothing.ini", {})


def test_a_key_means_safe_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    path = ini(tmp_path, "[wechat]\nappid = wx1\n")
    assert load(path, {}).encryption == "plain"
    environ = {"WX_ENCODING_AES_KEY": "A" * 43}
    assert load(path, environ).encryption == "safe"
    for encryption in ("plain", "compatible", "safe"):
        path = ini(tmp_path, f"[wechat]\nappid = wx1\nencryption = {encryption}\n")
        assert load(path, environ).encryption == encryption


def test_a_config_does_not_print_its_secrets() -> None:
    key = "k" * 43
    config = Config(
        token="tttttt",
        appid="wxshown",
        appsecret="ssssss",
        encoding_aes_key=key,
        central={"shop": "c" * 16},
        redis="redis://:rrrrrr@a",
    )
    shown = repr(config)
    assert "wxshown" in shown
    assert "tttttt" not in shown
    assert "ssssss" not in shown
    assert key not in shown
    assert "cccccc" not in shown
    assert "rrrrrr" not in shown


def test_config_ini_explains_every_key_above_its_line() -> None:
    lines = (ROOT / "config.ini").read_text().splitlines()
    for section, keys in wechat.config.settings().items():
        assert f"[{section}]" in lines
        for key in keys:
            (number,) = [n for n, line in enumerate(lines) if re.match(f"(; )?{key} =", line)]
            assert lines[number - 1].startswith("; ")


def test_config_ini_names_every_variable_of_the_environment() -> None:
    text = (ROOT / "config.ini").read_text()
    for keys in wechat.config.settings().values():
        for setting in keys.values():
            assert setting.environment in text


def test_a_configured_token_is_used_and_nothing_is_written(tmp_path: Path) -> None:
    config = Config(token="abc123", state_dir=tmp_path / "state")
    assert callback_token(config) == "abc123"
    assert not config.state_dir.exists()


def test_a_made_token_is_kept_private_and_shown_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(state_dir=tmp_path / "new" / "state")
    token = callback_token(config)
    assert re.fullmatch("[0-9a-f]{32}", token)
    assert caplog.text.count(token) == 1
    assert "Token" in caplog.text
    assert callback_token(config) == token
    assert caplog.text.count(token) == 1
    path = config.state_dir / "callback_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(config.state_dir.stat().st_mode) == 0o700


def test_processes_that_start_together_make_one_token(tmp_path: Path, run: Run) -> None:
    script = (
        "import sys, wechat.config, pathlib; sys.stdin.read(1);"
        "print(wechat.config.callback_token(wechat.config.Config(state_dir=pathlib.Path(sys.argv[1]))))"
    )
    processes = [run("-c", script, str(tmp_path / "state")) for _ in range(8)]
    outputs = [process.communicate("x") for process in processes]
    assert len({token for token, _ in outputs}) == 1
    assert sum("random one was made" in log for _, log in outputs) == 1


def test_a_token_left_empty_by_a_crash_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "callback_token").touch()
    assert re.fullmatch("[0-9a-f]{32}", callback_token(Config(state_dir=tmp_path)))


def test_a_token_file_of_something_else_is_an_error_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "callback_token").write_text("my token!\n")
    with pytest.raises(ConfigError, match=r"\[server\] state_dir: .*delete it"):
        callback_token(Config(state_dir=tmp_path))
    assert (tmp_path / "callback_token").read_text() == "my token!\n"


def test_a_place_that_cannot_be_written_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"\[server\] state_dir: .*callback_token"):
        callback_token(Config(state_dir=tmp_path / "file"))
    os.symlink(tmp_path / "file", tmp_path / "callback_token")
    with pytest.raises(ConfigError, match=r"\[server\] state_dir"):
        callback_token(Config(state_dir=tmp_path))


def test_the_first_of_systemds_runtime_folders_is_used(tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text("")
    assert load(tmp_path / "config.ini", {}).runtime_dir is None
    environ = {"RUNTIME_DIRECTORY": "/run/wxserver:/run/other"}
    assert load(tmp_path / "config.ini", environ).runtime_dir == Path("/run/wxserver")


@pytest.mark.parametrize("umask", [0, 0o022, 0o377])
def test_state_dir_is_its_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    config = Config(state_dir=tmp_path / "srv" / "state")
    config.state_dir.parent.mkdir()
    before = os.umask(umask)
    try:
        wechat.config.make_state_dir(config)
    finally:
        os.umask(before)
    assert config.state_dir.stat().st_mode & 0o777 == 0o700
