"""Signatures: the proof that a request comes from WeChat, and its making.

Source of the rules: the platform's 接入指南 (verifying the server).
"""

from __future__ import annotations

import hashlib
import hmac


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
