"""Submission: what becomes a run, what is refused before that, and what may fail afterwards without harm."""

from datetime import timedelta
from pathlib import Path

import pytest

from service.core.errors import (
    BundleRejected,
    DocumentInvalid,
    IdempotencyInFlight,
    IdempotencyMismatch,
    NotFound,
    PlacementRefused,
    QuotaExceeded,
)
from service.core.placement import Policy
from service.core.run import Phase
from service.core.tenancy import Quota, Trust
from service.usecases.submit import Attempt, begin, content_digest, release
from tests.factories import make_capabilities, make_tenant
from tests.unit.usecase_world import SCENARIO, World, make_zip

STALE = timedelta(seconds=60)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_scenario_alone_becomes_a_queued_run_and_rings_its_boundarys_bell(world: World) -> None:
    run = world.submit(metadata=b'{"order": "17"}')

    assert (run.phase, run.tenant, run.bundle, run.metadata) == (Phase.QUEUED, "acme", None, {"order": "17"})
    assert run.placement.boundary == "gvisor"
    assert world.store.get_run(run.id, "acme") == run
    assert world.doorbell.rings == ["gvisor"]
    assert ("outbox", run.id) in world.hints.given


def test_scenario_and_controls_are_found_at_the_bundles_root(world: World) -> None:
    bundle = make_zip({"scenario.yaml": SCENARIO, "controls.yaml": b"limits: {pids: 16}", "sub/scenario.yaml": b"no"})

    run = world.submit(bundle=bundle, scenario=None)

    assert run.scenario.name == "hello"
    assert run.controls.limits.pids == 16
    assert run.bundle is not None
    assert (run.bundle.files, run.bundle.bytes) == (3, len(bundle))
    assert world.blobs.path("acme", run.bundle.digest).read_bytes() == bundle


def test_a_part_goes_before_the_bundles_own_even_when_that_is_broken(world: World) -> None:
    bundle = make_zip({"scenario.yaml": b"[", "controls.yaml": b"["})

    run = world.submit(bundle=bundle, scenario=SCENARIO, controls=b"limits: {pids: 32}")

    assert (run.scenario.name, run.controls.limits.pids) == ("hello", 32)


def test_an_empty_part_is_a_part(world: World) -> None:
    with pytest.raises(DocumentInvalid) as refused:
        world.submit(bundle=make_zip({"scenario.yaml": SCENARIO}), scenario=b"")

    assert refused.value.code == "scenario_invalid"


def test_without_any_scenario_there_is_no_run(world: World) -> None:
    for bundle in (None, make_zip({"sub/scenario.yaml": SCENARIO})):
        with pytest.raises(DocumentInvalid, match=r"scenario\.yaml"):
            world.submit(bundle=bundle, scenario=None)


