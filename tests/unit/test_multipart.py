"""Receipt of a submission: any chunking gives the same, what is wrong is named, and what fails leaves nothing."""

import asyncio
import errno
import hashlib
import os
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.core.errors import BlastdoorError, DocumentInvalid, StorageFull, TooLarge
from service.intake import multipart
from service.intake.multipart import Upload, UploadCaps, UploadTimedOut, receive_upload

pytestmark = pytest.mark.unit

BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
KIND = f"multipart/form-data; boundary={BOUNDARY}"
CAPS = UploadCaps(bundle_bytes=5000, scenario_bytes=500, controls_bytes=400, metadata_bytes=300, deadline_s=20.0)
BUNDLE = b"\x00\x01binary\r\n--" + BOUNDARY[:-1].encode() + b"\r\n" + bytes(range(256)) * 8


def part(name: str, data: bytes, *headers: str, disposition: str | None = None) -> bytes:
    lines = [disposition or f'Content-Disposition: form-data; name="{name}"', *headers]
    return f"--{BOUNDARY}\r\n".encode() + "\r\n".join(lines).encode() + b"\r\n\r\n" + data + b"\r\n"


def body(*parts: bytes, end: bytes = f"--{BOUNDARY}--\r\n".encode()) -> bytes:
    return b"".join(parts) + end


GOOD = body(
    part("scenario", b"name: x\r\nsteps: []\r\n"),
    part("bundle", BUNDLE, "Content-Type: application/gzip",
         disposition='Content-Disposition: form-data; name="bundle"; filename="../../etc/passwd"'),
    part("metadata", b'{"a": "b"}', "Content-Type: application/json"),
)  # fmt: skip


