"""Root filesystems that an operator offers by name. `default` is a read-only view of this host's own distribution.

    <store>/default/<digest>/rootfs          a skeleton of ours: mount points, links, a minimal /etc
    <store>/<name>/<digest>/rootfs           imported from a directory or an OCI layout (`import_rootfs.py`)
    <store>/<name>/current                   the digest that is offered

A runtime never holds a device node: a sandbox's file server would hand it to the host (CVE-2026-96812). Every
mount point exists beforehand: gVisor's file server creates missing ones on the host, in the root, even a read-only one.
"""

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.core.errors import BlastdoorError

DEFAULT = "default"
INIT_AT = Path("/.blastdoor/init")
"""Where a boundary's own first process is mounted in the guest."""
MOUNT_POINTS = ("dev", "proc", "sys", "tmp", "work", ".blastdoor")
_NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")
_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")
_LINKED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_DIRECTORIES = ("etc", "usr", "home", "root", "run", "var", "var/tmp", "opt", "srv", "mnt", "media")
_ETC = {
    "passwd": "root:x:0:0:root:/:/usr/sbin/nologin\nguest:x:65532:65532:guest:/work:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "group": "root:x:0:\nguest:x:65532:\nnogroup:x:65534:\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "hostname": "sandbox\n",
}
_PACKAGE_LISTS = (
    "var/lib/dpkg/status",
    "lib/apk/db/installed",
    "var/lib/rpm/rpmdb.sqlite",
    "usr/lib/sysimage/rpm/rpmdb.sqlite",
)
_SHOWN_OF_ETC = ("os-release", "debian_version")


class RuntimeUnknown(BlastdoorError):
    """No root filesystem of that name is offered here, or what is stored is not what its digest says."""

    code = "runtime_unknown"


@dataclass(frozen=True, kw_only=True)
class RootFilesystem:
    """What a boundary makes the guest's `/` of: `path` read-only, then `binds` (host path, guest path; read-only), then
    `masks`: guest directories that must look empty."""

    name: str
    digest: str
    path: Path
    binds: tuple[tuple[Path, Path], ...] = ()
    masks: tuple[Path, ...] = ()


class RuntimeStore:
    """The runtimes of this host, in one directory of ours."""

    def __init__(self, directory: Path, *, host: Path = Path("/")) -> None:
        self._directory = directory
        self._host = host
        self._default: RootFilesystem | None = None

    def get(self, name: str) -> RootFilesystem:
        """Raises RuntimeUnknown."""
        if name == DEFAULT:
            if self._default is None or not self._default.path.is_dir():
                self._default = self._host_view()
            return self._default
        if not _NAME.match(name):
            raise RuntimeUnknown(f"{name!r} is no runtime's name")
        try:
            digest = (self._directory / name / "current").read_text().strip()
        except FileNotFoundError as error:
            raise RuntimeUnknown(f"no runtime {name} is offered here") from error
        path = self._directory / name / digest.removeprefix("sha256:") / "rootfs"
        if not _DIGEST.match(digest) or not path.is_dir():
            raise RuntimeUnknown(f"runtime {name} is damaged; import it again")
        return RootFilesystem(name=name, digest=digest, path=path)

    def offered(self) -> Mapping[str, str]:
        """Name to digest."""
        offered = {DEFAULT: self.get(DEFAULT).digest}
        for entry in sorted(self._directory.iterdir()) if self._directory.is_dir() else ():
            if entry.name != DEFAULT and _NAME.match(entry.name) and (entry / "current").exists():
                offered[entry.name] = self.get(entry.name).digest
        return offered

    def install(self, name: str, *, digest: str, rootfs: Path) -> RootFilesystem:
        """Take a finished tree into the store (by rename: it must lie below the store) and offer it. Raises
        RuntimeUnknown for a name that is not allowed."""
        if name == DEFAULT or not _NAME.match(name):
            raise RuntimeUnknown(f"{name!r} cannot be a runtime's name")
        complete_mount_points(rootfs)
        place = self._directory / name / digest.removeprefix("sha256:")
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "rootfs").exists():
            rootfs.rename(place / "rootfs")
        unfinished = self._directory / name / "current.new"
        unfinished.write_text(digest + "\n")
        unfinished.replace(self._directory / name / "current")
        return self.get(name)

    def scratch(self) -> Path:
        """A new directory to make a tree in, on the store's own file system. The caller removes it."""
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".new-", dir=self._directory))

    def _host_view(self) -> RootFilesystem:
        """The skeleton is made once per content and reused; /usr is the host's own, seen through a bind mount."""
        entries = _skeleton(self._host)
        listing = repr(sorted(entries.items())).encode() + _distribution(self._host)
        digest = hashlib.sha256(listing).hexdigest()
        path = self._directory / DEFAULT / digest / "rootfs"
        if not path.is_dir():
            scratch = self.scratch()
            try:
                _build(scratch / "rootfs", entries)
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.is_dir():
                    (scratch / "rootfs").rename(path)
            finally:
                shutil.rmtree(scratch)
        binds = [(self._host / "usr", Path("/usr"))]
        binds += [(self._host / name, Path("/") / name) for name, kind in entries.items() if kind == _BIND]
        return RootFilesystem(
            name=DEFAULT, digest=f"sha256:{digest}", path=path, binds=tuple(binds), masks=(Path("/usr/local"),)
        )


