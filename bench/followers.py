"""Many followers of slow replies, for both stores. ``make bench`` runs it.

400 ask at the same moment for what takes 12 s. Then 70 a second do so for 12 s, which is more than
the server has threads for. Each follower sends as WeChat does: up to three tries, each of five
seconds. Whoever got no answer writes once more afterwards, and should get the late answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import stores

import bench

TIMEOUT, TRIES = 5.0, 3  # of WeChat
SECONDS = 12  # that reply() takes
CONTENT = re.compile(rb"<Content><!\[CDATA\[(.*?)\]\]></Content>", re.DOTALL)

_msg_ids = itertools.count(time.time_ns() // 1000)


@dataclass
class Follower:
    """One follower, who sends one text after the other."""

    port: int
    name: str
    tries: int = 0  # that the last message took
    took: list[float] = field(default_factory=list)  # seconds, of each message

    async def send(self, text: str) -> str | None:
        """Send a text as WeChat does; return what is shown, None after three failed tries."""
        body = (
            "<xml><ToUserName><![CDATA[gh_97417a04a28d]]></ToUserName>"
            f"<FromUserName><![CDATA[{self.name}]]></FromUserName>"
            f"<CreateTime>{int(time.time())}</CreateTime><MsgType><![CDATA[text]]></MsgType>"
            f"<Content><![CDATA[{text}]]></Content><MsgId>{next(_msg_ids)}</MsgId></xml>"
        ).encode()
        began = time.monotonic()
        for self.tries in range(1, TRIES + 1):
            answer = b""
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                answer = await asyncio.wait_for(self._try(body), TIMEOUT)
            if is_whole(answer):
                self.took.append(time.monotonic() - began)
                content = CONTENT.search(answer)
                return content[1].decode() if content else ""
            # WeChat keeps its pace whatever a try is answered.
            await asyncio.sleep(max(began + self.tries * TIMEOUT - time.monotonic(), 0))
        return None

    async def _try(self, body: bytes) -> bytes:
        head = (
            f"POST /wx?{bench.query(openid=self.name)} HTTP/1.1\r\nHost: wx.example.com\r\n"
            f"Connection: close\r\nContent-Type: text/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(head.encode() + body)
            return await reader.read()
        finally:
            writer.close()


def is_whole(answer: bytes) -> bool:
    """Tell whether this is a whole 200: a worker may be killed while it sends one."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return head.startswith(b"HTTP/1.1 200 ") and length is not None and len(body) == int(length[1])


async def crowd(port: int, count: int, rate: float) -> tuple[Counter[str], list[str]]:
    """Let followers ask, ``rate`` a second, all at once if it is 0; return what came of it."""
    began, shown = time.monotonic(), Counter[str]()
    fast = Follower(port, f"fast{began}")

    async def ask(number: int) -> Follower | None:
        await asyncio.sleep(number / rate if rate else 0)
        follower, text = Follower(port, f"slow{began}-{number}"), f"{SECONDS} {began} {number}"
        answer = await follower.send(text)
        shown["answered" if answer == text else "told to wait" if answer else "failed"] += 1
        return None if answer == text else follower

    async def ask_fast() -> None:
        for number in range(20):
            shown["fast answered"] += await fast.send(f"0 {began} {number}") is not None
            await asyncio.sleep(1)

    meanwhile = asyncio.create_task(ask_fast())
    unanswered = await asyncio.gather(*(ask(number) for number in range(count)))
    await meanwhile
    last = Follower(port, f"last{began}")
    shown["the next is answered"] = await last.send(f"0 {began} next") is not None
    await asyncio.sleep(SECONDS + 2)  # until the last reply() has come back
    for follower in filter(None, unanswered):
        number = follower.name.partition("-")[2]
        text = await follower.send(f"0 {began} afterwards")
        shown["late"] += text == f"{SECONDS} {began} {number}"
    lines = Path(os.environ["RUNS"]).read_text().splitlines()
    runs = Counter(text for line in lines if (text := line.partition(" ")[2]).startswith("12 "))
    again = sum(times > 1 for text, times in runs.items() if f" {began} " in text)
    run = sum(f" {began} " in text for text in runs)
    return shown, [
        f"  answered in their window {shown['answered']}, told to wait {shown['told to wait']},"
        f" no answer {shown['failed']}; late, with the next message: {shown['late']}",
        f"  run {run}, run again {again}",
        f"  fast messages meanwhile: {shown['fast answered']} of 20 answered, in"
        f" {statistics.median(fast.took or [0]) * 1000:.0f} ms in the median,"
        f" {max(fast.took or [0]) * 1000:.0f} ms at most",
        f"  the next message afterwards: {(last.took or [TRIES * TIMEOUT])[0] * 1000:.0f} ms",
    ]


def main() -> None:
    """Run the benchmark and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--followers", type=int, default=400, help="who ask at once, default: 400")
    parser.add_argument(
        "--rate", type=float, default=70, help="a second, in the burst, default: 70"
    )
    arguments = parser.parse_args()
    own = Path(sys.executable).with_name("gunicorn")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=bench.SHM)))
        urls = {"files": ""}
        if shutil.which("redis-server"):
            urls["Redis"] = stack.enter_context(stores.redis_server(folder))
        for store, url in urls.items():
            os.environ["RUNS"] = str(folder / f"runs-{store}")
            with bench.serve(bench.ONCE, "slow", own, str(bench.HERE), folder, url) as server:
                crowds = {f"{arguments.followers} followers at once": (arguments.followers, 0.0)}
                burst = int(arguments.rate * SECONDS)
                crowds[f"{arguments.rate:.0f} a second for {SECONDS} s"] = (burst, arguments.rate)
                for name, (count, rate) in crowds.items():
                    print(f"\n{name}, reply() takes {SECONDS} s, {store}")
                    _, lines = asyncio.run(crowd(server.port, count, rate))
                    print("\n".join(lines))
                    print(
                        f"  memory of two workers: {bench.pss(server.workers()):.1f} MiB",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
