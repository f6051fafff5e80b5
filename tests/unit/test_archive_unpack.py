"""Unpacking: what is made, as whom, and that nothing which stands in the directory leads out of it."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.core.errors import BundleRejected
from service.intake.archive import unpack
from service.intake.beneath import open_beneath
from tests.archives import (
    CAPS,
    ZipMember,
    directory,
    gzipped,
    tar,
    tar_member,
    tree,
    unpack_into,
    write,
    zip_archive,
    zip_directory,
    zstandarded,
)

pytestmark = pytest.mark.unit

TAR = tar(
    directory(b"./"), directory(b"./d/"), tar_member(b"./d/f", b"content"), tar_member(b"./x/y/z", b"deep", mode=0o755)
)
ZIP = zip_archive(
    zip_directory(b"d/"), ZipMember(b"d/f", b"content"), ZipMember(b"x/y/z", b"deep", mode=stat.S_IFREG | 0o755)
)
MADE = {
    "d": (0o755, None),
    "d/f": (0o644, b"content"),
    "x": (0o755, None),
    "x/y": (0o755, None),
    "x/y/z": (0o755, b"deep"),
}
ARCHIVES = {"tar": TAR, "tar.gz": gzipped(TAR), "tar.zst": zstandarded(TAR), "zip": ZIP}
each_format = pytest.mark.parametrize("archive", ARCHIVES.values(), ids=ARCHIVES)


@contextmanager
def _directory_fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@each_format
def test_modes_are_exact_whatever_the_umask_is(archive: bytes, tmp_path: Path) -> None:
    for umask in (0o000, 0o022, 0o077):
        before = os.umask(umask)
        try:
            unpack_into(tmp_path / f"root{umask}", write(tmp_path, archive))
        finally:
            os.umask(before)
        assert tree(tmp_path / f"root{umask}") == MADE


@each_format
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_everything_made_belongs_to_the_owner_and_the_directory_itself_does_not(archive: bytes, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with _directory_fd(root) as fd:
        unpack(write(tmp_path, archive), fd, CAPS, owner=(65532, 65533))
    assert {(p.stat().st_uid, p.stat().st_gid) for p in root.rglob("*")} == {(65532, 65533)}
    assert root.stat().st_uid == os.geteuid()


@each_format
def test_no_descriptor_is_left_open(archive: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, archive)
    cut = tmp_path / "cut"
    cut.write_bytes(archive[:-1])
    before = os.listdir("/proc/self/fd")
    unpack_into(tmp_path / "root", path)
    with pytest.raises(BundleRejected):
        unpack_into(tmp_path / "root-cut", cut)
    assert os.listdir("/proc/self/fd") == before


@each_format
def test_a_directory_that_is_not_empty_is_never_written_over(archive: bytes, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    with _directory_fd(root) as fd, pytest.raises(FileExistsError):
        unpack(write(tmp_path, archive), fd, CAPS)
    (root / "d").rmdir()
    with _directory_fd(root) as fd:
        assert unpack(write(tmp_path, archive), fd, CAPS).files == 2
    assert tree(root) == MADE


@each_format
def test_a_link_planted_in_the_directory_is_not_followed(archive: bytes, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for planted in ("d", "x"):
        root = tmp_path / f"root-{planted}"
        root.mkdir()
        (root / planted).symlink_to(outside)
        with _directory_fd(root) as fd, pytest.raises(OSError):
            unpack(write(tmp_path, archive), fd, CAPS)
        assert list(outside.iterdir()) == []


def test_a_file_planted_as_a_link_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    root = tmp_path / "root"
    root.mkdir()
    (root / "f").symlink_to(target)
    with _directory_fd(root) as fd, pytest.raises(OSError):
        unpack(write(tmp_path, tar(tar_member(b"f", b"overwritten"))), fd, CAPS)
    assert target.read_text() == "untouched"


def test_the_kernel_refuses_every_way_out(tmp_path: Path) -> None:
    (tmp_path / "sibling").write_text("x")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "link").symlink_to("sub")
    (root / "up").symlink_to("..")
    (root / "sub/file").write_text("inside")
    with _directory_fd(root) as fd:
        for path, code in {
            "../sibling": errno.EXDEV,
            "sub/../../sibling": errno.EXDEV,
            str(tmp_path / "sibling"): errno.EXDEV,
            "up/sibling": errno.ELOOP,
            "link/file": errno.ELOOP,
        }.items():
            with pytest.raises(OSError) as refused:
                open_beneath(fd, path, os.O_RDONLY)
            assert refused.value.errno == code, path
        os.close(open_beneath(fd, "sub/file", os.O_RDONLY))
    with _directory_fd(Path("/")) as fd, pytest.raises(OSError) as refused:
        open_beneath(fd, "proc/version", os.O_RDONLY)  # another mount
    assert refused.value.errno == errno.EXDEV


def test_an_archive_that_is_a_link_or_no_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(TAR)
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "absent"):
        with pytest.raises(OSError):
            unpack_into(tmp_path / f"root-{name}", tmp_path / name)


def test_a_large_archive_comes_out_whole_however_its_second_pass_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above what is kept in memory from the first pass: from a file without a name, and where there can be none by
    decompressing again. The content is such that a slip by one byte would show."""
    content = {f"f{n}": os.urandom(1024) * (n * 400) + b"end" for n in range(8)}
    data = tar(*(tar_member(name.encode(), text) for name, text in content.items()))
    assert len(data) > 8 * 2**20
    descriptors = os.listdir("/proc/self/fd")
    for packed in (gzipped, zstandarded):
        path = write(tmp_path, packed(data))
        unpack_into(tmp_path / f"{packed.__name__}-kept", path)
        with monkeypatch.context() as patched:
            patched.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)  # no such file: EISDIR
            unpack_into(tmp_path / f"{packed.__name__}-again", path)
        for how in ("kept", "again"):
            root = tmp_path / f"{packed.__name__}-{how}"
            assert {name: text for name, (_, text) in tree(root).items()} == content
    assert os.listdir("/proc/self/fd") == descriptors
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"upload"}
