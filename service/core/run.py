"""A run: one scenario, one bundle, one record. The literal tables of what may follow what, and the shapes users see."""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from service.core.boundary import Artifact, SkippedArtifact, Usage
from service.core.controls import AppliedControls
from service.core.placement import Placement

MAX_ATTEMPTS = 3


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Phase(StrEnum):
    QUEUED = "queued"
    PROVISIONING = "provisioning"
    RUNNING = "running"
    COLLECTING = "collecting"
    FINISHED = "finished"


NEXT: Mapping[Phase, frozenset[Phase]] = {
    Phase.QUEUED: frozenset({Phase.PROVISIONING, Phase.FINISHED}),
    Phase.PROVISIONING: frozenset({Phase.RUNNING, Phase.QUEUED, Phase.FINISHED}),
    Phase.RUNNING: frozenset({Phase.COLLECTING, Phase.FINISHED}),
    Phase.COLLECTING: frozenset({Phase.FINISHED}),
    Phase.FINISHED: frozenset(),
}
ACTIVE: frozenset[Phase] = frozenset({Phase.PROVISIONING, Phase.RUNNING, Phase.COLLECTING})


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    LIMIT_EXCEEDED = "limit_exceeded"
    CANCELLED = "cancelled"
    ERRORED = "errored"


class StepOutcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    LIMIT_EXCEEDED = "limit_exceeded"
    SKIPPED = "skipped"


class Reason(StrEnum):
    EXPECTATION = "expectation"
    EXIT_CODE = "exit_code"
    STEP_TIMEOUT = "step_timeout"
    WALL_TIMEOUT = "wall_timeout"
    MEMORY = "memory"
    PIDS = "pids"
    DISK = "disk"
    FILES = "files"
    OUTPUT = "output"
    CANCELLED_BY_TENANT = "cancelled_by_tenant"
    CANCELLED_BY_OPERATOR = "cancelled_by_operator"
    WORKER_LOST = "worker_lost"
    PROVISION_FAILED = "provision_failed"
    BOUNDARY_LOST = "boundary_lost"
    QUEUE_EXPIRED = "queue_expired"
    INTERNAL = "internal"


class QueueReason(StrEnum):
    """What a queued run waits for; none: only for its turn."""

    NO_WORKER = "no_worker"  # one that can build its boundary
    DRAINING = "draining"  # those that can take no more runs
    CLEANING_UP = "cleaning_up"  # what its earlier attempt made is not yet known to be gone
    TENANT_AT_CAP = "tenant_at_cap"
    WORKERS_BUSY = "workers_busy"


class StreamText(_Frozen):
    """A stream as the run's JSON carries it: at most 16 KiB of text; `bytes` counts all that was printed."""

    text: str = ""
    bytes: int = 0
    truncated: bool = False


class Failure(_Frozen):
    """One expectation that did not hold: its dotted path, what was expected, what was there (at most 2 KiB)."""

    expectation: str
    expected: Any
    actual: Any


class StepResult(_Frozen):
    n: int
    name: str
    outcome: StepOutcome
    exit_code: int | None = None
    signal: int | None = None
    duration_s: float | None = None
    cpu_s: float | None = None
    stdout: StreamText = StreamText()
    stderr: StreamText = StreamText()
    failures: tuple[Failure, ...] = ()


class Verdict(_Frozen):
    outcome: Outcome
    reason: Reason | None = None
    message: str | None = None


class ScenarioSummary(_Frozen):
    name: str
    digest: str


class BundleSummary(_Frozen):
    digest: str
    bytes: int
    files: int


Metadata = Annotated[
    dict[Annotated[StrictStr, Field(max_length=128)], Annotated[StrictStr, Field(max_length=1024)]],
    Field(max_length=16),
]


class Run(_Frozen):
    """The run as the API shows it. Every key is always there, null when unknown."""

    id: str
    tenant: str
    metadata: Metadata = {}
    scenario: ScenarioSummary
    bundle: BundleSummary | None = None
    controls: AppliedControls
    phase: Phase = Phase.QUEUED
    outcome: Outcome | None = None
    reason: Reason | None = None
    message: str | None = None
    attempt: int = 0
    queue_position: int | None = None
    queue_reason: QueueReason | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    boundary_destroyed_at: datetime | None = None
    placement: Placement
    steps: tuple[StepResult, ...] = ()
    usage: Usage | None = None
    artifacts: tuple[Artifact, ...] = ()
    skipped_artifacts: tuple[SkippedArtifact, ...] = ()
    evidence: Mapping[str, Any] | None = None


class Result(_Frozen):
    """What `finish` records, in one transaction with its event.

    `outputs`: the blob of each stream that has one, by `output_name`; `output_bytes`: its size, by the same name. Both
    are kept beside the run and are no part of what its owner is shown.
    """

    verdict: Verdict
    steps: tuple[StepResult, ...] = ()
    usage: Usage | None = None
    artifacts: tuple[Artifact, ...] = ()
    skipped_artifacts: tuple[SkippedArtifact, ...] = ()
    evidence: Mapping[str, Any] | None = None
    outputs: Mapping[str, str] = {}
    output_bytes: Mapping[str, int] = {}

    def shown(self) -> dict[str, Any]:
        """What the run takes over as it is; outcome, reason and message come from the verdict."""
        return {name: value for name, value in self if name not in _KEPT_APART}

    def blobs(self) -> dict[str, int]:
        """Every blob that the run uses because of this result, by digest, with its size."""
        sizes = {f"sha256:{artifact.sha256}": artifact.bytes for artifact in self.artifacts}
        return sizes | {digest: self.output_bytes.get(name, 0) for name, digest in self.outputs.items()}


_KEPT_APART = frozenset({"verdict", "outputs", "output_bytes"})


def output_name(n: int, stream: str) -> str:
    """`1.stdout`: what `Result.outputs` calls a step's stream."""
    return f"{n}.{stream}"
