"""Keys: made once, shown once, kept as hashes.

A key is 32 random bytes, so nobody can search for the one behind a hash: SHA-256 does, and a slow hash (meant for words
that people choose) would only hand every caller a way to burn our CPU. Looking up by hash leaks nothing by its timing.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass

from service.core.errors import Unauthenticated
from service.core.ids import new_id
from service.core.ports.tenants import KeyRecord, TenantStore
from service.core.tenancy import KeyKind, Principal

PREFIXES = {KeyKind.TENANT: "bd_t_", KeyKind.SERVICE: "bd_s_", KeyKind.OPERATOR: "bd_a_"}
_RANDOM_BYTES = 32
_KEY = re.compile(r"bd_[tsa]_[A-Za-z0-9_-]{40,64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class MintedKey:
    """`key` exists here and nowhere else; `repr` does not show it."""

    id: str
    key: str

    def __repr__(self) -> str:
        return f"MintedKey(id={self.id!r})"


def mint(
    store: TenantStore, *, kind: KeyKind, tenant: str | None = None, service_id: str | None = None,
    minted_by: str = "api",
) -> MintedKey:  # fmt: skip
    """A new key for a tenant, for a service, or for an operator. The caller has checked that they exist."""
    minted = MintedKey(id=new_id("key"), key=PREFIXES[kind] + secrets.token_urlsafe(_RANDOM_BYTES))
    store.add_key(
        KeyRecord(
            id=minted.id, kind=kind, hash=key_hash(minted.key), tenant=tenant, service_id=service_id,
            minted_by=minted_by,
        )
    )  # fmt: skip
    return minted


def key_hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def authenticate(store: TenantStore, *, key: str) -> Principal:
    """Whom this key speaks for. Raises Unauthenticated; what cannot be a key never reaches the store."""
    principal = store.find_key(key_hash(key)) if _KEY.fullmatch(key) else None
    if principal is None:
        raise Unauthenticated("the key is not known, or was revoked")
    return principal


def is_valid(store: TenantStore, hash_: str) -> bool:
    """Whether a key that was accepted before still is. Raises Unavailable."""
    return store.find_key(hash_) is not None
