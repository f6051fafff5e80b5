"""Root filesystems: a view of a host, directories and OCI layouts; and what none of them may contain or do."""

import gzip
import hashlib
import io
import json
import os
import platform
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from workers.runtimes.import_rootfs import ImportRefused, import_directory, import_oci_layout
from workers.runtimes.store import INIT_AT, MOUNT_POINTS, RuntimeStore, RuntimeUnknown

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


@pytest.fixture
def store(tmp_path: Path) -> RuntimeStore:
    return RuntimeStore(tmp_path / "store")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host's root, with things in it that no guest may see."""
    root = tmp_path / "host"
    for directory in ("usr/bin", "etc/alternatives", "root", "opt", "home", "var/lib/dpkg"):
        (root / directory).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "lib64").mkdir()
    (root / "etc/shadow").write_text("secret")
    (root / "etc/passwd").write_text("real:x:1000:1000::/home/real:/bin/sh\n")
    (root / "etc/os-release").write_text("ID=test\n")
    (root / "etc/alternatives/awk").symlink_to("/usr/bin/mawk")
    (root / "etc/alternatives/README").write_text("not a link")
    (root / "var/lib/dpkg/status").write_text("Package: base\n")
    return root


class TestHostView:
    def test_it_shows_usr_and_a_minimal_etc_and_nothing_else(self, tmp_path: Path, host: Path) -> None:
        root = RuntimeStore(tmp_path / "store", host=host).get("default")
        assert root.binds == ((host / "usr", Path("/usr")), (host / "lib64", Path("/lib64")))
        assert root.masks == (Path("/usr/local"),)
        assert os.readlink(root.path / "bin") == "usr/bin"
        etc = sorted(str(path.relative_to(root.path / "etc")) for path in (root.path / "etc").rglob("*"))
        known = ["alternatives", "alternatives/awk", "group", "hostname", "hosts", "nsswitch.conf", "os-release"]
        assert etc == [*known, "passwd"]
        assert "real" not in (root.path / "etc/passwd").read_text()
        assert not any(path.is_file() for path in root.path.rglob("*") if path.parts[-2] in ("root", "opt", "home"))

    def test_every_mount_point_is_there_beforehand(self, tmp_path: Path, host: Path) -> None:
        root = RuntimeStore(tmp_path / "store", host=host).get("default")
        assert all((root.path / name).is_dir() for name in (*MOUNT_POINTS, "usr"))
        assert (root.path / INIT_AT.relative_to("/")).is_file()

    def test_it_is_made_once_and_again_when_the_distribution_changes(self, tmp_path: Path, host: Path) -> None:
        first = RuntimeStore(tmp_path / "store", host=host).get("default")
        inode = first.path.stat().st_ino
        again = RuntimeStore(tmp_path / "store", host=host).get("default")
        assert (again.digest, again.path.stat().st_ino) == (first.digest, inode)
        (host / "var/lib/dpkg/status").write_text("Package: newer\n")
        assert RuntimeStore(tmp_path / "store", host=host).get("default").digest != first.digest

    def test_a_tight_umask_shuts_no_guest_out(self, tmp_path: Path, host: Path) -> None:
        before = os.umask(0o077)
        try:
            root = RuntimeStore(tmp_path / "store", host=host).get("default")
        finally:
            os.umask(before)
        assert (root.path / "etc").stat().st_mode & 0o777 == 0o755
        assert (root.path / "etc/passwd").stat().st_mode & 0o777 == 0o644


class TestDirectories:
    def test_a_directory_is_copied_and_offered_with_its_digest(self, tmp_path: Path, store: RuntimeStore) -> None:
        source = tmp_path / "source"
        (source / "bin").mkdir(parents=True)
        (source / "bin/tool").write_text("#!")
        (source / "bin/tool").chmod(0o4755)
        (source / "link").symlink_to("/etc/passwd")
        root = import_directory(store, "tools", source)
        assert store.offered()["tools"] == root.digest
        assert store.get("tools").path == root.path
        assert (root.path / "bin/tool").stat().st_mode & 0o7777 == 0o755, "no set-uid bit survives"
        assert os.readlink(root.path / "link") == "/etc/passwd"
        assert import_directory(store, "tools", source).digest == root.digest
        (source / "bin/tool").write_text("#!!")
        assert import_directory(store, "tools", source).digest != root.digest

    def test_special_files_are_refused_and_nothing_is_left(self, tmp_path: Path, store: RuntimeStore) -> None:
        source = tmp_path / "source"
        source.mkdir()
        os.mkfifo(source / "pipe")
        with pytest.raises(ImportRefused, match="pipe"):
            import_directory(store, "tools", source)
        assert list((tmp_path / "store").glob(".new-*")) == []
        with pytest.raises(RuntimeUnknown):
            store.get("tools")

    def test_a_mount_point_that_is_a_link_is_refused(self, tmp_path: Path, store: RuntimeStore) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (source / "work").symlink_to("/etc")
        with pytest.raises(RuntimeUnknown, match="/work"):
            import_directory(store, "tools", source)

    @pytest.mark.parametrize("name", ["default", "../x", "", "UPPER", "a/b"])
    def test_names(self, tmp_path: Path, store: RuntimeStore, name: str) -> None:
        (tmp_path / "source").mkdir()
        with pytest.raises(RuntimeUnknown):
            import_directory(store, name, tmp_path / "source")


