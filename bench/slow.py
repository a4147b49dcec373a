"""A bot that takes its time: the seconds that a text begins with, 6 for 1 in 20 of ``wxsim load``.

Every run is noted in the file that RUNS names: the worker's process id and the text.
"""

import os
import time

import wxconfig
from wxmessage import Message
from wxserver import create_application


def reply(message: Message) -> str:
    """Note the run, wait, and send the text back."""
    text = str(message["Content"])
    with open(os.environ["RUNS"], "a", encoding="utf-8") as runs:
        runs.write(f"{os.getpid()} {text}\n")
    first = text.split()[0]
    if first.isdigit():
        time.sleep(int(first))
    elif first == "load" and int(message["MsgId"]) % 20 == 0:
        time.sleep(6)
    return text


application = create_application(wxconfig.load(), reply)
