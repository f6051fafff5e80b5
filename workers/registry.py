"""Which class builds which kind. Explicit, and an import that fails is an error: a missing driver is never skipped."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast, runtime_checkable

from service.core.boundary import Boundary, BoundaryKind, Host

DRIVERS: Mapping[BoundaryKind, str] = {
    BoundaryKind.GVISOR: "workers.boundaries.gvisor.driver:GvisorBoundary",
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


def load(kind: BoundaryKind, host: Host) -> Boundary:
    """Raises LookupError for a kind that has no driver."""
    if kind not in DRIVERS:
        built = ", ".join(sorted(DRIVERS)) or "none"
        raise LookupError(f"no driver builds {kind}; there are drivers for: {built}")
    module, _, name = DRIVERS[kind].partition(":")
    driver: Any = getattr(import_module(module), name)
    return cast("Boundary", driver.for_host(host))
