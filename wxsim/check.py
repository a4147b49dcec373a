"""The doctor for a real account: each thing that it needs, in one line, ok or what to do.

    python -m wxsim check --url https://YOUR.NAME/wx

Sources of the rules: the platform's 接入指南, 获取微信服务器IP地址 and 网络通信检测.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import pwd
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import wechat.api
import wechat.config
import wechat.crypto
from wechat.api import ApiError
from wechat.config import CALLBACK_CONSOLE, Config, ConfigError
from wxsim import client
from wxsim.client import Account, NoAnswer

ROOM = 16384  # bytes: the token's file and its successor
_NO_URL = 40201  # errcode of callback/check
INTERRUPTED = "interrupted"


class Fault(Exception):
    """Something does not hold. One line: what is wrong, and what the owner can do."""


def main(url: str) -> int:
    """Check everything, printing each finding as it comes, and never a secret.

    ``url`` is the callback's public address; without it the callback cannot be checked, which is
    not ok. Return the exit status: 0 when all is ok, else 1.
    """
    path = wechat.config.config_path()
    try:
        config, problem = wechat.config.load(path), ""
    except ConfigError as error:
        config, problem = Config(), str(error)
    points: list[tuple[str, Callable[[], str], tuple[str, ...]]] = [
        ("config", lambda: _config(config, path), ()),
        ("permissions", lambda: _permissions(config, path), ()),
        ("state directory", lambda: _state_directory(config.state_dir), ()),
        ("clock", lambda: _clock(config), ()),
        ("callback", lambda: _callback(config, url), ()),
        ("token", lambda: _token(config), ("config", "state directory")),
        ("getcallbackip", lambda: _getcallbackip(config), ("token",)),
        ("callback/check", lambda: _callback_check(config), ("token",)),
    ]
    failed = {"config.ini"} if problem else set()
    for name, check, needs in points:
        missing = next((need for need in ("config.ini", *needs) if need in failed), "")
        ok, finding = (False, f"needs {missing}") if missing else _outcome(check)
        if name == "config" and problem:
            finding = problem
        if not ok:
            failed.add(name)
        line = "".join(c if c.isprintable() else " " for c in finding)  # strangers wrote some of it
        print(f"{'ok  ' if ok else 'FAIL'}  {name}: {line}", flush=True)
        if finding == INTERRUPTED:
            break
    return 1 if failed else 0


def _outcome(check: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, check()
    except (Fault, ConfigError, ApiError) as error:
        return False, str(error)
    except OSError as error:
        return False, f"{error}; run it as the server's user"
    except KeyboardInterrupt:
        return False, INTERRUPTED


def _config(config: Config, path: Path) -> str:
    """All is installed and set that the account needs."""
    wechat.crypto.from_config(config)
    wechat.api.token_store(config)
    source = str(config.state_dir / "callback_token")
    if config.token:
        source = "WX_TOKEN" if os.environ.get("WX_TOKEN", "").strip() else "config.ini"
    return f"{path}, encryption {config.encryption}, Token from {source}"


def _permissions(config: Config, path: Path) -> str:
    """Nobody else can read a secret, or write the file that says where secrets are sent."""
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    parser.read_string(path.read_text(encoding="utf-8-sig"))
    info, me = path.stat(), os.geteuid()
    rules = wechat.config.settings()
    if any(
        value.strip() and (section == "central" or rules[section][key].is_secret)
        for section in parser.sections()
        for key, value in parser[section].items()
    ):
        if info.st_mode & 0o077:
            own = "" if info.st_uid == me else f"chown {_user(me)} {path}; "
            raise Fault(f"others can get at the secrets in {path}: {own}chmod 600 {path}")
    elif info.st_mode & 0o022:
        raise Fault(f"others can change where secrets are sent: chmod 644 {path}")
    for kept in (config.state_dir / "callback_token", config.state_dir / "access_token.json"):
        with contextlib.suppress(FileNotFoundError):
            if kept.stat().st_mode & 0o077:
                raise Fault(f"others can get at the secret in {kept}: chmod 600 {kept}")
    return "nobody else can get at a secret"


def _state_directory(folder: Path) -> str:
    """The server can keep its files in ``folder``, which is made when it is not there."""
    me = os.geteuid()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    owner = nearest.stat().st_uid
    # Root could write there all the same, and would leave files that the server cannot use.
    if owner != me and (nearest == folder or me == 0):
        raise Fault(
            f"{nearest} is {_user(owner)}'s, and this runs as {_user(me)}; run it as the server's"
            " user: when deployed, deploy/wxrun NAME -m wxsim check"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o022:
            raise Fault(f"others can write to {folder}: chmod 700 {folder}")
        for entry in os.scandir(folder):
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(info.st_mode) and info.st_uid != me:
                own = f"sudo chown {_user(me)} {entry.path}"
                raise Fault(f"{entry.path} is {_user(info.st_uid)}'s: {own}")
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(ROOM))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        why = error.strerror or error
        raise Fault(f"{folder}: {why}; it must be a folder of {_user(me)}'s with room") from None
    return f"{folder} is {_user(me)}'s and has room"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _clock(config: Config) -> str:
    """This machine's clock agrees with the API's."""
    host = urlsplit(config.api_base).netloc
    try:  # without a token: the answer is an errcode, and has a Date
        answer = client.exchange(f"{config.api_base}/cgi-bin/getcallbackip")
    except NoAnswer as error:
        raise Fault(f"{host} gives no time to compare with: {error}") from None
    ahead = client.clock_difference(answer)
    if ahead is None:
        raise Fault(f"{host} gives no time to compare with; look at timedatectl")
    off, most = abs(ahead), min(client.CLOCK_TOLERANCE, config.max_age or client.CLOCK_TOLERANCE)
    if off > most:
        which = "behind" if ahead > 0 else "ahead of"
        refused = f", so messages are refused (max_age is {config.max_age} s)"
        refused = refused if 0 < config.max_age < off else ""
        raise Fault(f"{off:.0f} s {which} {host}{refused}; timedatectl set-ntp true")
    return f"less than {most:.0f} s from {host}"


def _callback(config: Config, url: str) -> str:
    """The console would take ``url`` on 提交."""
    if not url:
        raise Fault(f"not checked; add --url https://YOUR.NAME{config.path}")
    if not client.is_url(url):
        raise Fault("--url must be http://… or https://…, as in the console")
    parts = urlsplit(url)
    usual = 443 if parts.scheme == "https" else 80
    made = config.state_dir / "callback_token"
    # To make one is the server's to do: it is shown, and belongs to whoever makes it.
    if not config.token and not config.redis and not (made.exists() and made.read_bytes().strip()):
        raise Fault("there is no Token; the server makes one at its first start, or set WX_TOKEN")
    if why := client.verify(Account(url, wechat.config.callback_token(config))):
        raise Fault(why)
    if parts.hostname in ("127.0.0.1", "localhost", "::1"):
        return "echostr came back on this machine; WeChat needs a public address"
    if parts.port not in (None, usual):
        raise Fault(f"echostr came back, but WeChat calls {parts.scheme} at port {usual} alone")
    return f"echostr came back from {parts.hostname}"


def _token(config: Config) -> str:
    """There is an access_token, got as the server gets it."""
    return f"{len(wechat.api.token_store(config).get())} characters"


def _getcallbackip(config: Config) -> str:
    """The classic first call works."""
    addresses = wechat.api.from_config(config).call("getcallbackip").get("ip_list")
    if not isinstance(addresses, list) or not addresses:
        raise Fault("WeChat's answer has no addresses; try again later")
    return f"addresses that WeChat calls from: {len(addresses)}"


def _callback_check(config: Config) -> str:
    """WeChat resolves the name in the console's URL, and its ping comes back."""
    asked = {"action": "all", "check_operator": "DEFAULT"}
    try:
        answer = wechat.api.from_config(config).call("callback/check", asked)
    except ApiError as error:
        if error.errcode != _NO_URL:
            raise
        raise Fault(f"errcode {_NO_URL}: the console has no URL yet: {CALLBACK_CONSOLE}") from None
    dns, pings = answer.get("dns"), answer.get("ping")
    if not dns or not isinstance(dns, list):
        raise Fault(f"WeChat cannot resolve the name in the console's URL: {CALLBACK_CONSOLE}")
    if not pings or not isinstance(pings, list) or not all(isinstance(p, dict) for p in pings):
        raise Fault("WeChat resolves the name in the console's URL, but tells of no ping")
    lost = [str(p.get("ip")) for p in pings if p.get("package_loss") != "0%"]
    if lost:
        raise Fault(
            f"WeChat's ping to {', '.join(lost)} is lost: the address must be this server's, and"
            " every firewall, the provider's too, let ping through"
        )
    told = (f"{p.get('ip')} from {p.get('from_operator')} in {p.get('time')}" for p in pings)
    return f"WeChat's ping came back: {', '.join(told)}"
