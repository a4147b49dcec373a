"""What the tests share: the account of the platform's worked examples, and real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode

import hypothesis
import pytest

import wechat.crypto
from wechat.config import Config
from wxsim.fake_api import FakeApi

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "AAAAA"  # of the platform's worked examples
APPID, APPSECRET = "wxba5fad812f8e6fb9", "0123456789abcdef0123456789abcdef"
KEY = "A" * 43
NOW = 1714036504
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
os.environ["no_proxy"] = "127.0.0.1"  # whatever proxy the machine has, the tests talk to loopback


def skip(reason: str) -> NoReturn:
    """Skip the running test; .ci/run, which installs all that tests need, lets it fail."""
    if os.environ.get("WXSERVER_NO_SKIP") == "1":
        pytest.fail(f"not to be skipped here: {reason}")
    pytest.skip(reason)


def signed(
    token: str = TOKEN, timestamp: object = NOW, nonce: str = "1514711492", **more: str
) -> str:
    """Return the query of a request as WeChat signs it."""
    signature = wechat.crypto.sign(token, str(timestamp), nonce)
    return urlencode({"signature": signature, "timestamp": str(timestamp), "nonce": nonce, **more})


def sealed(
    xml: bytes, token: str = TOKEN, timestamp: object = NOW, nonce: str = "1514711492"
) -> tuple[str, bytes]:
    """Return the query and the body of an encrypted message as WeChat sends it."""
    encrypt = wechat.crypto.MessageCipher(KEY, APPID).encrypt(xml)
    signature = wechat.crypto.sign(token, str(timestamp), nonce, encrypt)
    query = signed(token, timestamp, nonce, encrypt_type="aes", msg_signature=signature)
    to = "<ToUserName><![CDATA[gh_1]]></ToUserName>"
    whole = f"<xml>\n{to}\n<Encrypt><![CDATA[{encrypt}]]></Encrypt>\n</xml>"
    return query, whole.encode()


def message_xml(content: str = "hello", **fields: str) -> bytes:
    """Return a text message as WeChat writes it, with ``fields`` over or beside its own."""
    whole = {
        "ToUserName": "gh_97417a04a28d",
        "FromUserName": "o9AgO5Kd5ggOC-bXrbNODIiE3bGY",
        "CreateTime": "1714112445",
        "MsgType": "text",
        "Content": content,
        "MsgId": "23456789012345678",
        **fields,
    }
    return f"<xml>{''.join(f'<{k}><![CDATA[{v}]]></{k}>' for k, v in whole.items())}</xml>".encode()


def config_for(api: FakeApi, folder: Path, **environ: str) -> dict[str, str]:
    """Write a config.ini for the account of ``api``; return the environment that names it."""
    path = folder / "config.ini"
    path.write_text(f"[access_token]\napi_base = {api.base}\n")
    secrets = {"WX_APPID": APPID, "WX_APPSECRET": APPSECRET}
    return {"WXSERVER_CONFIG": str(path)} | secrets | environ


def account(api: FakeApi, folder: Path, **more: Any) -> Config:
    """Return the Config of the account of ``api``, with its state in ``folder``."""
    settings: dict[str, Any] = {
        "appid": APPID,
        "appsecret": APPSECRET,
        "api_base": api.base,
        "state_dir": folder,
    }
    return Config(**(settings | more))


@pytest.fixture
def fake_api() -> Iterator[FakeApi]:
    """Serve an api.weixin.qq.com of this test's own."""
    with FakeApi(APPID, APPSECRET) as api:
        yield api


Run = Callable[..., Any]  # a Popen whose pipes are all there


@pytest.fixture
def run() -> Iterator[Run]:
    """Start Python processes that are gone, with their children, when the test is."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str, env: dict[str, str] | None = None, log: Path | None = None) -> Any:
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("WX", "GUNICORN", "WEB_"))
        }
        with log.open("wb") if log else contextlib.nullcontext(subprocess.PIPE) as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**clean, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(env or {})},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Any]:
    """One redis-server for the tests that do it no harm."""
    from serving import RedisServer

    server = RedisServer()
    yield server
    server.kill()


@pytest.fixture
def redis_url(redis_server: Any) -> str:
    """The URL of an empty Redis."""
    redis_server.ask("FLUSHALL")
    return str(redis_server.url)
