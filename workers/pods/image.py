"""Packs the image that pods are made of: somebody's root file system, and our first process in it.

It takes no Docker and asks no registry: what comes out is an OCI archive (opencontainers/image-spec v1.1), for
`ctr images import` on a node or `skopeo copy` to a registry. The same tree gives the same digest, on any day.
"""

import gzip
import hashlib
import io
import json
import os
import platform
import re
import secrets
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from service.core.errors import BlastdoorError
from workers.pods.protocol import INIT, READABLE_INIT

INIT_BINARY = Path(__file__).parent / "init"
OURS = INIT.split("/")[1]
EMPTY = {"dev": 0o755, "proc": 0o755, "sys": 0o755, "run": 0o755, "tmp": 0o1777, "work": 0o755}
"""What is below these is left out: something is mounted there, or it was of the machine that the tree comes from."""
_NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_OCI = "application/vnd.oci.image"


class ImageRefused(BlastdoorError):
    """`detail` names the entry, or the name, and the rule."""

    code = "image_refused"


def pack(rootfs: Path, name: str, archive: Path) -> str:
    """Write an OCI archive of one image -> what BLASTDOOR_KUBE_IMAGE takes: `name`, @, digest.

    Everything in it is root's, without set-id bits; a hard link becomes a file; any other kind of entry is refused. It
    is for this machine's architecture, for which our first process was built. Raises ImageRefused, OSError; then what
    was at `archive` is there still.
    """
    if not _NAME.fullmatch(name):
        raise ImageRefused(f"{name!r} is no name of an image: REGISTRY/PATH, without a tag or digest")
    if not rootfs.is_dir():
        raise ImageRefused(f"{rootfs} is no directory")
    if (rootfs / OURS).is_symlink() or (rootfs / OURS).exists():
        raise ImageRefused(f"/{OURS} is there already; that place is ours")
    if archive.is_dir():
        raise ImageRefused(f"{archive} is a directory: the archive is a file")
    with tempfile.TemporaryFile(dir=archive.parent) as layer:
        plain, packed = _write_layer(rootfs, layer)
        config = _json(
            {
                "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
                "os": "linux",
                "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
                "rootfs": {"type": "layers", "diff_ids": [plain]},
            }
        )
        layer_bytes = layer.tell()
        manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": f"{_OCI}.manifest.v1+json",
                "config": _described(config, f"{_OCI}.config.v1+json"),
                "layers": [{"mediaType": f"{_OCI}.layer.v1.tar+gzip", "digest": packed, "size": layer_bytes}],
            }
        )
        called = f"{name}@{_digest(manifest)}"
        described = _described(manifest, f"{_OCI}.manifest.v1+json")
        described["annotations"] = {"io.containerd.image.name": called}  # beside the image: its digest is not changed
        layer.seek(0)
        with _renamed_when_whole(archive) as partial, tarfile.open(partial, "x", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
            _add(tar, "index.json", _json({"schemaVersion": 2, "manifests": [described]}))
            for blob in (config, manifest):
                _add(tar, _place(_digest(blob)), blob)
            entry = _entry(_place(packed), 0o644)
            entry.size = layer_bytes
            tar.addfile(entry, layer)
    return called


@contextmanager
def _renamed_when_whole(path: Path) -> Iterator[Path]:
    """What is at `path` already stays until all of the new one is written beside it."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Hashed:
    """Passes on what is written to it, and knows its digest."""

    def __init__(self, to: IO[bytes] | gzip.GzipFile) -> None:
        self._to = to
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._to.write(data)

    def flush(self) -> None:
        self._to.flush()

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


def _write_layer(rootfs: Path, to: IO[bytes]) -> tuple[str, str]:
    """-> the digests of the layer, plain and as it is written."""
    packed: Any = _Hashed(to)
    with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as squeezed:
        plain: Any = _Hashed(squeezed)
        with tarfile.open(fileobj=plain, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for path, found in _listed(rootfs):
                _add_found(tar, rootfs / path, path, found)
            for path, mode in EMPTY.items():
                _add_directory(tar, path, mode)
            _add_directory(tar, OURS, 0o755)
            for path, mode in {INIT: 0o111, READABLE_INIT: 0o555}.items():
                _add(tar, path.lstrip("/"), INIT_BINARY.read_bytes(), mode=mode)
    return plain.digest, packed.digest


def _listed(rootfs: Path) -> Iterator[tuple[str, os.stat_result]]:
    """What there is, a directory before what is in it, in an order that does not hang on the disk's."""
    for top, folders, files in os.walk(rootfs):
        below = os.path.relpath(top, rootfs)
        if below == ".":
            folders[:] = [name for name in folders if name not in EMPTY]
            files = [name for name in files if name not in EMPTY]
        folders.sort()
        for name in sorted([*folders, *files]):
            path = os.path.normpath(os.path.join(below, name))
            yield path, os.lstat(rootfs / path)


def _add_found(tar: tarfile.TarFile, source: Path, path: str, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        _add_directory(tar, path, found.st_mode & 0o777)
    elif stat.S_ISLNK(found.st_mode):
        entry = _entry(path, 0o777)
        entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(source)
        tar.addfile(entry)
    elif stat.S_ISREG(found.st_mode):
        entry = _entry(path, found.st_mode & 0o777)
        entry.size = found.st_size
        with source.open("rb") as file:
            tar.addfile(entry, file)
    else:
        raise ImageRefused(f"/{path}: only files, directories and links are allowed")


def _add_directory(tar: tarfile.TarFile, path: str, mode: int) -> None:
    entry = _entry(path, mode)
    entry.type = tarfile.DIRTYPE
    tar.addfile(entry)


def _add(tar: tarfile.TarFile, path: str, data: bytes, *, mode: int = 0o644) -> None:
    entry = _entry(path, mode)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _entry(path: str, mode: int) -> tarfile.TarInfo:
    """Root's, of no day."""
    entry = tarfile.TarInfo(path)
    entry.mode = mode
    entry.uname = entry.gname = "root"
    return entry


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _described(data: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _place(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"
