"""What goes to and comes from our program in a pod: nothing that comes is believed before it makes sense."""

import struct
from collections.abc import Sequence

import pytest

from service.core.boundary import ArtifactLimits
from service.core.controls import Limits
from tests.sandboxes import make_step
from workers.pods.collect import choose
from workers.pods.protocol import (
    REQUEST_BYTES,
    Found,
    Frames,
    Garbled,
    Listing,
    fetch_request,
    read_finding,
    read_listing,
    read_report,
    step_request,
)

REPORT = b"exited 3\ntook_ms 250\ncpu_us 1500000\ntasks 4\ndisk_full 0\noom_kills 1\npeak_bytes 4096\n"


def frame(kind: bytes, data: bytes) -> bytes:
    return struct.pack("<cI", kind, len(data)) + data


def heard(*chunks: bytes) -> tuple[Frames, dict[str, bytes]]:
    told = {"o": b"", "e": b""}

    def tell(stream: str, data: bytes) -> None:
        told[stream] += data

    frames = Frames({name: lambda data, name=name: tell(name, data) for name in told})  # type: ignore[misc]
    for chunk in chunks:
        frames.feed(chunk)
    return frames, told


def test_frames_are_taken_apart_wherever_they_were_cut() -> None:
    whole = frame(b"o", b"out") + frame(b"e", b"") + frame(b"e", b"err") + frame(b"o", b"more") + frame(b"s", REPORT)
    for size in (1, 2, 3, 7, len(whole)):
        frames, told = heard(*(whole[at : at + size] for at in range(0, len(whole), size)))
        assert told == {"o": b"outmore", "e": b"err"}
        assert frames.report is not None
        assert (frames.report.exited, frames.report.cpu_s, frames.report.oom_kills) == (3, 1.5, 1)


def test_the_count_of_files_is_the_latest_and_without_what_is_ours() -> None:
    frames, _ = heard(frame(b"f", struct.pack("<Q", 3)))
    assert frames.files == 0, "an empty volume"
    for count, files in ((70, 67), (5, 2), (0, 0)):
        frames.feed(frame(b"f", struct.pack("<Q", count)))
        assert frames.files == files
    with pytest.raises(Garbled):
        frames.feed(frame(b"f", b"7"))


@pytest.mark.parametrize(
    "bad",
    [
        frame(b"x", b"unknown"),
        struct.pack("<cI", b"o", 2**20),
        frame(b"s", REPORT) + frame(b"s", REPORT),
        frame(b"s", REPORT) + frame(b"o", b"after the end"),
        frame(b"s", b"exited 0\n"),
        frame(b"s", REPORT + b"signalled 9\n"),
        frame(b"s", REPORT + b"verdict 0\n"),
        frame(b"s", b"exited zero\n"),
        frame(b"s", b"\xff"),
    ],
)
def test_what_makes_no_sense_is_never_half_believed(bad: bytes) -> None:
    with pytest.raises(Garbled):
        heard(bad)


def test_a_report_says_what_the_node_must_say_too() -> None:
    rest = b"took_ms 0\ncpu_us 0\ntasks 0\ndisk_full 0\n"
    assert read_report(b"exited 139\n" + rest).status == 139
    assert read_report(b"signalled 11\n" + rest).status == 139, "told apart by the report, agreed on by both"
    assert read_report(b"not_started 2\n" + rest).status == 127


def test_a_step_is_words_with_their_sizes_and_too_many_are_none() -> None:
    request = step_request(make_step("echo", "a b", stdin=b"12345"), Limits(pids=9, open_files=16, disk=2**20))
    assert request is not None
    size, words, variables, stdin, pids, files, most = struct.unpack_from("<IIIQQQQ", request)
    assert (words, stdin, pids, files, most) == (2, 5, 12, 16, 2**20 + 4096)
    assert len(request) == struct.calcsize("<IIIQQQQ") + size
    assert request[-size:].split(b"\0")[:2] == [b"echo", b"a b"]
    assert request.endswith(b"\0")
    assert request.count(b"=") == variables
    assert step_request(make_step("x" * REQUEST_BYTES), Limits()) is None


