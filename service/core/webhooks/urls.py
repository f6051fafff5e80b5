"""What a webhook's URL may be, read by rules of our own: where parsers differ, a URL means two things.

Only the plain spelling is accepted: ASCII, no user, no fragment, a host name of letters, digits and hyphens or an
address in its usual form. So what was judged is what is connected to, whoever reads it.
"""

import re
from collections.abc import Iterable
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from pydantic import BaseModel, ConfigDict

from service.core.webhooks.addresses import Address, why_refused

MAX_URL = 2048
PORTS = frozenset({443, 8443})
_DEFAULT_PORT = {"https": 443, "http": 80}
_URL = re.compile(r"(https?)://([^/?#\\]*)(/[^?#\\]*)?(\?[^#\\]*)?", re.ASCII | re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:@\[\]]+)(?::([0-9]{1,5}))?", re.ASCII)
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_PAIR = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", re.ASCII)
# Names that never leave a host or a site; what such a name resolves to is judged in any case.
_INSIDE = ("localhost", "local", "internal", "home.arpa", "onion", "invalid", "alt")

Pairs = frozenset[tuple[str, int]]


class UrlRefused(ValueError):
    """The message says what is wrong and what would be right."""


class Target(BaseModel):
    """Where a delivery goes. `address` when the URL names one, then nothing is resolved. `excepted`: the operator has
    named this very host and port, so neither scheme, port nor address are judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: str
    host: str
    port: int
    path: str
    """With the query, as it goes into the request."""
    address: IPv4Address | IPv6Address | None = None
    excepted: bool = False

    @property
    def authority(self) -> str:
        """For the Host header: without the port where that is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORT[self.scheme] else f"{host}:{self.port}"


def read_pairs(text: str) -> Pairs:
    """`HOST:PORT,HOST:PORT`, with IPv6 in brackets. Raises ValueError."""
    pairs = set()
    for word in filter(None, (word.strip() for word in text.split(","))):
        found = _PAIR.fullmatch(word)
        if found is None or not 0 < int(found[2]) < 65536:
            raise ValueError(f"{word!r} should be HOST:PORT, or [ADDRESS]:PORT for IPv6")
        pairs.add((_spelled(found[1]), int(found[2])))
    return frozenset(pairs)


def judge_url(url: str, *, excepted: Pairs = frozenset()) -> Target:
    """Read it, and judge all that can be judged without resolving its name. Raises UrlRefused."""
    if len(url) > MAX_URL:
        raise UrlRefused(f"should have at most {MAX_URL} characters")
    if not all("!" <= letter <= "~" for letter in url):
        raise UrlRefused("should be ASCII without spaces: a name as xn--..., other letters as %XX")
    if "#" in url:
        raise UrlRefused("should have no fragment (#...)")
    found = _URL.fullmatch(url)
    if found is None:
        raise UrlRefused("should be https://HOST/PATH")
    scheme, authority = found[1].lower(), found[2]
    if "@" in authority:
        raise UrlRefused("should have no user or password: the signature proves who sends")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise UrlRefused("should name a host, and a port as a number or none")
    host, port = _spelled(parts[1]), int(parts[2]) if parts[2] else _DEFAULT_PORT[scheme]
    path = (found[3] or "/") + (found[4] or "")
    is_excepted = (host, port) in excepted
    target = Target(
        scheme=scheme, host=host, port=port, path=path, address=_address(host, literal=parts[1].startswith("[")),
        excepted=is_excepted,
    )  # fmt: skip
    if not is_excepted:
        _judge(target)
    return target


def _spelled(host: str) -> str:
    """Lower case, brackets off, IPv6 in its shortest form."""
    if not host.startswith("["):
        return host.lower()
    try:
        return str(IPv6Address(host[1:-1]))
    except AddressValueError:
        raise UrlRefused("should have a valid IPv6 address between the brackets") from None


def _address(host: str, *, literal: bool) -> Address | None:
    """What the host says when it is an address. Raises UrlRefused for odd spellings of one, and for no name at all."""
    if literal:
        return IPv6Address(host)
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return IPv4Address(host)
        except AddressValueError:
            raise UrlRefused("should write an IPv4 address as four decimal numbers") from None
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise UrlRefused("should have a host name of letters, digits and hyphens, without a dot at its end")
    return None


def _judge(target: Target) -> None:
    if target.scheme != "https":
        raise UrlRefused("should begin with https://")
    if target.port not in PORTS:
        raise UrlRefused(f"should have no port but {' or '.join(map(str, sorted(PORTS)))}")
    if target.address is not None:
        if why := why_refused(target.address):
            raise UrlRefused(f"should not lead to {target.address}: {why}")
    elif "." not in target.host or any(target.host == name or target.host.endswith("." + name) for name in _INSIDE):
        raise UrlRefused("should have a host name that is known everywhere, not one of this host or site only")


def judge_answers(target: Target, answers: Iterable[Address]) -> str | None:
    """Every address that the name resolves to, or is. -> None when all are allowed; else why not, with the address."""
    if target.excepted:
        return None
    for address in answers:
        if why := why_refused(address):
            return f"{address}: {why}"
    return None
