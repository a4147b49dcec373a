"""Files up and down, against a fake API over HTTP."""

from __future__ import annotations

import contextlib
import email
import io
import itertools
import json
import os
import pty
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
from conftest import ROOT, Run, account, config_for
from serving import until

import wechat.api
import wechat.exchange
import wechat.media
from token_store import TokenStore
from wechat.api import Api, ApiError
from wxsim.fake_api import GARBAGE, FakeApi

UPLOAD = "media/upload?type=image"
PICTURE = b"\xff\xd8\xff\xe0\r\n--\r\n\x00\r\n" + bytes(range(256)) * 700 + b"\r\n\r\n"


@pytest.fixture
def api(fake_api: FakeApi, tmp_path: Path) -> Api:
    return wechat.api.from_config(account(fake_api, tmp_path / "state"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "照片 “1”.jpg"
    path.write_bytes(PICTURE)
    return path


def get(media_id: str) -> str:
    return f"media/get?media_id={media_id}"


def media_id(
    api: Api, kind: str = "image", content: bytes | BinaryIO = PICTURE, name: str = "a.jpg"
) -> str:
    return str(api.upload(f"media/upload?type={kind}", content, name)["media_id"])


class Server:
    """Hands each connection to the next function; an Api that calls it has a token already."""

    def __init__(self, *serve: Callable[[BinaryIO, BinaryIO], object]) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._serve = serve
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Api:
        self._thread.start()
        api_base = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        return Api(TokenStore("wx1", Memory(), lambda _: ("the-secret-token", 7200)), api_base)

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._socket.close()

    def _run(self) -> None:
        for serve in self._serve:
            connection, _ = self._socket.accept()
            with (
                connection,
                contextlib.suppress(OSError),
                connection.makefile("rb") as file,
                connection.makefile("wb") as out,
            ):
                serve(file, out)


class Memory:
    name, one_machine, data = "memory", True, b""

    def read(self, _latest: bool) -> bytes:
        return self.data

    @contextlib.contextmanager
    def lock(self) -> Iterator[Callable[[bytes], None]]:
        yield lambda data: setattr(self, "data", data)


def request(file: BinaryIO) -> tuple[bytes, bytes]:
    """Read the head and the body of a request."""
    head = b"".join(iter(file.readline, b"\r\n"))
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return head, file.read(int(length[1]) if length else 0)


def answer(content: bytes, kind: str = "image/jpeg", length: int | None = None) -> bytes:
    length = len(content) if length is None else length
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + content


# Up.


def test_a_path_bytes_or_an_open_file_goes_up_as_it_is(api: Api, picture: Path) -> None:
    with picture.open("rb") as opened:
        files: list[Any] = [picture, str(picture), opened]
        for file, filename in [*((file, None) for file in files), (PICTURE, "a.png")]:
            answer = api.upload(UPLOAD, file, filename)
            assert (answer["type"], type(answer["created_at"])) == ("image", int)
            assert api.download(get(answer["media_id"])) == PICTURE
        assert not opened.closed


def test_an_open_file_is_sent_from_where_it_stands(api: Api) -> None:
    file = io.BytesIO(PICTURE)
    file.seek(1000)
    assert api.download(get(media_id(api, content=file))) == PICTURE[1000:]


@pytest.mark.parametrize("kind", ["path", "bytes", "file"])
def test_after_a_refused_token_the_whole_file_is_sent_again(
    api: Api, fake_api: FakeApi, picture: Path, kind: str
) -> None:
    api.call("getcallbackip")
    fake_api.expire()
    with picture.open("rb") as opened:
        files: dict[str, Any] = {"path": picture, "bytes": PICTURE, "file": opened}
        answer = api.upload(UPLOAD, files[kind], "a.jpg")
    assert api.download(get(answer["media_id"])) == PICTURE
    assert [target.partition("?")[0] for _, target, _ in fake_api.calls[1:]] == [
        "/cgi-bin/media/upload",
        "/cgi-bin/media/upload",
        "/cgi-bin/media/get",
    ]


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("照片.jpg", "照片.jpg"),
        ('a"b\r\nc.jpg', "a%22b%0D%0Ac.jpg"),
        ("folder/张三.png", "张三.png"),
        ("\udcff.gif", "?.gif"),
    ],
)
def test_the_form_has_one_field_media_with_the_name_in_utf8_a_type_and_a_length(
    name: str, sent: str
) -> None:
    requests = []

    def serve(file: BinaryIO, out: BinaryIO) -> None:
        requests.append(request(file))
        out.write(answer(b'{"media_id": "m"}', "text/plain"))

    with Server(serve) as api:
        assert api.upload(UPLOAD, PICTURE, name) == {"media_id": "m"}
    head, body = requests[0]
    assert head.startswith(b"POST /cgi-bin/media/upload?type=image&access_token=")
    assert b"transfer-encoding" not in head.lower()
    kind = re.search(rb"(?i)content-type: (.*)\r\n", head)
    assert kind
    form: Any = email.message_from_bytes(b"Content-Type: " + kind[1] + b"\r\n\r\n" + body)
    (part,) = form.get_payload()
    assert part.get_payload(decode=True) == PICTURE
    assert part.get_content_type() == f"image/{sent[-3:].replace('jpg', 'jpeg')}"
    line = f'Content-Disposition: form-data; name="media"; filename="{sent}"\r\n'
    assert line.encode() in body


