"""What of the evidence is worked out, and not just read."""

import pytest

from workers.kube import ClusterError
from workers.pods.evidence import amount


@pytest.mark.parametrize(
    ("quantity", "is_"),
    [
        ("67108864", 64 * 2**20), ("64Mi", 64 * 2**20), ("1.5Gi", 3 * 2**29), ("1k", 1000), ("2M", 2 * 10**6),
        ("1e3", 1000), ("1E2", 100), ("1E", 10**18), ("1Ei", 2**60), ("100m", 0.1), ("1500m", 1.5), ("0", 0),
        ("128974848000m", 128974848), ("5.", 5),
    ],
)  # fmt: skip
def test_a_quantity_is_read_as_kubernetes_reads_it(quantity: str, is_: float) -> None:
    assert amount(quantity) == is_


@pytest.mark.parametrize("quantity", ["", "Mi", "-1", "1 Mi", "1mi", "1K", "0x10", "\u0661"])
def test_what_is_no_quantity_is_refused(quantity: str) -> None:
    with pytest.raises(ClusterError, match="is no quantity"):
        amount(quantity)
