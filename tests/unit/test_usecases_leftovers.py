"""Bytes that no run uses, deleted tenants, and acts that are written down, on the shipped fakes."""

import hashlib
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.core.errors import Conflict, NotFound, QuotaExceeded, Unavailable
from service.usecases.audit import audited
from service.usecases.leftovers import finish_deletion, finish_deletions, sweep_blobs
from tests.unit.usecase_world import World, make_zip

HOUR = timedelta(hours=1)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def aged(world: World, digest: str) -> str:
    ago = time.time() - 7200
    os.utime(world.blobs.path("acme", digest), (ago, ago))
    return digest


def swept(world: World) -> int:
    return sweep_blobs(world.store, world.blobs, older_than=HOUR)


# --- bytes that no run uses -------------------------------------------------------------------------------------------


def test_what_a_crash_left_is_deleted_once_it_is_old_and_what_a_run_uses_never(world: World) -> None:
    run = world.submit(bundle=make_zip({"a": b"used"}))
    assert run.bundle is not None
    used = aged(world, run.bundle.digest)
    old, young = aged(world, world.blobs.put_bytes("acme", b"old")), world.blobs.put_bytes("acme", b"young")

    assert swept(world) == 1
    assert [world.blob_is_kept(digest) for digest in (used, young, old)] == [True, True, False]
    aged(world, young)
    assert swept(world) == 1, "the control: it was its age that saved it"
    assert swept(world) == 0


def test_an_upload_that_is_stored_again_over_an_old_orphan_is_safe(world: World) -> None:
    """The blob is there before its run is: an orphan for as long as the submission takes, but a young one."""
    data = make_zip({"a": b"again"})
    digest = aged(world, world.blobs.put_bytes("acme", data))
    assert digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    submit = world.store.submit

    def sweeping(*args: object, **more: object) -> object:
        assert swept(world) == 0
        return submit(*args, **more)  # type: ignore[arg-type]

    world.store.submit = sweeping  # type: ignore[method-assign, assignment]
    run = world.submit(bundle=data)

    assert run.bundle is not None
    assert world.blob_is_kept(run.bundle.digest)


def test_what_cannot_be_deleted_of_one_tenant_is_said_and_the_others_are_swept(world: World) -> None:
    aged(world, world.blobs.put_bytes("acme", b"old"))
    older_than = world.blobs.older_than

    def broken(tenant: str, age: timedelta) -> object:
        if tenant == "aaa":
            raise PermissionError("not ours")
        return older_than(tenant, age)

    world.store.create_tenant(world.tenant.model_copy(update={"name": "aaa"}))
    world.blobs.older_than = broken  # type: ignore[method-assign, assignment]
    with capture_logs() as log:
        assert swept(world) == 1

    assert [entry["event"] for entry in log] == ["blobs_left_behind"]


# --- deleted tenants --------------------------------------------------------------------------------------------------


def told(world: World) -> None:
    world.store.lead("relay", lease=HOUR)
    world.store.mark_published([row.pub_seq for row in world.store.stamp("relay", limit=100)])
    for event in world.store._events:
        event.fanned = True


def test_a_deleted_tenants_blobs_go_with_its_runs(world: World) -> None:
    run = world.submit(bundle=make_zip({"a": b"x"}))
    assert not finish_deletion(world.store, world.blobs, name="acme"), "it lives"
    world.store.delete_tenant("acme")
    assert not finish_deletion(world.store, world.blobs, name="acme"), "its end is not told"
    assert run.bundle is not None
    assert world.blob_is_kept(run.bundle.digest)
    told(world)

    assert finish_deletions(world.store, world.blobs) == 1

    assert not world.blob_is_kept(run.bundle.digest)
    with pytest.raises(NotFound):
        world.store.get_run(run.id, None)
    assert finish_deletions(world.store, world.blobs) == 0, "once"


def test_a_run_that_is_claimed_meanwhile_is_waited_for(world: World) -> None:
    world.submit()
    held = world.store.claim(
        worker_id="wrk_1", site="h", boundaries=["gvisor"], runtimes=["default"], lease=timedelta(seconds=30)
    )
    assert held is not None
    world.store.delete_tenant("acme")
    told(world)

    assert finish_deletions(world.store, world.blobs) == 0
    assert world.store.get_run(held.run.id, None).id == held.run.id


# --- acts that are written down ---------------------------------------------------------------------------------------


def entries(world: World) -> list[tuple[str, str | None]]:
    return [(entry.what, entry.result) for entry in world.store.list_acts(limit=10, before=None)[0]]


def test_an_act_is_written_down_before_it_is_done_and_again_with_what_came_of_it(world: World) -> None:
    seen = []

    def act() -> int:
        seen.append(entries(world))
        return 7

    assert audited(world.store, act, who="key_1", what="purge", result=lambda n: f"done: {n}") == 7
    assert seen == [[("purge", None)]]
    assert entries(world) == [("purge", "done: 7")]


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (NotFound(), "refused: not_found"),
        (Conflict("it answers", code="site_alive"), "refused: site_alive"),
        (QuotaExceeded("full"), "refused: quota_exceeded"),
        (Unavailable("away"), "failed: unavailable"),
        (RuntimeError("a defect"), "failed: RuntimeError"),
        (KeyboardInterrupt(), "failed: KeyboardInterrupt"),
    ],
)
def test_what_did_not_come_off_is_written_down_as_well(world: World, error: BaseException, result: str) -> None:
    def act() -> None:
        raise error

    with pytest.raises(type(error)):
        audited(world.store, act, who="key_1", what="site.forget")

    assert entries(world) == [("site.forget", result)]


def test_an_act_that_cannot_be_written_down_is_not_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def away(**_: object) -> str:
        raise Unavailable("the database cannot be used at the moment")

    monkeypatch.setattr(world.store, "begin_act", away)
    with pytest.raises(Unavailable):
        audited(world.store, lambda: done.append(1), who="key_1", what="purge")

    assert done == []


def test_an_act_that_was_done_does_not_fail_because_its_end_cannot_be_written_down(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise Unavailable("the database cannot be used at the moment")

    monkeypatch.setattr(world.store, "end_act", away)
    with capture_logs() as log:
        assert audited(world.store, lambda: 7, who="key_1", what="purge") == 7

    assert entries(world) == [("purge", None)]
    assert [entry["event"] for entry in log] == ["audit_result_lost"]
