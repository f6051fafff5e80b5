"""The lab builds with the machine's Go only where that is new enough."""

from pathlib import Path

import pytest

from tests.cluster.lab.toolchain import new_enough, version


@pytest.mark.parametrize(
    ("said", "enough"),
    [
        ("go version go1.26.6 linux/amd64", True),
        ("go version go1.27.0 linux/arm64", True),
        ("go version go2.0 linux/amd64", True),
        ("go version go1.26.5 linux/amd64", False),
        ("go version go1.26rc2 linux/amd64", False),
        ("go version go1.19.8 linux/amd64", False),  # Debian 12's
        ("", False),
    ],
)
def test_an_older_go_is_not_taken(said: str, enough: bool) -> None:
    assert new_enough(said) is enough


def test_a_machine_without_go_has_no_version_of_it(tmp_path: Path) -> None:
    assert version({"PATH": str(tmp_path)}) == ""
