"""Signatures and the encrypted modes: each side's half beside the other's.

Sources of the rules: the platform's 接入指南 (verifying the server) and 消息加解密说明.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wechat.config import Config

BLOCK = 32  # bytes; the platform pads to twice the block of AES


class DecryptError(ValueError):
    """An Encrypt cannot be decrypted. The text is for the log: a sender must not learn why."""


def sign(token: str, *parts: str) -> str:
    """Return WeChat's signature: 40 hex digits of SHA-1 over Token and parts, sorted and joined.

    Args:
        token: the callback's Token.
        parts: timestamp and nonce as they stand in the query; of an encrypted message its Encrypt
            too. The platform sorts bytes; Python sorts code points, the same order in UTF-8.
    """
    digest = hashlib.sha1(usedforsecurity=False)
    for part in sorted((token, *parts)):  # one by one: an Encrypt is not copied whole
        digest.update(part.encode())
    return digest.hexdigest()


def verify(signature: str, token: str, *parts: str) -> bool:
    """Tell in constant time whether ``signature`` is the one that ``sign`` makes.

    An empty Token verifies nothing: anybody can sign with it.
    """
    return bool(token) and hmac.compare_digest(sign(token, *parts).encode(), signature.encode())


def find_encrypt(body: bytes) -> str:
    """Return the Encrypt of an encrypted message, before anything is known of its sender.

    It is the last one: in compatible mode the readable message, in which a follower may have typed
    anything, stands before it.

    Raises:
        DecryptError: there is none.
    """
    start = body.rfind(b"<Encrypt>")
    end = body.find(b"</Encrypt>", start)
    if start < 0 or end < 0:
        raise DecryptError("the body has no Encrypt")
    encrypt = body[start + len(b"<Encrypt>") : end].strip()
    return encrypt.removeprefix(b"<![CDATA[").removesuffix(b"]]>").decode("latin-1")


def envelope(encrypt: str, token: str, nonce: str, now: float) -> dict[str, str | int]:
    """Return the fields of an encrypted answer; ``now``: Unix time in seconds."""
    timestamp = int(now)
    signature = sign(token, str(timestamp), nonce, encrypt)
    return {"Encrypt": encrypt, "MsgSignature": signature, "TimeStamp": timestamp, "Nonce": nonce}


class MessageCipher:
    """Encrypts and decrypts the messages of one account, with AES-256-CBC of ``cryptography``.

    Args:
        encoding_aes_key: the console's EncodingAESKey, 43 characters.
        appid: the account's AppID, which stands inside every encrypted message.

    Raises:
        ValueError: the key does not decode to 32 bytes, or there is no AppID.
        ModuleNotFoundError: ``cryptography`` is not installed.
    """

    def __init__(self, encoding_aes_key: str, appid: str) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        if len(encoding_aes_key) != 43 or not appid:
            raise ValueError("an EncodingAESKey of 43 characters and an AppID are needed")
        key = base64.b64decode(encoding_aes_key + "=", validate=True)
        self._aes = Cipher(algorithms.AES(key), modes.CBC(key[:16]))
        self._appid = appid.encode()

    def encrypt(self, message: bytes, random: bytes = b"") -> str:
        """Return the Encrypt of ``message``; ``random`` is 16 bytes, new ones by default."""
        content = (random or os.urandom(16)) + len(message).to_bytes(4, "big") + message
        content += self._appid
        pad = BLOCK - len(content) % BLOCK
        encryptor = self._aes.encryptor()
        data = encryptor.update(content + bytes([pad]) * pad) + encryptor.finalize()
        return base64.b64encode(data).decode()

    def decrypt(self, encrypt: str) -> bytes:
        """Return the message in ``encrypt``, whose signature has been verified.

        Raises:
            DecryptError: no base64, no whole blocks, or a padding, length or AppID that is wrong.
        """
        try:
            data = base64.b64decode(encrypt, validate=True)
        except ValueError:
            raise DecryptError("Encrypt is not base64") from None
        if not data or len(data) % BLOCK:
            raise DecryptError(f"Encrypt is not whole blocks of {BLOCK} bytes")
        decryptor = self._aes.decryptor()
        data = decryptor.update(data) + decryptor.finalize()
        pad = data[-1]
        if not 1 <= pad <= BLOCK or not data.endswith(bytes([pad]) * pad):
            raise DecryptError("wrong padding; is encoding_aes_key the one in WeChat's console?")
        content = data[16:-pad]  # the first 16 bytes are random
        end = 4 + int.from_bytes(content[:4], "big")
        if not 4 < end <= len(content):
            raise DecryptError("the length inside is wrong")
        if content[end:] != self._appid:
            raise DecryptError("the AppID inside is not [wechat] appid")
        return content[4:end]


def from_config(config: Config) -> MessageCipher | None:
    """Return the cipher of the account of config.ini, or None when ``encryption`` is plain.

    Raises:
        ConfigError: ``cryptography`` is not installed.
    """
    if config.encryption == "plain":
        return None
    try:
        return MessageCipher(config.encoding_aes_key, config.appid)
    except ModuleNotFoundError:
        from wechat.config import ConfigError

        raise ConfigError(
            f"[wechat] encryption = {config.encryption} needs the package cryptography:"
            " pip install '.[safe]'"
        ) from None
