"""Configuration: config.ini and the environment, read into one frozen Config."""

from __future__ import annotations

import configparser
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent.parent  # where wxserver.py is
STATE_DIR = HERE / "state"
# Where wechat/central.py answers; api.weixin.qq.com has the same paths.
CENTRAL_PATHS = ("/cgi-bin/stable_token", "/cgi-bin/token")
# In WeChat's console, since December 2025: where an account has its AppSecret and IP whitelist,
# and where the URL and Token of its callback are entered.
_CONSOLE = "developers.weixin.qq.com/platform → 我的业务 → 公众号/服务号 → 基础信息"
KEYS_CONSOLE = f"{_CONSOLE} → 开发密钥"
CALLBACK_CONSOLE = f"{_CONSOLE} → 域名与消息推送配置 (before: 设置与开发 → 基本配置 → 服务器配置)"
log = logging.getLogger("wxserver")


class ConfigError(Exception):
    """The configuration is wrong. One line: the file, the section and key, and what is allowed."""


def _matching(pattern: str, allowed: str) -> Callable[[str], str]:
    def convert(value: str) -> str:
        if not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(allowed)
        return value

    return convert


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def convert(value: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", value) or not least <= int(value) <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return int(value)

    return convert


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError("on or off")
    return value == "on"


_TOKEN_PATTERN = "[0-9A-Za-z]{3,32}"  # the rule of WeChat's console
_TOKEN = _matching(f"({_TOKEN_PATTERN})?", "3 to 32 letters or digits, or empty")
_APPID = _matching("[0-9A-Za-z_-]*", "letters and digits, as in the console")
_APPSECRET = _matching("[0-9A-Za-z]*", "letters and digits, as in the console")
_AES_KEY = _matching(
    "([0-9A-Za-z+/]{43})?", "the 43 letters or digits of the console's EncodingAESKey, or empty"
)
_ENCRYPTION = _matching("(plain|compatible|safe)?", "plain, compatible or safe, or empty")
_PATH = _matching(r"/[\w./~-]*", "a path such as /wx, without spaces, ? or #")
_FOLDER = _matching(
    r"(?![~\"'])(?!.*\s[;#])[^\0-\x1f]+",
    "a folder, without ~ or quotes; a comment or another key has a line of its own",
)
_ENDPOINT = _matching("stable_token|token", "stable_token or token")
# The AppSecret is sent there, so plain http is allowed for this machine only.
_API_BASE = _matching(
    r"https://[\w.-]+(:[0-9]{1,5})?(/[\w.-]+)*/?"
    r"|http://(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?/?",
    "https://HOST, or http:// on 127.0.0.1 or localhost",
)
_LATE = _matching("pickup|push|drop", "pickup, push or drop")
_LINE = _matching(r"[^\0-\x1f]{1,500}", "one line of 1 to 500 characters")
_REDIS = _matching("((rediss?|unix)://[!-~]+)?", "redis://…, rediss://… or unix://…, or empty")


class Setting(NamedTuple):
    """The rules for one key of config.ini."""

    section: str
    convert: Callable[
        [str], Any
    ]  # returns the value of a text; its ValueError says what is allowed
    environment: str = ""  # the variable that wins over the file, if there is one
    is_secret: bool = False  # no error and no repr shows the value


def _setting(
    default: Any,
    section: str,
    convert: Callable[[str], Any],
    environment: str = "",
    secret: bool = False,
) -> Any:
    setting = Setting(section, convert, environment, secret)
    return field(default=default, repr=not secret, metadata={"setting": setting})


@dataclass(frozen=True)
class Config:
    """All settings. This is the one table of the keys of config.ini, which explains them.

    Each key has its default and a ``Setting`` here.
    """

    token: str = _setting("", "wechat", _TOKEN, "WX_TOKEN", secret=True)
    appid: str = _setting("", "wechat", _APPID, "WX_APPID")
    appsecret: str = _setting("", "wechat", _APPSECRET, "WX_APPSECRET", secret=True)
    encoding_aes_key: str = _setting("", "wechat", _AES_KEY, "WX_ENCODING_AES_KEY", secret=True)
    encryption: str = _setting("", "wechat", _ENCRYPTION)  # by default safe with a key, else plain
    path: str = _setting("/wx", "server", _PATH)
    max_age: int = _setting(300, "server", _whole_number(0, 86400))  # seconds
    max_body: int = _setting(262144, "server", _whole_number(1024, 64 * 1048576))  # bytes
    state_dir: Path = _setting(STATE_DIR, "server", _FOLDER)  # noqa: RUF009 (it makes a field)
    endpoint: str = _setting("stable_token", "access_token", _ENDPOINT)
    margin: int = _setting(240, "access_token", _whole_number(0, 7200))  # seconds
    api_base: str = _setting("https://api.weixin.qq.com", "access_token", _API_BASE)
    once: bool = _setting(True, "reply", _switch)
    late: str = _setting("pickup", "reply", _LATE)
    late_text: str = _setting("还在处理，请稍后发送任意消息查看结果。", "reply", _LINE)
    redis: str = _setting("", "shared", _REDIS, "WX_REDIS", secret=True)  # may hold a password
    # Each key of [central] is a client's name, its value is the client's secret.
    central: Mapping[str, str] = field(default_factory=dict, repr=False)
    runtime_dir: Path | None = None  # systemd's RuntimeDirectory; no key of config.ini

    def __post_init__(self) -> None:
        """Set the default of ``encryption``, and check settings that depend on one another.

        Raises:
            ConfigError: a setting needs another one that is empty; two secrets are the same, so
                that clients of ``central`` cannot be told apart; or ``path`` is central's.
        """
        encryption = self.encryption or ("safe" if self.encoding_aes_key else "plain")
        object.__setattr__(self, "encryption", encryption)
        if self.encoding_aes_key and not self.appid:
            raise ConfigError("[wechat] encoding_aes_key: needs appid too, or WX_APPID")
        if encryption != "plain" and not self.encoding_aes_key:
            raise ConfigError(
                f"[wechat] encryption: {encryption} needs encoding_aes_key, or WX_ENCODING_AES_KEY"
            )
        if self.late == "push" and not (self.appid and self.appsecret):
            raise ConfigError("[reply] late: push needs [wechat] appid and appsecret")
        if self.redis and not self.appid:
            raise ConfigError("[shared] redis: needs [wechat] appid, or WX_APPID")
        if self.central:
            self._check_central()

    def _check_central(self) -> None:
        if not (self.appid and self.appsecret):
            raise ConfigError("[central] needs [wechat] appid and appsecret")
        owner_of = {self.appsecret: "the AppSecret"}
        for name, secret in self.central.items():
            if other := owner_of.get(secret):
                raise ConfigError(f"[central] {name}: must be another secret than {other}")
            owner_of[secret] = f"{name}'s"
        if self.path in CENTRAL_PATHS:
            raise ConfigError(f"[server] path: must be another than [central]'s {self.path}")


# A client's SDK sends the secret as its AppSecret, in a URL, and may not escape it.
_CLIENT = Setting(
    "central",
    _matching("[0-9A-Za-z]{16,128}", "a secret of 16 to 128 letters and digits: NAME = SECRET"),
    is_secret=True,
)
_CLIENT_NAME = r"[\w.-]{1,64}"


def settings() -> dict[str, dict[str, Setting]]:
    """Return the ``Setting`` of every key, by section and key; NAME is any key of [central]."""
    table: dict[str, dict[str, Setting]] = {}
    for each in fields(Config):
        if setting := each.metadata.get("setting"):
            table.setdefault(setting.section, {})[each.name] = setting
    return {**table, "central": {"NAME": _CLIENT}}


def load(path: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read the configuration.

    Args:
        path: the file; by default ``config_path(environ)``. Relative paths in it are relative to
            it.
        environ: may have systemd's RUNTIME_DIRECTORY, and WX_TOKEN, WX_APPID, WX_APPSECRET,
            WX_ENCODING_AES_KEY and WX_REDIS, which win over the file.

    Raises:
        ConfigError: the file cannot be read, or has an unknown section or key or a wrong value.
    """
    path = Path(path).absolute() if path else config_path(environ)
    table = settings()
    values: dict[str, Any] = {"central": {}}
    for section, entries in read(path).items():
        if section not in table:
            raise ConfigError(f"{path}: unknown section [{section}]; there are {', '.join(table)}")
        for key, text in entries.items():
            where = f"{path}: {_where(section, key)}"
            if section == "central":
                if not re.fullmatch(_CLIENT_NAME, key, re.ASCII):
                    raise ConfigError(f"{where}: a client's name has letters, digits, _ . or -")
                values["central"][key] = _convert(_CLIENT, text, where)
            elif key in table[section]:
                values[key] = _convert(table[section][key], text, where)
            else:
                known = ", ".join(table[section])
                raise ConfigError(f"{where}: unknown key; there are {known}")
    for keys in table.values():
        for key, setting in keys.items():
            if text := environ.get(setting.environment, "").strip():
                values[key] = _convert(setting, text, f"environment: {setting.environment}")
    values["state_dir"] = path.parent / values.get("state_dir", "state")
    if runtime := environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]:
        values["runtime_dir"] = Path(runtime)
    values["api_base"] = values.get("api_base", Config.api_base).rstrip("/")
    try:
        return Config(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def config_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the file that WXSERVER_CONFIG names, else config.ini beside wxserver.py."""
    return Path(environ.get("WXSERVER_CONFIG") or HERE / "config.ini").absolute()


def read(path: Path) -> dict[str, dict[str, str]]:
    """Return the texts of the file, by section and key.

    Raises:
        ConfigError: the file cannot be read, or is not in the form of config.ini.
    """
    # utf-8-sig skips the BOM that Notepad writes; [DEFAULT] and % have no special meaning here.
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8; save it as UTF-8") from None
    except configparser.DuplicateSectionError as error:
        raise ConfigError(f"{path}: [{error.section}] is there twice") from None
    except configparser.DuplicateOptionError as error:
        raise ConfigError(f"{path}: {_where(error.section, error.option)} is there twice") from None
    # The messages of these two errors quote the line, which may hold a secret.
    except configparser.MissingSectionHeaderError as error:
        line = error.lineno
        raise ConfigError(f"{path}: line {line} stands before any [section]") from None
    except configparser.ParsingError as error:
        line = error.errors[0][0]
        raise ConfigError(f"{path}: line {line} is neither [section] nor key = value") from None
    return {name: dict(parser[name]) for name in parser.sections()}


def _where(section: str, key: str) -> str:
    # A key as long as a secret may be one, in a line SECRET = NAME.
    return f"[{section}] {'NAME' if section == 'central' and len(key) >= 16 else key}"


def _convert(setting: Setting, text: str, where: str) -> Any:
    try:
        return setting.convert(text)
    except ValueError as error:
        # A secret may stand under a wrong key, so a section that has secrets shows no value.
        in_section = settings()[setting.section].values()
        shown = "" if any(each.is_secret for each in in_section) else f"{text!r}: "
        raise ConfigError(f"{where}: {shown}must be {error}") from None


def make_state_dir(config: Config) -> None:
    """Make ``state_dir`` with mode 0700, unless it exists.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        config.state_dir.parent.mkdir(parents=True, exist_ok=True)
        config.state_dir.mkdir(mode=0o700)
        config.state_dir.chmod(0o700)  # mkdir() takes the umask off the mode
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(
            f"[server] state_dir: {config.state_dir}: {error.strerror or error}"
        ) from None


def callback_token(config: Config) -> str:
    """Return the callback Token: the configured one, else a random one.

    The first process that calls this makes the random one, saves it in
    ``state_dir/callback_token`` (0600) for all other processes, and logs how to use it.

    Raises:
        ConfigError: the file cannot be written, or holds something else; or ``redis`` is set, so
            that several machines would each make a Token of their own.
    """
    if config.token:
        return config.token
    if config.redis:
        raise ConfigError("[wechat] token: with [shared] redis set it, the same on every machine")
    make_state_dir(config)
    try:
        import fcntl
    except ModuleNotFoundError:
        raise ConfigError(
            "[wechat] token: to make one needs Linux or macOS; on Windows use WSL, or set it"
        ) from None
    path = config.state_dir / "callback_token"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "r+", encoding="ascii", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            token = file.read().strip()
            if not token:
                token = secrets.token_hex(16)
                file.write(token + "\n")
                file.flush()
                os.fsync(fd)
                log.warning(
                    "No [wechat] token is set, so a random one was made and kept in %s. In WeChat's"
                    " console (%s) enter the public address of this server with the path %s as URL,"
                    " and as Token: %s",
                    path,
                    CALLBACK_CONSOLE,
                    config.path,
                    token,
                )
    except OSError as error:
        raise ConfigError(f"[server] state_dir: {path}: {error.strerror or error}") from None
    if not re.fullmatch(_TOKEN_PATTERN, token):
        what = "must hold a Token of 3 to 32 letters or digits; delete it, and another is made"
        raise ConfigError(f"[server] state_dir: {path} {what}")
    return token
