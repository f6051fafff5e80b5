"""Downloads and retention on the shipped fakes: what is found, what is said of what is gone, what is left alone."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.core.boundary import Artifact
from service.core.errors import NotFound, QuotaExceeded, Unavailable
from service.core.ids import new_run_id
from service.core.run import Run
from service.relay.housekeeping import EVERY, FIRST_AFTER, OFTEN, Housekeeping
from service.usecases.downloads import Download, open_artifact, open_output
from service.usecases.retention import FRESH, Purged, purge
from tests.factories import make_result, make_step_result, make_tenant
from tests.unit.usecase_world import World, make_zip

LONG_AGO = timedelta(days=-1)
"""An age that everything has reached."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def leave(world: World, *, stdout: bytes = b"hello\n", report: bytes = b"{}", printed: int | None = None) -> Run:
    """A finished run that brought a bundle, printed, and left one artifact."""
    run = world.submit(bundle=make_zip({"a": os.urandom(8)}))
    held = bring_to_collecting(world)
    digest = world.blobs.put_bytes("acme", stdout) if stdout else None
    sha256 = world.blobs.put_bytes("acme", report).removeprefix("sha256:")
    step = make_step_result(text=stdout.decode())
    if printed is not None:
        step = step.model_copy(update={"stdout": step.stdout.model_copy(update={"bytes": printed})})
    result = make_result(
        steps=(step,), artifacts=(Artifact(path="out/r.json", bytes=len(report), sha256=sha256),),
        outputs={"1.stdout": digest} if digest else {}, output_bytes={"1.stdout": len(stdout)} if digest else {},
    )  # fmt: skip
    world.store.finish(run.id, held, result)
    return world.store.get_run(run.id, "acme")


def bring_to_collecting(world: World) -> int:
    claim = world.store.claim(
        worker_id="wrk_1", site="h", boundaries=["gvisor"], runtimes=["default"], lease=timedelta(seconds=30)
    )
    assert claim is not None
    world.store.mark_running(claim.run.id, claim.fence)
    world.store.mark_collecting(claim.run.id, claim.fence)
    return claim.fence


def read(download: Download) -> bytes:
    with download.file as file:
        data = file.read()
    assert len(data) == download.bytes
    return data


def output(world: World, run_id: str, *, n: int = 1, tenant: str = "acme") -> Download:
    return open_output(world.store, world.blobs, run_id=run_id, tenant=tenant, n=n, stream="stdout")


def artifact(world: World, run_id: str, *, path: str = "out/r.json", tenant: str = "acme") -> Download:
    return open_artifact(world.store, world.blobs, run_id=run_id, tenant=tenant, path=path)


# --- downloads --------------------------------------------------------------------------------------------------------


def test_what_a_step_printed_and_a_run_left_is_read_back(world: World) -> None:
    run = leave(world, stdout=b"caf\xc3\xa9\n", report=b"[1]")

    assert read(output(world, run.id)) == b"caf\xc3\xa9\n"
    assert read(artifact(world, run.id)) == b"[1]"


def test_a_stream_with_nothing_in_it_is_no_bytes_and_no_error(world: World) -> None:
    run = leave(world, stdout=b"")

    assert read(output(world, run.id)) == b""


