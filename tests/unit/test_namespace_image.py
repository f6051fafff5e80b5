"""The image that pods are made of, packed from a root file system."""

import errno
import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from workers.cluster_cli import cluster
from workers.pods import image
from workers.pods.image import INIT_BINARY, ImageRefused, pack

NAME = "registry.example:5000/blastdoor/run"


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A small one, with what an image must not have, too."""
    root = tmp_path / "rootfs"
    for folder in ("usr/bin", "etc", "tmp", "dev", "work/left"):
        (root / folder).mkdir(parents=True)
    (root / "usr/bin/tool").write_text("#!/bin/sh\n")
    (root / "usr/bin/tool").chmod(0o4755)
    (root / "bin").symlink_to("usr/bin")
    (root / "tmp/of-the-build").write_text("x")
    os.mkfifo(root / "dev/pipe")
    return root


def layer(archive: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(archive) as tar:
        index = json.load(read(tar, "index.json"))
        manifest = json.load(blob(tar, index["manifests"][0]["digest"]))
        with tarfile.open(fileobj=blob(tar, manifest["layers"][0]["digest"])) as inner:
            return {entry.name: entry for entry in inner}


def read(tar: tarfile.TarFile, name: str) -> "tarfile.ExFileObject":
    file = tar.extractfile(name)
    assert file is not None
    return file


def blob(tar: tarfile.TarFile, digest: str) -> "tarfile.ExFileObject":
    """It is what its name says."""
    file = read(tar, f"blobs/{digest.replace(':', '/')}")
    assert f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == digest
    file.seek(0)
    return file


def test_it_holds_the_tree_and_our_first_process_and_is_called_by_its_digest(rootfs: Path, tmp_path: Path) -> None:
    called = pack(rootfs, NAME, tmp_path / "run.tar")

    with tarfile.open(tmp_path / "run.tar") as tar:
        (described,) = json.load(read(tar, "index.json"))["manifests"]
        assert called == f"{NAME}@{described['digest']}" == described["annotations"]["io.containerd.image.name"]
        manifest = json.load(blob(tar, described["digest"]))
        assert json.load(blob(tar, manifest["config"]["digest"]))["os"] == "linux"
    found = layer(tmp_path / "run.tar")
    assert {name: oct(found[name].mode) for name in (".blastdoor/init", ".blastdoor/init-readable", "tmp")} == {
        ".blastdoor/init": "0o111", ".blastdoor/init-readable": "0o555", "tmp": "0o1777"
    }  # fmt: skip
    assert found[".blastdoor/init"].size == INIT_BINARY.stat().st_size
    assert found["bin"].linkname == "usr/bin"
    assert found["work"].isdir()


def test_what_an_image_must_not_have_is_left_out(rootfs: Path, tmp_path: Path) -> None:
    pack(rootfs, NAME, tmp_path / "run.tar")

    found = layer(tmp_path / "run.tar")
    assert not {"dev/pipe", "tmp/of-the-build", "work/left"} & found.keys()
    assert found["usr/bin/tool"].mode == 0o755, "a set-id bit"
    assert {(entry.uid, entry.gid) for entry in found.values()} == {(0, 0)}


def test_the_same_tree_gives_the_same_digest(rootfs: Path, tmp_path: Path) -> None:
    first = pack(rootfs, NAME, tmp_path / "first.tar")
    os.utime(rootfs / "usr/bin/tool", (1, 1))
    assert pack(rootfs, NAME, tmp_path / "second.tar") == first
    (rootfs / "etc/new").touch()
    assert pack(rootfs, NAME, tmp_path / "third.tar") != first


def _fifo(rootfs: Path) -> None:
    os.mkfifo(rootfs / "etc/pipe")


def _ours(rootfs: Path) -> None:
    (rootfs / ".blastdoor").symlink_to("etc")


@pytest.mark.parametrize(("spoil", "why"), [(_fifo, "/etc/pipe: only files"), (_ours, "that place is ours")])
def test_what_cannot_be_an_image_is_refused(
    rootfs: Path, tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    spoil(rootfs)
    with pytest.raises(ImageRefused, match=why):
        pack(rootfs, NAME, tmp_path / "run.tar")


@pytest.mark.parametrize("name", ["run", "registry.example/run:1", "registry.example/run@sha256:0", "Registry/run", ""])
def test_a_name_is_a_registry_and_a_path(rootfs: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageRefused, match="is no name of an image"):
        pack(rootfs, name, tmp_path / "run.tar")


def test_the_command_prints_the_name_and_a_refusal_leaves_what_was_there(rootfs: Path, tmp_path: Path) -> None:
    asked = ["image", str(rootfs), "--name", NAME, "--output", str(tmp_path / "run.tar")]
    done = CliRunner().invoke(cluster, asked)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{pack(rootfs, NAME, tmp_path / 'again.tar')}\n"
    before = (tmp_path / "run.tar").read_bytes()
    assert before == (tmp_path / "again.tar").read_bytes()

    _fifo(rootfs)
    done = CliRunner().invoke(cluster, asked)
    assert (done.exit_code, "only files" in done.output) == (2, True)
    assert (tmp_path / "run.tar").read_bytes() == before


def test_a_refusal_writes_no_file(rootfs: Path, tmp_path: Path) -> None:
    _fifo(rootfs)
    done = CliRunner().invoke(cluster, ["image", str(rootfs), "--name", NAME, "--output", str(tmp_path / "run.tar")])
    assert done.exit_code == 2
    assert os.listdir(tmp_path) == ["rootfs"]


def test_an_archive_that_is_only_half_written_does_not_take_the_place_of_a_whole_one(
    rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(rootfs, NAME, tmp_path / "run.tar")
    before = (tmp_path / "run.tar").read_bytes()

    def full(digest: str) -> str:
        assert len(list(tmp_path.glob(".run.tar.*"))) == 1, "it is being written"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(image, "_place", full)
    (rootfs / "etc/new").touch()
    with pytest.raises(OSError, match="No space left"):
        pack(rootfs, NAME, tmp_path / "run.tar")
    assert (tmp_path / "run.tar").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["rootfs", "run.tar"]


def test_an_archive_is_not_a_directory(rootfs: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cluster, ["image", str(rootfs), "--name", NAME, "--output", str(tmp_path)])
    assert (done.exit_code, "is a directory" in done.output) == (2, True)