def member(name: str, *, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.size = kind, link, mode, len(data)
    return info, data


def layer(*members: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def oci_layout(directory: Path, *layers: tuple[str, bytes]) -> Path:
    """`layers`: media type's ending, blob."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    rows = [put(data) | {"mediaType": f"application/vnd.oci.image.layer.v1.{ending}"} for ending, data in layers]
    manifest = put(json.dumps({"schemaVersion": 2, "layers": rows}).encode())
    other = {"digest": "sha256:" + "0" * 64, "platform": {"os": "linux", "architecture": "other"}}
    entries = [manifest | {"platform": {"os": "linux", "architecture": ARCHITECTURE}}, other]
    index = put(json.dumps({"manifests": entries}).encode())
    (directory / "index.json").write_text(json.dumps({"manifests": [index]}))
    return directory


class TestOciLayouts:
    def test_layers_of_every_compression_are_applied_in_order(self, tmp_path: Path, store: RuntimeStore) -> None:
        base = layer(
            member("./", kind=tarfile.DIRTYPE, mode=0o755),
            member("etc/", kind=tarfile.DIRTYPE, mode=0o755),
            member("etc/old", data=b"old"),
            member("etc/kept", data=b"kept"),
            member("opq/a", data=b"lower"),
            member("bin/tool", data=b"tool", mode=0o6755),
            member("bin/alias", kind=tarfile.LNKTYPE, link="bin/tool"),
            member("sh", kind=tarfile.SYMTYPE, link="/bin/tool"),
        )
        second = layer(member("etc/.wh.old"), member("opq/b", data=b"upper"), member("opq/.wh..wh..opq"))
        third = layer(member("etc/kept", data=b"newer"))
        halves = gzip.compress(base[:512]) + gzip.compress(base[512:])  # several gzip members make one stream
        path = oci_layout(
            tmp_path / "layout", ("tar+gzip", halves), ("tar", second), ("tar+zstd", zstandard.compress(third))
        )
        root = import_oci_layout(store, "image", path).path
        assert not (root / "etc/old").exists()
        assert (root / "etc/kept").read_bytes() == b"newer"
        assert [entry.name for entry in (root / "opq").iterdir()] == ["b"]
        assert (root / "bin/alias").stat().st_ino == (root / "bin/tool").stat().st_ino
        assert (root / "bin/tool").stat().st_mode & 0o7777 == 0o755
        assert os.readlink(root / "sh") == "/bin/tool"

    @pytest.mark.parametrize(
        ("members", "why"),
        [
            ([member("../x", data=b"x")], "no path inside"),
            ([member("a/../../x", data=b"x")], "no path inside"),
            ([member("dev/sda", kind=tarfile.BLKTYPE)], "only files"),
            ([member("null", kind=tarfile.CHRTYPE)], "only files"),
            ([member("pipe", kind=tarfile.FIFOTYPE)], "only files"),
            ([member("out", kind=tarfile.SYMTYPE, link="/tmp"), member("out/x", data=b"x")], "beneath what is not"),
            ([member("hard", kind=tarfile.LNKTYPE, link="../../etc/passwd")], "no path inside"),
            ([member("l", kind=tarfile.SYMTYPE, link="/etc"), member("h", kind=tarfile.LNKTYPE, link="l")], "no file"),
        ],
    )
    def test_hostile_layers_are_refused(
        self, tmp_path: Path, store: RuntimeStore, members: list[Any], why: str
    ) -> None:
        path = oci_layout(tmp_path / "layout", ("tar", layer(*members)))
        with pytest.raises(ImportRefused, match=why):
            import_oci_layout(store, "image", path)
        assert not (tmp_path / "x").exists()
        assert list((tmp_path / "store").glob(".new-*")) == []

    def test_an_absolute_name_lands_inside(self, tmp_path: Path, store: RuntimeStore) -> None:
        path = oci_layout(tmp_path / "layout", ("tar", layer(member("/abs", data=b"x"))))
        assert (import_oci_layout(store, "image", path).path / "abs").read_bytes() == b"x"

    def test_a_blob_that_is_not_its_digest_is_refused(self, tmp_path: Path, store: RuntimeStore) -> None:
        data = layer(member("a", data=b"x"))
        path = oci_layout(tmp_path / "layout", ("tar", data))
        (path / "blobs/sha256" / hashlib.sha256(data).hexdigest()).write_bytes(data + b"\0")
        with pytest.raises(ImportRefused, match="not what its digest says"):
            import_oci_layout(store, "image", path)

    def test_a_cut_layer_is_refused(self, tmp_path: Path, store: RuntimeStore) -> None:
        data = gzip.compress(layer(member("a", data=os.urandom(4096))))[:2000]
        with pytest.raises(ImportRefused, match="cannot be read"):
            import_oci_layout(store, "image", oci_layout(tmp_path / "layout", ("tar+gzip", data)))
