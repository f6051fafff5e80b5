"""A bundle that the door lets in fits into the run's disk, to the last block; one block more is refused at the door."""

import gzip
import random

import pytest

from tests.archives import directory, tar, tar_member
from tests.stack import Stack, played, post

MIB, BLOCK = 2**20, 4096
pytestmark = pytest.mark.timeout(180)
NOISE = random.Random(3).randbytes(MIB)


def bundle(*sizes: int, directories: int = 0) -> bytes:
    """Files of these sizes, and empty directories."""
    made = [directory(b"empty%d/" % n) for n in range(directories)]
    return gzip.compress(tar(*made, *(tar_member(b"f%d" % n, NOISE[:size]) for n, size in enumerate(sizes))), 1)


FULL = {
    "one large file": ([MIB], 0),
    "many of one byte": ([1] * (MIB // BLOCK), 0),
    "a byte over a block each": ([BLOCK + 1] * (MIB // BLOCK // 2), 0),
    "directories and empty files take none": ([MIB, *[0] * 40], 200),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_bundle_of_exactly_the_disks_size_is_unpacked_and_one_block_more_is_refused(stack: Stack, kind: str) -> None:
    sizes, directories = FULL[kind]
    limits = {"disk": "1MiB", "files": 1000}
    look = "cat f* | wc -c; df -B1 --output=avail /work | tail -1; echo x > more"
    run = played(stack.tenant, look, bundle=bundle(*sizes, directories=directories), limits=limits)
    assert run["phase"] == "finished"
    content, available = run["steps"][0]["stdout"]["text"].split()
    assert int(content) == sum(sizes), "all of it was unpacked"
    assert int(available) == 0, "control: not a block is left"
    assert (run["outcome"], run["reason"]) == ("limit_exceeded", "disk")

    refused = post(stack.tenant, "true", bundle=bundle(*sizes, 1, directories=directories), limits=limits)
    problem = refused.json()
    assert (refused.status_code, problem["code"], problem["rule"]) == (422, "bundle_rejected", "disk")
    assert str(MIB + BLOCK) in problem["detail"]
    assert f"limits.disk is {MIB}" in problem["detail"]
