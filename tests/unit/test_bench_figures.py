"""The benchmark's arithmetic: a figure nobody can check by hand should at least be computed as it says."""

import io
import tarfile
from pathlib import Path

import pytest

from service.intake.archive import ArchiveCaps, inspect
from tests.bench import extract, upload
from tests.bench.figures import Overshoot, latencies_ms, percentile, rate, ratio_of_pairs, status_bytes, worst


def shot(seen: float, *, limit: float = 10, by: str = "bomb") -> Overshoot:
    return Overshoot(unit="bytes", limit=limit, seen=seen, by=by)


def test_a_percentile_is_one_of_the_values_by_nearest_rank() -> None:
    values = [float(n) for n in range(1, 21)]
    assert percentile(values[::-1], 95) == 19
    assert percentile(values, 50) == 10
    assert percentile([7.0], 95) == 7
    assert percentile(values, 100) == 20


def test_a_ratio_is_taken_pair_by_pair_so_that_a_slow_moment_counts_for_neither() -> None:
    assert ratio_of_pairs([1, 100, 1], [2, 200, 2]) == 2
    assert ratio_of_pairs([2.0], [1.0]) == 0.5
    with pytest.raises(ValueError, match="shorter"):
        ratio_of_pairs([1, 2], [1])


def test_an_overshoot_is_what_was_seen_beyond_the_limit_and_never_less_than_nothing() -> None:
    assert shot(12).beyond == 2
    assert shot(9).beyond == 0
    assert shot(10.25).document() == {
        "unit": "bytes", "limit": 10, "seen": 10.25, "beyond": 0.25, "by": "bomb", "plays": 1,
    }  # fmt: skip


def test_the_worst_play_is_the_one_furthest_beyond_its_own_limit() -> None:
    most = worst([shot(12), shot(103, limit=100, by="other"), shot(9)])
    assert (most.by, most.beyond, most.plays) == ("other", 3, 3)
    near = worst([shot(3), shot(9, by="nearest")])
    assert (near.by, near.beyond, near.plays) == ("nearest", 0, 2)


def test_a_rate_is_the_growth_of_a_counter_over_its_whole_time() -> None:
    assert rate([(10.0, 1.0), (11.0, 9.0), (14.0, 3.0)]) == 0.5


def test_a_latency_counts_for_everything_that_was_committed_or_there_is_no_figure() -> None:
    assert latencies_ms({"a": 1.0, "b": 2.0}, {"b": 2.5, "a": 1.25, "not ours": 9.0}) == [250, 500]
    with pytest.raises(ValueError, match="1 of 2 never came, b among them"):
        latencies_ms({"a": 1.0, "b": 2.0}, {"a": 1.25})


def test_memory_is_read_from_the_status_of_a_process() -> None:
    status = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
    assert (status_bytes(status, "VmHWM"), status_bytes(status, "VmRSS")) == (2 * 2**20, 2**20)
    with pytest.raises(ValueError, match="no VmSwap"):
        status_bytes(status, "VmSwap")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_archives_to_extract_hold_what_their_shape_says(tmp_path: Path, mode: str) -> None:
    extract.make_archive(tmp_path / "archive", mode, files=3, size=70_000)
    summary = inspect(tmp_path / "archive", ArchiveCaps())
    assert (summary.files, summary.content_bytes) == (3, 210_000)


def test_the_refused_archive_is_whole_but_for_its_last_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "ARRIVING", 4096)
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(4096))
    with (tmp_path / "archive").open("w+b") as file:
        upload.tar_with_link(file, noise)
    with tarfile.open(tmp_path / "archive") as tar:
        members = tar.getmembers()
    assert [member.type for member in members] == [tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE]
    assert [member.size for member in members] == [1024] * 4 + [0]


def test_the_accepted_archives_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "ARRIVING", 64 * 1024)
    monkeypatch.setattr(upload, "MANY", 16)
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(64 * 1024))
    for name, make in upload.ACCEPTED.items():
        packed = io.BytesIO()
        make(packed, noise)
        (tmp_path / name).write_bytes(packed.getvalue())
        assert inspect(tmp_path / name, ArchiveCaps()).content_bytes == 64 * 1024, name
