"""The same echo with wechatpy and Flask, the way wechatpy's own example goes."""

import os
from typing import Any

from flask import Flask, abort, request
from wechatpy import create_reply, parse_message
from wechatpy.exceptions import InvalidSignatureException
from wechatpy.utils import check_signature

application = Flask(__name__)


def callback() -> Any:
    """Answer a verification with echostr, a text with itself."""
    query = request.args
    try:
        check_signature(
            os.environ["WX_TOKEN"], query["signature"], query["timestamp"], query["nonce"]
        )
    except InvalidSignatureException:
        abort(403)
    if request.method == "GET":
        return query["echostr"]
    message = parse_message(request.data)
    return create_reply(message.content, message).render()


application.add_url_rule("/wx", view_func=callback, methods=["GET", "POST"])
