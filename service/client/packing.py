"""A directory as the bundle that is uploaded. The same files always make the same bytes, so the same digest.

The service accepts regular files and directories only; what else is there is refused here, by name, before anything is
sent, rather than followed: a link could lead anywhere on this machine.
"""

import gzip
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from service.client.errors import CannotPack

LEFT_OUT = frozenset({".git"})


def pack_directory(directory: Path, target: BinaryIO) -> int:
    """Write a .tar.gz of what is beneath `directory`, without `.git`. -> the number of files.

    Raises CannotPack for links, devices, pipes and sockets, for names that are not UTF-8, and for what cannot be read.
    """
    if not directory.is_dir():
        raise CannotPack(f"{directory} is not a directory")
    files = 0
    with (
        gzip.GzipFile(filename="", fileobj=target, mode="wb", compresslevel=6, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path, name in _members(directory, ""):
            files += _add(archive, path, name)
    return files


def _members(directory: Path, prefix: str) -> Iterator[tuple[Path, str]]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise CannotPack(f"{directory} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name in LEFT_OUT:
            continue
        name = prefix + entry.name
        yield Path(entry.path), name
        if entry.is_dir(follow_symlinks=False):
            yield from _members(Path(entry.path), name + "/")


def _add(archive: tarfile.TarFile, path: Path, name: str) -> int:
    """-> 1 for a file, 0 for a directory. Opened without following links, so what is judged is what is read."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise CannotPack(f"{name!r}: the name is not UTF-8; rename it") from error
    member = tarfile.TarInfo(name)
    try:
        mode = path.lstat().st_mode
        _refuse_special(name, mode)
        if stat.S_ISDIR(mode):
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(member)
            return 0
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CannotPack(f"{name}: cannot be read: {error.strerror}") from error
    with open(descriptor, "rb") as source:
        status = os.fstat(descriptor)
        _refuse_special(name, status.st_mode)
        member.size = status.st_size
        member.mode = 0o755 if status.st_mode & 0o111 else 0o644
        try:
            archive.addfile(member, source)
        except OSError as error:
            raise CannotPack(f"{name}: changed or could not be read while it was packed ({error})") from error
    return 1


_SPECIAL = (
    (stat.S_ISLNK, "a symbolic link; put the file itself there, or leave it out"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _refuse_special(name: str, mode: int) -> None:
    for test, words in _SPECIAL:
        if test(mode):
            raise CannotPack(f"{name}: a bundle has regular files and directories only; this is {words}")
