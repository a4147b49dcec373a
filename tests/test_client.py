"""Sending as WeChat does: over real sockets, to servers that do everything wrong."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import APPID, KEY, TOKEN, Run, skip

from wechat.config import Config
from wechat.crypto import MessageCipher
from wechat.message import from_xml
from wxsim import client, messages
from wxsim.client import Account, Answer, NoAnswer, exchange

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
MESSAGE = messages.outgoing(messages.make("text", "o1", 1714112445))
ACCOUNTS = {
    mode: Account(
        "http://127.0.0.1/wx", TOKEN, None if mode == "plain" else MessageCipher(KEY, APPID), mode
    )
    for mode in ("plain", "compatible", "safe")
}

Talk = Callable[[socket.socket], object]
Listen = Callable[[Talk], int]


@contextlib.contextmanager
def listening(talk: Talk, host: str = "127.0.0.1") -> Iterator[int]:
    """Let ``talk`` have each connection to the port, one after the other."""

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener is closed, and the thread ends
            while True:
                connection, _ = listener.accept()
                connection.settimeout(5)  # a test that fails must not hang
                with connection, contextlib.suppress(OSError):
                    talk(connection)

    with socket.create_server((host, 0), family=_family(host)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def get(port: int, host: str = "127.0.0.1", timeout: float = 5.0) -> Answer:
    return exchange(f"http://{host}:{port}/wx", timeout=timeout)


def asked(connection: socket.socket) -> bytes:
    """Read a request without a body."""
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        request += connection.recv(65536)
    return request


def says(*pieces: bytes) -> Talk:
    """Answer in ``pieces``, each a packet of its own, and hang up."""

    def talk(connection: socket.socket) -> None:
        asked(connection)
        for number, piece in enumerate(pieces):
            time.sleep(0.02 if number else 0)
            connection.sendall(piece)

    return talk


def keeps_open(connection: socket.socket) -> None:
    asked(connection)
    connection.sendall(HELLO)
    connection.recv(1)  # until the other side hangs up


def drips(connection: socket.socket) -> None:
    asked(connection)
    for number in range(len(HELLO)):
        connection.sendall(HELLO[number : number + 1])
        time.sleep(0.02)


def never_answers(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def drips_a_head_line_by_line(connection: socket.socket) -> None:
    asked(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(50):
        connection.sendall(b"X-%d: a\r\n" % number)
        time.sleep(0.02)


def drips_chunks(connection: socket.socket) -> None:
    asked(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(50):
        connection.sendall(b"1\r\na\r\n")
        time.sleep(0.02)


@pytest.mark.parametrize(
    "talk",
    [drips, drips_a_head_line_by_line, drips_chunks, never_answers],
    ids=lambda t: t.__name__,
)
def test_the_time_is_for_the_whole_answer_not_for_the_next_byte(talk: Talk) -> None:
    with listening(talk) as port:
        began = time.monotonic()
        with pytest.raises(NoAnswer, match=r"^no answer within 0.2 s$"):
            get(port, timeout=0.2)
        assert time.monotonic() - began < 1


def drips_tls(connection: socket.socket) -> None:
    connection.recv(65536)
    record = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"  # a ServerHello of 16 KiB begins
    for _ in range(50):
        connection.sendall(record[:1])
        record = record[1:] or b"\x00"
        time.sleep(0.02)


@pytest.mark.parametrize("talk", [never_answers, drips_tls], ids=lambda t: t.__name__)
def test_the_time_is_for_tls_too(talk: Talk) -> None:
    with listening(talk) as port:
        began = time.monotonic()
        with pytest.raises(NoAnswer, match=r"^no answer within 0.2 s$"):
            exchange(f"https://127.0.0.1:{port}/wx", timeout=0.2)
        assert time.monotonic() - began < 1


def test_the_time_is_for_connecting_too() -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # more than the backlog: the rest gets no answer to its SYN
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        began = time.monotonic()
        with pytest.raises(NoAnswer, match=r"^no answer within 0.3 s$"):
            get(full.getsockname()[1], timeout=0.3)
        assert time.monotonic() - began < 1


def test_the_time_is_for_a_name_server_that_is_silent_too(run: Run, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        skip("needs root and unshare, for a resolv.conf of its own")
    (tmp_path / "resolv.conf").write_text("nameserver 127.9.9.9\noptions timeout:30\n")
    (tmp_path / "config.ini").touch()
    script = f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec {sys.executable}"
    script += " -m wxsim verify --url http://silent.example/wx"
    command = ["unshare", "--mount", "sh", "-c", script]
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.9.9.9", 53))
        env = {"WXSERVER_CONFIG": str(tmp_path / "config.ini"), "WX_TOKEN": TOKEN}
        starter = f"import os; os.execvp('unshare', {command})"
        began = time.monotonic()
        out, errors = run("-c", starter, env=env).communicate(timeout=25)
    assert (out, errors) == ("请求URL超时: no answer within 5 s\n", "")
    assert 4.8 < time.monotonic() - began < 10


def drips_for_long(connection: socket.socket) -> None:
    asked(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    with contextlib.suppress(OSError):  # the other side has hung up
        for _ in range(200):
            connection.sendall(b"a")
            time.sleep(0.02)


@pytest.mark.parametrize("waits", [never_answers, drips_for_long], ids=lambda t: t.__name__)
def test_who_hangs_up_closes_the_connection(waits: Talk) -> None:
    gone = threading.Event()

    def talk(connection: socket.socket) -> None:
        waits(connection)
        gone.set()

    with listening(talk) as port:
        with pytest.raises(NoAnswer):
            get(port, timeout=0.1)
        assert gone.wait(2)


def test_an_answer_is_complete_with_its_last_byte_though_the_connection_stays_open() -> None:
    with listening(keeps_open) as port:
        assert get(port, timeout=2).body == b"hello"


@pytest.mark.parametrize(
    "pieces",
    [
        (HELLO[:3], HELLO[3:30], HELLO[30:]),
        (b"HTTP/1.0 200 OK\r\n\r\nhel", b"lo"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n",
            b"3\r\nllo\r\n0\r\n\r\n",
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n", HELLO),
    ],
    ids=["pieces", "until the end", "chunked", "100 first"],
)
def test_an_answer_is_read_however_it_comes(pieces: tuple[bytes, ...]) -> None:
    with listening(says(*pieces)) as port:
        answer = get(port)
    assert (answer.status, answer.body) == (200, b"hello")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "the connection failed"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer is not HTTP"),
        (b"<xml></xml>\r\n\r\n", "the answer is not HTTP"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",
            "the answer is not HTTP, or not whole",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhello",
            "the answer is not HTTP, or not whole",
        ),
    ],
    ids=["nothing", "another protocol", "a bare body", "too short", "a chunk too short"],
)
def test_what_is_no_whole_http_answer_is_told_in_words(answer: bytes, why: str) -> None:
    with listening(says(answer)) as port, pytest.raises(NoAnswer, match=why):
        get(port)


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (b"Content-Length: 99999999999\r\n\r\n", b"a" * 65536),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"a" * 65536 + b"\r\n"),
        (b"Transfer-Encoding: chunked\r\n\r\n7fffffffffff\r\n", b"a" * 65536),
        (b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", b"a" * 65536),
        (b"\r\n", b"a" * 65536),
    ],
    ids=["length", "chunks", "one chunk", "a negative chunk", "until the end"],
)
def test_an_answer_without_end_is_given_up_and_fills_no_memory(head: bytes, more: bytes) -> None:
    def talk(connection: socket.socket) -> None:
        asked(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + head)
        for _ in range(1000):
            connection.sendall(more)

    with listening(talk) as port:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        with pytest.raises(NoAnswer, match=r"larger than 4194304 bytes|is not HTTP"):
            get(port)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_a_head_without_end_is_given_up() -> None:
    def talk(connection: socket.socket) -> None:
        asked(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000)

    with listening(talk) as port, pytest.raises(NoAnswer, match="the answer is not HTTP"):
        get(port)


def test_a_refused_connection_and_an_unknown_name_are_told_in_words() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(NoAnswer, match="the connection was refused; is the server"):
            get(closed.getsockname()[1])
    with pytest.raises(NoAnswer, match=r"the name nowhere\.invalid does not resolve"):
        get(80, "nowhere.invalid")


def test_a_callback_may_have_an_ipv6_address() -> None:
    try:
        with listening(says(HELLO), "::1") as port:
            assert get(port, "[::1]").body == b"hello"
    except OSError as error:  # of bind: this machine has no IPv6
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a key and a certificate for 127.0.0.1 that nobody signed, in one file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -batch"
    names = "-subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    key = path.with_name("key.pem")
    command = f"{request} {names} -keyout {key} -out {path}".split()
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        skip("needs openssl")
    path.write_text(key.read_text() + path.read_text())
    return path


@pytest.mark.parametrize("trusted", [False, True])
def test_over_https_only_a_trusted_certificate_will_do(
    certificate: Path, trusted: bool, run: Run, tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def talk(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            keeps_open(secure)

    env = {"SSL_CERT_FILE": str(certificate)} if trusted else {}
    with listening(talk) as port:
        printed = verification(run, tmp_path, f"https://127.0.0.1:{port}/wx", **env)
    if trusted:
        assert re.search(r"in place of echostr, \d{19}, came 'hello'", printed)
    else:
        assert re.search("the connection failed: .*self.signed certificate", printed)


def verification(run: Run, folder: Path, url: str, **env: str) -> str:
    """Return what ``python -m wxsim verify`` prints."""
    (folder / "config.ini").touch()
    env = {"WXSERVER_CONFIG": str(folder / "config.ini"), "WX_TOKEN": TOKEN, **env}
    process = run("-m", "wxsim", "verify", "--url", url, env=env)
    return str(process.communicate(timeout=30)[0])


def test_https_to_a_server_of_plain_http_is_told_in_words() -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listening(talk) as port, pytest.raises(NoAnswer, match=r"the connection failed: .*SSL"):
        exchange(f"https://127.0.0.1:{port}/wx")


def test_three_silences_and_wechat_gives_up() -> None:
    with listening(never_answers) as port:
        to = Account(f"http://127.0.0.1:{port}/wx", TOKEN)
        tries = list(client.deliver(to, MESSAGE, timeout=0.1))
    assert [each.answer for each in tries] == [None] * 3
    assert [each.failure for each in tries] == ["no answer within 0.1 s"] * 3


def test_a_verification_that_takes_too_long_fails() -> None:
    with listening(drips) as port:
        to = Account(f"http://127.0.0.1:{port}/wx", TOKEN)
        with pytest.raises(client.TooLate, match=r"^no answer within 0.1 s$"):
            client.verify(to, timeout=0.1)


@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("", "/?"),
        ("/", "/?"),
        ("/wx", "/wx?"),
        ("/wx?a=1", "/wx?a=1&"),
        ("/wx?a=1&b=%2F", "/wx?a=1&b=%2F&"),
    ],
)
def test_the_signature_joins_whatever_query_the_url_has(path: str, start: str) -> None:
    requests: list[str] = []

    def talk(connection: socket.socket) -> None:
        requests.append(asked(connection).split(b" ")[1].decode())
        connection.sendall(HELLO)

    with listening(talk) as port:
        to = Account(f"http://127.0.0.1:{port}{path}", TOKEN)
        with pytest.raises(NoAnswer, match="in place of echostr"):
            client.verify(to)
        requests.append(client.request(to, MESSAGE)[0].partition(str(port))[2])
    signed = r"signature=[0-9a-f]{40}&timestamp=\d+&nonce=\d+"
    assert re.fullmatch(rf"{re.escape(start)}{signed}&echostr=\d{{19}}", requests[0])
    assert re.fullmatch(rf"{re.escape(start if path else '?')}{signed}&openid=o1", requests[1])


def test_by_default_the_callback_is_the_local_servers_with_its_own_token(tmp_path: Path) -> None:
    config = Config(path="/here", state_dir=tmp_path)
    account = client.from_config(config)
    assert account.url == "http://127.0.0.1:8000/here"
    assert account.token == (tmp_path / "callback_token").read_text().strip()
    assert account.token not in repr(account)


def test_in_compatible_mode_the_body_has_both_and_in_safe_mode_encrypt_alone() -> None:
    bodies = {mode: from_xml(client.request(to, MESSAGE)[1]) for mode, to in ACCOUNTS.items()}
    assert bodies["plain"] == from_xml(MESSAGE.xml)
    assert list(bodies["compatible"]) == [*from_xml(MESSAGE.xml), "Encrypt"]
    assert list(bodies["safe"]) == ["ToUserName", "Encrypt"]


def test_what_is_typed_is_raw_in_every_mode_in_the_readable_copy_too() -> None:
    typed = "a\x1dc]]><b>\udcff"
    message = messages.outgoing(MESSAGE.fields | {"Content": typed})
    raw = b"<Content><![CDATA[a\x1dc]]><b>\xff]]></Content>"
    bodies = {mode: client.request(to, message)[1] for mode, to in ACCOUNTS.items()}
    assert raw in bodies["plain"]
    assert raw in bodies["compatible"]
    for mode in ("compatible", "safe"):
        encrypt = re.search(rb"<Encrypt><!\[CDATA\[(.*?)\]\]>", bodies[mode])
        cipher = ACCOUNTS[mode].cipher
        assert encrypt
        assert cipher
        assert cipher.decrypt(encrypt[1].decode()) == message.xml
