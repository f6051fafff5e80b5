"""From received bytes to a queued run, or a refusal before anything is queued.

Nothing here is undone by hand: a refusal happens before the one transaction that stores the run, and what comes after
it (the doorbell, a hint) may fail without harm, because a reconciler rings again for what waits.
"""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from service.core.boundary import Bundle
from service.core.controls import AppliedControls, Controls, apply
from service.core.errors import BundleRejected, DocumentInvalid, IdempotencyMismatch, Unavailable
from service.core.failpoints import Failpoint, reach
from service.core.ids import new_run_id
from service.core.placement import Policy, choose
from service.core.ports.publishing import Doorbell, Hints
from service.core.ports.runs import IdempotencyClaim, RunStore
from service.core.ports.tenants import TenantStore, WorkerStore
from service.core.run import BundleSummary, Metadata, Run, ScenarioSummary
from service.core.scenario import Scenario
from service.core.tenancy import Tenant
from service.intake.archive import ArchiveCaps, ArchiveSummary, inspect, read_member
from service.intake.documents import (
    MAX_CONTROLS_BYTES,
    MAX_SCENARIO_BYTES,
    parse_controls,
    parse_metadata,
    parse_scenario,
)
from service.intake.multipart import Upload
from service.usecases.bundles import Bundles
from service.usecases.cancel import hint
from service.usecases.capabilities import live_capabilities

SCENARIO_MEMBER = "scenario.yaml"
CONTROLS_MEMBER = "controls.yaml"

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Submitting:
    """What submission needs of the world, and the values that hold for every upload."""

    runs: RunStore
    tenants: TenantStore
    workers: WorkerStore
    bundles: Bundles
    hints: Hints
    doorbell: Doorbell
    policy: Policy
    archive_caps: ArchiveCaps
    worker_fresh: timedelta


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """An idempotency key that this request holds (its first answer is still to come) or has found answered."""

    key: str
    claim: IdempotencyClaim


@dataclass(frozen=True, kw_only=True)
class Submitted:
    run: Run
    replayed: bool = False


@dataclass(frozen=True, kw_only=True)
class _Documents:
    scenario: Scenario
    controls: Controls
    metadata: Metadata


def begin(runs: RunStore, *, tenant: str, key: str, stale_after: timedelta) -> Attempt:
    """Take the key before the upload is read. Raises IdempotencyInFlight."""
    return Attempt(key=key, claim=runs.begin_idempotent(tenant, key, stale_after=stale_after))


def release(runs: RunStore, *, tenant: str, attempt: Attempt) -> None:
    """The request ends without an answer to keep. A key that was completed meanwhile stays completed."""
    if attempt.claim.answer is None:
        runs.release_idempotent(tenant, attempt.key, attempt.claim.token)


def submit(
    world: Submitting, *, tenant: str, upload: Upload, attempt: Attempt | None = None, traceparent: str | None = None
) -> Submitted:
    """Judge the upload, choose its wall, queue it. The bundle's file is moved into the blobs. `traceparent` is of the
    request; an answer that is given again keeps the first one's.

    Raises what the API answers as refusals; the caller releases `attempt` then.
    """
    content = content_digest(upload)
    if attempt is not None and attempt.claim.answer is not None:
        if attempt.claim.content_digest != content:
            raise IdempotencyMismatch("this Idempotency-Key was used for a request with other content")
        return Submitted(run=Run.model_validate(attempt.claim.answer), replayed=True)
    who = world.tenants.get_tenant(tenant)
    bundle, contents = _judged_bundle(upload, world.archive_caps)
    documents = _documents(upload)
    controls = apply(documents.controls, who)
    if contents is not None:
        _fits(contents, controls)
    run = _placed_run(world, who, documents, controls, bundle)
    idempotency = (attempt.key, attempt.claim.token, content) if attempt is not None else None
    with ExitStack() as kept:
        if bundle is not None and upload.bundle_path is not None:
            kept.enter_context(world.bundles.stored(tenant, path=upload.bundle_path, digest=bundle.digest))
        stored = world.runs.submit(
            run, documents.scenario, bundle, max_queued=who.quota.queued, max_stored=who.quota.storage_bytes,
            idempotency=idempotency, traceparent=traceparent,
        )  # fmt: skip
        reach(Failpoint.SUBMIT_AFTER_COMMIT)
    _announce(world, stored)
    return Submitted(run=stored)