def complete_mount_points(rootfs: Path) -> None:
    """Every place on which a boundary mounts something, made beforehand and by us. Raises RuntimeUnknown when one of
    them is there as something else than a directory: a link would lead elsewhere."""
    for name in MOUNT_POINTS:
        place = rootfs / name
        try:
            found = os.lstat(place)
        except FileNotFoundError:
            _directory(place)
            continue
        if not stat.S_ISDIR(found.st_mode):
            raise RuntimeUnknown(f"the tree's /{name} should be a directory")
    init = rootfs / INIT_AT.relative_to("/")
    if init.is_symlink() or (init.exists() and not init.is_file()):
        raise RuntimeUnknown(f"the tree's {INIT_AT} should not exist")
    init.touch(mode=0o644)


_BIND = "bind"
_DIR = "dir"


def _skeleton(host: Path) -> dict[str, str]:
    """Path to what it is: `dir`, `bind`, `link TARGET` or `file TEXT`. Nothing of the host's /etc but its name, and
    the alternatives: links into /usr without which awk, cc or vi are missing."""
    entries = dict.fromkeys(_DIRECTORIES, _DIR)
    for name in _LINKED:
        place = host / name
        if place.is_symlink():
            entries[name] = f"link {os.readlink(place)}"
        elif place.is_dir():
            entries[name] = _BIND  # a host that is not usr-merged
    entries |= {f"etc/{name}": f"file {text}" for name, text in _ETC.items()}
    for name in _SHOWN_OF_ETC:
        if (host / "etc" / name).is_file():
            entries[f"etc/{name}"] = f"file {(host / 'etc' / name).read_text()[:4096]}"
    alternatives = host / "etc/alternatives"
    if alternatives.is_dir():
        entries["etc/alternatives"] = _DIR
        for entry in sorted(os.scandir(alternatives), key=lambda found: found.name):
            if entry.is_symlink():
                entries[f"etc/alternatives/{entry.name}"] = f"link {os.readlink(entry.path)}"
    return entries


def _build(rootfs: Path, entries: Mapping[str, str]) -> None:
    rootfs.mkdir(parents=True)
    rootfs.chmod(0o755)
    for path, entry in sorted(entries.items()):
        kind, _, rest = entry.partition(" ")
        place = rootfs / path
        if kind in (_DIR, _BIND):
            _directory(place)
        elif kind == "link":
            place.symlink_to(rest)
        else:
            place.write_text(rest)
            place.chmod(0o644)
    complete_mount_points(rootfs)


def _directory(place: Path) -> None:
    place.mkdir()
    place.chmod(0o755)  # whatever the worker's umask: the guest's uid has to pass


def _distribution(host: Path) -> bytes:
    """What says which files /usr holds, without reading them all: the package manager's list, else /usr's own times."""
    for listing in _PACKAGE_LISTS:
        try:
            return hashlib.sha256((host / listing).read_bytes()).digest()
        except OSError:
            continue
    found = os.stat(host / "usr")
    return f"{found.st_dev} {found.st_ino} {found.st_mtime_ns}".encode()
