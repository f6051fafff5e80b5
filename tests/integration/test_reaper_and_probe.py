"""A reaper sweeps while a worker of the same host tries its wall out: the canary has no run, and must not be taken for
an orphan. A worker whose canary is destroyed believes that it can build nothing, and ends."""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from service.adapters.memory import MemoryHints, MemoryStore
from service.core.boundary import BoundaryRef
from service.core.errors import NotYetDestroyed
from service.core.ids import new_run_id
from tests.sandboxes import Never, gvisor_boundary, make_ref, make_spec, require_gvisor
from workers.boundaries.gvisor import probe
from workers.boundaries.gvisor.driver import GvisorBoundary
from workers.boundaries.gvisor.places import Places
from workers.reaper import sweep


@pytest.fixture
def boundary(tmp_path: Path) -> Iterator[GvisorBoundary]:
    require_gvisor()
    with gvisor_boundary(tmp_path / "run", store=tmp_path / "runtimes") as made:
        yield made


def _canary(boundary: GvisorBoundary) -> list[str]:
    """What is missing after a canary of now, not of ten minutes ago."""
    probe._passed.clear()
    (row,) = boundary.probe()
    return list(row.missing)


def test_a_canary_survives_a_reaper_that_never_stops_sweeping(boundary: GvisorBoundary) -> None:
    reapers, stop = GvisorBoundary(boundary.host), threading.Event()
    installation, store = boundary.host.installation, MemoryStore()
    destroyed: list[BoundaryRef] = []
    swept = 0

    def reap() -> None:
        nonlocal swept
        while not stop.is_set():
            destroyed.extend(sweep([reapers], store, MemoryHints(), installation=installation, site="here").destroyed)
            swept += 1

    reaper = threading.Thread(target=reap)
    reaper.start()
    try:
        missing = [_canary(boundary) for _ in range(3)]
    finally:
        stop.set()
        reaper.join()

    assert swept > 3
    assert missing == [[], [], []]
    assert [ref for ref in destroyed if ref.tenant] == [], "at most a name that was just being removed"


def test_a_canary_that_somebody_destroys_does_fail(boundary: GvisorBoundary) -> None:
    """The positive control: without the reaper's patience the worker would be told that it has no wall."""
    other, stop = GvisorBoundary(boundary.host), threading.Event()

    def destroy() -> None:
        while not stop.is_set():
            for ref in other.discover():
                with suppress(NotYetDestroyed):
                    other.destroy(ref)

    destroyer = threading.Thread(target=destroy)
    destroyer.start()
    try:
        missing = [why for _ in range(5) for why in _canary(boundary)]
    finally:
        stop.set()
        destroyer.join()

    assert missing
    assert all("canary" in why for why in missing)


def test_a_boundary_that_gets_its_name_while_it_is_listed_has_its_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(runtime_dir=tmp_path, installation="test-labels", site="here")
    ref = places.unlabelled(f"bd-{new_run_id().removeprefix('run_')}-f0").model_copy(update={"tenant": "_canary"})
    place = places.place(ref.name)
    place.make(ref)
    place.directory.rename(place.unlabelled)
    scandir = os.scandir

    def late(path: Path) -> list[os.DirEntry[str]]:
        entries = list(scandir(path))
        place.unlabelled.rename(place.directory)
        return entries

    monkeypatch.setattr("workers.boundaries.gvisor.places.os.scandir", late)

    assert list(places.labels()) == [ref]


def test_two_sites_of_one_installation_on_one_machine_do_not_see_each_others_sandboxes(
    boundary: GvisorBoundary, tmp_path: Path
) -> None:
    neighbour = GvisorBoundary(dataclasses.replace(boundary.host, site="there", runtime_dir=tmp_path / "there"))
    late = GvisorBoundary(dataclasses.replace(boundary.host, runtime_dir=tmp_path / "late"))
    ref = make_ref(installation=boundary.host.installation)
    with boundary.open(make_spec(), ref, cancelled=Never()):
        assert list(boundary.discover()) == [ref]
        assert list(neighbour.discover()) == []
        assert [found.name for found in late.discover()] == [ref.name], "control: its group is there to be found"
    boundary.destroy(ref)


def test_what_resists_is_waited_for_once_and_then_hardly_at_all(
    boundary: GvisorBoundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker lives and holds the tmpfs: each sweep comes back to it, and must not spend its time on it."""
    monkeypatch.setattr("workers.boundaries.gvisor.driver._CLEAR_S", 2.0)
    reaper = GvisorBoundary(boundary.host)
    ref = make_ref(installation=boundary.host.installation)
    took = []
    with boundary.open(make_spec(), ref, cancelled=Never()):
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(NotYetDestroyed):
                reaper.destroy(ref)
            took.append(time.monotonic() - began)
    reaper.destroy(ref)

    assert took[0] >= 2.0
    assert min(took[1:]) < 1.5
