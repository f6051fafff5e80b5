"""What a guest printed and left, on this machine: bytes into a pipe, files beneath one new directory and nowhere else.

Names and bytes are a stranger's, by way of a service that might be lied to as well. The directory is made here, so that
nothing stands in it that could lead elsewhere; every file is made new, through no link (`service.intake.beneath`), is
never executable, and is compared with the digest that the run's record has.
"""

import codecs
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from service.cli.client import Client
from service.cli.printing import visible
from service.intake.beneath import Beneath


def write_output(pieces: Iterable[bytes]) -> None:
    """To stdout: as they are into a pipe or file; control characters spelled out on a terminal, which would obey."""
    if not sys.stdout.isatty():
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        sys.stdout.write(visible(decoder.decode(piece)))
    sys.stdout.write(visible(decoder.decode(b"", final=True)))
    sys.stdout.flush()


def save_artifacts(client: Client, run: Mapping[str, Any], directory: Path) -> list[str]:
    """-> the paths that were saved. Raises OSError: the directory is there already, a name leads elsewhere or twice to
    the same place, the bytes are not those of the record. What was saved before that stays."""
    paths = [str(artifact["path"]) for artifact in run["artifacts"]]
    for path in paths:
        _insist_on_harmless(path)
    directory.mkdir(mode=0o700)
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with Beneath(root) as beneath:
            for path, artifact in zip(paths, run["artifacts"], strict=True):
                with client.artifact(str(run["id"]), path) as pieces:
                    beneath.make_file(path, _checked(pieces, path, str(artifact["sha256"])), executable=False)
    finally:
        os.close(root)
    return paths


def _insist_on_harmless(path: str) -> None:
    """Relative, without a way up, and of characters that a listing shows as they are."""
    if any(part in ("", ".", "..") for part in path.split("/")) or visible(path, one_line=True) != path:
        raise OSError(f"{path!r} is no name to save a file under; nothing was saved")


def _checked(pieces: Iterable[bytes], path: str, sha256: str) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    if digest.hexdigest() != sha256:
        raise OSError(f"{path!r}: these are not the bytes that the run's record names")
