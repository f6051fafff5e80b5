"""What makes whole clusters: the one protocol that kind and Cluster API implement."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from service.core.boundary import BoundaryRef, Cancellation
from service.core.controls import Limits
from service.core.errors import ProvisionFailed

Tell = Callable[[str], None]
"""Takes one short line of progress: "preparing nodes"."""


class NoRoom(ProvisionFailed):
    """As many clusters as are allowed are there, and nothing was made: it may be asked again when one has gone."""


class NameTaken(ProvisionFailed):
    """There is something of that name, which whoever asked did not make: it is not theirs to undo."""


class Provisioner(Protocol):
    """Makes a whole cluster for one run, and takes it away again. Usable from any process: `destroy` needs nothing
    that is only in memory."""

    @property
    def variant(self) -> str:
        """`kind` or `capi`."""
        ...

    def lacks(self) -> Sequence[str]:
        """What is missing here to make one, each with how to get it; empty: it can. Within a second, since it is asked
        all the time, and never raises for what is absent."""
        ...

    def versions(self) -> Mapping[str, str]:
        """Of what builds it, by name: `{"kind": "0.33.0", "engine": "28.5.2"}`; what is not known is left out."""
        ...

    def too_small_for(self, limits: Limits) -> str | None:
        """Why no cluster of its would hold a run's pod with these limits; None: one would, as far as is known."""
        ...

    def create(self, ref: BoundaryRef, *, cancelled: Cancellation, tell: Tell) -> Path:
        """-> kubeconfig of the new cluster's administrator, mode 0600, in a directory that `destroy` removes. Raises
        ProvisionFailed, also when cancelled; whatever fails leaves nothing, or what `destroy` then removes. Raises
        NoRoom when all places are taken, which the caller may wait out, and NameTaken, after which the caller must not
        destroy what is there."""
        ...

    def longest_s(self) -> float:
        """After so long `create` has made one or given up."""
        ...

    def discover(self) -> Iterator[BoundaryRef]:
        """What exists for this installation and site, by the platform's own labels; half-made ones too."""
        ...

    def destroy(self, ref: BoundaryRef) -> None:
        """Idempotent, from any process; absent is success, and what another installation made is left alone. Raises
        NotYetDestroyed while something is left."""
        ...
