"""Calling WeChat's API with the account's access_token.

    api = wechat.api.from_config(wechat.config.load())
    api.call("getcallbackip")
    api.call("message/custom/typing", {"touser": openid, "command": "Typing"})

``python -m wechat.api getcallbackip`` does the same in a shell. What the error codes
mean is in token_store.py, which has to work without this file.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import token_store
from token_store import ApiError as ApiError
from token_store import TokenStore

if TYPE_CHECKING:
    from wechat.config import Config

log = logging.getLogger("wechat.api")
ANOTHER_TOKEN = frozenset({40001, 40014, 42001})  # the token is not the latest, invalid, expired


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
        token = self._store.get()
        try:
            return self._ask(path, body, token)
        except ApiError as error:
            if error.errcode not in ANOTHER_TOKEN:
                raise
        return self._ask(path, body, self._store.refresh(token))

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

    def _ask(self, path: str, body: dict[str, Any] | None, token: str) -> dict[str, Any]:
        path = quote(
            path if path.startswith("/") else f"/cgi-bin/{path}", safe="/?&=%+,:@", errors="replace"
        )
        url = f"{self._api_base}{path}{'&' if '?' in path else '?'}"
        url += urlencode({"access_token": token})
        return token_store.fetch_json(url, body, token, token_store.TIMEOUT)


def _lowered(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields as this API spells them: PicUrl is picurl."""
    return {name.lower(): value for name, value in fields.items() if not name.endswith("MediaId")}


def from_config(config: Config) -> Api:
    """Return the API of the account of config.ini.

    Raises:
        TokenError: AppID or AppSecret is not set.
    """
    return Api(token_store.from_config(config), config.api_base)


def main() -> None:
    """Call WeChat's API and print the answer as JSON."""
    import argparse

    import wechat.config

    parser = argparse.ArgumentParser(
        description=main.__doc__,
        epilog="The classic first test of an account: python -m wechat.api getcallbackip",
    )
    parser.add_argument("path", help="getcallbackip, user/info?openid=…, /datacube/getusersummary")
    parser.add_argument("body", nargs="?", help="a JSON object to POST; without it the call is GET")
    arguments = parser.parse_args()
    body = None
    if arguments.body is not None:
        try:
            body = json.loads(arguments.body)
        except (ValueError, RecursionError) as error:
            parser.error(f"the body is not JSON: {error}")
        if not isinstance(body, dict):
            parser.error("the body is not a JSON object")
    try:
        answer = from_config(wechat.config.load()).call(arguments.path, body)
    except (ApiError, wechat.config.ConfigError, UnicodeEncodeError) as error:
        sys.exit(f"wechat.api: {error}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Chinese
    print(json.dumps(answer, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
