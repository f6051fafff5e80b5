"""D26 and D27: the metadata service of clouds, our own services, the gateway and the node itself are out of reach.

The real driver runs in a network namespace of the test's own where all of them exist and listen (network_room.py).
That nothing was heard counts only because, with the wall's two defences taken out, everything is.
"""

import json
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.escape.network_room import LOOPBACK, METADATA, NODE, TARGETS
from tests.sandboxes import require_gvisor
from tests.sweep import swept

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(180)


@dataclass
class Room:
    """One play in a room: what its listeners heard, and what the host saw of the sandbox's network."""

    heard: frozenset[str]
    token_seen: bool
    network: str

    def heard_at(self, *addresses: str) -> set[str]:
        return {target for target in self.heard if target.split()[0] in addresses}


def in_a_room(directory: Path, *weaken: str) -> Room:
    require_gvisor()
    directory.mkdir()
    asked = {"runtime_dir": str(directory), "store": str(directory.parent / "store"), "weaken": weaken}
    played = subprocess.run(
        [sys.executable, "-m", "tests.escape.network_room"],
        input=json.dumps(asked | {"token": f"canary{secrets.token_hex(8)}"}),
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert played.returncode == 0, played.stderr
    answer = json.loads(played.stdout.splitlines()[-1])  # a driver may log before it
    assert swept(str(directory), within_s=10) == []
    return Room(frozenset(answer["heard"]), answer["token_seen"], answer["network"])


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """The driver as it is."""
    return in_a_room(tmp_path_factory.mktemp("held") / "run")


@pytest.fixture(scope="module")
def open_room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """The same attack against a wall without its network defences."""
    return in_a_room(tmp_path_factory.mktemp("open") / "run", "network", "namespace")


def test_d26_the_metadata_service_hears_nothing_by_ipv4_or_ipv6(held: Room, open_room: Room) -> None:
    assert held.heard_at(*METADATA) == set()
    assert not held.token_seen
    assert {target.split()[0] for target in open_room.heard_at(*METADATA)} == set(METADATA), "control"
    assert open_room.token_seen, "control: the token is what a guest would have come away with"


def test_d27_no_service_hears_anything_at_the_loopback_the_gateway_or_the_node(held: Room, open_room: Room) -> None:
    assert held.heard == set()
    assert open_room.heard == TARGETS, "control: each listener hears what reaches it"
    assert open_room.heard_at(*LOOPBACK)
    assert open_room.heard_at(NODE)


@pytest.mark.parametrize("weaken", ["network", "namespace"])
def test_each_of_the_two_defences_holds_alone(weaken: str, tmp_path: Path) -> None:
    """Neither a wrong flag nor a wrong configuration opens the wall; the control is that both together do (above)."""
    room = in_a_room(tmp_path / "run", weaken)
    assert room.heard == set()
    assert not room.token_seen


def test_the_evidence_says_none_only_where_there_is_none(held: Room, open_room: Room) -> None:
    """The room has no device but the loopback either, so it is the namespace itself that tells."""
    assert (held.network, open_room.network) == ("none", "host")