async def _chunks(data: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def receive(
    data: bytes,
    staging: Path,
    *,
    size: int = 1000,
    kind: str = KIND,
    caps: UploadCaps = CAPS,
    length: int | None = None,
) -> Upload:
    return asyncio.run(
        receive_upload(_chunks(data, size), content_type=kind, staging=staging, caps=caps, content_length=length)
    )


def _as_sent(upload: Upload, staging: Path) -> None:
    assert upload.scenario == b"name: x\r\nsteps: []\r\n"
    assert upload.controls is None
    assert upload.metadata == b'{"a": "b"}'
    assert upload.bundle_bytes == len(BUNDLE)
    assert upload.bundle_digest == f"sha256:{hashlib.sha256(BUNDLE).hexdigest()}"
    assert upload.bundle_path is not None
    assert upload.bundle_path.parent == staging
    assert upload.bundle_path.read_bytes() == BUNDLE
    assert upload.bundle_path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(staging) == ["bundle"]
    upload.bundle_path.unlink()


def test_any_chunking_gives_the_same_upload(tmp_path: Path) -> None:
    for size in (*range(1, 80), 255, 256, 257, 1000, len(GOOD) - 1, len(GOOD), len(GOOD) + 1):
        _as_sent(receive(GOOD, tmp_path, size=size), tmp_path)


def test_a_quoted_boundary_and_any_order_of_parts_will_do(tmp_path: Path) -> None:
    for data in (GOOD, GOOD.removesuffix(b"\r\n"), b"\r\n" + GOOD):
        _as_sent(receive(data, tmp_path, kind=f'Multipart/Form-Data; charset=utf-8; boundary="{BOUNDARY}"'), tmp_path)


def test_a_part_may_be_absent_or_empty(tmp_path: Path) -> None:
    assert receive(body(part("scenario", b"x")), tmp_path) == Upload(scenario=b"x")
    empty = receive(body(part("bundle", b""), part("controls", b"")), tmp_path)
    assert empty.bundle_digest == f"sha256:{hashlib.sha256(b'').hexdigest()}"
    assert (empty.bundle_bytes, empty.controls) == (0, b"")
    assert receive(body(), tmp_path) == Upload()


WRONG = {
    "an unknown part": (body(part("code", b"x")), "code", "the parts are bundle, scenario, controls, metadata"),
    "a part twice": (body(part("scenario", b"x"), part("scenario", b"y")), "scenario", "sent once"),
    "a bundle twice": (body(part("bundle", b"x"), part("bundle", b"y")), "bundle", "sent once"),
    "a part without a name": (body(part("", b"x", disposition="Content-Disposition: form-data")), "", "name="),
    "a part without a disposition": (body(part("", b"x", disposition="Content-Type: text/plain")), "", "name="),
    "an attachment": (body(part("", b"x", disposition="Content-Disposition: attachment; name=x")), "", "form-data"),
    "a part in base64": (body(part("bundle", b"eA==", "Content-Transfer-Encoding: base64")), "bundle", "as it is"),
    "a header twice": (body(part("bundle", b"x", "Content-Disposition: form-data; name=controls")), "", "two headers"),
    "nine headers": (body(part("bundle", b"x", *[f"X-{n}: y" for n in range(8)])), "", "well-formed"),
    "a header too long": (body(part("bundle", b"x", "X: " + "y" * 2000)), "", "well-formed"),
    "a header without a colon": (body(part("bundle", b"x", "nonsense")), "", "well-formed"),
    "a body that is no multipart": (b"hello", "", "well-formed"),
    "another boundary": (GOOD.replace(BOUNDARY.encode(), b"other"), "", "well-formed"),
    "nothing": (b"", "", "cut short"),
    "no closing boundary": (body(part("bundle", BUNDLE), end=b""), "bundle", "cut short"),
    "half a closing boundary": (GOOD[:-5], "metadata", "cut short"),
    "half a bundle": (GOOD[:400], "bundle", "cut short"),
    "something after the end": (GOOD + b"GET / HTTP/1.1\r\n\r\n", "", "nothing after"),
    "another body after the end": (GOOD + part("controls", b"x"), "", "nothing after"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "path", "says"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_and_leaves_nothing(data: bytes, path: str, says: str, tmp_path: Path) -> None:
    for size in (1, 7, 100_000):
        with pytest.raises(DocumentInvalid) as refused:
            receive(data, tmp_path, size=size)
        assert refused.value.document == "request"
        assert says in refused.value.errors[0]["message"]
        assert refused.value.errors[0]["path"] in (path, "")
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "kind",
    ["", "application/json", "multipart/mixed; boundary=x", "multipart/form-data", "multipart/form-data; boundary=",
     "multipart/form-data; boundary=" + "x" * 71, "multipart/form-data; boundary=é\u2028"],
)  # fmt: skip
def test_a_content_type_without_a_sound_boundary_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DocumentInvalid) as refused:
        receive(GOOD, tmp_path, kind=kind)
    assert refused.value.code == "request_invalid"
    assert refused.value.detail.isprintable()


@pytest.mark.parametrize(("name", "most"), [("bundle", 5000), ("scenario", 500), ("controls", 400), ("metadata", 300)])
def test_each_part_has_its_cap(name: str, most: int, tmp_path: Path) -> None:
    for size in (1, 333, 100_000):
        receive(body(part(name, b"x" * most)), tmp_path, size=size)
        for left in tmp_path.iterdir():
            left.unlink()
        with pytest.raises(TooLarge, match=f"part {name} is larger than {most} bytes"):
            receive(body(part(name, b"x" * (most + 1))), tmp_path, size=size)
        assert os.listdir(tmp_path) == []


def test_reading_stops_at_the_cap_and_before_it_when_the_length_is_told(tmp_path: Path) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        yield part("bundle", b"")[:-2]
        while True:
            read += 1000
            yield bytes(1000)

    with pytest.raises(TooLarge):
        asyncio.run(receive_upload(endless(), content_type=KIND, staging=tmp_path, caps=CAPS))
    assert read <= 6000
    with pytest.raises(TooLarge):
        receive(b"", tmp_path, length=CAPS.total_bytes + 1)
    _as_sent(receive(GOOD, tmp_path, length=CAPS.total_bytes), tmp_path)


def test_framing_counts_towards_the_total(tmp_path: Path) -> None:
    async def newlines() -> AsyncIterator[bytes]:
        while True:
            yield b"\r\n" * 500

    with pytest.raises((TooLarge, DocumentInvalid)):
        asyncio.run(receive_upload(newlines(), content_type=KIND, staging=tmp_path, caps=CAPS))


def test_an_upload_that_is_too_slow_ends_by_its_deadline(tmp_path: Path) -> None:
    async def dripping() -> AsyncIterator[bytes]:
        for at in range(len(GOOD)):
            yield GOOD[at : at + 1]
            await asyncio.sleep(0.005 if at > 300 else 0)

    caps = UploadCaps(bundle_bytes=5000, deadline_s=0.1)
    started = time.monotonic()
    with pytest.raises(UploadTimedOut, match=r"within 0\.1 s"):
        asyncio.run(receive_upload(dripping(), content_type=KIND, staging=tmp_path, caps=caps))
    assert time.monotonic() - started < 2.0
    assert os.listdir(tmp_path) == []


def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    class GoneError(Exception):
        pass

    async def leaving() -> AsyncIterator[bytes]:
        yield GOOD[:600]
        raise GoneError

    with pytest.raises(GoneError):
        asyncio.run(receive_upload(leaving(), content_type=KIND, staging=tmp_path, caps=CAPS))
    assert os.listdir(tmp_path) == []


def test_a_cancelled_upload_leaves_nothing_and_its_thread_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    write_out = multipart._Sink.write_out

    def slow(sink: multipart._Sink) -> None:
        time.sleep(0.2)
        write_out(sink)
        events.append("written")

    monkeypatch.setattr(multipart, "_BUFFER_BYTES", 100)
    monkeypatch.setattr(multipart._Sink, "write_out", slow)

    async def scene() -> None:
        task = asyncio.create_task(receive_upload(_chunks(GOOD, 1000), content_type=KIND, staging=tmp_path, caps=CAPS))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        events.append("ended")

    asyncio.run(scene())
    assert events == ["written", "ended"]
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multipart.os, "write", full)
    with pytest.raises(StorageFull):
        receive(GOOD, tmp_path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    receive(GOOD, tmp_path).bundle_path.unlink()  # type: ignore[union-attr]
    before = len(os.listdir("/proc/self/fd"))
    receive(GOOD, tmp_path).bundle_path.unlink()  # type: ignore[union-attr]
    for data, _, _ in WRONG.values():
        with pytest.raises(DocumentInvalid):
            receive(data, tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_stands_in_the_staging_directory_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        receive(GOOD, tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "bundle").is_symlink()


def test_a_large_upload_passes_through_little_memory_and_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    piece = os.urandom(64 * 1024)
    count = 1024  # 64 MiB
    waits: list[float] = []

    async def large() -> AsyncIterator[bytes]:
        yield part("bundle", b"")[:-2]
        for _ in range(count):
            yield piece
            await asyncio.sleep(0)
        yield b"\r\n" + body()

    async def others() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            waits.append(time.perf_counter() - started)

    async def scene() -> Upload:
        other = asyncio.create_task(others())
        caps = UploadCaps(bundle_bytes=len(piece) * count)
        try:
            return await receive_upload(large(), content_type=KIND, staging=tmp_path, caps=caps)
        finally:
            other.cancel()

    tracemalloc.start()
    try:
        upload = asyncio.run(scene())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert upload.bundle_bytes == len(piece) * count
    assert upload.bundle_digest == f"sha256:{hashlib.sha256(piece * count).hexdigest()}"
    assert peak < 4 * 2**20
    assert sorted(waits)[len(waits) // 2] < 0.05


_pieces = st.sampled_from([
    b"--" + BOUNDARY.encode(), b"--" + BOUNDARY.encode() + b"\r\n", b"--" + BOUNDARY.encode() + b"--",
    b'Content-Disposition: form-data; name="bundle"\r\n\r\n', b"\r\n", b"\r", b"\n",
    b'Content-Disposition: form-data; name="scenario"\r\n\r\n',
    b"Content-Disposition: form-data; name*=utf-8''bundle\r\n\r\n", b"X: y\r\n", b":", b"--", b"data", b"\0" * 100,
])  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(_pieces | st.binary(max_size=40), max_size=30), size=st.integers(1, 200))
def test_whatever_arrives_only_our_own_errors_are_raised(tmp_path: Path, pieces: Iterable[bytes], size: int) -> None:
    try:
        upload = receive(b"".join(pieces), tmp_path, size=size)
    except BlastdoorError:
        assert os.listdir(tmp_path) == []
    else:
        if upload.bundle_path is not None:
            upload.bundle_path.unlink()
        assert os.listdir(tmp_path) == []
