"""One program that forks the product's processes, for a session; and the rule that nothing is skipped silently."""

from collections.abc import Iterator

import pytest

from tests.faults.place import Forks
from tests.servers import NotInstalled
from tests.summary import ran


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    ran("boundary", "fake, its world on disk")
    forks = Forks()
    try:
        yield forks
    except NotInstalled as missing:
        pytest.skip(str(missing))
    finally:
        forks.close()
