"""Takes an operator's root filesystem into the store: from a directory, or from an OCI image layout.

Only operators import; a tenant never supplies an image. Still the tree is copied, not used where it lies, and judged
entry by entry: regular files, directories, symlinks and hard links; no device node, no FIFO, no socket (a device node
in a root reaches the host through gVisor's file server, CVE-2026-96812); no set-id bits; everything owned by root. What
is created is created beneath a directory descriptor, so no link in an image leads out of it.

OCI layout: opencontainers/image-spec v1.1, image-layout.md and layer.md. Every blob is checked against its digest.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from service.core.errors import BlastdoorError
from workers.runtimes.store import RootFilesystem, RuntimeStore

_DIGEST = re.compile(r"^sha256:([0-9a-f]{64})$")
_MAX_DOCUMENT = 4 * 2**20
_MAX_ENTRIES = 500_000
_MAX_BYTES = 20 * 2**30
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_CHUNK = 1024 * 1024


class ImportRefused(BlastdoorError):
    """`detail` names the entry or the document, and the rule."""

    code = "import_refused"


def import_directory(store: RuntimeStore, name: str, source: Path) -> RootFilesystem:
    """Copy a directory. Its digest is of its content: names, types, modes, bytes. Raises ImportRefused, OSError."""
    scratch = store.scratch()
    try:
        tree = _Tree(scratch / "rootfs")
        for path, found in _listed(source):
            place = source / path
            if stat.S_ISDIR(found.st_mode):
                tree.directory(path, found.st_mode)
            elif stat.S_ISLNK(found.st_mode):
                tree.symlink(path, os.readlink(place))
            elif stat.S_ISREG(found.st_mode):
                with open(place, "rb", opener=_no_follow) as file:
                    tree.file(path, found.st_mode, file)
            else:
                raise ImportRefused(f"{path}: only files, directories and links are allowed")
        return store.install(name, digest=tree.digest(), rootfs=scratch / "rootfs")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def import_oci_layout(store: RuntimeStore, name: str, layout: Path) -> RootFilesystem:
    """Unpack the layout's one image for this machine. Its digest is the manifest's. Raises ImportRefused, OSError."""
    digest, manifest = _manifest(layout)
    scratch = store.scratch()
    try:
        tree = _Tree(scratch / "rootfs")
        for layer in manifest["layers"]:
            with _layer(layout, layer) as stream:
                _apply(tree, stream)
        return store.install(name, digest=digest, rootfs=scratch / "rootfs")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Tree:
    """A root filesystem being made: nothing is created but beneath its own descriptor, through no symlink."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        root.chmod(0o755)
        self._root = root
        self._entries = 0
        self._bytes = 0

    def directory(self, path: str, mode: int) -> None:
        with self._parent(path) as (parent, name):
            found = _lstat(parent, name)
            if found is not None and not stat.S_ISDIR(found.st_mode):
                os.unlink(name, dir_fd=parent)
                found = None
            if found is None:
                os.mkdir(name, dir_fd=parent)
            os.chmod(name, _mode(mode) | 0o700, dir_fd=parent, follow_symlinks=True)

    def symlink(self, path: str, target: str) -> None:
        with self._parent(path) as (parent, name):
            self._clear(parent, name)
            os.symlink(target, name, dir_fd=parent)

    def hard_link(self, path: str, target: str) -> None:
        with self._parent(target) as (target_parent, target_name):
            found = _lstat(target_parent, target_name)
            if found is None or not stat.S_ISREG(found.st_mode):
                raise ImportRefused(f"{path}: links to {target}, which is no file of the image")
            with self._parent(path) as (parent, name):
                self._clear(parent, name)
                os.link(target_name, name, src_dir_fd=target_parent, dst_dir_fd=parent, follow_symlinks=False)

    def file(self, path: str, mode: int, source: IO[bytes]) -> None:
        with self._parent(path) as (parent, name):
            self._clear(parent, name)
            fd = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent
            )
            with os.fdopen(fd, "wb") as file:
                while chunk := source.read(_CHUNK):
                    self._bytes += len(chunk)
                    if self._bytes > _MAX_BYTES:
                        raise ImportRefused(f"{path}: more than {_MAX_BYTES} bytes in all")
                    file.write(chunk)
                os.fchmod(fd, _mode(mode))

    def remove(self, path: str) -> None:
        """A whiteout: what lower layers have there is gone."""
        with self._parent(path) as (parent, name):
            self._clear(parent, name)

    def empty(self, path: str, *, fresh: AbstractSet[str]) -> None:
        """An opaque whiteout: what lower layers have in that directory is gone; what this layer put there stays."""
        with self._parent(f"{path}/{_OPAQUE}" if path else _OPAQUE) as (directory, _):
            for child in sorted(os.listdir(directory)):
                inside = f"{path}/{child}" if path else child
                if inside not in fresh:
                    self._clear(directory, child)
                elif stat.S_ISDIR(os.stat(child, dir_fd=directory, follow_symlinks=False).st_mode):
                    self.empty(inside, fresh=fresh)

    def digest(self) -> str:
        """sha256 over a listing of every entry, in order."""
        listing = hashlib.sha256()
        for path, found in _listed(self._root):
            place = self._root / path
            content = ""
            if stat.S_ISREG(found.st_mode):
                with open(place, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            elif stat.S_ISLNK(found.st_mode):
                content = os.readlink(place)
            listing.update(repr((path, found.st_mode, content)).encode("utf-8", "surrogateescape"))
        return f"sha256:{listing.hexdigest()}"

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        """-> (a descriptor of the directory that holds it, made where missing; its name there)."""
        self._entries += 1
        if self._entries > _MAX_ENTRIES:
            raise ImportRefused(f"more than {_MAX_ENTRIES} entries")
        parts = path.split("/")
        if not path or any(part in ("", ".", "..") for part in parts) or "\0" in path:
            raise ImportRefused(f"{path!r} is no path inside a root filesystem")
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts[:-1]:
                if _lstat(fd, part) is None:
                    os.mkdir(part, dir_fd=fd)
                    os.chmod(part, 0o755, dir_fd=fd)  # noqa: S103 - the guest's uid has to pass
                try:
                    below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                except NotADirectoryError as error:
                    raise ImportRefused(f"{path}: lies beneath what is not a directory") from error
                os.close(fd)
                fd = below
            yield fd, parts[-1]
        finally:
            os.close(fd)

    def _clear(self, parent: int, name: str) -> None:
        found = _lstat(parent, name)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(name, dir_fd=parent)
            return
        shutil.rmtree(name, dir_fd=parent)  # by descriptor, following no link


def _apply(tree: _Tree, stream: IO[bytes]) -> None:
    """One layer, in order."""
    fresh: set[str] = set()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                path = member.name.removeprefix("./").strip("/")
                if path not in ("", "."):
                    _apply_member(tree, archive, member, path, fresh)
    except (tarfile.TarError, zlib.error, zstandard.ZstdError) as error:
        raise ImportRefused(f"a layer cannot be read: {error}") from error


def _apply_member(tree: _Tree, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str, fresh: set[str]) -> None:
    directory, _, base = path.rpartition("/")
    if base == _OPAQUE:
        tree.empty(directory, fresh=fresh)
        return
    if base.startswith(_WHITEOUT):
        hidden = base.removeprefix(_WHITEOUT)
        tree.remove(f"{directory}/{hidden}" if directory else hidden)
        return
    if member.isdir():
        tree.directory(path, member.mode)
    elif member.issym():
        tree.symlink(path, member.linkname)
    elif member.islnk():
        tree.hard_link(path, member.linkname.removeprefix("./").strip("/"))
    elif member.isreg():
        source = archive.extractfile(member)
        assert source is not None
        tree.file(path, member.mode, source)
    else:
        raise ImportRefused(f"{path}: only files, directories and links are allowed")
    while path and path not in fresh:
        fresh.add(path)
        path = path.rpartition("/")[0]


def _manifest(layout: Path) -> tuple[str, dict[str, Any]]:
    """Follow index.json to the one image manifest for this machine."""
    digest, document = "", _json((layout / "index.json").read_bytes(), "index.json")
    for _ in range(4):
        if digest and "layers" in document:
            return digest, document
        wanted = _ARCHITECTURES.get(platform.machine(), platform.machine())
        found = [
            entry
            for entry in document.get("manifests", [])
            if entry.get("platform", {}).get("architecture", wanted) == wanted
            and entry.get("platform", {}).get("os", "linux") == "linux"
        ]
        if len(found) != 1:
            raise ImportRefused(f"the layout should have one image for linux/{wanted}, and has {len(found)}")
        digest = str(found[0].get("digest"))
        document = _json(_blob(layout, digest).read_bytes(), digest)
    raise ImportRefused("the layout's indexes are nested too deep")


def _json(text: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text) if len(text) <= _MAX_DOCUMENT else None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ImportRefused(f"{where} is no JSON object of at most {_MAX_DOCUMENT} bytes")
    return document


def _blob(layout: Path, digest: str) -> Path:
    """The blob's path, after its bytes have been compared with its digest."""
    match = _DIGEST.match(digest)
    if match is None:
        raise ImportRefused(f"{digest!r} is no sha256 digest")
    path = layout / "blobs/sha256" / match[1]
    with open(path, "rb", opener=_no_follow) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != match[1]:
            raise ImportRefused(f"blob {digest} is not what its digest says")
    return path


@contextmanager
def _layer(layout: Path, layer: dict[str, Any]) -> Iterator[IO[bytes]]:
    media_type = str(layer.get("mediaType"))
    with open(_blob(layout, str(layer.get("digest"))), "rb") as file:
        if media_type.endswith("tar"):
            yield file
        elif media_type.endswith(("+gzip", ".gzip")):
            yield cast("IO[bytes]", _Gunzip(file))
        elif media_type.endswith("+zstd"):
            yield zstandard.ZstdDecompressor().stream_reader(file)
        else:
            raise ImportRefused(f"layers of type {media_type} are not supported")


class _Gunzip:
    """Reads gzip forward, one member after another (some tools write several); all that tarfile's stream mode needs."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._inflate = zlib.decompressobj(wbits=31)
        self._ready = b""

    def read(self, size: int) -> bytes:
        while len(self._ready) < size:
            chunk = self._inflate.unconsumed_tail
            if self._inflate.eof:
                chunk = self._inflate.unused_data
                self._inflate = zlib.decompressobj(wbits=31)
            chunk = chunk or self._file.read(_CHUNK)
            if not chunk:
                break
            self._ready += self._inflate.decompress(chunk, _CHUNK)
        taken, self._ready = self._ready[:size], self._ready[size:]
        return taken


def _listed(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry beneath, parents first, in order; links are not followed."""
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted(names + files):
            path = os.path.join(directory, name)
            yield os.path.relpath(path, root), os.lstat(path)


def _lstat(parent: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _mode(mode: int) -> int:
    """No set-id bits, nothing that others may write but sticky directories."""
    return mode & 0o755 if not mode & stat.S_ISVTX else mode & 0o1777


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
