"""A bot that takes as many seconds as a text begins with, and sends it back.

Every run is noted in the file that RUNS names: the worker's process id and the text.
"""

import os
import time

import wechat.config
from wechat.message import Message
from wxserver import create_application


def reply(message: Message) -> str:
    """Note the run, wait, and send the text back."""
    text = str(message["Content"])
    with open(os.environ["RUNS"], "a", encoding="utf-8") as runs:
        runs.write(f"{os.getpid()} {text}\n")
    first = text.split()[0]
    if first.isdigit():
        time.sleep(int(first))
    return text


application = create_application(wechat.config.load(), reply)
