"""Signatures and the encrypted modes, in both directions.

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

BLOCK = 32  # bytes; the platform pads to twice the block size of AES


class DecryptError(ValueError):
    """A message cannot be decrypted. The text is for the log: the sender must not learn why."""


def sign(token: str, *parts: str) -> str:
    """Return WeChat's signature: 40 hex digits of SHA-1 over Token and parts, sorted and joined.

    Args:
        token: the callback's Token.
        parts: timestamp and nonce as they stand in the query, and the Encrypt of an encrypted
            message. The platform sorts bytes; Python's order of str is the same as in UTF-8.
    """
    signed = "".join(sorted((token, *parts))).encode()
    return hashlib.sha1(signed, usedforsecurity=False).hexdigest()


def verify(signature: str, token: str, *parts: str) -> bool:
    """Tell in constant time whether ``signature`` is what ``sign`` returns.

    It never is with an empty Token, with which anybody can sign.
    """
    return bool(token) and hmac.compare_digest(sign(token, *parts).encode(), signature.encode())


def find_encrypt(body: bytes) -> str:
    """Return the Encrypt of an encrypted message whose signature is not verified yet.

    In compatible mode the plain fields come first, and a follower may have typed an Encrypt there,
    so the last one counts.

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
    """Return the fields of an encrypted answer. ``now`` is Unix time in seconds."""
    timestamp = int(now)
    signature = sign(token, str(timestamp), nonce, encrypt)
    return {"Encrypt": encrypt, "MsgSignature": signature, "TimeStamp": timestamp, "Nonce": nonce}


class MessageCipher:
    """Encrypts and decrypts the messages of one account, with AES-256-CBC of ``cryptography``.

    Args:
        encoding_aes_key: the console's EncodingAESKey, 43 characters.
        appid: the account's AppID, which every encrypted message contains.

    Raises:
        ValueError: the key is not 43 characters of base64, or there is no AppID.
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
        """Return the message in ``encrypt``, whose signature must have been verified.

        Raises:
            DecryptError: it is no base64 or no whole blocks, or has the wrong padding, length or
                AppID.
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
