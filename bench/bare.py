"""The least that a WSGI callable can do: read the body, return a constant of an echo's size."""

from typing import Any

REPLY = (
    b"<xml><ToUserName><![CDATA[o9AgO5Kd5ggOC-bXrbNODIiE3bGY]]></ToUserName><FromUserName>"
    b"<![CDATA[gh_97417a04a28d]]></FromUserName><CreateTime>1714112445</CreateTime>"
    b"<MsgType><![CDATA[text]]></MsgType><Content><![CDATA[\xe4\xbd\xa0\xe5\xa5\xbd hello]]>"
    b"</Content></xml>"
)


def application(environ: Any, start_response: Any) -> list[bytes]:
    """Answer everything with the constant."""
    environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(REPLY)))]
    start_response("200 OK", headers)
    return [REPLY]
