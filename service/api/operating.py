"""What travels in the bodies of operators' clean-up."""

from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from service.core.boundary import BoundaryKind
from service.core.cleanup import (
    ActionKind,
    BoundaryState,
    CleanupPlan,
    InventoryRow,
    PlannedAction,
    Scope,
    StandbyState,
)
from service.core.custody import AuditEntry
from service.core.errors import DocumentInvalid
from service.core.ports.tenants import WorkerRecord

_Word = Annotated[StrictStr, Field(min_length=1, max_length=255)]
_TEN_YEARS_S = 10 * 366 * 86400.0
_Age = Annotated[float, Field(ge=0, le=_TEN_YEARS_S, strict=True)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


# --- requests --------------------------------------------------------------------------------------------------------


class CleanupScope(_Body):
    """What is given is combined by AND."""

    tenant: _Word | None = None
    run: _Word | None = Field(None, description="the run's id")
    boundary: _Word | None = Field(None, description="the boundary's name, bd-...")
    orphans: bool = Field(False, description="only what is not live")
    older_than_s: _Age | None = None


class CleanupAsked(_Body):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"scope": {"orphans": True}}]})

    dry_run: bool = True
    scope: CleanupScope = CleanupScope()
    force: bool = False
    plan: _Word | None = Field(None, description="instead of a scope: apply this plan, as it was shown")

    def wanted(self) -> Scope:
        words = self.scope.model_dump(exclude={"older_than_s"})
        age = self.scope.older_than_s
        return Scope(**words, older_than=None if age is None else timedelta(seconds=age))

    def check_plan(self) -> None:
        """Raises DocumentInvalid."""
        rows = []
        if self.scope != CleanupScope():
            rows.append({"path": "scope", "message": "should be absent: the plan says what it is about"})
        if self.dry_run:
            rows.append({"path": "dry_run", "message": "should be false: a plan is given to be applied"})
        if rows:
            raise DocumentInvalid("request", rows)


class DrainAsked(_Body):
    worker: _Word


class PurgeAsked(_Body):
    older_than_s: _Age
    dry_run: bool = True


# --- answers ---------------------------------------------------------------------------------------------------------


class BoundaryShown(BaseModel):
    """`age_s`: since its run was claimed; of what no run has yet, since it was begun. `standby`: null for what was made
    for its run."""

    kind: BoundaryKind
    variant: str | None
    site: str
    name: str
    run: str
    tenant: str | None
    fence: int
    created_at: datetime
    expires_at: datetime
    observed_at: datetime
    state: BoundaryState
    age_s: float
    standby: StandbyState | None

    @classmethod
    def of(cls, row: InventoryRow, *, now: datetime) -> "BoundaryShown":
        ref = row.ref
        return cls(
            kind=ref.kind, variant=ref.variant or None, site=ref.site, name=ref.name, run=ref.run_id,
            tenant=ref.tenant or None, fence=ref.fence, created_at=row.created_at, expires_at=ref.expires_at,
            observed_at=row.observed_at, state=row.state, standby=row.standby,
            age_s=max((now - row.created_at).total_seconds(), 0.0),  # the label's clock is the host's
        )  # fmt: skip


class SiteShown(BaseModel):
    """`silent`: it has not looked for long; what it had counts as quarantined."""

    name: str
    last_seen_at: datetime
    silent: bool


class BoundaryPage(BaseModel):
    items: list[BoundaryShown]
    sites: list[SiteShown]


class RefShown(BaseModel):
    """Exactly what is meant."""

    installation: str
    kind: BoundaryKind
    variant: str | None
    site: str
    name: str
    run: str
    tenant: str | None
    fence: int


class ActionShown(BaseModel):
    """`result` begins with destroyed, refused or quarantined; null while its site works, and in a dry run."""

    ref: RefShown
    action: ActionKind
    why: str
    result: str | None

    @classmethod
    def of(cls, line: PlannedAction) -> "ActionShown":
        ref = line.ref
        shown = RefShown(
            installation=ref.installation, kind=ref.kind, variant=ref.variant or None, site=ref.site, name=ref.name,
            run=ref.run_id, tenant=ref.tenant or None, fence=ref.fence,
        )  # fmt: skip
        return cls(ref=shown, action=line.action, why=line.why, result=line.result)


class CleanupShown(BaseModel):
    id: str
    applied: bool
    force: bool
    asked_by: str
    at: datetime
    applied_at: datetime | None
    done_at: datetime | None
    actions: list[ActionShown]

    @classmethod
    def of(cls, plan: CleanupPlan) -> "CleanupShown":
        return cls(
            id=plan.id, applied=plan.applied_at is not None, force=plan.force, asked_by=plan.asked_by, at=plan.at,
            applied_at=plan.applied_at, done_at=plan.done_at, actions=[ActionShown.of(line) for line in plan.actions],
        )  # fmt: skip


class WorkerShown(WorkerRecord):
    """`playing`: runs that it acts on now."""

    playing: int
    state: Literal["working", "draining", "drained"]

    @classmethod
    def of(cls, worker: WorkerRecord, *, playing: int) -> "WorkerShown":
        state: Literal["working", "draining", "drained"] = "working"
        if worker.draining:
            state = "draining" if playing else "drained"
        return cls(**dict(worker), playing=playing, state=state)


class WorkerPage(BaseModel):
    items: list[WorkerShown]


class PurgeShown(BaseModel):
    """How much was given up; in a dry run, how much would be, but for `blobs`, which only the act can tell."""

    dry_run: bool
    older_than_s: float
    runs: int
    runs_without_blobs: int
    blobs: int
    idempotency_keys: int
    deliveries: int
    events: int


class AuditPage(BaseModel):
    items: list[AuditEntry]
    next_cursor: str | None = Field(description="give it back as `cursor`; null on the last page")
