"""What the account answers. This is the file to edit.

A message is a dict of WeChat's own names; docs/replies.md shows how to write replies. Return a str
to answer with text, None to stay silent, or what a builder of wechat.message makes: text, image,
voice, video, music, news, transfer_customer_service.
"""

from wechat.message import Message, Reply, image, voice


def reply(message: Message) -> Reply:
    """Return the answer to one message or event of a follower."""
    match message:
        case {"MsgType": "text", "Content": str(content)}:
            return content
        case {"MsgType": "image", "MediaId": str(media_id)}:
            return image(media_id)
        case {"MsgType": "voice", "MediaId": str(media_id)}:
            return voice(media_id)
        case {"MsgType": "location", "Location_X": str(x), "Location_Y": str(y)}:
            return f"你的位置：纬度 {x}，经度 {y}。"
        case {"MsgType": "link", "Title": str(title)}:
            return f"收到链接：{title}"
        case {"MsgType": "event", "Event": "subscribe"}:
            return "欢迎关注！发文字、图片或语音，我会原样发回。"
    return None
