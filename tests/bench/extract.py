"""How fast our extractor unpacks, as a ratio to the standard library's `tarfile` (`extractall` with the filter `data`).

The same archive by both in turns, who goes first alternating, each into a new directory of the same file system:
memory (/dev/shm) where there is one, as a run's /work is, so that no disk's moods are in it. The archive, and what ours
keeps of it between its two passes, stand in the scratch directory, as in a state directory. `tar` and `tar.gz`, of few
large files and of many small ones; `extract_ratio` is the worst of the four.
"""

import os
import random
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from service.intake.archive import ArchiveCaps, unpack
from tests.bench.figures import MIB, ratio_of_pairs
from tests.bench.live import Document, progress, scratch

PAIRS = int(os.environ.get("BENCH_PAIRS", "7"))
_SHARED_MEMORY = Path("/dev/shm")
_WORDS_SEED = 20_260_101
SHAPES = {"large": (4, 16 * MIB), "small": (2_500, 8 * 1024)}
"""Files, and bytes in each."""


def measure(runsc: Path) -> Document:
    details: Document = {}
    memory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    with scratch() as directory, tempfile.TemporaryDirectory(prefix="blastdoor-bench-", dir=memory) as targets:
        for shape, (files, size) in SHAPES.items():
            for kind, mode in (("tar", "w"), ("tar_gz", "w:gz")):
                name = f"{kind}_{shape}"
                progress(f"extract {name}")
                archive = directory / name
                make_archive(archive, mode, files=files, size=size)
                details[name] = _compared(archive, Path(targets), content_bytes=files * size)
                archive.unlink()
    return {"extract_ratio": min(case["ratio"] for case in details.values()), "extract": details}


def _compared(archive: Path, targets: Path, *, content_bytes: int) -> Document:
    times: dict[Callable[[Path, Path], None], list[float]] = {_ours: [], _theirs: []}
    for number in range(PAIRS + 1):
        turns = list(times) if number % 2 else list(times)[::-1]
        for way in turns:
            took_s = _timed(way, archive, targets)
            if number:  # the first pair warms up
                times[way].append(took_s)
    ours, theirs = times[_ours], times[_theirs]
    mib = content_bytes / MIB
    return {
        "ratio": ratio_of_pairs(ours, theirs),
        "mib_per_s": mib / statistics.median(ours),
        "tarfile_mib_per_s": mib / statistics.median(theirs),
    }


def _timed(way: Callable[[Path, Path], None], archive: Path, targets: Path) -> float:
    directory = targets / "into"
    directory.mkdir()
    try:
        started = time.perf_counter()
        way(archive, directory)
        return time.perf_counter() - started
    finally:
        shutil.rmtree(directory)


def _ours(archive: Path, directory: Path) -> None:
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        unpack(archive, directory_fd, ArchiveCaps())
    finally:
        os.close(directory_fd)


def _theirs(archive: Path, directory: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")


def make_archive(archive: Path, mode: str, *, files: int, size: int) -> None:
    """Words, so that gzip has as much to do as with source code."""
    chosen = random.Random(_WORDS_SEED)
    words = [bytes(chosen.choices(b"abcdefghijklmnopqrstuvwxyz_", k=chosen.randint(2, 12))) for _ in range(4000)]
    block = b" ".join(chosen.choices(words, k=MIB // 4))
    packing = {"compresslevel": 6} if mode.endswith("gz") else {}
    with tarfile.open(archive, mode, format=tarfile.GNU_FORMAT, **packing) as tar:  # type: ignore[call-overload]
        for number in range(files):
            info = tarfile.TarInfo(f"{number // 50:03}/file-{number:05}.py")
            info.size = size
            tar.addfile(info, _Repeated(block, at=chosen.randrange(len(block)), size=size))


class _Repeated:
    """`size` bytes of a block, from somewhere in it and around."""

    def __init__(self, block: bytes, *, at: int, size: int) -> None:
        self._block, self._at, self._left = block, at, size

    def read(self, most: int) -> bytes:
        wanted = min(most, self._left)
        read = self._block[self._at : self._at + wanted]
        while len(read) < wanted:
            read += self._block[: wanted - len(read)]
        self._at = (self._at + wanted) % len(self._block)
        self._left -= wanted
        return read
