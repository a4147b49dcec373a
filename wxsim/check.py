"""The doctor for a real account: each thing that it needs, in one line, ok or what to do.

    python -m wxsim check --url https://YOUR.NAME/wx

Sources of the rules: the platform's 接入指南, 获取微信服务器IP地址 and 网络通信检测.
"""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
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
CLOCK_TOLERANCE = 30.0  # seconds that this machine's clock may be off
_NO_URL = 40201  # errcode of callback/check


class Fault(Exception):
    """Something does not hold. One line: what is wrong, and what the owner can do."""


def main(url: str) -> bool:
    """Check everything, print each finding as it comes, and tell whether all is ok.

    ``url`` is the callback's public address. Without it the callback cannot be checked, which is
    not ok. No secret is printed.
    """
    path = wechat.config.config_path()
    try:
        config = wechat.config.load(path)
    except ConfigError as error:
        _print("config", str(error), ok=False)
        return False
    checks: list[tuple[str, Callable[[], str], tuple[str, ...]]] = [
        ("config", lambda: _config(config, path), ()),
        ("permissions", lambda: _permissions(config, path), ()),
        ("state directory", lambda: _state_directory(config.state_dir), ()),
        ("clock", lambda: _clock(config), ()),
        ("callback", lambda: _callback(config, url), ()),
        ("token", lambda: _token(config), ("config", "state directory")),
        ("getcallbackip", lambda: _getcallbackip(config), ("token",)),
        ("callback/check", lambda: _callback_check(config), ("token",)),
    ]
    failed: list[str] = []
    for name, check, needs in checks:
        missing = [need for need in needs if need in failed]
        try:
            ok, finding = (False, f"needs {missing[0]}") if missing else (True, check())
        except (Fault, ConfigError, ApiError, NoAnswer) as error:
            ok, finding = False, str(error)
        except OSError as error:
            ok, finding = False, f"{error}; run it as the server's user"
        except KeyboardInterrupt:
            _print(name, "interrupted", ok=False)
            return False
        _print(name, finding, ok)
        if not ok:
            failed.append(name)
    return not failed


def _print(name: str, finding: str, ok: bool) -> None:
    line = "".join(c if c.isprintable() else " " for c in finding)  # strangers wrote some of it
    print(f"{'ok  ' if ok else 'FAIL'}  {name}: {line}", flush=True)


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
    info, me = path.stat(), os.geteuid()
    table = wechat.config.settings()
    has_secret = any(
        text and (section == "central" or table[section][key].is_secret)
        for section, entries in wechat.config.read(path).items()
        for key, text in entries.items()
    )
    if has_secret and info.st_mode & 0o077:
        own = "" if info.st_uid == me else f"chown {_user(me)} {path}; "
        raise Fault(f"others can get at the secrets in {path}: {own}chmod 600 {path}")
    if info.st_mode & 0o022:
        raise Fault(f"others can change where secrets are sent: chmod 644 {path}")
    for name in ("callback_token", "access_token.json"):
        file = config.state_dir / name
        if file.exists() and file.stat().st_mode & 0o077:
            raise Fault(f"others can get at the secret in {file}: chmod 600 {file}")
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
    import pwd  # which Windows has not, where token_store says so

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
    try:
        ahead = parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()
    except (TypeError, ValueError):
        raise Fault(f"{host} gives no time to compare with; look at timedatectl") from None
    limit = min(CLOCK_TOLERANCE, config.max_age or CLOCK_TOLERANCE)
    if abs(ahead) > limit:
        off = f"{abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead of'} {host}"
        if 0 < config.max_age < abs(ahead):
            off += f", so messages are refused (max_age is {config.max_age} s)"
        raise Fault(f"{off}; timedatectl set-ntp true")
    return f"less than {limit:.0f} s from {host}"


def _callback(config: Config, url: str) -> str:
    """The console would take ``url`` on 提交."""
    if not url:
        raise Fault(f"not checked; add --url https://YOUR.NAME{config.path}")
    if not client.is_url(url):
        raise Fault("--url must be http://… or https://…, as in the console")
    file = config.state_dir / "callback_token"
    # Only the server makes one: it logs the Token, and the file must belong to its user.
    if not config.token and not config.redis and not (file.exists() and file.read_bytes().strip()):
        raise Fault("there is no Token; the server makes one at its first start, or set WX_TOKEN")
    client.verify(Account(url, wechat.config.callback_token(config)))
    parts = urlsplit(url)
    if parts.hostname in ("127.0.0.1", "localhost", "::1"):
        return "echostr came back on this machine; WeChat needs a public address"
    port = 443 if parts.scheme == "https" else 80
    if parts.port not in (None, port):
        raise Fault(f"echostr came back, but WeChat calls {parts.scheme} at port {port} alone")
    return f"echostr came back from {parts.hostname}"


def _token(config: Config) -> str:
    """There is an access_token, got as the server gets it."""
    return f"{len(wechat.api.token_store(config).get())} characters"


def _getcallbackip(config: Config) -> str:
    """The classic first call works."""
    addresses = wechat.api.from_config(config).call("getcallbackip").get("ip_list")
    if not addresses:
        raise Fault("WeChat's answer has no addresses; try again later")
    return f"addresses that WeChat calls from: {len(addresses)}"


def _callback_check(config: Config) -> str:
    """WeChat resolves the name in the console's URL, and its ping comes back."""
    body = {"action": "all", "check_operator": "DEFAULT"}
    try:
        answer = wechat.api.from_config(config).call("callback/check", body)
    except ApiError as error:
        if error.errcode != _NO_URL:
            raise
        raise Fault(f"errcode {_NO_URL}: the console has no URL yet: {CALLBACK_CONSOLE}") from None
    if not answer.get("dns"):
        raise Fault(f"WeChat cannot resolve the name in the console's URL: {CALLBACK_CONSOLE}")
    pings = answer.get("ping")
    if not pings:
        raise Fault("WeChat resolves the name in the console's URL, but tells of no ping")
    lost = [ping["ip"] for ping in pings if ping["package_loss"] != "0%"]
    if lost:
        raise Fault(
            f"WeChat's ping to {', '.join(lost)} is lost: the address must be this server's, and"
            " every firewall, the provider's too, let ping through"
        )
    came = [f"{ping['ip']} from {ping['from_operator']} in {ping['time']}" for ping in pings]
    return f"WeChat's ping came back: {', '.join(came)}"
