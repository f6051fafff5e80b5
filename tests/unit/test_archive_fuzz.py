"""Damaged archives, some thousands of them (tests/mutants.py); `python -m tests.fuzz` goes on as long as one likes."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.mutants import TARS, WRAP, ZIPS, Edit, Wrapping, damaged, judge, with_checksums

pytestmark = pytest.mark.unit

edits = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 2**14), st.integers(0, 2**14), st.binary(max_size=24)),
    min_size=1,
    max_size=5,
)
steady = settings(
    max_examples=400,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def scratch() -> Iterator[Path]:
    with TemporaryDirectory(prefix="fuzz-") as name:
        yield Path(name)


@pytest.mark.parametrize("wrapping", Wrapping)
def test_the_archives_that_are_damaged_are_sound(wrapping: Wrapping, scratch: Path) -> None:
    assert all(judge(WRAP[wrapping](data), scratch) for data in TARS)
    assert all(judge(data, scratch) for data in ZIPS)


@steady
@given(base=st.sampled_from(TARS), edits=edits, wrapping=st.sampled_from(Wrapping), repaired=st.booleans())
def test_a_damaged_tar_is_refused_or_read_as_the_standard_library_reads_it(
    scratch: Path, base: bytes, edits: list[Edit], wrapping: Wrapping, repaired: bool
) -> None:
    data = damaged(base, edits)
    judge(WRAP[wrapping](with_checksums(data) if repaired else data), scratch)


@steady
@given(base=st.sampled_from(TARS), edits=edits, wrapping=st.sampled_from([Wrapping.GZIP, Wrapping.ZSTD]))
def test_a_damaged_compressed_tar_is_refused_or_read_as_the_standard_library_reads_it(
    scratch: Path, base: bytes, edits: list[Edit], wrapping: Wrapping
) -> None:
    judge(damaged(WRAP[wrapping](base), edits), scratch)


@steady
@given(base=st.sampled_from(ZIPS), edits=edits)
def test_a_damaged_zip_is_refused_or_read_as_the_standard_library_reads_it(
    scratch: Path, base: bytes, edits: list[Edit]
) -> None:
    judge(damaged(base, edits), scratch)


@steady
@given(data=st.binary(max_size=2000), magic=st.sampled_from([b"", b"PK\x03\x04", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"]))
@example(data=b"", magic=b"PK\x05\x06")
@example(data=bytes(1023), magic=b"")
def test_noise_is_refused(scratch: Path, data: bytes, magic: bytes) -> None:
    assert not judge(magic + data, scratch)
