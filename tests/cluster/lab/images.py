"""Container images without a registry: OCI archives packed by hand, as `ctr images import` takes them."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAUSE = "blastdoor.test/pause:lab"
BUSYBOX = "blastdoor.test/busybox:lab"
OCI = "application/vnd.oci.image"


def write_pause(archive: Path, program: Path) -> None:
    layer = _layer(lambda tar: _add_file(tar, "pause", program.read_bytes(), mode=0o755))
    write_image(archive, PAUSE, layer, entrypoint=["/pause"])


def write_busybox(archive: Path, program: Path) -> None:
    """A shell and its tools for the pods of tests, among them `nc`, `httpd` and `dmesg`; its `wget -T` crashes."""
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()

    def fill(tar: tarfile.TarFile) -> None:
        _add_file(tar, "bin/busybox", program.read_bytes(), mode=0o755)
        for applet in applets:
            if applet != "busybox":
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        for folder, mode in {"tmp": 0o1777, "work": 0o777, "etc": 0o755}.items():
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        _add_file(tar, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n", mode=0o644)

    write_image(archive, BUSYBOX, _layer(fill), command=["/bin/sh"])


def write_tree(archive: Path, name: str, root: Path, *, command: list[str] | None = None) -> None:
    """An image called `name` of the files below a directory, all of them root's; it passes through memory."""

    def as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        return entry

    write_image(archive, name, _layer(lambda tar: tar.add(root, arcname=".", filter=as_root)), command=command)


def write_image(
    archive: Path, name: str, layer: bytes, *, entrypoint: list[str] | None = None, command: list[str] | None = None
) -> None:
    """An OCI archive with one image of one layer; `layer` is an uncompressed tar."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/bin:/bin"], "Entrypoint": entrypoint, "Cmd": command},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    packed = gzip.compress(layer, compresslevel=1, mtime=0)
    with tarfile.open(archive, "w") as tar:

        def blob(data: bytes, media_type: str) -> dict[str, Any]:
            _add_file(tar, f"blobs/sha256/{hashlib.sha256(data).hexdigest()}", data, mode=0o644)
            return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}

        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": blob(json.dumps(config).encode(), f"{OCI}.config.v1+json"),
            "layers": [blob(packed, f"{OCI}.layer.v1.tar+gzip")],
        }
        described = blob(json.dumps(manifest).encode(), f"{OCI}.manifest.v1+json")
        described["annotations"] = {"io.containerd.image.name": name}
        index = {"schemaVersion": 2, "manifests": [described]}
        _add_file(tar, "index.json", json.dumps(index).encode(), mode=0o644)
        _add_file(tar, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}', mode=0o644)


def _layer(fill: Callable[[tarfile.TarFile], None]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        fill(tar)
    return buffer.getvalue()


def _add_file(tar: tarfile.TarFile, name: str, data: bytes, *, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