def pipe(_folder: Path) -> object:
    read, write = os.pipe()
    os.close(write)
    return os.fdopen(read, "rb")


def text_file(folder: Path) -> object:
    (folder / "a.txt").write_text("hello")
    return (folder / "a.txt").open()


def fifo(folder: Path) -> object:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


NO_FILES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: folder / "absent.jpg", "there is no file .*absent.jpg"),
    (lambda folder: folder, "there is no file"),
    (fifo, "there is no file .*fifo"),
    (lambda _: b"", "a.jpg has 0 bytes; WeChat takes 1 to 10485760"),
    (lambda _: bytes(10485761), "a.jpg has 10485761 bytes; WeChat takes 1 to 10485760"),
    (pipe, "a.jpg cannot be rewound"),
    (lambda _: object(), "a.jpg cannot be rewound"),
    (text_file, "a.jpg is not open in binary mode"),
]


@pytest.mark.parametrize(("make", "why"), NO_FILES)
def test_what_cannot_be_sent_is_refused_before_anything_is_sent(
    api: Api, fake_api: FakeApi, tmp_path: Path, make: Callable[[Path], object], why: str
) -> None:
    file: Any = make(tmp_path)
    with pytest.raises(ValueError, match=why):
        api.upload(UPLOAD, file, "a.jpg")
    assert (fake_api.calls, fake_api.fetches) == ([], [])
    if hasattr(file, "close"):
        file.close()


def test_a_file_without_a_name_needs_one(api: Api) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(PICTURE)
        for nameless in (PICTURE, io.BytesIO(PICTURE), file):
            with pytest.raises(ValueError, match="needs a filename, such as"):
                api.upload(UPLOAD, nameless)


@pytest.mark.parametrize(
    ("kind", "size", "name", "errcode"),
    [
        ("picture", 1, "a.jpg", 40004),
        ("image", 1, "a", 40005),
        ("voice", 1, "a.wav", 40005),
        ("voice", 2097153, "a.amr", 40010),
        ("thumb", 65537, "a.jpg", 40012),
    ],
)
def test_what_wechat_refuses_is_an_error_with_its_errcode(
    api: Api, kind: str, size: int, name: str, errcode: int
) -> None:
    with pytest.raises(ApiError) as caught:
        media_id(api, kind, bytes(size), name)
    assert caught.value.errcode == errcode


def test_a_file_that_shrinks_while_it_is_sent_is_an_error(api: Api, picture: Path) -> None:
    with pytest.raises(ApiError, match="the file became shorter while it was sent"):
        api.upload(UPLOAD, picture, progress=lambda _done, _whole: os.truncate(picture, 70000))


MEMORY = """
import sys, tracemalloc, wechat.api, wechat.config
api = wechat.api.from_config(wechat.config.load())
api.call("getcallbackip")
tracemalloc.start()
api.upload("media/upload?type=video", sys.argv[1])
print(tracemalloc.get_traced_memory()[1])
"""


def test_the_largest_file_takes_little_memory(fake_api: FakeApi, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(os.urandom(wechat.media.LARGEST_UPLOAD))
    process = run("-c", MEMORY, str(path), env=config_for(fake_api, tmp_path))
    out, err = process.communicate()
    assert err == ""
    assert int(out) < 1_000_000


def test_the_progress_of_an_upload_ends_with_the_whole_body(api: Api) -> None:
    seen: list[tuple[int, int]] = []
    api.upload(UPLOAD, PICTURE, "a.jpg", progress=lambda *both: seen.append(both))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    ((done, whole),) = {seen[-1]}
    assert done == whole > len(PICTURE)
    assert len(seen) > 3


def test_an_upload_that_takes_too_long_is_given_up_and_leaves_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = threading.Event()

    def serve(file: BinaryIO, _out: BinaryIO) -> None:
        while not over.wait(0.01):
            file.read(50_000)

    monkeypatch.setattr(wechat.api, "FILE_TIMEOUT", 0.3)
    before = threading.active_count()
    with Server(serve) as api:
        file = io.BytesIO(bytes(wechat.media.LARGEST_UPLOAD))
        with pytest.raises(ApiError, match=r"no answer from 127\.0\.0\.1:\d+: timed out after 0 s"):
            api.upload(UPLOAD, file, "a.jpg")
        until(lambda: threading.active_count() == before + 1)
        assert file.tell() < wechat.media.LARGEST_UPLOAD
        over.set()


def test_a_connection_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wechat.exchange, "STALLED", 0.2)
    over = threading.Event()
    with Server(lambda *_: over.wait(10)) as api:
        with pytest.raises(ApiError, match=r"no answer from .*timed out"):
            api.upload(UPLOAD, bytes(wechat.media.LARGEST_UPLOAD), "a.jpg")
        over.set()


