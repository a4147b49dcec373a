"""Calling WeChat's API with the account's access_token.

    api = wechat.api.from_config(wechat.config.load())
    api.call("getcallbackip")
    api.call("message/custom/typing", {"touser": openid, "command": "Typing"})
    media_id = api.upload("media/upload?type=image", "photo.jpg")["media_id"]
    api.download(f"media/get?media_id={media_id}", "copy.jpg")

``python -m wechat.api getcallbackip`` does the same in a shell. Sources of the rules: the
platform's 获取 Access token, 获取稳定版接口调用凭据, 新增临时素材, 获取临时素材 and 全局返回码.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from token_store import ApiError as ApiError
from token_store import FilePlace, Place, TokenError, TokenStore
from wechat.config import KEYS_CONSOLE
from wechat.exchange import Answer, Progress, exchange, one_line, silent
from wechat.media import File, StrPath, open_form, save

if TYPE_CHECKING:
    from wechat.config import Config

TIMEOUT = 5.0  # seconds for a whole exchange with WeChat
FILE_TIMEOUT = 300.0  # seconds for one with a file: 10 MB on a line of 0.3 Mbit/s
LARGEST_DOWNLOAD = 32 * 1048576  # bytes; the platform names none
TOKEN_REFUSED = frozenset({40001, 40014, 42001})  # the token is not the latest, invalid, expired

ADVICE = {
    -1: "WeChat is busy; try again later",
    40001: "check [wechat] appsecret; or something else fetches tokens for this account",
    40002: "the grant_type is wrong",
    40003: "no follower of this account has this OpenID",
    40007: "the MediaId is wrong, of another account, or of a file sent over three days ago",
    40013: "check [wechat] appid",
    40014: "the access_token is invalid",
    40125: "check [wechat] appsecret, or reset it in the console",
    40164: (
        f"add {{ip}} to the account's IP whitelist: {KEYS_CONSOLE} → IP白名单"
        " (before: 设置与开发 → 基本配置); a change takes some minutes"
    ),
    40243: "the AppSecret is frozen; unfreeze it in the console",
    41002: "the AppID is missing",
    41004: "the AppSecret is missing",
    42001: "the access_token has expired",
    43002: "this call needs a body to POST",
    45002: "the text is too long",
    45009: "the day's quota is used up; wait for tomorrow, or call clear_quota",
    45011: "too many calls; slow down",
    45015: "the follower last wrote over 48 hours ago, or has left; wait for a message of theirs",
    45047: "five 客服消息 may follow a message, three a menu click, a scan or a subscription",
    48001: "the account has no right to this call; it needs verification (认证)",
    50004: "the account is banned or logged out",
    89503: "the administrator has to confirm this IP on the phone",
    89506: "the administrator refused this IP; it has to be confirmed on the phone",
    89507: "the administrator blocked this IP; it has to be confirmed on the phone",
}
_T = TypeVar("_T")
log = logging.getLogger("wechat.api")


class Api:
    """Calls WeChat's API as one account.

    Args:
        store: where the access_token comes from.
        api_base: the API's address, without a slash at the end.
    """

    def __init__(self, store: TokenStore, api_base: str = "https://api.weixin.qq.com") -> None:
        self._store, self._api_base = store, api_base

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET ``path``, or POST ``body`` to it as JSON, and return WeChat's answer.

        When WeChat says that the token is no good, another one is got and the call is made again,
        once.

        Args:
            path: after ``/cgi-bin/``, or whole when it begins with a slash; it may have a query.
            body: None for GET.

        Raises:
            ApiError: WeChat answered with an errcode, or not at all; TokenError is one of them.
        """
        return self._with_token(lambda token: request_json(self._url(path, token), body, token))

    def upload(
        self, path: str, file: File, filename: str | None = None, progress: Progress = silent
    ) -> dict[str, Any]:
        """POST a file to ``path``, and return WeChat's answer: ``type``, ``media_id`` and so on.

        What ``media/upload?type=image`` (or voice, video, thumb) brings is kept for three days. The
        answer for a thumb has ``thumb_media_id`` in place of ``media_id``.

        Args:
            path: as for ``call``.
            file: a path, bytes, or a file open in binary mode, which is sent from where it stands.
            filename: what WeChat is told; bytes need one. Its ending has to be the right one.
            progress: called in another thread with the bytes sent so far, and with all.

        Raises:
            ApiError: as for ``call``.
            ValueError: no file, an empty one, or one over ``media.LARGEST_UPLOAD``.
            OSError: the file cannot be opened.
        """
        with open_form(file, filename) as form:

            def ask(token: str) -> dict[str, Any]:
                url = self._url(path, token)
                return _parse(exchange(url, form, token, FILE_TIMEOUT, progress=progress), token)

            return self._with_token(ask)

    def download(
        self,
        path: str,
        to: StrPath | None = None,
        body: dict[str, Any] | None = None,
        progress: Progress = silent,
    ) -> bytes | dict[str, Any]:
        """GET a file, or POST ``body`` for one. Return its bytes, or the JSON sent in its place.

        Such JSON is no error: for a video, ``media/get`` answers ``{"video_url": "http://…"}``.

        Args:
            path: as for ``call``: ``media/get?media_id=…``.
            to: a path to write the file to as well, whole or not at all. JSON is not written.
            body: None for GET.
            progress: called in another thread with the bytes that came, and with all (0: unknown).

        Raises:
            ApiError: as for ``call``; or the file is over ``LARGEST_DOWNLOAD``, or broke off.
            ValueError: ``to`` is a folder, a device or the like.
            OSError: ``to`` cannot be written.
        """

        def ask(token: str) -> bytes | dict[str, Any]:
            url, data = self._url(path, token), _to_json(body)
            answer = exchange(url, data, token, FILE_TIMEOUT, LARGEST_DOWNLOAD, progress)
            return answer.content if answer.is_file else _parse(answer, token)

        answer = self._with_token(ask)
        if to is not None and isinstance(answer, bytes):
            save(to, answer)
        return answer

    def send(self, openid: str, reply: dict[str, Any]) -> None:
        """Send a reply by the customer-service API (客服消息), within 48 hours of a message.

        Args:
            openid: the follower.
            reply: a dict from a builder of wechat.message, or what ``reply()`` was answered with.

        Raises:
            ApiError: WeChat refused it, or this kind of reply cannot be sent this way.
        """
        kind = str(reply.get("MsgType"))
        match reply:
            case {"MsgType": "text", "Content": content}:
                inside: dict[str, Any] = {"content": content}
            case {"MsgType": "news", "Articles": {"item": items}}:
                articles = items if isinstance(items, list) else [items]
                inside = {"articles": [_lowered(article) for article in articles]}
            case {"MsgType": "image", "Image": dict(fields)} | {
                "MsgType": "voice",
                "Voice": dict(fields),
            }:
                inside = {"media_id": fields.get("MediaId")}
            case {"MsgType": "video", "Video": dict(fields)}:
                inside = _lowered(fields) | {"media_id": fields.get("MediaId")}
            case {"MsgType": "music", "Music": dict(fields)}:
                inside = _lowered(fields) | {"thumb_media_id": fields.get("ThumbMediaId")}
            case _:
                raise ApiError(f"a reply of MsgType {kind} cannot be sent by 客服消息")
        self.call("message/custom/send", {"touser": openid, "msgtype": kind, kind: inside})

    def typing(self, openid: str) -> None:
        """Let a follower see that an answer is being written; what fails is only logged."""
        try:
            self.call("message/custom/typing", {"touser": openid, "command": "Typing"})
        except ApiError as error:
            log.warning("no typing indicator: %s", error)

    def _with_token(self, ask: Callable[[str], _T]) -> _T:
        token = self._store.get()
        try:
            return ask(token)
        except ApiError as error:
            if error.errcode not in TOKEN_REFUSED:
                raise
        return ask(self._store.refresh(token))

    def _url(self, path: str, token: str) -> str:
        path = quote(
            path if path.startswith("/") else f"/cgi-bin/{path}", safe="/?&=%+,:@", errors="replace"
        )
        url = f"{self._api_base}{path}{'&' if '?' in path else '?'}"
        return url + urlencode({"access_token": token})


