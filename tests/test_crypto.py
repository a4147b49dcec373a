"""Signatures and encryption, by the platform's worked examples."""

import base64
import hmac
from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from wechat.crypto import DecryptError, MessageCipher, sign, verify

KEY, APPID = "A" * 43, "wxba5fad812f8e6fb9"  # of the worked examples
ENCRYPT = (
    "+qdx1OKCy+5JPCBFWw70tm0fJGb2Jmeia4FCB7kao+/Q5c/ohsOzQHi8khUOb05JCpj0JB4RvQMkUyus8TPxLKJGQqcvZqz"
    "DpVzazhZv6JsXUnnR8XGT740XgXZUXQ7vJVnAG+tE8NUd4yFyjPy7GgiaviNrlCTj+l5kdfMuFUPpRSrfMZuMcp3Fn2Pede"
    "2IuQrKEYwKSqFIZoNqJ4M8EajAsjLY2km32IIjdf8YL/P50F7mStwntrA2cPDrM1kb6mOcfBgRtWygb3VIYnSeOBrebufAl"
    "r7F9mFUPAJGj04="
)
MESSAGE = (
    b'{"ToUserName":"gh_97417a04a28d","FromUserName":"o9AgO5Kd5ggOC-bXrbNODIiE3bGY",'
    b'"CreateTime":1714112445,"MsgType":"event","Event":"debug_demo","debug_str":"hello world"}'
)
RESPONSE = (
    "ELGduP2YcVatjqIS+eZbp80MNLoAUWvzzyJxgGzxZO/5sAvd070Bs6qrLARC9nVHm48Y4hyRbtzve1L32tmxSQ=="
)


@pytest.mark.parametrize(
    ("timestamp", "nonce", "signature"),
    [
        ("1714036504", "1514711492", "f464b24fc39322e44b38aa78f5edd27bd1441696"),
        ("1714037059", "486452656", "899cf89e464efb63f54ddac96b0a0a235f53aa78"),
    ],
)
def test_the_official_examples_are_signed_and_verified(
    timestamp: str, nonce: str, signature: str
) -> None:
    assert sign("AAAAA", timestamp, nonce) == signature
    assert verify(signature, "AAAAA", timestamp, nonce)


def test_another_token_timestamp_or_nonce_is_not_verified() -> None:
    signature = sign("AAAAA", "1714036504", "1514711492")
    assert not verify(signature, "AAAAB", "1714036504", "1514711492")
    assert not verify(signature, "AAAAA", "1714036505", "1514711492")
    assert not verify(signature, "AAAAA", "1714036504", "1514711493")


def test_an_empty_token_verifies_nothing_not_even_its_own_signature() -> None:
    assert not verify(sign("", "1714036504", "1"), "", "1714036504", "1")


def test_signatures_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = Mock(wraps=hmac.compare_digest)
    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert not verify("0" * 40, "AAAAA", "1714036504", "1514711492")
    compare.assert_called_once_with(b"f464b24fc39322e44b38aa78f5edd27bd1441696", b"0" * 40)


def test_the_parts_are_sorted_as_bytes() -> None:
    # U+FF5A comes before U+1F600 in UTF-8 (and after it in UTF-16).
    assert sign("\uff5a", "\U0001f600") == sign("\U0001f600", "\uff5a")
    assert sign("", "\U0001f600", "\uff5a") == sign("\uff5a\U0001f600")


def test_the_official_message_is_verified_and_decrypted() -> None:
    signature = "046e02f8204d34f8ba5fa3b1db94908f3df2e9b3"
    assert verify(signature, "AAAAA", "1714112445", "415670741", ENCRYPT)
    assert MessageCipher(KEY, APPID).decrypt(ENCRYPT) == MESSAGE


def test_the_official_response_is_encrypted_and_signed() -> None:
    cipher = MessageCipher(KEY, APPID)
    encrypt = cipher.encrypt(b'{"demo_resp":"good luck"}', b"707722b803182950")
    assert encrypt == RESPONSE
    signature = "1b9339964ed2e271e7c7b6ff2b0ef902fc94dea1"
    assert sign("AAAAA", "1713424427", "415670741", encrypt) == signature


@given(st.binary(min_size=1, max_size=200), st.text("AQgw", min_size=1, max_size=20))
def test_what_is_encrypted_is_decrypted_to_the_same(message: bytes, appid: str) -> None:
    cipher = MessageCipher("0123456789abcdefghijABCDEFGHIJ0123456789ab+", appid)
    assert cipher.decrypt(cipher.encrypt(message)) == message


def test_the_same_message_is_never_encrypted_the_same() -> None:
    cipher = MessageCipher(KEY, APPID)
    assert len({cipher.encrypt(MESSAGE) for _ in range(20)}) == 20


@pytest.mark.parametrize("key", ["", "A" * 42, "A" * 44, "A" * 42 + "!", "A" * 42 + "你"])
def test_a_key_that_is_not_32_bytes_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"EncodingAESKey|base64|ASCII"):
        MessageCipher(key, APPID)


def test_a_cipher_without_an_appid_is_refused() -> None:
    with pytest.raises(ValueError, match="AppID"):
        MessageCipher(KEY, "")


def raw(content: bytes) -> str:
    """Encrypt whole blocks as they are, padding and all."""
    key = base64.b64decode(KEY + "=")
    encryptor = Cipher(algorithms.AES(key), modes.CBC(key[:16])).encryptor()
    return base64.b64encode(encryptor.update(content) + encryptor.finalize()).decode()


def content(length: int, message: bytes = b"hello", appid: str = APPID) -> bytes:
    return b"r" * 16 + length.to_bytes(4, "big") + message + appid.encode()


def padded(data: bytes) -> bytes:
    pad = 32 - len(data) % 32
    return data + bytes([pad]) * pad


def test_the_blocks_of_these_tests_are_right_ones() -> None:
    assert MessageCipher(KEY, APPID).decrypt(raw(padded(content(5)))) == b"hello"


@pytest.mark.parametrize(
    ("encrypt", "why"),
    [
        ("", "blocks"),
        ("!!!!", "base64"),
        ("你好", "base64"),
        (RESPONSE[:-1], "base64"),
        (RESPONSE + "\n", "base64"),
        (base64.b64encode(b"x" * 33).decode(), "blocks"),
        (raw(padded(content(5)) + b"x" * 16), "blocks"),
        (raw(b"x" * 31 + b"\0"), "padding"),
        (raw(b"x" * 31 + b"\x21"), "padding"),
        (raw(b"x" * 62 + b"\x01\x02"), "padding"),
        (raw(b"\x20" * 32), "length"),
        (raw(padded(b"r" * 16)), "length"),
        (raw(padded(content(0, b""))), "length"),
        (raw(padded(content(24))), "length"),
        (raw(padded(content(2**32 - 1))), "length"),
        (raw(padded(content(4))), "AppID"),
        (raw(padded(content(6))), "AppID"),
        (raw(padded(content(5, appid=""))), "AppID"),
        (raw(padded(content(5, appid=APPID + "0"))), "AppID"),
        (MessageCipher(KEY, "wx0000000000000000").encrypt(b"hello"), "AppID"),
        (MessageCipher("B" * 43, APPID).encrypt(b"hello"), "padding|length|AppID"),
    ],
)
def test_what_is_not_encrypted_as_the_platform_does_is_refused_with_the_reason(
    encrypt: str, why: str
) -> None:
    with pytest.raises(DecryptError, match=why):
        MessageCipher(KEY, APPID).decrypt(encrypt)
