"""The image of sandboxes for tests: a shell and its tools, and our own first process; called by its digest."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.lab.images import write_image
from workers.pods.protocol import INIT, READABLE_INIT

INIT_BINARY = Path(__file__).parents[2] / "workers/pods/init"
PREFIX = "blastdoor.test/"
_NAME = f"{PREFIX}runtime"


def write_runtime(archive: Path, busybox: Path, applets: list[str], *, more: Mapping[str, Path] | None = None) -> str:
    """-> what the nodes call it: name and digest. `more`: path in the image to a file of this machine."""
    layer = _layer(busybox, applets, more or {})
    write_image(archive, _NAME, layer)
    with tarfile.open(archive) as tar:
        index = tar.extractfile("index.json")
        assert index is not None
        digest = json.load(index)["manifests"][0]["digest"]
    write_image(archive, f"{_NAME}@{digest}", layer)  # the name is beside the image, not in it
    return f"{_NAME}@{digest}"


def _layer(busybox: Path, applets: list[str], more: Mapping[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", dereference=True) as tar:
        for name, mode in {"bin": 0o755, ".blastdoor": 0o755, "work": 0o755, "tmp": 0o1777, "etc": 0o755}.items():
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, mode
            tar.addfile(folder)
        programs = {"bin/busybox": (busybox, 0o755), INIT: (INIT_BINARY, 0o111), READABLE_INIT: (INIT_BINARY, 0o555)}
        for path, (source, mode) in programs.items():
            data = source.read_bytes()
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode = len(data), mode
            tar.addfile(entry, io.BytesIO(data))
        for applet in applets:
            if applet != "busybox":
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        for path, source in more.items():
            with source.open("rb") as file:
                entry = tar.gettarinfo(arcname=path, fileobj=file)
                entry.uid = entry.gid = 0
                entry.uname = entry.gname = "root"
                tar.addfile(entry, file)
        data = b"root:x:0:0:root:/:/bin/sh\n"
        entry = tarfile.TarInfo("etc/passwd")
        entry.size, entry.mode = len(data), 0o644
        tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