# Down.


def test_a_file_is_written_whole_in_place_of_an_older_one(api: Api, tmp_path: Path) -> None:
    folder = tmp_path / "图片"
    folder.mkdir()
    (folder / "旧.jpg").write_bytes(b"old")
    for name in ("旧.jpg", "新.jpg", "长" * 80 + ".jpg"):
        assert api.download(get(media_id(api)), folder / name) == PICTURE
        assert (folder / name).read_bytes() == PICTURE
    assert len(list(folder.iterdir())) == 3
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((folder / "新.jpg").stat().st_mode) == 0o666 & ~umask


def test_a_file_may_be_in_the_working_directory(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    api.download(get(media_id(api)), "a.jpg")
    assert (tmp_path / "a.jpg").read_bytes() == PICTURE


def test_a_refused_token_is_replaced_and_the_file_asked_for_again(
    api: Api, fake_api: FakeApi
) -> None:
    wanted = get(media_id(api))
    fake_api.expire()
    assert api.download(wanted) == PICTURE


@pytest.mark.parametrize("kind", ["application/json; encoding=utf-8", "text/plain", "image/jpeg"])
def test_an_errcode_in_place_of_a_file_is_an_error_and_nothing_is_written(
    tmp_path: Path, kind: str
) -> None:
    refusal = answer(b'{"errcode": 40007, "errmsg": "invalid media_id"}', kind)
    (tmp_path / "a.jpg").write_bytes(b"old")
    with (
        Server(lambda file, out: (request(file), out.write(refusal))) as api,
        pytest.raises(ApiError, match=r"40007 .*: the MediaId is wrong") as caught,
    ):
        api.download(get("m"), tmp_path / "a.jpg")
    assert caught.value.errcode == 40007
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_video_is_answered_with_its_url(api: Api, fake_api: FakeApi, tmp_path: Path) -> None:
    wanted = get(media_id(api, "video", b"a film", "a.mp4"))
    answer = api.download(wanted, tmp_path / "a.mp4")
    assert isinstance(answer, dict)
    assert answer["video_url"].startswith(f"{fake_api.base}/video?")
    assert not (tmp_path / "a.mp4").exists()
    assert api.download(answer["video_url"].removeprefix(fake_api.base)) == b"a film"


def test_a_post_may_bring_a_file() -> None:
    requests = []

    def serve(file: BinaryIO, out: BinaryIO) -> None:
        requests.append(request(file))
        out.write(answer(PICTURE))

    with Server(serve) as api:
        assert api.download("material/get_material", body={"media_id": "媒"}) == PICTURE
    assert requests[0][0].startswith(b"POST ")
    assert requests[0][1] == '{"media_id": "媒"}'.encode()


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (answer(GARBAGE, "text/html"), "answered with something else than WeChat's JSON"),
        (answer(b""), "answered with something else than WeChat's JSON"),
        (answer(PICTURE, length=len(PICTURE) + 1), "no answer from .*: its answer broke off"),
        (b"HTTP/1.1 502 the-secret-token\r\n\r\n", "no answer from .*: HTTP status 502$"),
        (b"HTTP/1.1 302 x\r\nLocation: http://127.0.0.1/\r\n\r\n", "HTTP status 302$"),
        (b"the-secret-token\r\n\r\n", r"no answer from .*: \*\*\*"),
    ],
)
def test_what_is_no_whole_file_is_an_error_without_the_token(
    tmp_path: Path, sent: bytes, why: str
) -> None:
    with (
        Server(lambda file, out: (request(file), out.write(sent))) as api,
        pytest.raises(ApiError, match=why) as caught,
    ):
        api.download(get("m"), tmp_path / "a.jpg")
    assert "the-secret-token" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wechat.api, "LARGEST_DOWNLOAD", 2 * 1048576)

    def serve(file: BinaryIO, out: BinaryIO) -> None:
        request(file)
        out.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
        for _ in itertools.count():
            out.write(bytes(65536))

    with Server(serve) as api, pytest.raises(ApiError, match="its answer is over 2 MB"):
        api.download(get("m"))


