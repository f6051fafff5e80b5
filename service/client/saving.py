"""A guest's files on this machine: beneath one new directory and nowhere else.

Names and bytes are a stranger's, by way of a service that might be lied to as well. The directory is made here, so that
nothing stands in it that could lead elsewhere; every file is made new, through no link (`service.intake.beneath`), is
never executable, and is compared with the digest that the run's record has.
"""

import base64
import binascii
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from service.client.errors import CannotSave, ClientError
from service.intake.beneath import Beneath

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SHA256 = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")

Open = Callable[[str], AbstractContextManager[Iterator[bytes]]]


def save_artifacts(open_: Open, artifacts: Sequence[Mapping[str, Any]], directory: Path) -> list[str]:
    """-> the paths that were saved. Raises ClientError, OSError; what was saved whole before that stays."""
    paths = [str(artifact["path"]) for artifact in artifacts]
    for path in paths:
        _insist_on_harmless(path)
    directory.mkdir(mode=0o700)
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with Beneath(root) as beneath:
            for path, artifact in zip(paths, artifacts, strict=True):
                with open_(path) as pieces:
                    bytes_ = checked(pieces, path, sha256=str(artifact["sha256"]), size=int(artifact["bytes"]))
                    _save(beneath, path, bytes_, directory)
    finally:
        os.close(root)
    return paths


def checked(
    pieces: Iterable[bytes], name: str, *, sha256: str | None = None, header: str | None = None,
    size: int | None = None,
) -> Iterator[bytes]:  # fmt: skip
    """The same pieces. Raises CannotSave behind the last one when they are not what `sha256` (hexadecimal), `size` or
    the header Repr-Digest says, and before that as soon as they are more."""
    wrong = CannotSave(f"{name!r}: these are not the bytes that the run's record names")
    digest, count = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        count += len(piece)
        if size is not None and count > size:
            raise wrong
        yield piece
    expected = [value for value in (sha256, _of_header(header)) if value is not None]
    if count != (count if size is None else size) or any(value != digest.hexdigest() for value in expected):
        raise wrong


def _save(beneath: Beneath, path: str, pieces: Iterable[bytes], directory: Path) -> None:
    """A file that did not come whole, or is not the one of the record, does not stay."""
    try:
        beneath.make_file(path, pieces, executable=False)
    except ClientError:
        (directory / path).unlink()  # through directories of our making, to a file of our making
        raise
    except OSError as error:
        raise CannotSave(f"{path!r}: {error.strerror or error}") from error


def _insist_on_harmless(path: str) -> None:
    """Relative, without a way up, and of characters that a listing shows as they are."""
    unseen = any(unicodedata.category(character) in _HIDDEN for character in path)
    if unseen or any(part in ("", ".", "..") for part in path.split("/")):
        raise CannotSave(f"{path!r} is no name to save a file under; nothing was saved")


def _of_header(value: str | None) -> str | None:
    """The SHA-256 of a Repr-Digest (RFC 9530), in hexadecimal."""
    match = _SHA256.search(value or "")
    try:
        return base64.b64decode(match[1], validate=True).hex() if match else None
    except binascii.Error:
        return None
