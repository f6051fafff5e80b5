"""Which class builds which kind. Explicit, and an import that fails is an error: a missing driver is never skipped."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast, runtime_checkable

from service.core.boundary import Boundary, BoundaryKind, Cancellation, Host
from service.core.cleanup import StandbyState

DRIVERS: Mapping[BoundaryKind, str] = {
    BoundaryKind.GVISOR: "workers.boundaries.gvisor.driver:GvisorBoundary",
    BoundaryKind.CLUSTER: "workers.boundaries.cluster.driver:ClusterBoundary",
    BoundaryKind.NAMESPACE: "workers.boundaries.namespace.driver:NamespaceBoundary",
}


@runtime_checkable
class Warmable(Protocol):
    """A driver that can get something ready before the first run asks for it."""

    def warm(self) -> None:
        """Raises ProvisionFailed; then the run will find out for itself."""
        ...

    def close(self) -> None:
        """End what was kept ready."""
        ...


@runtime_checkable
class Surrounded(Protocol):
    """A driver whose boundaries do not stand on this host."""

    def surroundings(self) -> Sequence[tuple[str, int]]:
        """Who answers near them by TCP, as (address, port): what a guest must not reach. Raises BlastdoorError."""
        ...


@runtime_checkable
class Telling(Protocol):
    """A driver whose boundaries take so long to make that somebody wants to know what takes the seconds."""

    def telling(self, tell: Callable[[str], None]) -> Boundary:
        """-> the same, which tells of what it makes in short lines."""
        ...


@runtime_checkable
class Slow(Protocol):
    """A driver whose boundaries take longer than moments to make."""

    def making_s(self, variant: str) -> float:
        """The longest that one may be in the making: `open` has given up by then."""
        ...


@runtime_checkable
class Keeping(Protocol):
    """A driver that keeps boundaries ready which nobody uses yet. One process of a host does it."""

    def keep(self, *, cancelled: Cancellation) -> None:
        """Make what is missing, end what is too old. To be called again and again. Raises BlastdoorError, OSError."""
        ...

    def keep_none(self) -> None:
        """End those that nobody uses. Raises BlastdoorError, OSError."""
        ...

    def standing(self) -> Mapping[str, int]:
        """`wanted`, `ready` and `being_made` now; `claimed`, `expired` and `failed` as they add up."""
        ...

    def kept(self) -> Mapping[str, StandbyState]:
        """Of what is there now, by the boundary's name: what was made before anybody asked."""
        ...


def load(kind: BoundaryKind, host: Host) -> Boundary:
    """Raises LookupError for a kind that has no driver."""
    if kind not in DRIVERS:
        built = ", ".join(sorted(DRIVERS)) or "none"
        raise LookupError(f"no driver builds {kind}; there are drivers for: {built}")
    module, _, name = DRIVERS[kind].partition(":")
    driver: Any = getattr(import_module(module), name)
    return cast("Boundary", driver.for_host(host))
