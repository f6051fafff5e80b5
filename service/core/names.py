"""How a name that a guest has chosen is written down: the one rule, for every path in a run's record and in a URL.

The name's bytes are read as UTF-8. Written as `%XX` (each byte, two upper-case hexadecimal digits) are: bytes that are
no UTF-8; characters that are not shown as themselves, which is Unicode's categories Cc, Cf, Cs, Co, Cn, Zl and Zp
(controls, bidirectional and other format characters, private and unassigned ones, line and paragraph separators); and
`%` itself. All else stands as it is, spaces and slashes too. So every name has one spelling, no two names have the same
one, and a spelling is text on one line that any terminal, log and database shows and keeps as it is.
"""

import unicodedata
from urllib.parse import unquote_to_bytes

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def written(raw: bytes) -> str:
    """The spelling of a name or path: `100%25 sure`, `out/caf%E9`, `a%E2%80%AEb`, `two%0Alines`."""
    text = raw.decode("utf-8", "surrogateescape")
    if text.isascii() and text.isprintable() and "%" not in text:
        return text
    return "".join(_spelled(char) if char == "%" or unicodedata.category(char) in _HIDDEN else char for char in text)


def read_back(spelling: str) -> bytes:
    """The name that `written` spelled so."""
    return unquote_to_bytes(spelling)


def _spelled(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))
