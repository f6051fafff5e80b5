"""An engine for the tests of a module."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.engine.outside import Engine
from tests.cluster.engine.run import running_engine
from tests.cluster.lab.outside import NoLab
from tests.cluster.lab.toolchain import NoParts


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Import it where it is used. Where there can be none, a skip, which in CI is a failure."""
    try:  # in a folder with a short name: the paths of its sockets have to fit
        with tempfile.TemporaryDirectory(prefix="bd-engine-") as folder, running_engine(Path(folder, "e"), _say) as one:
            yield one
    except (NoLab, NoParts) as why:
        pytest.skip(f"no engine: {why}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