def test_a_download_that_takes_too_long_is_given_up(
    api: Api, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = get(media_id(api))
    fake_api.drip = 0.01
    monkeypatch.setattr(wechat.api, "FILE_TIMEOUT", 0.3)
    start = time.monotonic()
    with pytest.raises(ApiError, match="timed out"):
        api.download(wanted)
    assert time.monotonic() - start < 2


def test_the_progress_of_a_download_ends_with_the_whole_file(api: Api) -> None:
    seen: list[tuple[int, int]] = []
    api.download(get(media_id(api)), progress=lambda *both: seen.append(both))
    assert seen[-1] == (len(PICTURE), len(PICTURE))
    assert len(seen) == 3


def test_call_names_what_saves_a_file(api: Api) -> None:
    with pytest.raises(
        ApiError, match=r"a file of \d+ bytes \(image/jpeg\); save it with download"
    ):
        api.call(get(media_id(api)))


@pytest.mark.parametrize("name", [".", "fifo", "link to a device"])
def test_what_is_no_file_is_not_replaced(api: Api, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link to a device").symlink_to("/dev/null")
    with pytest.raises(ValueError, match="is not a file that can be replaced"):
        api.download(get(media_id(api)), tmp_path / name)


FULL = """
import resource, sys, wechat.media
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    wechat.media.save(sys.argv[1], bytes(5000))
except OSError as error:
    print(error)
"""


def test_a_disk_that_is_full_leaves_the_old_file_alone(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"old")
    assert "too large" in run("-c", FULL, str(path)).communicate()[0]
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]


def test_a_folder_that_is_not_there_is_named(api: Api, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent/a\.jpg"):
        api.download(get(media_id(api)), tmp_path / "absent/a.jpg")


# The command.


def test_the_command_uploads_and_saves(
    fake_api: FakeApi, tmp_path: Path, picture: Path, run: Run
) -> None:
    env = config_for(fake_api, tmp_path)
    out, err = run("-m", "wechat.api", UPLOAD, f"@{picture}", env=env).communicate()
    assert err == ""
    wanted, saved = get(json.loads(out)["media_id"]), tmp_path / "saved.jpg"
    process = run("-m", "wechat.api", wanted, "-o", str(saved), env=env)
    assert (process.communicate(), process.returncode) == (("", ""), 0)
    assert saved.read_bytes() == PICTURE
    process = run("-m", "wechat.api", wanted, env=env)
    out, err = process.communicate()
    assert (out, err.count("\n"), process.returncode) == ("", 1, 1)
    assert f"a file of {len(PICTURE)} bytes (image/jpeg); save it with download(), or -o" in err


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([UPLOAD, "@absent.jpg"], 1, "wechat.api: there is no file absent.jpg"),
        ([UPLOAD, "@"], 1, "wechat.api: there is no file"),
        ([get("none"), "-o", "a.jpg"], 1, "wechat.api: errcode 40007"),
        (["getcallbackip", "-o", "a.json"], 0, ""),
        ([UPLOAD, "@a.jpg", "-o", "b.jpg"], 2, "-o is for a file that comes, @ for one that goes"),
    ],
)
def test_the_command_says_on_stderr_what_is_wrong_with_a_file(
    fake_api: FakeApi, tmp_path: Path, run: Run, arguments: list[str], status: int, said: str
) -> None:
    process = run("-m", "wechat.api", *arguments, env=config_for(fake_api, tmp_path))
    assert said in process.communicate()[1]
    assert process.returncode == status
    assert not Path("a.jpg").exists()
    assert not Path("a.json").exists()


def test_a_terminal_is_shown_the_progress(fake_api: FakeApi, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(bytes(3_000_000))
    terminal, stderr = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-m", "wechat.api", "media/upload?type=video", f"@{path}"],
        env={**os.environ, **config_for(fake_api, tmp_path), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        check=True,
    )
    os.close(stderr)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert json.loads(process.stdout)["type"] == "video"
    assert "1.0 of 3.0 MB\r" in shown
    assert shown.endswith("3.0 of 3.0 MB\r\n")


def test_ctrl_c_ends_the_command_quietly(tmp_path: Path, picture: Path, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        base = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = config_for(SimpleNamespace(base=base), tmp_path)  # type: ignore[arg-type]
        process = run("-m", "wechat.api", UPLOAD, f"@{picture}", env=env)
        connection, _ = server.accept()
        process.send_signal(signal.SIGINT)
        assert (process.communicate(), process.returncode) == (("", ""), 130)
        connection.close()


def test_help_says_how_files_go_up_and_down(run: Run) -> None:
    shown = run("-m", "wechat.api", "--help").communicate()[0]
    for word in ("media/upload?type=image", "@photo.jpg", "media/get?media_id=", "-o FILE"):
        assert word in shown