def content_digest(upload: Upload) -> str:
    """Of every byte that decides what is run. Each part is counted, so that no two uploads spell the same input."""
    digest = hashlib.sha256()
    bundle = upload.bundle_digest.encode() if upload.bundle_digest is not None else None
    for part in (bundle, upload.scenario, upload.controls, upload.metadata):
        digest.update(b"absent;" if part is None else b"%d:" % len(part) + part)
    return f"sha256:{digest.hexdigest()}"


def _judged_bundle(upload: Upload, caps: ArchiveCaps) -> tuple[Bundle | None, ArchiveSummary | None]:
    """-> the bundle, and what unpacking it makes."""
    if upload.bundle_path is None or upload.bundle_digest is None:
        return None, None
    summary = inspect(upload.bundle_path, caps)
    bundle = Bundle(
        digest=upload.bundle_digest,
        bytes_=upload.bundle_bytes,
        files=summary.files,
        content_bytes=summary.content_bytes,
    )
    return bundle, summary


def _documents(upload: Upload) -> _Documents:
    """Each from its part; scenario and controls else from the bundle's root; controls else the tenant's defaults."""
    scenario = _part_or_member(upload.scenario, upload, SCENARIO_MEMBER, max_bytes=MAX_SCENARIO_BYTES)
    if scenario is None:
        where = f"the request has no part `scenario`, and no bundle with a {SCENARIO_MEMBER} at its root"
        raise DocumentInvalid("scenario", [{"path": "", "message": where}])
    controls = _part_or_member(upload.controls, upload, CONTROLS_MEMBER, max_bytes=MAX_CONTROLS_BYTES)
    return _Documents(
        scenario=parse_scenario(scenario),
        controls=parse_controls(controls) if controls is not None else Controls(),
        metadata=parse_metadata(upload.metadata) if upload.metadata is not None else {},
    )


def _part_or_member(part: bytes | None, upload: Upload, name: str, *, max_bytes: int) -> bytes | None:
    if part is not None or upload.bundle_path is None:
        return part
    return read_member(upload.bundle_path, name, max_bytes=max_bytes)


def _fits(contents: ArchiveSummary, controls: AppliedControls) -> None:
    """As the run's file system will count it, so that what is accepted here can be unpacked there."""
    limits = controls.limits
    if contents.disk_bytes > limits.disk:
        detail = (
            f"the bundle's files take {contents.disk_bytes} bytes of disk, each in whole blocks of 4 KiB "
            f"({contents.content_bytes} bytes of content), and limits.disk is {limits.disk}"
        )
        raise BundleRejected(detail, rule="disk")
    if contents.entries > limits.files:
        detail = f"the bundle has {contents.entries} files and directories, and limits.files is {limits.files}"
        raise BundleRejected(detail, rule="files")


def _placed_run(
    world: Submitting, who: Tenant, documents: _Documents, controls: AppliedControls, bundle: Bundle | None
) -> Run:
    scenario = documents.scenario
    live = live_capabilities(world.workers, worker_fresh=world.worker_fresh)
    return Run(
        id=new_run_id(),
        tenant=who.name,
        metadata=documents.metadata,
        scenario=ScenarioSummary(name=scenario.name, digest=scenario.digest),
        bundle=BundleSummary(digest=bundle.digest, bytes=bundle.bytes_, files=bundle.files) if bundle else None,
        controls=controls,
        created_at=datetime.now(UTC),  # the store puts its own clock's here
        placement=choose(who, controls, world.policy, live, runtime=scenario.runtime),
    )


def _announce(world: Submitting, run: Run) -> None:
    """After the commit: the run is accepted, whatever becomes of this."""
    reach(Failpoint.SUBMIT_BEFORE_RING)
    try:
        world.doorbell.ring(run.placement.queue)
    except Unavailable as error:
        log.warning("doorbell_not_rung", run_id=run.id, boundary=run.placement.queue, error=error.detail)
    hint(world.hints, topic="outbox", run_id=run.id)
