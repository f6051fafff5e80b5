"""One rule for every name that a guest has chosen: each has one spelling, and no two the same."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.names import read_back, written

# Bytes as they come, and what a guest would try: text that looks escaped, halves of characters, what a screen obeys.
ODD = st.sampled_from(
    [b"%", b"%25", b"%FF", b"\xff", b"\xc3", b"\xa9", "é".encode(), "\u202e".encode(), b"\n", b"/", b"a"]
)
NAMES = st.binary(max_size=20) | st.lists(ODD, max_size=6).map(b"".join)


@pytest.mark.parametrize(
    ("raw", "spelling"),
    [
        (b"out/report.json", "out/report.json"),
        ("out/Zoë Ω 日本.txt".encode(), "out/Zoë Ω 日本.txt"),
        (b"100% sure", "100%25 sure"),
        (b"%41", "%2541"),
        (b"caf\xe9", "caf%E9"),
        (b"two\nlines\t\x7f\x00", "two%0Alines%09%7F%00"),
        ("gpj.\u202eexe".encode(), "gpj.%E2%80%AEexe"),
        ("a\u2028b\u200b\ufeff".encode(), "a%E2%80%A8b%E2%80%8B%EF%BB%BF"),
        (b"\xed\xa0\x80", "%ED%A0%80"),
        (b"\xc0\xaf", "%C0%AF"),
        ("e\u0301".encode(), "e\u0301"),
    ],
)
def test_the_rule_by_example(raw: bytes, spelling: str) -> None:
    assert written(raw) == spelling


@given(NAMES)
def test_a_spelling_is_read_back_to_the_very_bytes(raw: bytes) -> None:
    """So no two names share one."""
    assert read_back(written(raw)) == raw


@given(NAMES)
def test_a_spelling_is_plain_text_on_one_line(raw: bytes) -> None:
    spelling = written(raw)
    spelling.encode()
    assert {unicodedata.category(char)[0] for char in spelling} <= set("LMNPSZ")
    assert not any(unicodedata.category(char) in ("Zl", "Zp") for char in spelling)
    assert spelling.count("/") == raw.count(b"/")


@given(NAMES)
def test_what_needs_no_escape_stands_as_it_is(raw: bytes) -> None:
    spelling = written(raw)
    assert ("%" in spelling) or spelling.encode() == raw


def test_control_an_escape_that_spares_the_percent_sign_gives_two_names_one_spelling() -> None:
    def spares(raw: bytes) -> str:
        return "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in raw)

    assert spares(b"\xff") == spares(b"%FF")
    assert written(b"\xff") != written(b"%FF")
