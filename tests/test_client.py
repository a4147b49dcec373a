"""WeChat's end of the wire: its patience, and what it can use of an answer."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import APPID, KEY, TOKEN, message_xml, skip
from hypothesis import given
from hypothesis import strategies as st

import wxcrypto
from wxsim import client
from wxconfig import Config
from wxcrypto import MessageCipher
from wxmessage import MAX_TEXT, from_xml, to_xml
from wxsim.client import FAULT, Account, Answer, NoAnswer, exchange

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
MESSAGE = message_xml()
REPLY = {
    "ToUserName": from_xml(MESSAGE)["FromUserName"],
    "FromUserName": from_xml(MESSAGE)["ToUserName"],
    "CreateTime": 1714112445,
    "MsgType": "text",
    "Content": "hello",
}
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


def get(port: int, host: str = "127.0.0.1", patience: float = 5.0) -> Answer:
    return asyncio.run(exchange(f"http://{host}:{port}/wx", patience=patience))


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


@pytest.mark.parametrize("talk", [drips, never_answers])
def test_patience_is_for_the_whole_answer_not_for_the_next_byte(talk: Talk) -> None:
    with listening(talk) as port:
        began = time.monotonic()
        with pytest.raises(NoAnswer, match=r"^no answer within 0.2 s$"):
            get(port, patience=0.2)
        assert time.monotonic() - began < 1


def test_who_hangs_up_closes_the_connection() -> None:
    gone = threading.Event()

    def talk(connection: socket.socket) -> None:
        never_answers(connection)
        gone.set()

    with listening(talk) as port, pytest.raises(NoAnswer):
        get(port, patience=0.1)
    assert gone.wait(1)


def test_an_answer_is_complete_with_its_last_byte_though_the_connection_stays_open() -> None:
    with listening(keeps_open) as port:
        assert get(port, patience=2).body == b"hello"


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
        (b"", "the connection broke off"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer is not HTTP"),
        (b"<xml></xml>\r\n\r\n", "the answer is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", "the answer broke off"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhello",
            "the answer broke off",
        ),
    ],
    ids=["nothing", "another protocol", "a bare body", "too short", "a chunk too short"],
)
def test_what_is_no_whole_http_answer_is_told_in_words(answer: bytes, why: str) -> None:
    with listening(says(answer)) as port, pytest.raises(NoAnswer, match=why):
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
    certificate: Path, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def talk(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            keeps_open(secure)

    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    client._tls.cache_clear()
    with listening(talk) as port:
        url = f"https://127.0.0.1:{port}/wx"
        if trusted:
            assert asyncio.run(exchange(url)).body == b"hello"
        else:
            with pytest.raises(NoAnswer, match=r"TLS failed: self.signed certificate"):
                asyncio.run(exchange(url))


def test_https_to_a_server_of_plain_http_is_told_in_words() -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listening(talk) as port, pytest.raises(NoAnswer, match="TLS failed"):
        asyncio.run(exchange(f"https://127.0.0.1:{port}/wx"))


def test_three_silences_and_wechat_gives_up() -> None:
    failures: list[tuple[int, str]] = []
    with listening(never_answers) as port:
        to = Account(f"http://127.0.0.1:{port}/wx", TOKEN)
        answer = asyncio.run(
            client.deliver(to, MESSAGE, "o1", lambda *f: failures.append(f), patience=0.1)
        )
    assert answer is None
    assert failures == [(number, "no answer within 0.1 s") for number in (1, 2, 3)]


def test_a_verification_that_takes_too_long_fails() -> None:
    with listening(drips) as port:
        to = Account(f"http://127.0.0.1:{port}/wx", TOKEN)
        assert client.verify(to, patience=0.1) == "no answer within 0.1 s"


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
        client.verify(to)
        requests.append(client.wrap(to, MESSAGE, "o1")[0].partition(str(port))[2])
    signed = r"signature=[0-9a-f]{40}&timestamp=\d+&nonce=\d+"
    assert re.fullmatch(rf"{re.escape(start)}{signed}&echostr=\d{{19}}", requests[0])
    assert re.fullmatch(rf"{re.escape(start if path else '?')}{signed}&openid=o1", requests[1])


def test_by_default_the_callback_is_the_local_servers_with_its_own_token(tmp_path: Path) -> None:
    config = Config(path="/here", state_dir=tmp_path)
    account = client.account(config)
    assert account.url == "http://127.0.0.1:8000/here"
    assert account.token == (tmp_path / "callback_token").read_text().strip()
    assert account.token not in repr(account)


def test_in_compatible_mode_the_body_has_both_and_in_safe_mode_encrypt_alone() -> None:
    bodies = {
        mode: from_xml(client.wrap(to, MESSAGE, "o1")[1]) for mode, to in ACCOUNTS.items()
    }
    assert bodies["plain"] == from_xml(MESSAGE)
    assert list(bodies["compatible"]) == [*from_xml(MESSAGE), "Encrypt"]
    assert list(bodies["safe"]) == ["ToUserName", "Encrypt"]


def envelope(xml: bytes, token: str = TOKEN) -> bytes:
    encrypt = MessageCipher(KEY, APPID).encrypt(xml)
    signature = wxcrypto.sign(token, "1714112445", "n", encrypt)
    return to_xml(
        {"Encrypt": encrypt, "MsgSignature": signature, "TimeStamp": 1714112445, "Nonce": "n"}
    )


def read(body: bytes, mode: str = "plain") -> client.Shown:
    return client.read(ACCOUNTS[mode], MESSAGE, Answer(200, {}, body, 0.0))


@pytest.mark.parametrize("body", [b"", b"success"])
@pytest.mark.parametrize("mode", ACCOUNTS)
def test_the_empty_answer_and_success_show_nothing_in_every_mode(mode: str, body: bytes) -> None:
    assert read(body, mode) == client.Shown(None)


def test_an_encrypted_answer_is_read_in_the_encrypted_modes() -> None:
    for mode in ("compatible", "safe"):
        shown = read(envelope(to_xml(REPLY)), mode)
        assert (shown.text, shown.problem, shown.xml) == ("hello", "", to_xml(REPLY))


KINDS = ("text", "image", "voice", "video", "music", "news", "transfer_customer_service")
MARKUP = b"< </ > ]]> <![CDATA[ &amp; <?xml?> 1 ToUserName <Content> </xml> <!DOCTYPE success {} \0"
PIECES = st.binary(max_size=60) | st.sampled_from(MARKUP.split(b" "))
VALUES: st.SearchStrategy[object] = st.recursive(
    st.text(max_size=20) | st.integers() | st.sampled_from(["1714112445", "x" * (MAX_TEXT + 1)]),
    lambda inner: (
        st.dictionaries(
            st.sampled_from(["MediaId", "Title", "Url", "item", "ThumbMediaId"]), inner, max_size=3
        )
        | st.lists(inner, max_size=9)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [*REPLY, "Image", "Voice", "Video", "Music", "Articles", "ArticleCount", "TransInfo"]
)
MEDIA = st.sampled_from([{"MediaId": "m"}, {"MediaId": ""}, {"ThumbMediaId": "m"}, {}, "m"])
ITEMS = st.lists(st.sampled_from([{"Title": "t"}, {}, "t"]), max_size=9)
KIND = st.fixed_dictionaries(
    {"MsgType": st.sampled_from(KINDS)},
    optional={
        **dict.fromkeys(("Image", "Voice", "Video", "Music"), MEDIA),
        "Articles": st.fixed_dictionaries({"item": ITEMS}),
        "ArticleCount": st.integers(0, 9),
        "CreateTime": st.integers() | st.text("1\u0661\uff11", min_size=1),
    },
)
ANSWERS = st.one_of(
    st.binary(),
    st.lists(PIECES, max_size=8).map(b"".join),
    st.tuples(st.binary(max_size=9), st.integers(0, 250), st.integers(0, 9)).map(
        lambda t: to_xml(REPLY)[: t[1]] + t[0] + to_xml(REPLY)[t[1] + t[2] :]
    ),
    st.tuples(KIND, st.dictionaries(FIELDS, VALUES, max_size=4)).map(
        lambda t: to_xml({**REPLY, **t[0], **t[1]})
    ),
)


def usable(body: bytes) -> bool:
    """Tell by another parser, and by the platform's page alone, whether ``body`` is a reply."""
    root = ElementTree.fromstring(body)
    leaf = {child.tag: child.text or "" for child in root if not len(child)}
    kind = leaf.get("MsgType", "")
    inside: dict[str, Callable[[], object]] = {
        "text": lambda: "Content" in leaf and len(leaf["Content"].encode()) <= MAX_TEXT,
        "image": lambda: root.findtext("Image/MediaId"),
        "voice": lambda: root.findtext("Voice/MediaId"),
        "video": lambda: root.findtext("Video/MediaId"),
        "music": lambda: root.findtext("Music/ThumbMediaId"),
        "news": lambda: leaf.get("ArticleCount") == str(len(root.findall("Articles/item"))) != "0",
        "transfer_customer_service": lambda: True,
    }
    return (
        root.tag == "xml"
        and all(leaf.get(name) == REPLY[name] for name in ("ToUserName", "FromUserName"))
        and re.fullmatch("[0-9]+", leaf.get("CreateTime", "")) is not None
        and kind in inside
        and bool(inside[kind]())
    )


@given(ANSWERS, st.sampled_from([*ACCOUNTS]), st.booleans())
def test_no_answer_crashes_the_reader_or_passes_for_a_reply_that_it_is_not(
    body: bytes, mode: str, sealed: bool
) -> None:
    shown = read(envelope(body) if sealed else body, mode)
    if shown.problem:
        assert shown.text == FAULT
    elif shown.text is None:
        assert body in (b"", b"success")
        assert not sealed
    else:
        assert sealed is (mode == "safe") or mode == "compatible"
        assert usable(body)


@given(st.binary(max_size=40), st.integers(0, 800), st.integers(0, 40))
def test_no_mangled_envelope_passes_for_another_reply(piece: bytes, start: int, gone: int) -> None:
    whole = envelope(to_xml(REPLY))
    shown = read(whole[:start] + piece + whole[start + gone :], "safe")
    assert shown.problem or shown.text in (None, "hello")
