"""Which addresses a webhook may be sent to: global unicast, and nothing that is a private address in disguise.

Not `ipaddress.is_global`: CPython has called some of the ranges below global, and it does not look into an IPv6 address
for the IPv4 address that a gateway on the way would send it to. The lists are IANA's special-purpose registries; what
they do not know is refused for IPv6 (only 2000::/3 is handed out at all) and allowed for IPv4 (all of it is).
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address

_REFUSED_4 = {
    IPv4Network("0.0.0.0/8"): "this network",
    IPv4Network("10.0.0.0/8"): "private",
    IPv4Network("100.64.0.0/10"): "shared address space",
    IPv4Network("127.0.0.0/8"): "loopback",
    IPv4Network("168.63.129.16/32"): "a cloud's own service",
    IPv4Network("169.254.0.0/16"): "link-local",
    IPv4Network("172.16.0.0/12"): "private",
    IPv4Network("192.0.0.0/24"): "protocol assignments",
    IPv4Network("192.0.2.0/24"): "documentation",
    IPv4Network("192.31.196.0/24"): "AS112",
    IPv4Network("192.52.193.0/24"): "AMT",
    IPv4Network("192.88.99.0/24"): "6to4 relays",
    IPv4Network("192.168.0.0/16"): "private",
    IPv4Network("192.175.48.0/24"): "AS112",
    IPv4Network("198.18.0.0/15"): "benchmarking",
    IPv4Network("198.51.100.0/24"): "documentation",
    IPv4Network("203.0.113.0/24"): "documentation",
    IPv4Network("224.0.0.0/4"): "multicast",
    IPv4Network("240.0.0.0/4"): "reserved",
}
_REFUSED_6 = {
    IPv6Network("::/128"): "unspecified",
    IPv6Network("::1/128"): "loopback",
    IPv6Network("::/96"): "an IPv4-compatible address",
    IPv6Network("::ffff:0:0:0/96"): "an IPv4-translated address",
    IPv6Network("64:ff9b:1::/48"): "local-use NAT64",
    IPv6Network("100::/64"): "discard-only",
    IPv6Network("100:0:0:1::/64"): "dummy prefix",
    IPv6Network("2001::/32"): "a Teredo address",
    IPv6Network("2001::/23"): "protocol assignments",
    IPv6Network("2001:db8::/32"): "documentation",
    IPv6Network("2002::/16"): "a 6to4 address",
    IPv6Network("2620:4f:8000::/48"): "AS112",
    IPv6Network("3ffe::/16"): "6bone, handed back",
    IPv6Network("3fff::/20"): "documentation",
    IPv6Network("5f00::/16"): "segment routing",
    IPv6Network("fc00::/7"): "private",
    IPv6Network("fe80::/10"): "link-local",
    IPv6Network("fec0::/10"): "site-local",
    IPv6Network("ff00::/8"): "multicast",
}
# These are IPv4 addresses, spelled in IPv6: what they carry decides.
_CARRIERS = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))
_GLOBAL_6 = IPv6Network("2000::/3")
_ISATAP = frozenset({0x0000_5EFE, 0x0200_5EFE, 0x0100_5EFE, 0x0300_5EFE})


def why_refused(address: Address) -> str | None:
    """None when a webhook may be sent there; else what the address is, in words for its owner."""
    if isinstance(address, IPv4Address):
        return _within(address)
    if address.scope_id is not None:
        return "bound to an interface"
    for carrier in _CARRIERS:
        if address in carrier:
            carried = why_refused(_low_32(address))
            return carried and f"{carried}, inside an IPv6 address"
    for network, what in _REFUSED_6.items():
        if address in network:
            return what
    if address not in _GLOBAL_6:
        return "not global unicast"
    if (int(address) >> 32) & 0xFFFF_FFFF in _ISATAP:
        carried = why_refused(_low_32(address))
        return carried and f"{carried}, inside an ISATAP address"
    return None


def _within(address: IPv4Address) -> str | None:
    return next((what for network, what in _REFUSED_4.items() if address in network), None)


def _low_32(address: IPv6Address) -> IPv4Address:
    return IPv4Address(int(address) & 0xFFFF_FFFF)
