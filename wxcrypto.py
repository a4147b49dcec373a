"""Signatures and the encrypted modes: each side's half beside the other's.

Sources of the rules: the platform's 接入指南 (verifying the server) and 消息加解密说明.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wxconfig import Config

BLOCK = 32  # bytes; the platform pads to twice the block of AES
_PADDING = [bytes([size]) * size for size in range(BLOCK + 1)]


class DecryptError(ValueError):
    """An Encrypt cannot be decrypted. The text is for the log: a sender must not learn why."""


def sign(token: str, *parts: str) -> str:
    """Return WeChat's signature: 40 hex digits of SHA-1 over Token and parts, sorted and joined.

    ``parts`` are timestamp and nonce as they stand in the query. The platform sorts bytes;
    Python sorts code points, which is the same order in UTF-8.
    """
    return hashlib.sha1(
        "".join(sorted((token, *parts))).encode(), usedforsecurity=False
    ).hexdigest()


def verify(signature: str, token: str, *parts: str) -> bool:
    """Tell in constant time whether ``signature`` is the one that ``sign`` makes.

    An empty Token verifies nothing: anybody can sign with it.
    """
    return bool(token) and hmac.compare_digest(sign(token, *parts).encode(), signature.encode())


class MessageCipher:
    """Encrypts and decrypts the messages of one account, with AES-256-CBC of ``cryptography``.

    To set AES up takes longer than to use it, so that is done once for all messages. In CBC a block
    depends on the one before, which for the first one is the key's first half: a decryptor that has
    worked before is given that first and what comes of it is thrown away. An encryptor is not: it
    goes on from the last block, which makes the 16 bytes that have to be random anyway.

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
        self._iv, self._appid = key[:16], appid.encode()
        self._cipher = Cipher(algorithms.AES(key), modes.CBC(self._iv))
        self._decryptor, self._encryptor = self._cipher.decryptor(), self._cipher.encryptor()
        self._encryptor.update(os.urandom(16))
        self._lock = threading.Lock()

    def encrypt(self, message: bytes, random: bytes = b"") -> str:
        """Return the Encrypt of ``message``; ``random`` is 16 bytes, new ones by default."""
        content = (random or bytes(16)) + len(message).to_bytes(4, "big") + message + self._appid
        padding = _PADDING[BLOCK - len(content) % BLOCK]
        with self._lock:
            encryptor = self._cipher.encryptor() if random else self._encryptor
            data = encryptor.update(content + padding)
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
        with self._lock:
            data = self._decryptor.update(self._iv + data)[16:]
        pad = data[-1]
        if not 1 <= pad <= BLOCK or not data.endswith(_PADDING[pad]):
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
        from wxconfig import ConfigError

        raise ConfigError(
            f"[wechat] encryption = {config.encryption} needs the package cryptography:"
            " pip install '.[safe]'"
        ) from None
