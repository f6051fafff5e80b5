"""Submission's world on the shipped fakes: a tenant `acme`, a live gvisor worker, and uploads made of plain values."""

import hashlib
import io
import zipfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from service.adapters.memory import MemoryBlobs, MemoryDoorbell, MemoryHints, MemoryStore
from service.core.boundary import Capabilities
from service.core.errors import NotFound
from service.core.placement import Policy
from service.core.ports.tenants import WorkerRecord
from service.core.run import Run
from service.core.tenancy import Tenant
from service.intake.archive import ArchiveCaps
from service.intake.multipart import Upload
from service.usecases.bundles import Bundles
from service.usecases.submit import Attempt, Submitted, Submitting, submit
from tests.factories import make_capabilities, make_result, make_step_result, make_tenant

SCENARIO = b"name: hello\nsteps: [{name: only, run: 'true'}]\n"


def make_zip(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


@dataclass
class World:
    directory: Path
    store: MemoryStore = field(default_factory=MemoryStore)
    blobs: MemoryBlobs = field(default_factory=MemoryBlobs)
    doorbell: MemoryDoorbell = field(default_factory=MemoryDoorbell)
    hints: MemoryHints = field(default_factory=MemoryHints)

    def __post_init__(self) -> None:
        self.bundles = Bundles(self.blobs)
        self.tenant = self.store.create_tenant(make_tenant())
        self.show_worker(make_capabilities())

    def show_worker(self, *capabilities: Capabilities) -> None:
        self.store.record_worker(WorkerRecord(id="wrk_1", host="h", site="h", capabilities=capabilities))

    def change_tenant(self, tenant: Tenant) -> None:
        self.store.update_tenant(tenant)

    def upload(self, *, bundle: bytes | None = None, scenario: bytes | None = SCENARIO, **more: Any) -> Upload:
        words: dict[str, Any] = {"scenario": scenario} | more
        if bundle is not None:
            path = self.directory / f"bundle-{len(list(self.directory.iterdir()))}"
            path.write_bytes(bundle)
            digest = f"sha256:{hashlib.sha256(bundle).hexdigest()}"
            words |= {"bundle_path": path, "bundle_digest": digest, "bundle_bytes": len(bundle)}
        return Upload(**words)

    def submitted(self, upload: Upload, *, attempt: Attempt | None = None, **more: Any) -> Submitted:
        world = self.submitting(policy=more.pop("policy", Policy()))
        return submit(world, tenant="acme", upload=upload, attempt=attempt)

    def submitting(self, *, policy: Policy | None = None) -> Submitting:
        return Submitting(
            runs=self.store, tenants=self.store, workers=self.store, bundles=self.bundles, hints=self.hints,
            doorbell=self.doorbell, policy=policy or Policy(), archive_caps=ArchiveCaps(),
            worker_fresh=timedelta(seconds=90),
        )  # fmt: skip

    def submit(self, **parts: Any) -> Run:
        return self.submitted(self.upload(**parts)).run

    def play(self, *, text: str = "") -> Run:
        """Claim the next run and finish it, as a worker would."""
        claim = self.store.claim(
            worker_id="wrk_1", site="h", boundaries=["gvisor"], runtimes=["default"], lease=timedelta(seconds=30)
        )
        assert claim is not None
        self.store.mark_running(claim.run.id, claim.fence)
        self.store.mark_collecting(claim.run.id, claim.fence)
        self.store.finish(claim.run.id, claim.fence, make_result(steps=(make_step_result(text=text),)))
        return self.store.get_run(claim.run.id, None)

    def blob_is_kept(self, digest: str) -> bool:
        try:
            return self.blobs.path("acme", digest).is_file()
        except NotFound:
            return False
