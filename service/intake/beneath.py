"""Making files and directories beneath one open directory, and nowhere else, whatever stands in it.

Every path is resolved by the kernel with openat2(2): RESOLVE_BENEATH (no way up), RESOLVE_NO_SYMLINKS (a planted link
is ELOOP) and RESOLVE_NO_XDEV (no other mount). There is no fallback: where the call does not exist, nothing is
unpacked.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from types import TracebackType

_SYS_OPENAT2 = 437  # the same number on every architecture (Linux 5.6)
_RESOLVE_NO_XDEV, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x01, 0x04, 0x08
_RESOLVE = _RESOLVE_NO_XDEV | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH
_TRIES = 16
_MAKE_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_OpenHow), ctypes.c_size_t)


def open_beneath(directory_fd: int, path: str, flags: int, *, mode: int = 0) -> int:
    """openat2 with all three restrictions. -> a descriptor. Raises OSError: ELOOP for a link on the way, EXDEV for a
    way out. Names are UTF-8 whatever the locale is."""
    how = _OpenHow(flags, mode, _RESOLVE)
    name = path.encode()
    if b"\0" in name:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    for _ in range(_TRIES):
        fd: int = _syscall(_SYS_OPENAT2, directory_fd, name, ctypes.byref(how), ctypes.sizeof(how))
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):  # EAGAIN: something was renamed while the kernel walked
            break
    raise OSError(code, os.strerror(code), path)


class Beneath:
    """Makes what a judged archive names. Paths are canonical (`a/b/c`); a parent that was not made yet is made first.

    `owner` is (uid, gid) for everything made, the caller's own when None. What was made stays when something fails:
    the directory is the caller's, and so is its destruction.
    """

    def __init__(self, directory_fd: int, *, owner: tuple[int, int] | None = None) -> None:
        self._root_fd = directory_fd
        self._owner = owner
        self._made: set[str] = {""}
        self._parent = ""
        self._parent_fd = directory_fd

    def __enter__(self) -> "Beneath":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def make_directory(self, path: str) -> None:
        """Nothing to do when a longer path has implied it before."""
        if path not in self._made:
            self._make_missing(path)

    def make_file(self, path: str, pieces: Iterable[bytes | memoryview], *, executable: bool) -> int:
        """A new file with these bytes; -> how many. Raises OSError, FileExistsError for a name that is taken."""
        parent, _, name = path.rpartition("/")
        self._enter(parent)
        mode = 0o755 if executable else 0o644
        fd = open_beneath(self._parent_fd, name, _MAKE_FILE, mode=mode)
        try:
            self._settle(fd, mode)
            written = 0
            for piece in pieces:
                written += write_all(fd, piece)
        finally:
            os.close(fd)
        return written

    def _enter(self, directory: str) -> None:
        """Make `directory` the one that names are resolved in."""
        if directory == self._parent:
            return
        if directory not in self._made:
            self._make_missing(directory)
        if directory != self._parent:
            self._move(directory, open_beneath(self._root_fd, directory, _OPEN_DIRECTORY) if directory else None)

    def _make_missing(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        if parent not in self._made:
            self._make_missing(parent)
        self._enter(parent)
        os.mkdir(
            name.encode(), 0o755, dir_fd=self._parent_fd
        )  # one part: there is nothing to resolve, and it is never followed
        fd = open_beneath(self._parent_fd, name, _OPEN_DIRECTORY)
        try:
            self._settle(fd, 0o755)
        except OSError:
            os.close(fd)
            raise
        self._made.add(path)
        self._move(path, fd)

    def _settle(self, fd: int, mode: int) -> None:
        if self._owner is not None:
            os.fchown(fd, *self._owner)
        os.fchmod(fd, mode)  # exact, whatever the umask is

    def _move(self, directory: str, fd: int | None) -> None:
        self._leave()
        self._parent, self._parent_fd = directory, self._root_fd if fd is None else fd

    def _leave(self) -> None:
        if self._parent_fd != self._root_fd:
            os.close(self._parent_fd)
        self._parent, self._parent_fd = "", self._root_fd


def write_all(fd: int, piece: bytes | memoryview) -> int:
    """-> the length of the piece. Raises OSError."""
    size = len(piece)
    written = os.write(fd, piece)
    while written < size:
        written += os.write(fd, memoryview(piece)[written:])
    return size


def open_archive(path: os.PathLike[str]) -> int:
    """A descriptor of a regular file of ours, read-only. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return fd
