"""Where a kind cluster's things are on a host, and of whom it is when many want it."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.ids import new_run_id
from workers.boundaries.cluster.kind_places import MARK, Place, Places, kill_makers


def new_ref(*, tenant: str = "acme", fence: int = 1) -> BoundaryRef:
    return BoundaryRef(
        installation="inst0", kind=BoundaryKind.CLUSTER, variant="kind", site="here", tenant=tenant,
        run_id=new_run_id(), fence=fence, expires_at=datetime(2026, 1, 2, tzinfo=UTC),
    )  # fmt: skip


@pytest.fixture
def places(tmp_path: Path) -> Places:
    places = Places(state=tmp_path / "state")
    places.make()
    return places


def standby(places: Places) -> Place:
    ref = new_ref(tenant="_standby", fence=0)
    place = places.place(ref.name)
    place.make(ref)
    place.say_ready("made of something")
    return place


def test_directories_are_ours_alone_and_a_name_is_taken_once(places: Places) -> None:
    ref = new_ref()
    place = places.place(ref.name)
    place.make(ref)
    for directory in (places.state, places.home, place.directory):
        assert directory.stat().st_mode & 0o777 == 0o700
    assert (place.ref(), place.claimed_by()) == (ref, None)
    with pytest.raises(FileExistsError):
        place.make(ref)
    place.remove()
    place.remove()
    assert not place.exists
    for name in ("..", "bd-1-f1", f"{ref.name}/..", ""):
        with pytest.raises(ValueError, match="no boundary's name"):
            places.place(name)


def test_of_many_that_claim_a_cluster_at_once_one_gets_it_for_good(places: Places) -> None:
    for _ in range(20):
        place, refs = standby(places), [new_ref() for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(place.claim, refs))
        assert sum(got) == 1
        (winner,) = (ref for ref, won in zip(refs, got, strict=True) if won)
        assert place.claimed_by() == winner
        assert [found.name for found in places.claimed_for(winner)] == [place.name]
        assert not [name for name in os.listdir(place.directory) if name.startswith(".claim")]


def test_a_claim_whose_record_is_lost_lets_nobody_else_claim_it(places: Places) -> None:
    place, ref = standby(places), new_ref()
    assert place.claim(ref)
    (place.directory / "claimed.json").unlink()
    assert place.claimed_by() is None
    assert not place.standby.exists(), "what is not ready is not handed out"


def test_a_cluster_that_is_gone_cannot_be_claimed(places: Places) -> None:
    place = standby(places)
    place.remove()
    assert not place.claim(new_ref())
    assert not place.exists


def test_what_is_counted_in_many_processes_is_counted(places: Places) -> None:
    assert places.counted("claimed") == 0
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: places.count("claimed"), range(200)))
    assert places.counted("claimed") == 200


def test_a_lock_is_one_holders_and_ends_with_it(places: Places) -> None:
    with places.locked("cap") as mine, places.locked("cap", wait=False) as other:
        assert (mine, other) == (True, False)
    with places.locked("cap", wait=False) as again:
        assert again


def test_what_still_makes_a_cluster_is_ended_with_all_that_it_started_and_nothing_else_is() -> None:
    def start(network: str) -> "subprocess.Popen[bytes]":
        program = "import os, time; os.fork(); print(flush=True); time.sleep(60)"
        argv = [sys.executable, "-I", "-S", "-c", program]
        process = subprocess.Popen(argv, env={MARK: network}, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        assert process.stdout.read(2) == b"\n\n", "both are there"
        return process

    wanted, other = f"bd-{os.getpid()}-f1.inst0", f"bd-{os.getpid()}-f1.inst0x"
    with start(wanted) as making, start(other) as bystander:
        assert kill_makers(wanted) == 2
        assert making.wait(timeout=10) == -9
        deadline = time.monotonic() + 10
        while kill_makers(wanted):
            assert time.monotonic() < deadline
        assert bystander.poll() is None
        assert kill_makers(other) == 2, "the control: it was there to be found"
