"""What every keeper of blobs promises, kept by files and by the shipped fake."""

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import pytest

from service.adapters.blobs import FileBlobs
from service.adapters.memory import MemoryBlobs
from service.core.errors import NotFound, StorageFull, TooLarge
from service.core.ports.blobs import Blobs

TEXT = b"print('hello')\n"
DIGEST = f"sha256:{hashlib.sha256(TEXT).hexdigest()}"
NOT_DIGESTS = ["", "sha256:", "sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:../../etc/passwd", "md5:" + "0" * 32,
               "sha256:" + "A" * 64, "sha256:" + "0" * 64 + "\n"]  # fmt: skip


HOUR = timedelta(hours=1)


def age(blobs: Blobs, tenant: str, digest: str) -> None:
    """As if it had been stored two hours ago."""
    ago = time.time() - 7200
    os.utime(blobs.path(tenant, digest), (ago, ago))


@pytest.fixture(params=["files", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return FileBlobs(tmp_path / "state") if request.param == "files" else MemoryBlobs()


class TestEveryBlobs:
    def test_bytes_are_read_back_by_their_digest(self, blobs: Blobs) -> None:
        assert blobs.put_bytes("acme", TEXT) == DIGEST
        assert blobs.path("acme", DIGEST).read_bytes() == TEXT

    def test_a_finished_file_is_taken(self, blobs: Blobs) -> None:
        with blobs.staging() as staging:
            upload = staging / "upload"
            upload.write_bytes(TEXT)
            blobs.put_file("acme", upload, DIGEST)
            assert not upload.exists()

        assert blobs.path("acme", DIGEST).read_bytes() == TEXT

    def test_taking_the_same_again_is_no_error(self, blobs: Blobs) -> None:
        blobs.put_bytes("acme", TEXT)
        with blobs.staging() as staging:
            (staging / "upload").write_bytes(TEXT)
            blobs.put_file("acme", staging / "upload", DIGEST)

        assert blobs.path("acme", DIGEST).read_bytes() == TEXT

    def test_a_stream_is_measured_and_named(self, blobs: Blobs) -> None:
        assert blobs.put_stream("acme", BytesIO(TEXT), max_bytes=len(TEXT)) == (DIGEST, len(TEXT))
        assert blobs.path("acme", DIGEST).read_bytes() == TEXT

    def test_a_stream_that_is_one_byte_too_long_leaves_nothing(self, blobs: Blobs) -> None:
        with pytest.raises(TooLarge):
            blobs.put_stream("acme", BytesIO(TEXT), max_bytes=len(TEXT) - 1)

        with pytest.raises(NotFound):
            blobs.path("acme", DIGEST)

    def test_nothing_at_all_is_a_blob_too(self, blobs: Blobs) -> None:
        digest, size = blobs.put_stream("acme", BytesIO(b""), max_bytes=0)

        assert size == 0
        assert blobs.path("acme", digest).read_bytes() == b""

    def test_a_tenants_blob_is_not_there_for_another(self, blobs: Blobs) -> None:
        blobs.put_bytes("acme", TEXT)

        with pytest.raises(NotFound):
            blobs.path("rival", DIGEST)

    def test_deleting_one_tenants_blob_leaves_the_others(self, blobs: Blobs) -> None:
        blobs.put_bytes("acme", TEXT)
        blobs.put_bytes("rival", TEXT)

        blobs.delete("acme", DIGEST)

        with pytest.raises(NotFound):
            blobs.path("acme", DIGEST)
        assert blobs.path("rival", DIGEST).read_bytes() == TEXT

    def test_deleting_what_is_not_there_is_success(self, blobs: Blobs) -> None:
        blobs.delete("acme", DIGEST)
        blobs.delete("acme", DIGEST)

    def test_what_is_old_is_listed_for_each_tenant_and_discarded_when_it_is_old(self, blobs: Blobs) -> None:
        for tenant in ("acme", "other"):
            blobs.put_bytes(tenant, TEXT)
        young = blobs.put_bytes("acme", b"young")
        age(blobs, "acme", DIGEST)

        assert list(blobs.older_than("acme", HOUR)) == [DIGEST]
        assert list(blobs.older_than("other", HOUR)) == list(blobs.older_than("nobody", HOUR)) == []
        assert [blobs.discard("acme", digest, age=HOUR) for digest in (DIGEST, young, "sha256:" + "0" * 64)] == [
            True, False, False
        ]  # fmt: skip
        assert blobs.path("acme", young).read_bytes() == b"young"
        assert blobs.path("other", DIGEST).read_bytes() == TEXT
        with pytest.raises(NotFound):
            blobs.path("acme", DIGEST)

    def test_clearing_a_tenant_leaves_nothing_of_it_and_all_of_the_others(self, blobs: Blobs) -> None:
        for tenant in ("acme", "other"):
            blobs.put_bytes(tenant, TEXT)
        for _ in range(2):
            blobs.clear("acme")

        assert list(blobs.older_than("acme", timedelta(0))) == []
        assert blobs.path("other", DIGEST).read_bytes() == TEXT
        assert blobs.put_bytes("acme", TEXT) == DIGEST, "and it can be stored again"

    def test_staging_is_private_and_gone_afterwards(self, blobs: Blobs) -> None:
        with blobs.staging() as staging:
            (staging / "deep").mkdir()
            (staging / "deep" / "file").write_bytes(TEXT)
            assert stat.S_IMODE(staging.stat().st_mode) == 0o700

        assert not staging.exists()

    def test_staging_is_gone_after_an_error_too(self, blobs: Blobs) -> None:
        with pytest.raises(TooLarge), blobs.staging() as staging:
            raise TooLarge("no")

        assert not staging.exists()

    def test_two_stagings_are_apart(self, blobs: Blobs) -> None:
        with blobs.staging() as one, blobs.staging() as other:
            assert one != other


class TestFiles:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return tmp_path / "state"

    @pytest.fixture
    def blobs(self, root: Path) -> FileBlobs:
        return FileBlobs(root)

    def test_one_that_is_stored_again_while_it_is_discarded_stays(
        self, blobs: FileBlobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was old when it was listed; the same bytes come again just before it is moved aside."""
        blobs.put_bytes("acme", TEXT)
        age(blobs, "acme", DIGEST)
        rename = Path.rename

        def late(self: Path, target: Path) -> Path:
            if target.name == "discarded":
                monkeypatch.setattr(Path, "rename", rename)
                blobs.put_bytes("acme", TEXT)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", late)

        assert not blobs.discard("acme", DIGEST, age=HOUR)
        assert blobs.path("acme", DIGEST).read_bytes() == TEXT
        age(blobs, "acme", DIGEST)
        assert blobs.discard("acme", DIGEST, age=HOUR), "nobody stores it: it goes"

    def test_a_newer_one_is_not_put_back_over(self, blobs: FileBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
        """Twice: before it is moved aside, and again before it is put back."""
        blobs.put_bytes("acme", TEXT)
        link = Path.hardlink_to

        def later(self: Path, target: Path) -> None:
            blobs.put_bytes("acme", TEXT)
            link(self, target)

        monkeypatch.setattr(Path, "hardlink_to", later)

        assert not blobs.discard("acme", DIGEST, age=HOUR)
        assert blobs.path("acme", DIGEST).read_bytes() == TEXT

    @pytest.mark.parametrize("digest", NOT_DIGESTS)
    def test_what_is_no_digest_names_nothing(self, blobs: FileBlobs, digest: str) -> None:
        with pytest.raises(NotFound):
            blobs.path("acme", digest)
        blobs.delete("acme", digest)

    def test_no_name_of_a_tenant_leads_out_of_the_root(self, blobs: FileBlobs, root: Path) -> None:
        for tenant in ("..", "../../x", "a/b", "", "\x00"):
            blobs.put_bytes(tenant, TEXT)

        assert {path.parent.parent for path in root.rglob("*") if path.is_file()} == {root / "blobs"}

    def test_everything_below_the_root_is_for_this_user_alone(self, blobs: FileBlobs, root: Path) -> None:
        blobs.put_bytes("acme", TEXT)
        with blobs.staging():
            for path in [root, *root.rglob("*")]:
                assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path

    def test_bytes_on_the_way_stand_under_no_digest(self, blobs: FileBlobs, root: Path) -> None:
        class Breaks(BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                if self.tell():
                    raise ConnectionError
                return super().read(5)

        with pytest.raises(ConnectionError):
            blobs.put_stream("acme", Breaks(TEXT), max_bytes=100)

        assert [path for path in root.rglob("*") if path.is_file()] == []

    def test_what_a_killed_process_left_in_staging_is_removed_at_the_next_start(self, root: Path) -> None:
        holder = _holder(root)
        (left,) = (root / "staging").iterdir()
        holder.send_signal(signal.SIGKILL)
        holder.wait()

        FileBlobs(root)

        assert not left.exists()

    def test_what_a_living_process_has_in_staging_is_left_alone(self, root: Path) -> None:
        holder = _holder(root)
        (held,) = (root / "staging").iterdir()

        FileBlobs(root)

        assert (held / "upload").exists()
        holder.kill()
        holder.wait()

    def test_a_bundle_is_whole_after_the_process_was_killed(self, root: Path) -> None:
        program = f"""
            import os, signal
            from pathlib import Path
            from service.adapters.blobs import FileBlobs
            blobs = FileBlobs(Path({str(root)!r}))
            with blobs.staging() as staging:
                (staging / "upload").write_bytes({TEXT!r})
                blobs.put_file("acme", staging / "upload", {DIGEST!r})
                os.kill(os.getpid(), signal.SIGKILL)
        """
        killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)

        assert killed.returncode == -signal.SIGKILL
        assert FileBlobs(root).path("acme", DIGEST).read_bytes() == TEXT

    def test_a_bundle_is_flushed_with_its_name_before_it_is_answered_for(
        self, blobs: FileBlobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushed: list[str] = []
        fsync = os.fsync

        def note(descriptor: int) -> None:
            flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        monkeypatch.setattr("os.fsync", note)
        with blobs.staging() as staging:
            (staging / "upload").write_bytes(TEXT)
            blobs.put_file("acme", staging / "upload", DIGEST)

        final = blobs.path("acme", DIGEST)
        assert flushed == [str(final.parent.parent), str(staging / "upload"), str(final.parent)]

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_said_to_be_full(
        self, blobs: FileBlobs, root: Path, number: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_descriptor: int) -> NoReturn:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(StorageFull):
            blobs.put_bytes("acme", TEXT)

        assert [path for path in root.rglob("*") if path.is_file()] == []

    def test_an_upload_that_fills_the_disk_is_said_to_have_filled_it(self, blobs: FileBlobs) -> None:
        with pytest.raises(StorageFull), blobs.staging():
            raise OSError(errno.ENOSPC, "no space left")

    def test_another_error_of_the_disk_stays_what_it_is(self, blobs: FileBlobs) -> None:
        with pytest.raises(PermissionError), blobs.staging():
            raise PermissionError(errno.EACCES, "no")


def _holder(root: Path) -> subprocess.Popen[bytes]:
    """A process that is in the middle of an upload."""
    program = f"""
        import time
        from pathlib import Path
        from service.adapters.blobs import FileBlobs
        with FileBlobs(Path({str(root)!r})).staging() as staging:
            (staging / "upload").touch()
            print("holding", flush=True)
            time.sleep(60)
    """
    argv = [sys.executable, "-c", textwrap.dedent(program)]
    holder = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"holding\n"
    holder.stdout.close()
    return holder
