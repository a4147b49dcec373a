"""What strangers without a signature cost. ``make bench`` runs it.

In safe mode with ``max_body`` raised to 1 MiB, 16 of them send as much at the same moment, and one
follower a message. A row for each kind of body.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import bench

STRANGERS = 16
SIZE = 1048576  # bytes


def bodies() -> dict[str, bytes]:
    """Return a body of each kind."""
    kinds = {
        "many elements": b"<a>b</a>",
        "many attributes": b'<a b="c" d="e"/>',
        "many bits of text": b"<![CDATA[a]]>&lt;b",
        "many Encrypts": b"<Encrypt>a</Encrypt>",
        "many unclosed Encrypts": b"<Encrypt>",
        "many ends of Encrypt": b"</Encrypt>",
    }
    made = {
        kind: b"<xml>" + bit * ((SIZE - 11) // len(bit)) + b"</xml>" for kind, bit in kinds.items()
    }
    made["one long Encrypt"] = b"<xml><Encrypt>" + b"A" * (SIZE - 31) + b"</Encrypt></xml>"
    made["random bytes"] = os.urandom(SIZE)
    return made


def post(port: int, query: str, body: bytes) -> tuple[int, float]:
    """Return the status of the answer, and the seconds until it was there."""
    began = time.monotonic()
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", f"/wx?{query}", body)
        return connection.getresponse().status, time.monotonic() - began
    finally:
        connection.close()


def peak(pids: list[int]) -> float:
    """Return the most memory that the processes ever had, in MiB, and begin anew."""
    total = 0
    for pid in pids:
        total += int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return total / 1024


def main() -> None:
    """Run the benchmark and print its rows."""
    own = Path(sys.executable).with_name("gunicorn")
    print(f"\n{STRANGERS} unsigned bodies of 1 MiB at once, safe mode")
    print(f"{'':24}{'MiB more':>10}{'s in all':>10}{'s of a follower':>17}")
    with (
        tempfile.TemporaryDirectory(dir=bench.SHM) as folder,
        bench.serve(
            bench.ENCRYPTED, "wxserver", own, str(bench.HERE), Path(folder), max_body=SIZE
        ) as server,
        ThreadPoolExecutor(STRANGERS + 1) as pool,
    ):
        wrong = bench.query(encrypt_type="aes", msg_signature="0" * 40)
        for kind, body in bodies().items():
            peak(server.workers())  # so that the next peak begins now
            before, began = peak(server.workers()), time.monotonic()
            sent = [pool.submit(post, server.port, wrong, body) for _ in range(STRANGERS)]
            status, follower = pool.submit(
                post, server.port, *bench.message(encrypted=True)
            ).result()
            statuses = {future.result()[0] for future in sent}
            took = time.monotonic() - began
            if status != 200 or statuses != {403}:
                raise RuntimeError(f"{kind}: {statuses} to strangers, {status} to the follower")
            more = peak(server.workers()) - before
            print(f"{kind:24}{more:10.1f}{took:10.2f}{follower:17.3f}", flush=True)


if __name__ == "__main__":
    main()
