"""One root for every error Blastdoor raises on purpose.

BlastdoorError
├── Refused                 the caller's request cannot be accepted; nothing was changed
│   ├── TooLarge            more bytes arrived than the cap
│   ├── BundleRejected      what the upload is, or expands to, is not accepted
│   ├── DocumentInvalid     scenario, controls, metadata or a JSON body; carries {path, message} rows
│   ├── PlacementRefused    no wall that can be built now gives the guarantees that are required
│   ├── QuotaExceeded       the tenant's queue or storage is full
│   ├── IdempotencyMismatch / IdempotencyInFlight
│   ├── NotFound            absent, or another tenant's: the two are never told apart
│   ├── Conflict            the thing exists, or is not in a state that allows this
│   ├── Unauthenticated / Forbidden
│   └── StorageFull         the platform has no room
├── Unavailable             try again later
├── LeaseLost               this worker may no longer act on this run
└── BoundaryError           the wall's side
    ├── ProvisionFailed     the boundary could not be made
    ├── BoundaryLost        it died under a step, and no limit of the run explains it
    │   └── SandboxBroken   by the guest's own doing: the run has failed
    └── NotYetDestroyed     something of it still exists

`api/errors.py` has the one table from these to problem+json.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class BlastdoorError(Exception):
    """The root. `code` is the stable word of the contract, `extra` the further members of a problem document."""

    code = "internal"

    def __init__(self, detail: str, *, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra: dict[str, Any] = dict(extra or {})


class Refused(BlastdoorError):
    code = "refused"


class TooLarge(Refused):
    code = "too_large"


class BundleRejected(Refused):
    """`detail` names the member and the rule; `rule` is the stable word (path, link, type, count, depth, bomb, ...)."""

    code = "bundle_rejected"

    def __init__(self, detail: str, *, rule: str, member: str | None = None) -> None:
        super().__init__(detail, extra={"rule": rule, "member": member})
        self.rule = rule
        self.member = member


class DocumentInvalid(Refused):
    """`document` is scenario, controls, metadata or request; `errors` has one row for each place that is wrong."""

    def __init__(self, document: str, errors: Sequence[Mapping[str, str]]) -> None:
        rows = [dict(row) for row in errors]
        first = rows[0] if rows else {"path": "", "message": "not valid"}
        place = f"{document}.{first['path']}" if first["path"] else document
        more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        super().__init__(f"{place}: {first['message']}{more}", extra={"errors": rows})
        self.document = document
        self.errors = rows
        self.code = f"{document}_invalid"


class PlacementRefused(Refused):
    code = "placement_refused"


class QuotaExceeded(Refused):
    code = "quota_exceeded"


class IdempotencyMismatch(Refused):
    code = "idempotency_mismatch"


class IdempotencyInFlight(Refused):
    code = "idempotency_in_flight"


class NotFound(Refused):
    code = "not_found"

    def __init__(self, detail: str = "there is no such thing here") -> None:
        super().__init__(detail)


class Conflict(Refused):
    """Carries its own code: not_finished, tenant_exists, ..."""

    def __init__(self, detail: str, *, code: str = "conflict") -> None:
        super().__init__(detail)
        self.code = code


class Unauthenticated(Refused):
    code = "unauthenticated"


class Forbidden(Refused):
    code = "forbidden"


class StorageFull(Refused):
    code = "storage_full"


class Unavailable(BlastdoorError):
    code = "unavailable"

    def __init__(self, detail: str, *, retry_after_s: int = 5) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class LeaseLost(BlastdoorError):
    code = "lease_lost"


class BoundaryError(BlastdoorError):
    code = "boundary"


class ProvisionFailed(BoundaryError):
    code = "provision_failed"


class BoundaryLost(BoundaryError):
    code = "boundary_lost"


class SandboxBroken(BoundaryLost):
    """What was to read what a guest left, or to end it, was ended by the guest: its own failure, and never a pass."""


class NotYetDestroyed(BoundaryError):
    code = "not_yet_destroyed"
