"""What the WSGI callables share: responses, refusals, reading a body, noticing a hang-up."""

from __future__ import annotations

import logging
import re
import select
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger("wxserver")

OK = "200 OK"
BAD_REQUEST = "400 Bad Request"
FORBIDDEN = "403 Forbidden"
NOT_FOUND = "404 Not Found"
METHOD_NOT_ALLOWED = "405 Method Not Allowed"
CONTENT_TOO_LARGE = "413 Content Too Large"
UNAVAILABLE = "503 Service Unavailable"

Headers: TypeAlias = list[tuple[str, str]]
Response: TypeAlias = tuple[str, Headers, bytes]  # the status, headers and body
TEXT: Headers = [("Content-Type", "text/plain"), ("X-Content-Type-Options", "nosniff")]

# The events that poll() reports when a client has hung up. POLLRDHUP, which Linux has, comes even
# while data is still unread.
_HANG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
_ESTABLISHED = 1  # in TCP_INFO, the state of a connection that neither side has closed
_LENGTH = re.compile("[0-9]{1,18}")


class Refused(Exception):
    """A request is refused.

    Args:
        status: the status of the response, and the one line of its body.
        reason: for the log alone.
        headers: more headers of the response.
    """

    def __init__(self, status: str, reason: str, headers: Headers | None = None) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers or []


class ClientGone(Refused):
    """The client hung up, so nobody reads the response."""


def as_wsgi(
    respond: Callable[[WSGIEnvironment], Response],
    statuses: Mapping[type[Exception], str] | None = None,
) -> WSGIApplication:
    """Make a WSGI callable of ``respond``. It turns every refusal into a response and a log line.

    Args:
        respond: makes the response to a request, or raises Refused.
        statuses: other exceptions by which ``respond`` refuses a request, and the status of each.
    """
    statuses = statuses or {}
    refusals: tuple[type[Exception], ...] = (Refused, *statuses)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            status, headers, body = respond(environ)
        except refusals as error:
            if isinstance(error, Refused):
                status, headers = error.status, [*TEXT, *error.headers]
            else:
                status, headers = statuses[type(error)], TEXT
            body = f"{status}\n".encode()
            level = logging.INFO if isinstance(error, ClientGone) else logging.WARNING
            log.log(level, "%s: %s", status, error)
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return application


def read_body(environ: WSGIEnvironment, max_body: int) -> bytes:
    """Return the body of a request.

    Raises:
        Refused: the body has more than ``max_body`` bytes or is not whole, or Content-Length is
            malformed.
    """
    length = environ.get("CONTENT_LENGTH", "")
    if length:
        if not _LENGTH.fullmatch(length):
            raise Refused(BAD_REQUEST, "Content-Length is no number")
        size = int(length)
        if size > max_body:
            raise Refused(CONTENT_TOO_LARGE, f"a body of {size} bytes; max_body is {max_body}")
    else:  # a chunked body, if the server (as gunicorn) promises that reading ends where it ends
        size = max_body + 1 if environ.get("wsgi.input_terminated") else 0
    try:
        body: bytes = environ["wsgi.input"].read(size)
    except OSError as error:
        raise Refused(BAD_REQUEST, f"the body broke off: {type(error).__name__}") from None
    if len(body) > max_body:
        raise Refused(CONTENT_TOO_LARGE, f"a body of more than max_body, {max_body} bytes")
    if length and len(body) < size:
        raise Refused(BAD_REQUEST, f"only {len(body)} bytes came of a body of {size}")
    return body


def client_gone(environ: WSGIEnvironment) -> bool:
    """Tell whether the client has hung up; False if the server does not show the connection.

    gunicorn shows it. nginx hangs up on gunicorn when WeChat hangs up on nginx. A request that
    waited so long for a thread need not run: WeChat has sent the message again.
    """
    connection: socket.socket | None = environ.get("gunicorn.socket")
    if connection is None:
        return False
    try:  # faster than poll(), which releases the GIL and then waits to get it back
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED
    except (AttributeError, OSError):  # not on Linux, or a Unix socket
        poll = select.poll()
        poll.register(connection, _HANG_UP)
        return bool(poll.poll(0))
