"""The signature, by the platform's worked examples."""

import hmac
from unittest.mock import Mock

import pytest

import wxcrypto


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
    assert wxcrypto.sign("AAAAA", timestamp, nonce) == signature
    assert wxcrypto.verify(signature, "AAAAA", timestamp, nonce)


def test_another_token_timestamp_or_nonce_is_not_verified() -> None:
    signature = wxcrypto.sign("AAAAA", "1714036504", "1514711492")
    assert not wxcrypto.verify(signature, "AAAAB", "1714036504", "1514711492")
    assert not wxcrypto.verify(signature, "AAAAA", "1714036505", "1514711492")
    assert not wxcrypto.verify(signature, "AAAAA", "1714036504", "1514711493")


def test_an_empty_token_verifies_nothing_not_even_its_own_signature() -> None:
    assert not wxcrypto.verify(wxcrypto.sign("", "1714036504", "1"), "", "1714036504", "1")


def test_signatures_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = Mock(wraps=hmac.compare_digest)
    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert not wxcrypto.verify("0" * 40, "AAAAA", "1714036504", "1514711492")
    compare.assert_called_once_with(b"f464b24fc39322e44b38aa78f5edd27bd1441696", b"0" * 40)


def test_the_parts_are_sorted_as_bytes() -> None:
    # U+FF5A comes before U+1F600 in UTF-8 (and after it in UTF-16).
    assert wxcrypto.sign("\uff5a", "\U0001f600") == wxcrypto.sign("\U0001f600", "\uff5a")
    assert wxcrypto.sign("", "\U0001f600", "\uff5a") == wxcrypto.sign("\uff5a\U0001f600")