def record(what: bytes, path: bytes, *, links: int = 1, size: int = 0) -> bytes:
    return struct.pack("<BHIQ", what[0], len(path), links, size) + path


def test_a_listing_is_read_to_its_end_and_no_further() -> None:
    data = record(b"D", b"out") + record(b"F", b"out/\xff", size=3)
    assert read_listing(data + record(b"E", b"")) == Listing(
        [Found(b"out", "D", 1, 0), Found(b"out/\xff", "F", 1, 3)], complete=True
    )
    assert not read_listing(data + record(b"T", b"")).complete
    for bad in (
        data,
        data[:-1],
        data + record(b"E", b"") + b"x",
        data + record(b"E", b"name"),
        record(b"F", b"/etc/passwd") + record(b"E", b""),
        record(b"F", b"a/../../b") + record(b"E", b""),
        record(b"Z", b"a") + record(b"E", b""),
    ):
        with pytest.raises(Garbled):
            read_listing(bad)


def test_a_finding_is_three_words() -> None:
    assert read_finding(b"shut 13 423\n") == (13, 0.423)
    for bad in (b"", b"init\n", b"shut 1\n", b"shut -1 2\n", b"shut 1 2 3\n", b"\xff"):
        with pytest.raises(Garbled):
            read_finding(bad)


def test_files_are_asked_for_by_path_and_nothing_else() -> None:
    assert fetch_request([b"a", b"b/\xff"]) == b"\x02\0\0\0" + b"\x01\0a" + b"\x03\0b/\xff"


class TestChoosing:
    FOUND = (
        Found(b"out", "D", 2, 0),
        Found(b"out/a", "F", 1, 5),
        Found(b"out/b", "F", 1, 5),
        Found(b"out/link", "L", 1, 9),
        Found(b"out/pipe", "P", 1, 0),
        Found(b"out/twice", "F", 2, 1),
        Found(b"way", "L", 1, 3),
    )

    def choose(
        self, patterns: Sequence[str], *, complete: bool = True, **limits: object
    ) -> tuple[list[bytes], dict[str, str]]:
        asked = ArtifactLimits.model_validate({"total_bytes": 100} | limits)
        chosen = choose(Listing(self.FOUND, complete), patterns, asked)
        return [found.path for found in chosen.kept], {one.path: one.why for one in chosen.skipped}

    def test_only_a_regular_file_with_one_name_is_what_it_seems_to_be(self) -> None:
        kept, skipped = self.choose(["out/**"])
        assert kept == [b"out/a", b"out/b"]
        assert skipped == {"out/link": "symlink", "out/pipe": "fifo", "out/twice": "hard link"}

    def test_what_is_beyond_a_limit_is_said(self) -> None:
        assert self.choose(["out/?"], total_bytes=8)[1]["out/b"].startswith("too large")
        assert self.choose(["out/?"], count=1) == ([b"out/a"], {"out/b": "more than 1 artifacts"})
        assert self.choose(["**"], depth=1) == ([], {"out": "deeper than 1", "way": "symlink"})
        assert "." in self.choose(["out/?"], complete=False)[1]

    def test_expected_files_are_absent_with_a_reason(self) -> None:
        paths = ("out/a", "out/link", "out/twice", "out/none", "way/x", "out")
        limits = ArtifactLimits(total_bytes=100, expected=paths, expected_bytes=5)
        chosen = choose(Listing(self.FOUND, complete=True), [], limits)
        assert list(chosen.expected) == ["out/a"]
        assert {path: content.absent_why for path, content in chosen.absent.items()} == {
            "out/link": "symlink",
            "out/twice": "hard link",
            "out/none": "absent",
            "way/x": "symlink",
            "out": "directory",
        }
        small = choose(Listing(self.FOUND, complete=True), [], limits.model_copy(update={"expected_bytes": 4}))
        assert small.absent["out/a"].absent_why == "too large: more than 4 bytes"
