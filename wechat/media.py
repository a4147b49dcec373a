"""Files: sent to WeChat as a multipart form, and saved whole.

Source of the rules: the platform's 新增临时素材. It does not say that WeChat answers 41005 to a
filename in the form of RFC 2231 (``filename*=``), 40005 to one without .jpg, .mp3 and so on, and
HTTP status 412 to a body without Content-Length.
"""

from __future__ import annotations

import contextlib
import io
import mimetypes
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO, TypeAlias

LARGEST_UPLOAD = 10 * 1048576  # bytes; the platform's limit for pictures and videos
PIECE = 65536  # bytes of a file that are in memory at a time

StrPath: TypeAlias = str | os.PathLike[str]
File: TypeAlias = StrPath | bytes | BinaryIO
_ESCAPES = {ord('"'): "%22", ord("\r"): "%0D", ord("\n"): "%0A"}  # as browsers write them


class Form:
    """A body of one file in the field ``media``. Every iteration reads it from its beginning.

    Args:
        file: open in binary mode; it is sent from where it stands to its end.
        filename: its ending tells WeChat what kind of file this is.

    Raises:
        ValueError: the file is empty, over ``LARGEST_UPLOAD``, not binary, or cannot be rewound.
    """

    def __init__(self, file: BinaryIO, filename: str) -> None:
        try:
            start = file.tell()
            file.seek(0, os.SEEK_END)
            size = file.tell() - start
        except (AttributeError, OSError):
            raise ValueError(f"{filename} cannot be rewound; pass its bytes") from None
        if file.read(0) != b"":
            raise ValueError(f"{filename} is not open in binary mode")
        if not 0 < size <= LARGEST_UPLOAD:
            raise ValueError(f"{filename} has {size} bytes; WeChat takes 1 to {LARGEST_UPLOAD}")
        boundary = secrets.token_hex(16)
        kind = mimetypes.guess_type(filename)[0] or "application/octet-stream"
        self._head = (
            f"--{boundary}\r\nContent-Disposition: form-data;"
            f' name="media"; filename="{filename.translate(_ESCAPES)}"\r\n'
            f"Content-Type: {kind}\r\n\r\n"
        ).encode(errors="replace")
        self._tail = f"\r\n--{boundary}--\r\n".encode()
        self._file, self._start, self._size = file, start, size
        self.length = len(self._head) + size + len(self._tail)  # bytes of the body
        self.headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(self.length),
        }

    def __iter__(self) -> Iterator[bytes]:
        """Read the body. OSError: the file cannot be read, or is shorter than it was."""
        self._file.seek(self._start)
        yield self._head
        left = self._size
        while left:
            piece = self._file.read(min(left, PIECE))
            if not piece:
                raise OSError("the file became shorter while it was sent")
            yield piece
            left -= len(piece)
        yield self._tail


@contextlib.contextmanager
def open_form(file: File, filename: str | None = None) -> Iterator[Form]:
    """Make a form of a file.

    Raises:
        ValueError: it is no file, or has no name, or see ``Form``.
        OSError: the file cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        name: object = getattr(file, "name", None)  # a number, of a file without a name
        if isinstance(file, bytes):
            file = io.BytesIO(file)
        elif isinstance(file, (str, os.PathLike)):
            name = os.fspath(file)
            if not os.path.isfile(file):  # to open a pipe would wait for its other end
                raise ValueError(f"there is no file {name}")
            file = stack.enter_context(open(file, "rb"))
        name = filename or name
        if not isinstance(name, str):
            raise ValueError("the file needs a filename, such as photo.jpg")
        yield Form(file, os.path.basename(name))


def save(path: StrPath, content: bytes) -> None:
    """Write ``content`` to the file ``path``, whole or not at all.

    Raises:
        ValueError: ``path`` is a folder, a device or the like.
        OSError: the file cannot be written.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)} is not a file that can be replaced")
    part = f"{os.fspath(path)}.{secrets.token_hex(4)}"
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)
