"""What is uploaded is what stands in the directory: the same bytes for the same files, and no links."""

import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from service.client import CannotPack
from service.client.packing import pack_directory


def test_the_same_files_make_the_same_bytes_whatever_their_times_and_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory, names in ((first, ("a", "b")), (second, ("b", "a"))):
        directory.mkdir(mode=0o700)
        for name in names:
            (directory / name).write_text(name)
    os.utime(second / "a", (0, 0))
    (second / "b").chmod(0o600)
    assert _packed(first) == _packed(second)


def test_files_and_directories_keep_their_content_and_the_executable_bit(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text("print()")
    (tmp_path / "run.sh").write_text("#!/bin/sh\n")
    (tmp_path / "run.sh").chmod(0o700)
    with _opened(tmp_path) as archive:
        found = {member.name: (member.isdir(), member.mode, member.uid, member.mtime) for member in archive}
        assert found == {
            "empty": (True, 0o755, 0, 0),
            "run.sh": (False, 0o755, 0, 0),
            "src": (True, 0o755, 0, 0),
            "src/main.py": (False, 0o644, 0, 0),
        }
        content = archive.extractfile("src/main.py")
        assert content is not None
        assert content.read() == b"print()"


def test_the_history_of_git_stays_at_home(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("[remote] url = https://token@example.com")
    (tmp_path / "a").write_text("a")
    with _opened(tmp_path) as archive:
        assert archive.getnames() == ["a"]


def test_long_and_foreign_names_survive(tmp_path: Path) -> None:
    names = ["ü" * 100, "x" * 250]
    for name in names:
        (tmp_path / name).write_text("")
    with _opened(tmp_path) as archive:
        assert sorted(archive.getnames()) == sorted(names)


@pytest.mark.parametrize("kind", ["symlink", "directory symlink", "pipe", "socket"])
def test_what_is_no_file_is_refused_by_name_and_not_followed(tmp_path: Path, kind: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    odd = inner / "odd"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(odd))
    else:
        odd.symlink_to("/etc/passwd" if kind == "symlink" else "/etc")
    with pytest.raises(CannotPack, match="inner/odd: a bundle has regular files and directories only; this is a "):
        _packed(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff", os.O_CREAT | os.O_WRONLY))
    with pytest.raises(CannotPack, match="not UTF-8"):
        _packed(tmp_path)


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "absent"):
        with pytest.raises(CannotPack, match="is not a directory"):
            _packed(path)


def _packed(directory: Path) -> bytes:
    target = io.BytesIO()
    pack_directory(directory, target)
    return target.getvalue()


def _opened(directory: Path) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(_packed(directory)), mode="r:gz")
