"""One HTTP exchange with WeChat, within a time limit, that shows no secret."""

from __future__ import annotations

import functools
import http.client
import io
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

from token_store import ApiError
from wechat.media import PIECE, Form

STALLED = 30.0  # seconds after which a connection that moves no byte is given up
LARGEST_ANSWER = 4 * 1048576  # bytes; a list of 10,000 followers takes 0.3 MB

Progress: TypeAlias = Callable[[int, int], object]  # takes the bytes done, and all; 0: unknown


class Answer(NamedTuple):
    """What WeChat answered."""

    host: str
    content: bytes
    content_type: str  # without parameters

    @property
    def is_file(self) -> bool:
        """Tell a file from JSON and from a proxy's page of HTML."""
        is_text = self.content_type.startswith(("text/", "application/json"))
        return bool(self.content) and not is_text and not self.content.startswith(b"{")


def silent(_done: int, _whole: int) -> None:
    """Show no progress."""


def exchange(
    url: str,
    body: bytes | Form | None,
    secret: str,
    timeout: float,
    largest: int = LARGEST_ANSWER,
    progress: Progress = silent,
) -> Answer:
    """GET ``url``, or POST ``body`` to it.

    Args:
        url: never shown in an error, since it may hold a secret.
        body: a form, or JSON; None for GET.
        secret: removed from errors, in case that WeChat quotes it.
        timeout: seconds for the whole exchange.
        largest: bytes of the largest answer.
        progress: called in another thread while a form is sent, or while an answer comes.

    Raises:
        ApiError: WeChat did not answer, not with success, or with too much.
    """
    host, end = url.partition("://")[2].partition("/")[0], time.monotonic() + timeout
    results: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

    def note(done: int, whole: int) -> None:
        if time.monotonic() > end:  # the caller has gone on, and may have closed the file
            raise TimeoutError
        progress(done, whole)

    def run() -> None:
        try:
            request = _request(url, body, note)
            with _opener().open(request, timeout=min(timeout, STALLED)) as response:
                content = _read(response, largest, silent if isinstance(body, Form) else note)
                results.put(Answer(host, content, response.headers.get_content_type()))
        except Exception as error:  # noqa: BLE001  it is raised in the caller's thread
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            results.put(error)

    result: Answer | Exception
    try:
        # In a thread, because a DNS look-up or a server that drips bytes outlasts any timeout.
        threading.Thread(target=run, daemon=True).start()
        result = results.get(timeout=timeout)
    except RuntimeError as error:  # this process has as many threads as it may
        result = error
    except queue.Empty:
        result = TimeoutError(f"timed out after {timeout:.0f} s")
    if isinstance(result, Exception):
        raise ApiError(f"no answer from {host}: {_why(result, secret)}")
    return result


def _request(url: str, body: bytes | Form | None, progress: Progress) -> urllib.request.Request:
    if isinstance(body, Form):
        pieces = _watched(body, body.length, progress)
        return urllib.request.Request(url, pieces, body.headers)
    return urllib.request.Request(url, body, {"Content-Type": "application/json"})


def _watched(pieces: Iterable[bytes], whole: int, progress: Progress) -> Iterator[bytes]:
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece)
        progress(done, whole)


def _read(response: http.client.HTTPResponse, largest: int, progress: Progress) -> bytes:
    content, whole = io.BytesIO(), response.length or 0
    for piece in _watched(iter(lambda: response.read(PIECE), b""), whole, progress):
        content.write(piece)
        if content.tell() > largest:
            raise OSError(f"its answer is over {largest // 1048576} MB")
    if response.length:
        raise OSError("its answer broke off")
    return content.getvalue()


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Return an opener of http(s) that follows no redirect: the secrets go nowhere else."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _why(error: Exception, secret: str) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    if isinstance(error, ValueError):  # its text quotes the URL
        return type(error).__name__
    return one_line(getattr(error, "reason", None) or error, secret)


def one_line(text: object, secret: str) -> str:
    """Return the text as one line that can be logged, without the secret."""
    shown = str(text).replace(secret, "***")
    return " ".join("".join(c if c.isprintable() else " " for c in shown).split())[:200]
