"""Keeps secrets that must be readable again: encrypted with a key that is not in the database.

Fernet (AES-128-CBC with HMAC-SHA256). The first key encrypts; the others still decrypt what was sealed before them, so
a key is replaced by putting a new one in front.
"""

from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from service.core.errors import BlastdoorError


class FernetBox:
    """Implements webhooks.ports.SecretBox. `keys`: 32 bytes each, URL-safe base64; at least one. Raises
    BlastdoorError for one that is none."""

    def __init__(self, keys: Sequence[str]) -> None:
        try:
            self._keys = MultiFernet([Fernet(key) for key in keys])
        except ValueError:  # its own message may quote the key
            raise BlastdoorError("BLASTDOOR_SECRETS_KEY should be Fernet keys, separated by commas") from None

    def seal(self, plain: str) -> str:
        return self._keys.encrypt(plain.encode()).decode("ascii")

    def unseal(self, sealed: str) -> str:
        try:
            return self._keys.decrypt(sealed.encode("ascii")).decode()
        except (InvalidToken, UnicodeError):
            raise BlastdoorError("a secret was sealed with a key that is not among BLASTDOOR_SECRETS_KEY") from None


def box_of(keys: str) -> FernetBox | None:
    """From the setting: keys separated by commas. None without any: then nothing can be sealed, and nothing is."""
    found = [key.strip() for key in keys.split(",") if key.strip()]
    return FernetBox(found) if found else None
