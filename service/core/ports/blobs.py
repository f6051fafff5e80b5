"""What the logic asks of the store of bytes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Protocol


class Blobs(Protocol):
    """Bytes by content digest, apart for each tenant. Writes are complete or absent."""

    def put_file(self, tenant: str, path: Path, digest: str) -> None:
        """Take a finished temporary file (same file system) as `sha256:...`; moved, or dropped when it is known."""
        ...

    def put_bytes(self, tenant: str, data: bytes) -> str: ...
    def put_stream(self, tenant: str, source: BinaryIO, *, max_bytes: int) -> tuple[str, int]: ...
    def path(self, tenant: str, digest: str) -> Path: ...  # NotFound
    def delete(self, tenant: str, digest: str) -> None: ...
    def older_than(self, tenant: str, age: timedelta) -> Sequence[str]:
        """Digests of those that were stored so long ago, by the clock that dates files."""
        ...

    def discard(self, tenant: str, digest: str, *, age: timedelta) -> bool:
        """Delete one that was stored so long ago. One that somebody stores again at this instant stays. -> whether it
        was deleted."""
        ...

    def clear(self, tenant: str) -> None:
        """Delete all that the tenant has."""
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """A private directory on the same file system, gone with its contents when the context ends."""
        ...
