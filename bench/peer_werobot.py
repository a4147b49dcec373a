"""The same echo with WeRoBot, as its documentation deploys it: the robot's own WSGI callable."""

import os
from typing import Any

import werobot

robot = werobot.WeRoBot(token=os.environ["WX_TOKEN"])
robot.config["SESSION_STORAGE"] = False


def echo(message: Any) -> Any:
    """Send a text back."""
    return message.content


robot.add_handler(echo, type="text")

application = robot.wsgi