def test_what_the_run_does_not_have_and_what_is_anothers_are_the_same_not_found(world: World) -> None:
    run = leave(world)
    waiting = world.submit().id
    asked: list[Callable[[], Download]] = [
        lambda: output(world, run.id, n=2), lambda: output(world, waiting), lambda: output(world, run.id, tenant="b"),
        lambda: output(world, new_run_id()), lambda: output(world, "../x"), lambda: artifact(world, run.id, path="r"),
        lambda: artifact(world, run.id, path="../r.json"), lambda: artifact(world, run.id, tenant="b"),
        lambda: artifact(world, waiting),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(NotFound) as refusal:
            ask()
        assert refusal.value.detail == NotFound().detail


def test_an_output_that_had_no_room_says_so(world: World) -> None:
    run = leave(world, stdout=b"", printed=7)
    with pytest.raises(NotFound, match="no room"):
        output(world, run.id)


# --- the storage quota ------------------------------------------------------------------------------------------------


def test_a_bundle_beyond_the_quota_is_refused_and_leaves_no_blob(world: World) -> None:
    first, second = make_zip({"a": b"1"}), make_zip({"b": os.urandom(4000)})
    quota = make_tenant().quota.model_copy(update={"storage_bytes": len(first) + len(second) - 1})
    world.change_tenant(world.tenant.model_copy(update={"quota": quota}))
    kept = world.submit(bundle=first)
    upload = world.upload(bundle=second)
    with pytest.raises(QuotaExceeded, match=f"{len(first)} bytes of its quota of {quota.storage_bytes}"):
        world.submitted(upload)

    assert upload.bundle_digest is not None
    assert not world.blob_is_kept(upload.bundle_digest)
    assert kept.bundle is not None
    assert world.blob_is_kept(kept.bundle.digest)
    assert world.submit().bundle is None


# --- retention --------------------------------------------------------------------------------------------------------


def later() -> float:
    """When every file that is there now is old enough to be removed."""
    return time.time() + FRESH.total_seconds() + 1


def blobs_of(world: World, run: Run) -> list[bool]:
    assert run.bundle is not None
    digests = [run.bundle.digest, "sha256:" + run.artifacts[0].sha256, *world.store._runs[run.id].outputs.values()]
    return [world.blob_is_kept(digest) for digest in digests]


def test_blobs_go_before_the_record_and_downloads_say_that_they_were_purged(world: World) -> None:
    run = leave(world)

    purged = purge(world.store, world.blobs, blobs_older_than=LONG_AGO, clock=later)

    assert purged == Purged(runs=0, runs_without_blobs=1, blobs=3, idempotency_keys=0)
    assert blobs_of(world, run) == [False] * 3
    assert world.store.get_run(run.id, "acme") == run
    for ask in (output, artifact):
        with pytest.raises(NotFound, match="purged"):
            ask(world, run.id)
    again = purge(world.store, world.blobs, blobs_older_than=LONG_AGO, clock=later)
    assert again == Purged()


def test_an_old_run_goes_with_its_blobs_and_what_is_not_finished_stays(world: World) -> None:
    run, waiting = leave(world), world.submit()

    purged = purge(world.store, world.blobs, older_than=LONG_AGO, blobs_older_than=LONG_AGO, clock=later)

    assert (purged.runs, purged.runs_without_blobs, purged.blobs) == (1, 0, 3)
    with pytest.raises(NotFound):
        world.store.get_run(run.id, "acme")
    assert world.store.get_run(waiting.id, "acme") == waiting


def test_what_is_young_is_left_alone(world: World) -> None:
    run = leave(world)

    assert purge(world.store, world.blobs, clock=later) == Purged()
    assert all(blobs_of(world, run))


def test_a_dry_run_counts_and_changes_nothing(world: World) -> None:
    old = leave(world)

    assert purge(world.store, world.blobs, older_than=LONG_AGO, blobs_older_than=LONG_AGO, dry_run=True).runs == 1
    assert purge(world.store, world.blobs, blobs_older_than=LONG_AGO, dry_run=True).runs_without_blobs == 1
    assert all(blobs_of(world, old))
    assert read(output(world, old.id)) == b"hello\n"


def test_a_blob_that_another_run_uses_stays(world: World) -> None:
    leave(world, stdout=b"same")
    second = leave(world, stdout=b"same", report=b"other")
    first = world.store.expired(older_than=LONG_AGO)[0]
    world.store.give_up_blobs(first.run_id)

    assert read(output(world, second.id)) == b"same"


def test_a_file_that_a_run_may_just_have_stored_is_left_alone(world: World) -> None:
    """A worker stores a step's output minutes before it records the run: nobody knows yet that it is used again."""
    run = leave(world)

    assert purge(world.store, world.blobs, blobs_older_than=LONG_AGO).blobs == 0
    assert all(blobs_of(world, run))


# --- when it is done --------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_leader_keeps_house_once_an_hour_and_a_standby_never() -> None:
    clock, done, leads = Clock(), [], [False]

    def purged() -> Purged:
        done.append(clock.now)
        return Purged()

    house = Housekeeping(purged, leading=lambda: leads[0], clock=clock)
    house.step()
    clock.now += FIRST_AFTER.total_seconds()
    house.step()
    assert done == []
    leads[0] = True
    for _ in range(3):
        house.step()
    assert done == [clock.now]
    clock.now += EVERY.total_seconds()
    house.step()

    assert len(done) == 2


def test_what_is_to_be_done_often_is_done_by_the_leader_and_an_error_ends_nothing() -> None:
    clock, done, leads = Clock(), [], [False]

    def often() -> int:
        done.append(clock.now)
        raise Unavailable("the database is busy")

    house = Housekeeping(Purged, leading=lambda: leads[0], often=often, clock=clock)
    clock.now += OFTEN.total_seconds()
    house.step()
    leads[0] = True
    with capture_logs() as log:
        for _ in range(3):
            house.step()
        clock.now += OFTEN.total_seconds()
        house.step()

    assert done == [clock.now - OFTEN.total_seconds(), clock.now]
    assert [entry["event"] for entry in log] == ["housekeeping_interrupted"] * 2


def test_what_could_not_be_purged_is_said_and_tried_again_in_an_hour() -> None:
    clock, asked = Clock(), []

    def purged() -> Purged:
        asked.append(clock.now)
        raise Unavailable("the database is busy")

    house = Housekeeping(purged, leading=lambda: True, clock=clock)
    with capture_logs() as log:
        for _ in range(2):
            clock.now += EVERY.total_seconds()
            house.step()
            house.step()

    assert len(asked) == 2
    assert [entry["event"] for entry in log] == ["purge_failed"] * 2
