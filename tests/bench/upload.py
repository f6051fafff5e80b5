"""How much the API's process grows while 256 MiB arrive.

`blastdoor up`'s API (`python -m service.main`) is sent 256 MiB of random bytes in each of the ways below, one after the
other. Growth is the most resident memory it ever had meanwhile (VmHWM, which the kernel keeps and we reset before each;
no sample can miss it) above what it had before the first of them, after one small submission: what an upload leaves
behind counts against the next one too. RssFile is in it.

Refused:
- `declared`: Content-Length says 256 MiB, with the cap at its default of 50 MiB. Refused by its header.
- `undeclared`: chunked, so that the cap is only found out as the bytes come.
- `last_member`: the cap is raised, all of it arrives, and the archive's last member is a symbolic link.

Accepted (202, and the run passes), with BLASTDOOR_UPLOAD_MAX_BYTES raised to 300 MiB. An archive may expand to 256 MiB
and a file in it to 64 MiB; neither is a setting. So this is the most that is ever accepted, and as much arrives:
- `tar`: 4 files of 64 MiB;
- `tar_gz`: 9,000 files, since every name is kept until the whole set is judged (random bytes are stored blocks);
- `tar_zst`: with the largest window that is accepted, 8 MiB;
- `zip`: 9,000 files, deflated.
"""

import gzip
import io
import json
import os
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from tests.bench.figures import MIB, status_bytes
from tests.bench.live import Document, Service, form, must_pass, progress, running, scratch, submit

ARRIVING = 256 * MIB
RAISED_CAP = 300 * MIB
MANY = 9_000
_CHUNK = MIB
_ANSWER_WITHIN_S = 120.0
_HEAD = '--bench\r\nContent-Disposition: form-data; name="bundle"; filename="bundle"\r\n\r\n'
_SCENARIO = '{"name": "large", "steps": [{"name": "nothing", "run": "true"}]}'
_CONTROLS = '{"limits": {"memory": "1GiB", "disk": "300MiB", "files": 20000}}'


def measure(runsc: Path) -> Document:
    with scratch() as directory:
        noise = directory / "noise"
        _write_noise(noise)
        with running() as service:
            refused = _each(service, {"declared": (noise, True), "undeclared": (noise, False)}, expect=413)
        with running(upload_max_bytes=RAISED_CAP) as service:
            accepted = _accepted(service, directory, noise)
            refused |= accepted.pop("refused")
    worst = {"refused": _worst(refused), "accepted": _worst(accepted)}
    return {"upload_growth_mib": max(worst.values()), "upload_growth": worst | {"of": refused | accepted}}


def _accepted(service: Service, directory: Path, noise: Path) -> Document:
    found: Document = {}
    watched = Watched(service)
    for name, make in {"last_member": tar_with_link, **ACCEPTED}.items():
        progress(f"upload: making {name}")
        archive = directory / name
        with archive.open("wb") as file:
            make(file, noise)
        refusal = name == "last_member"
        figures = watched.send(name, archive, declared=True, expect=422 if refusal else 202)
        archive.unlink()
        if refusal:
            found["refused"] = {name: figures}
        else:
            found[name] = figures
    return found


def _each(service: Service, ways: dict[str, tuple[Path, bool]], *, expect: int) -> Document:
    watched = Watched(service)
    return {name: watched.send(name, path, declared=declared, expect=expect) for name, (path, declared) in ways.items()}


def _worst(cases: Document) -> float:
    growth: float = max(case["growth_mib"] for case in cases.values())
    return growth


