"""The bytes that a run leaves: what its steps printed, and its artifacts. Opened here, so that what is being read
cannot be purged from under the reader; never held in memory.

A run of another tenant, one that never was, a step or a path that it does not have: all the same NotFound.
"""

import hashlib
import io
from dataclasses import dataclass
from typing import BinaryIO, Literal

from service.core.errors import NotFound
from service.core.ports.blobs import Blobs
from service.core.ports.runs import Kept, RunStore
from service.core.run import output_name
from service.usecases.fetch import checked_run_id

Stream = Literal["stdout", "stderr"]


@dataclass(frozen=True, kw_only=True)
class Download:
    """`file` is the caller's to close; `sha256` is hexadecimal."""

    file: BinaryIO
    bytes: int
    sha256: str
    name: str
    """What a person might call it; a guest may have chosen it."""


def open_output(runs: RunStore, blobs: Blobs, *, run_id: str, tenant: str, n: int, stream: Stream) -> Download:
    """The bytes that were kept of what the step printed: head and tail. A step that printed nothing has none, which is
    no error. Raises NotFound, also for what was purged or had no room."""
    kept = runs.get_kept(checked_run_id(run_id), tenant)
    step = next((step for step in kept.run.steps if step.n == n), None)
    if step is None:
        raise NotFound
    name = f"{run_id}-{output_name(n, stream)}"
    digest = kept.outputs.get(output_name(n, stream))
    if digest is not None:
        return _opened(blobs, kept, digest, name=name)
    if getattr(step, stream).bytes:
        raise NotFound("this output was not kept: there was no room for it in the tenant's storage")
    return Download(file=io.BytesIO(), bytes=0, sha256=hashlib.sha256().hexdigest(), name=name)


def open_artifact(runs: RunStore, blobs: Blobs, *, run_id: str, tenant: str, path: str) -> Download:
    """`path` exactly as the run's `artifacts` spell it. Raises NotFound, also for what was purged."""
    kept = runs.get_kept(checked_run_id(run_id), tenant)
    artifact = next((artifact for artifact in kept.run.artifacts if artifact.path == path), None)
    if artifact is None:
        raise NotFound
    return _opened(blobs, kept, f"sha256:{artifact.sha256}", name=path)


def _opened(blobs: Blobs, kept: Kept, digest: str, *, name: str) -> Download:
    if kept.purged:
        raise NotFound("the run's files were purged: they are kept for a shorter time than its record")
    try:
        file = blobs.path(kept.run.tenant, digest).open("rb")
    except (NotFound, FileNotFoundError) as error:
        raise NotFound("these bytes are no longer kept") from error
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return Download(file=file, bytes=size, sha256=digest.removeprefix("sha256:"), name=name)