@pytest.mark.parametrize(
    ("parts", "error", "code"),
    [
        ({"scenario": b"name: ["}, DocumentInvalid, "scenario_invalid"),
        ({"controls": b"limits: {cpu: 9999}"}, DocumentInvalid, "controls_invalid"),
        ({"controls": b"code: trusted"}, DocumentInvalid, "controls_invalid"),
        ({"metadata": b"[]"}, DocumentInvalid, "metadata_invalid"),
        ({"bundle": b"no archive"}, BundleRejected, "bundle_rejected"),
        ({"bundle": make_zip({"../up": b""})}, BundleRejected, "bundle_rejected"),
        ({"bundle": make_zip({"a": bytes(2**21)}), "controls": b"limits: {disk: 1MiB}"}, BundleRejected,
         "bundle_rejected"),
        ({"bundle": make_zip({f"{n}": b"" for n in range(17)}), "controls": b"limits: {files: 16}"}, BundleRejected,
         "bundle_rejected"),
        ({"controls": b"needs: [kubernetes-api]"}, PlacementRefused, "placement_refused"),
        ({"scenario": b"name: a\nruntime: cobol\nsteps: [{name: b, run: c}]"}, PlacementRefused, "placement_refused"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_nothing_behind(
    world: World, parts: dict[str, bytes], error: type[Exception], code: str
) -> None:
    with pytest.raises(error) as refused:
        world.submit(**parts)

    assert refused.value.code == code  # type: ignore[attr-defined]
    assert world.store.list_runs("acme", phase=None, outcome=None, limit=10, before=None).items == ()
    assert world.doorbell.rings == []
    assert not any(path.is_file() for path in world.blobs._root.rglob("*"))


def test_a_full_queue_refuses_the_run_and_keeps_no_blob_of_it(world: World) -> None:
    world.change_tenant(make_tenant(queued=1))
    kept = make_zip({"a": b"kept"})
    first = world.submit(bundle=kept)
    assert first.bundle is not None

    for bundle in (make_zip({"a": b"other"}), kept):
        upload = world.upload(bundle=bundle)
        with pytest.raises(QuotaExceeded):
            world.submitted(upload)
        assert upload.bundle_digest is not None
        assert world.blob_is_kept(upload.bundle_digest) is (bundle is kept)


def test_a_deleted_tenant_submits_nothing(world: World) -> None:
    world.store.delete_tenant("acme")

    with pytest.raises(NotFound):
        world.submit()


def test_only_live_workers_count_and_the_policy_may_ask_for_more(world: World) -> None:
    world.show_worker(make_capabilities(available=False, missing=("runsc is not installed",)))
    with pytest.raises(PlacementRefused, match="runsc is not installed"):
        world.submit()
    world.show_worker(make_capabilities())
    with pytest.raises(PlacementRefused) as refused:
        world.submitted(world.upload(), policy=Policy(floors={Trust.UNTRUSTED: {"kernel": "dedicated"}}))
    assert refused.value.extra["requirements"] == {"kernel": "dedicated"}


def test_a_bell_that_cannot_be_rung_does_not_fail_the_accepted_run(world: World) -> None:
    world.doorbell.away = True
    world.hints.lost = True

    run = world.submit()

    assert world.store.get_run(run.id, "acme").phase is Phase.QUEUED


# --- the same request again -------------------------------------------------------------------------------------------


def _attempt(world: World) -> Attempt:
    return begin(world.store, tenant="acme", key="k", stale_after=STALE)


def test_the_first_answer_is_replayed_and_other_content_is_not(world: World) -> None:
    bundle = make_zip({"a": b"1"})
    first = world.submitted(world.upload(bundle=bundle), attempt=_attempt(world))
    world.play()

    again = world.submitted(world.upload(bundle=bundle), attempt=_attempt(world))

    assert again.replayed
    assert again.run == first.run
    assert len(world.doorbell.rings) == 1
    with pytest.raises(IdempotencyMismatch):
        world.submitted(world.upload(bundle=make_zip({"a": b"2"})), attempt=_attempt(world))


def test_a_key_in_flight_is_refused_and_free_again_after_a_refusal(world: World) -> None:
    first = _attempt(world)
    with pytest.raises(IdempotencyInFlight):
        _attempt(world)
    release(world.store, tenant="acme", attempt=first)

    run = world.submitted(world.upload(), attempt=_attempt(world)).run

    assert run.phase is Phase.QUEUED


def test_releasing_after_the_answer_changes_nothing(world: World) -> None:
    attempt = _attempt(world)
    first = world.submitted(world.upload(), attempt=attempt)

    release(world.store, tenant="acme", attempt=attempt)

    assert world.submitted(world.upload(), attempt=_attempt(world)).run == first.run


def test_no_two_uploads_of_different_content_share_a_digest(world: World) -> None:
    uploads = [
        world.upload(scenario=b"a", controls=b"b"),
        world.upload(scenario=b"ab"),
        world.upload(scenario=b"ab", controls=b""),
        world.upload(scenario=None, controls=b"ab"),
        world.upload(scenario=b"", controls=b"ab"),
        world.upload(scenario=b"a", metadata=b"b"),
        world.upload(scenario=b"a", controls=b"absent;", metadata=b"b"),
        world.upload(scenario=b"ab", bundle=b""),
    ]

    assert len({content_digest(upload) for upload in uploads}) == len(uploads)
    assert content_digest(world.upload(scenario=b"ab", bundle=b"x")) == content_digest(
        world.upload(scenario=b"ab", bundle=b"x")
    )


def test_quota_default_is_the_contracts() -> None:
    assert Quota() == Quota(concurrent=2, queued=100, storage_bytes=2**30)
