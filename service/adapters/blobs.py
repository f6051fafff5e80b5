"""Bytes by content digest in a directory, apart for each tenant.

A blob is written under another name in a private directory, flushed to the disk, and renamed into place, so that it is
complete or absent, also after a power cut. Nothing of a tenant is shared with another, not even equal bytes: that
somebody has uploaded the same cannot be found out.

    <root>/blobs/<hash of the tenant's name>/<hex of the digest>
    <root>/staging/<random>/                  one for each upload in progress, locked by the process that owns it
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from service.core.errors import NotFound, StorageFull, TooLarge

_DIGEST = re.compile(r"^sha256:([0-9a-f]{64})$", re.ASCII)
_CHUNK_BYTES = 256 * 1024
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class FileBlobs:
    """Implements ports.Blobs. Several processes may share one root; it belongs to this user alone (mode 0700)."""

    def __init__(self, root: Path) -> None:
        """Makes what is missing below `root`, and removes what crashed processes left in staging."""
        self._blobs = root / "blobs"
        self._staging = root / "staging"
        for directory in (root, self._blobs, self._staging):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_stale_staging()

    def put_file(self, tenant: str, path: Path, digest: str) -> None:
        """Take `path`, a finished file in a `staging()` directory, as `digest`, which the caller has computed.

        On the disk when this returns: a run that was answered with 202 has its bundle even after a power cut. Raises
        StorageFull.
        """
        final = self._place(tenant, digest)
        with _storage_full():
            self._make_home(final.parent)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.rename(final)
            _flush_directory(final.parent)

    def put_bytes(self, tenant: str, data: bytes) -> str:
        digest, _ = self.put_stream(tenant, BytesIO(data), max_bytes=len(data))
        return digest

    def put_stream(self, tenant: str, source: BinaryIO, *, max_bytes: int) -> tuple[str, int]:
        """-> digest and size of all that `source` gives. Raises TooLarge past `max_bytes`, StorageFull; then nothing
        is kept. Unlike a bundle, the name may be lost by a power cut that follows: complete, or absent."""
        with self.staging() as directory:
            partial = directory / "partial"
            digest, size = _copy(source, partial, max_bytes=max_bytes)
            final = self._place(tenant, digest)
            self._make_home(final.parent)
            partial.rename(final)
        return digest, size

    def path(self, tenant: str, digest: str) -> Path:
        """Raises NotFound, also for what is not a digest."""
        path = self._place(tenant, digest)
        if not path.is_file():
            raise NotFound
        return path

    def delete(self, tenant: str, digest: str) -> None:
        """Absent is success."""
        with suppress(NotFound):
            self._place(tenant, digest).unlink(missing_ok=True)

    def older_than(self, tenant: str, age: timedelta) -> Sequence[str]:
        until = time.time() - age.total_seconds()
        try:
            entries = list(os.scandir(self._home(tenant)))
        except FileNotFoundError:
            return []
        return sorted(f"sha256:{entry.name}" for entry in entries if _stored_at(entry) <= until)

    def discard(self, tenant: str, digest: str, *, age: timedelta) -> bool:
        """It is moved aside first, and what was moved is judged: between a look at the file and its removal somebody
        could put a new one in its place. One that is too young after all is put back, unless there is yet a newer."""
        try:
            place = self._place(tenant, digest)
        except NotFound:
            return False
        with self._stage() as directory:
            aside = directory / "discarded"
            try:
                place.rename(aside)
            except FileNotFoundError:
                return False
            if aside.stat().st_mtime <= time.time() - age.total_seconds():
                return True
            with suppress(FileExistsError):
                place.hardlink_to(aside)
            return False

    def clear(self, tenant: str) -> None:
        """Absent is success; what a writer puts there meanwhile is left for the next time."""
        home = self._home(tenant)
        with self._stage() as directory, suppress(FileNotFoundError):
            home.rename(directory / "cleared")

    def staging(self) -> AbstractContextManager[Path]:
        """A new directory with mode 0700, removed at the end. A full disk inside the block is StorageFull."""
        return self._stage()

    @contextmanager
    def _stage(self) -> Iterator[Path]:
        with _storage_full():
            directory, lock = self._locked_directory()
            try:
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(lock)

    def _locked_directory(self) -> tuple[Path, int]:
        """A directory that `_remove_stale_staging` of another process lets be: its lock ends with its owner."""
        while True:
            directory = self._staging / secrets.token_hex(16)
            directory.mkdir(mode=0o700)
            # A cleaner that came between the two lines has locked it first, or has removed it.
            if (lock := _lock(directory)) is not None:
                return directory, lock

    def _remove_stale_staging(self) -> None:
        for directory in self._staging.iterdir():
            if (lock := _lock(directory)) is not None:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(lock)

    def _place(self, tenant: str, digest: str) -> Path:
        """Neither the tenant's name nor anything but hex ever stands in a path."""
        match = _DIGEST.match(digest)
        if match is None:
            raise NotFound
        return self._home(tenant) / match[1]

    def _home(self, tenant: str) -> Path:
        return self._blobs / hashlib.sha256(tenant.encode()).hexdigest()

    def _make_home(self, directory: Path) -> None:
        if not directory.is_dir():
            directory.mkdir(mode=0o700, exist_ok=True)
            _flush_directory(self._blobs)


def _stored_at(entry: os.DirEntry[str]) -> float:
    """Seconds since the epoch; never, for what is gone by now."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return float("inf")


def _copy(source: BinaryIO, to: Path, *, max_bytes: int) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        while chunk := source.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > max_bytes:
                raise TooLarge(f"more than {max_bytes} bytes", extra={"max_bytes": max_bytes})
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            digest.update(chunk)
        os.fsync(file.fileno())
    return f"sha256:{digest.hexdigest()}", size


def _lock(directory: Path) -> int | None:
    """-> an open descriptor that holds the lock, or None when another holds it or the directory is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull("there is no room left for uploads and results") from error
        raise