class Watched:
    """A service's API: its memory at rest, and its most while something is sent to it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._process = Path("/proc") / str(service.pid("api"))
        self._key = service.new_tenant("uploads", storage_bytes=4 * 2**30)
        with service.client(self._key) as client:
            submit(client)
        self._idle = self._bytes("VmRSS")

    def send(self, name: str, path: Path, *, declared: bool, expect: int) -> Document:
        progress(f"upload: sending {name}")
        (self._process / "clear_refs").write_text("5")  # VmHWM begins anew
        pushed = _push(self._service.address, self._key, path, declared=declared)
        most = self._bytes("VmHWM")
        if pushed.status != expect:
            raise SystemExit(f"upload {name}: answered {pushed.status}, not {expect}: {pushed.body[:500]!r}")
        if expect == 202:
            with self._service.client(self._key) as client:
                must_pass(client.finished(pushed.document()))
        return {
            "growth_mib": (most - self._idle) / MIB,
            "idle_mib": self._idle / MIB,
            "sent_mib": pushed.sent_bytes / MIB,
            "status": pushed.status,
        }

    def _bytes(self, field: str) -> int:
        return status_bytes((self._process / "status").read_text(), field)


@dataclass(frozen=True)
class Pushed:
    """What came of it. `sent_bytes`: what the kernel took from us, so what arrived, but for its buffers."""

    status: int | None
    body: bytes
    sent_bytes: int

    def document(self) -> Document:
        document: Document = json.loads(self.body)
        return document


def _push(address: str, key: str, path: Path, *, declared: bool) -> Pushed:
    """A client that goes on sending whatever is answered meanwhile: until all is sent, or the connection broken."""
    tail = b"\r\n" + form(scenario=_SCENARIO, controls=_CONTROLS)
    length = len(_HEAD) + path.stat().st_size + len(tail)
    how = f"Content-Length: {length}" if declared else "Transfer-Encoding: chunked"
    lines = ("POST /v1/runs HTTP/1.1", f"Host: {address}", f"Authorization: Bearer {key}", "Connection: close", how)
    kind = "Content-Type: multipart/form-data; boundary=bench"
    host, port = address.rsplit(":", 1)
    sent = 0
    with socket.create_connection((host, int(port)), timeout=_ANSWER_WITHIN_S) as connection:
        connection.sendall("\r\n".join((*lines, kind, "", "")).encode())
        try:
            for chunk in _body(path, tail):
                connection.sendall(chunk if declared else b"%x\r\n%b\r\n" % (len(chunk), chunk))
                sent += len(chunk)
            if not declared:
                connection.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough; what it said is looked at now
        answer = _read_to_end(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else None
    return Pushed(status, body, sent)


def _body(path: Path, tail: bytes) -> Iterator[bytes]:
    yield _HEAD.encode()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
    yield tail


def _read_to_end(connection: socket.socket) -> bytes:
    answer = bytearray()
    try:
        while piece := connection.recv(65536):
            answer += piece
    except ConnectionResetError:
        pass  # after an answer that was given before everything had been read
    return bytes(answer)


# --- What is sent ----------------------------------------------------------------------------------------------------


def _write_noise(path: Path) -> None:
    """Nothing that a compressor could make smaller."""
    with path.open("wb") as file:
        for _ in range(ARRIVING // _CHUNK):
            file.write(os.urandom(_CHUNK))


def _tar(file: IO[bytes], noise: Path, *, files: int = 4) -> None:
    size = ARRIVING // files
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar, noise.open("rb") as source:
        for number in range(files):
            tar.addfile(_info(_name(number), size), source)


def tar_with_link(file: IO[bytes], noise: Path) -> None:
    _tar(file, noise)
    link = _info("link", 0)
    link.type, link.linkname = tarfile.SYMTYPE, "000/file-0000"
    end = io.BytesIO()
    with tarfile.open(fileobj=end, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(link)
    file.seek(ARRIVING + 4 * 512)  # over the end of the first
    file.truncate()
    file.write(end.getvalue())


def _tar_gz(file: IO[bytes], noise: Path) -> None:
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=0) as packed:
        _tar(packed, noise, files=MANY)


def _tar_zst(file: IO[bytes], noise: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=23)
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file, closefd=False) as packed:
        _tar(packed, noise)


def _zip(file: IO[bytes], noise: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=0) as packed, noise.open("rb") as source:
        for number in range(MANY):
            packed.writestr(_name(number), source.read(ARRIVING // MANY))


ACCEPTED: dict[str, Callable[[IO[bytes], Path], None]] = {
    "tar": _tar, "tar_gz": _tar_gz, "tar_zst": _tar_zst, "zip": _zip,
}  # fmt: skip


def _name(number: int) -> str:
    return f"{number // 100:03}/file-{number:04}"


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info
