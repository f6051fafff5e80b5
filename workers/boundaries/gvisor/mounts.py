"""The kernel calls that Python has no name for: mount, umount2 and openat2; and what is mounted now.

Nothing here follows a path into a tree that a guest may write: mounts are of directories that only we can write, and
`open_beneath` refuses every link.
"""

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

MS_NOSUID, MS_NODEV, MS_NOSYMFOLLOW = 2, 4, 256
UMOUNT_NOFOLLOW = 8
_SYS_OPENAT2 = 437  # the same number on every architecture
_RESOLVE = 0x01 | 0x02 | 0x04 | 0x08  # NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH (linux/openat2.h)
_OCTAL = re.compile(r"\\([0-7]{3})")


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_LIBC = ctypes.CDLL(None, use_errno=True)


def mount_tmpfs(directory: Path, *, size_bytes: int, inodes: int) -> None:
    """A tmpfs that ends at `size_bytes` (rounded up to pages) and at `inodes`, its own root among them. No set-uid, no
    device nodes, and the host follows no symlink in it. Raises OSError; EINVAL from a kernel before 5.10."""
    flags = MS_NOSUID | MS_NODEV | MS_NOSYMFOLLOW
    options = f"size={size_bytes},nr_inodes={inodes},mode=0711".encode()
    if _LIBC.mount(b"blastdoor", os.fsencode(directory), b"tmpfs", ctypes.c_ulong(flags), options) != 0:
        raise _error(directory)


def unmount(directory: Path) -> None:
    """Raises OSError; EBUSY while somebody holds a descriptor in it. Never lazily: that would hide what is left."""
    if _LIBC.umount2(os.fsencode(directory), UMOUNT_NOFOLLOW) != 0:
        raise _error(directory)


def mount_points() -> Iterator[Path]:
    """Every mount point of this process's namespace, from /proc/self/mountinfo (field 5, octal escapes)."""
    with open("/proc/self/mountinfo") as listing:
        for line in listing:
            yield Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), line.split(" ", 5)[4]))


def open_beneath(directory_fd: int, path: str, flags: int) -> int:
    """openat2(2) that resolves `path` beneath the directory, through no link of any kind and into no other mount.

    Raises OSError: ELOOP for a symlink, EXDEV for a way out, ENOENT, ...
    """
    how = _OpenHow(flags=flags | os.O_CLOEXEC, mode=0, resolve=_RESOLVE)
    while True:
        fd: int = _LIBC.syscall(_SYS_OPENAT2, directory_fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
        if fd >= 0:
            return fd
        if ctypes.get_errno() != errno.EINTR:
            raise _error(path)


def _error(path: Path | str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), str(path))