def _lowered(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields as this API spells them: PicUrl is picurl."""
    return {name.lower(): value for name, value in fields.items() if not name.endswith("MediaId")}


def request_json(
    url: str, payload: dict[str, Any] | None, secret: str, timeout: float = TIMEOUT
) -> dict[str, Any]:
    """GET ``url``, or POST ``payload`` to it as JSON; return the JSON object that WeChat answers.

    Args:
        url: never shown in an error, since it may hold a secret.
        payload: None for GET.
        secret: removed from errors, in case that WeChat quotes it.
        timeout: seconds for the whole exchange.

    Raises:
        ApiError: WeChat refused, or gave no answer that can be read.
        TypeError, ValueError: ``payload`` cannot be JSON in UTF-8.
    """
    return _parse(exchange(url, _to_json(payload), secret, timeout), secret)


def _to_json(payload: dict[str, Any] | None) -> bytes | None:
    # ensure_ascii=False, for WeChat shows a follower what it is sent, even as \u escapes.
    return None if payload is None else json.dumps(payload, ensure_ascii=False).encode()


def _parse(answer: Answer, secret: str) -> dict[str, Any]:
    if answer.is_file:
        what = f"a file of {len(answer.content)} bytes ({answer.content_type})"
        raise ApiError(f"{answer.host} answered with {what}; save it with download(), or -o FILE")
    parsed = None
    with contextlib.suppress(ValueError, RecursionError):
        parsed = json.loads(answer.content)
    errcode = parsed.get("errcode", 0) if isinstance(parsed, dict) else None
    if not isinstance(parsed, dict) or type(errcode) is not int or abs(errcode) > 10**9:
        raise ApiError(f"{answer.host} answered with something else than WeChat's JSON")
    if errcode:
        raise _refusal(errcode, one_line(parsed.get("errmsg"), secret))
    return parsed


def _refusal(errcode: int, errmsg: str) -> ApiError:
    advice = ADVICE.get(errcode, "its meaning is in WeChat's 全局返回码")
    ip = re.search(r"[0-9]+(\.[0-9]+){3}", errmsg)
    advice = advice.format(ip=ip.group() if ip else "this machine's public address")
    return ApiError(f"errcode {errcode} ({errmsg}): {advice}", errcode)


def token_request(config: Config, refused: str = "") -> tuple[str, dict[str, Any] | None]:
    """Return the URL and the body (None: GET) of a request for the account's access_token.

    Args:
        config: the account, the kind of token and where the API is.
        refused: a token that must be replaced although WeChat thinks that it is valid.
    """
    url = f"{config.api_base}/cgi-bin/{config.endpoint}"
    fields: dict[str, Any] = {
        "grant_type": "client_credential",
        "appid": config.appid,
        "secret": config.appsecret,
    }
    if refused and not _is_wechat(config.api_base):
        fields["stale_token"] = refused
    if config.endpoint == "token":
        return f"{url}?{urlencode(fields)}", None
    if refused:
        fields["force_refresh"] = True
    return url, fields


def _is_wechat(api_base: str) -> bool:
    """Tell WeChat's own hosts from a copy of this project that hands out tokens ([central])."""
    return (urlsplit(api_base).hostname or "").endswith(".weixin.qq.com")


def fetch_token(config: Config, refused: str = "") -> tuple[str, int]:
    """Fetch the account's access_token; see ``token_store.Fetch``, which checks what comes.

    Raises:
        ApiError: WeChat refused, or gave no answer that can be read.
    """
    answer = request_json(*token_request(config, refused), config.appsecret)
    return answer.get("access_token", ""), answer.get("expires_in", 0)


def token_store(config: Config, clock: Callable[[], float] = time.time) -> TokenStore:
    """Return the store of the account's access_token, in ``state_dir`` or in Redis.

    Raises:
        TokenError: AppID or AppSecret is not set.
        ConfigError: ``[shared] redis`` needs a package that is not installed.
    """
    if not config.appid or not config.appsecret:
        raise TokenError("set [wechat] appid and appsecret, or WX_APPID and WX_APPSECRET")
    place: Place = FilePlace(config.state_dir / "access_token.json")
    if config.redis:
        import wechat.redis_store

        place = wechat.redis_store.RedisPlace(config.redis, config.appid)
    fetch = functools.partial(fetch_token, config)
    return TokenStore(config.appid, place, fetch, margin=config.margin, clock=clock)


def from_config(config: Config) -> Api:
    """Return the API of the account of config.ini.

    Raises:
        TokenError: AppID or AppSecret is not set.
        ConfigError: ``[shared] redis`` needs a package that is not installed.
    """
    return Api(token_store(config), config.api_base)


def main() -> None:
    """Call WeChat's API and print the answer as JSON, or save the file that it answers."""
    import argparse

    import wechat.config

    parser = argparse.ArgumentParser(
        description=main.__doc__,
        epilog="The classic first test of an account: python -m wechat.api getcallbackip",
    )
    parser.add_argument(
        "path",
        help="getcallbackip, user/info?openid=…, /datacube/getusersummary, media/get?media_id=… or"
        " media/upload?type=image (voice, video, thumb)",
    )
    body_help = (
        "a JSON object to POST, or @photo.jpg to upload that file; without it the call is GET"
    )
    parser.add_argument("body", nargs="?", help=body_help)
    parser.add_argument("-o", metavar="FILE", help="write the file that WeChat answers to FILE")
    arguments = parser.parse_args()
    text, body, file = arguments.body, None, None
    if text is not None and text.startswith("@"):
        file = text[1:]
    elif text is not None:
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            parser.error(f"the body is not JSON: {error}")
        if not isinstance(body, dict):
            parser.error("the body is not a JSON object")
    if file is not None and arguments.o is not None:
        parser.error("-o is for a file that comes, @ for one that goes")
    progress = _show if sys.stderr.isatty() else silent
    try:
        api = from_config(wechat.config.load())
        answer: bytes | dict[str, Any]
        if file is not None:
            answer = api.upload(arguments.path, file, progress=progress)
        elif arguments.o is not None:
            answer = api.download(arguments.path, arguments.o, body, progress)
        else:
            answer = api.call(arguments.path, body)
    except (ApiError, wechat.config.ConfigError, ValueError, OSError) as error:
        sys.exit(f"wechat.api: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if isinstance(answer, bytes):
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Chinese
    print(json.dumps(answer, ensure_ascii=False, indent=2))


def _show(done: int, whole: int) -> None:
    of = f" of {whole / 1e6:.1f}" if whole else ""
    end = "\n" if done == whole else "\r"  # so that what is printed next begins a line
    print(f"{done / 1e6:.1f}{of} MB", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
