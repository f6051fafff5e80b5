"""Valid core objects for tests: say only what the test is about."""

import itertools
from datetime import UTC, datetime
from typing import Any

from service.core.boundary import (
    Bundle,
    Capabilities,
    Capture,
    ControlPlane,
    Ended,
    Execution,
    Guarantees,
    Kernel,
    Nodes,
    Usage,
)
from service.core.controls import AppliedControls, Controls, apply
from service.core.ids import uuid7
from service.core.placement import Placement
from service.core.run import (
    BundleSummary,
    Outcome,
    Reason,
    Result,
    Run,
    ScenarioSummary,
    StepOutcome,
    StepResult,
    StreamText,
    Verdict,
)
from service.core.scenario import Scenario
from service.core.tenancy import Quota, Tenant, Trust

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SANDBOXED = Guarantees(kernel=Kernel.SANDBOXED, nodes=Nodes.SHARED, control_plane=ControlPlane.ISOLATED)
BUNDLE_DIGEST = "sha256:" + "b" * 64
_ids = itertools.count(1_767_268_800_000)


def make_run_id(*, made_ms: int | None = None) -> str:
    """`made_ms`: milliseconds since the epoch; when absent, each id is newer than the one before."""
    return f"run_{uuid7(next(_ids) if made_ms is None else made_ms).hex}"


def make_tenant(
    *, name: str = "acme", trust: Trust = Trust.UNTRUSTED, concurrent: int = 2, queued: int = 100, **more: Any
) -> Tenant:
    return Tenant(name=name, trust=trust, quota=Quota(concurrent=concurrent, queued=queued), **more)


def make_controls(*, tenant: Tenant | None = None, **asked: Any) -> AppliedControls:
    """As the tenant (untrusted when absent) would have them applied."""
    return apply(Controls.model_validate(asked), tenant or make_tenant())


def make_scenario(*, name: str = "discount rules", run: str | list[str] = "true", **more: Any) -> Scenario:
    """One step unless `steps` says otherwise."""
    return Scenario.model_validate({"name": name, "steps": [{"name": "only", "run": run}]} | more)


def make_placement(*, boundary: str = "gvisor", **more: Any) -> Placement:
    words: dict[str, Any] = {
        "boundary": boundary,
        "guarantees": SANDBOXED,
        "requirements": {"kernel": "sandboxed"},
        "why": ("tenant acme is untrusted: kernel >= sandboxed",),
        "rejected": (),
        "policy": "sha256:" + "0" * 64,
    }
    return Placement(**words | more)


def make_run(
    *, tenant: str = "acme", boundary: str = "gvisor", scenario: Scenario | None = None, bundle: Bundle | None = None,
    **more: Any,
) -> Run:  # fmt: skip
    """A queued run as `usecases.submit` makes it."""
    played = scenario or make_scenario()
    words: dict[str, Any] = {
        "id": make_run_id(),
        "tenant": tenant,
        "scenario": ScenarioSummary(name=played.name, digest=played.digest),
        "bundle": bundle and BundleSummary(digest=bundle.digest, bytes=bundle.bytes_, files=bundle.files),
        "controls": make_controls(),
        "created_at": NOON,
        "placement": make_placement(boundary=boundary),
    }
    return Run(**words | more)


def make_bundle(*, digest: str = BUNDLE_DIGEST, **more: Any) -> Bundle:
    return Bundle(**{"digest": digest, "bytes_": 1234, "files": 4, "content_bytes": 4000} | more)


def make_step_result(
    *, n: int = 1, outcome: StepOutcome = StepOutcome.PASSED, text: str = "", **more: Any
) -> StepResult:
    words: dict[str, Any] = {"exit_code": 0, "duration_s": 0.4, "cpu_s": 0.3, "name": f"step {n}"}
    stdout = StreamText(text=text, bytes=len(text.encode()))
    return StepResult(**words | {"n": n, "outcome": outcome, "stdout": stdout} | more)


def make_result(*, outcome: Outcome = Outcome.PASSED, reason: Reason | None = None, **more: Any) -> Result:
    words: dict[str, Any] = {
        "steps": (make_step_result(),),
        "usage": Usage(wall_s=0.9, cpu_s=0.5, peak_memory_bytes=2**20),
    }
    return Result(verdict=Verdict(outcome=outcome, reason=reason), **words | more)


def make_execution(
    *, ended: Ended = Ended.EXITED, exit_code: int | None = 0, stdout: bytes = b"", **more: Any
) -> Execution:
    """By default a program that exited 0 after 0.1 s, having printed `stdout`."""
    words: dict[str, Any] = {"duration_s": 0.1, "cpu_s": 0.05, "stdout": make_capture(printed=stdout)}
    return Execution(**words | {"ended": ended, "exit_code": exit_code if ended is Ended.EXITED else None} | more)


def make_capture(*, printed: bytes, limit: int = 2**20) -> Capture:
    """As a reader with this output limit keeps it: head and tail, each up to half."""
    if len(printed) <= limit:
        return Capture(head=printed, total_bytes=len(printed))
    return Capture(head=printed[: limit // 2], tail=printed[-(limit // 2) :], total_bytes=len(printed))


def make_capabilities(*, boundary: str = "gvisor", available: bool = True, **more: Any) -> Capabilities:
    words: dict[str, Any] = {"runtimes": {"default": "sha256:" + "d" * 64}, "versions": {"runsc": "20260101.0"}}
    return Capabilities(**words | {"boundary": boundary, "available": available} | more)
