"""Standby clusters: made before anybody asks, each used once, by one run, then destroyed like any other.

One process of a host keeps them (`keep`), any process takes one (`claim`). What is known of them is on disk and on the
engine, so a process that dies loses none: a cluster is ready once `standby.json` is beside its kubeconfig, and is
somebody's once `claimed.json` is, which many may want to write and one can. Until then it is a boundary of its own, of
no tenant and with fence 0: it lives until its label says, and the reaper ends what was forgotten.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from service.core.boundary import BoundaryKind, BoundaryRef, Cancellation
from service.core.cleanup import StandbyState
from service.core.errors import BlastdoorError, NotYetDestroyed
from service.core.ids import new_run_id
from workers.boundaries.cluster.kind import KindProvisioner
from workers.boundaries.cluster.kind_places import Place
from workers.boundaries.cluster.kind_render import STANDBY, VARIANT
from workers.boundaries.cluster.provisioners import NameTaken

log = structlog.get_logger()

LIFETIME = timedelta(hours=2)
"""An unused cluster is replaced after so long: what it is made of is never much older than what is installed."""
_MARGIN = timedelta(minutes=2)
"""One that ends sooner is not handed out any more."""
_AGAIN_S, _AGAIN_AT_MOST_S = 30.0, 600.0
_READY, _CLAIMED, _EXPIRED, _FAILED = "ready", "claimed", "expired", "failed"


Prepare = Callable[[Path, Cancellation], None]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """`wanted` as it is set, `ready` and `being_made` now. The others count since the host's state was made: handed
    out, too old before anyone came, could not be made or stopped answering."""

    wanted: int
    ready: int
    being_made: int
    claimed: int
    expired: int
    failed: int


def host_now() -> datetime:
    return datetime.now(UTC)


class Standby:
    """Of one worker's host. `prepare` is given the kubeconfig of each new cluster and brings it as far as it can be
    without a run, unless it is cancelled; it may raise BlastdoorError: then the cluster does not count. `made_of` says
    what `prepare` puts in: clusters that were made of something else are replaced."""

    def __init__(
        self, provisioner: KindProvisioner, *, wanted: int, prepare: Prepare, made_of: str = "",
        lifetime: timedelta = LIFETIME, now: Callable[[], datetime] = host_now,
    ) -> None:  # fmt: skip
        self._provisioner, self._places = provisioner, provisioner.places
        self._wanted, self._prepare, self._made_of = wanted, prepare, made_of
        self._lifetime, self._now = lifetime, now
        self._failures, self._not_before = 0, 0.0

    def keep(self, *, cancelled: Cancellation) -> None:
        """End what is too old, broken or too many, then make one that is missing: half a minute. To be called again and
        again; when another process is at it, nothing is done. After a failure it waits, longer each time. Raises
        EngineFailed, OSError."""
        if self._wanted == 0 and not self._unclaimed():
            return
        self._places.make()
        with self._places.locked("standby", wait=False) as alone:
            record = self._record() if alone else None
            if record is None:
                return
            self._end_lost()
            ready = [place for place in self._unclaimed() if self._is_kept(place, record)]
            for place in ready[self._wanted :]:
                self._end(place, why="not wanted any more")
            if len(ready) < self._wanted and time.monotonic() >= self._not_before and not cancelled.is_set():
                self._make_one(record, cancelled)

    def keep_none(self) -> None:
        """End those that nobody has: whoever kept them stops. Raises EngineFailed, OSError."""
        if not self._unclaimed():
            return
        with self._places.locked("standby"):
            for place in self._unclaimed():
                self._end(place, why="nobody keeps it any more")

    def claim(self, ref: BoundaryRef) -> Path | None:
        """-> kubeconfig of a cluster that is this run's from now on, or None when none is ready that is made of what it
        would be made of now. The record of it is on disk before it is used. Raises ProvisionFailed for what is not of
        this place, EngineFailed, OSError."""
        self._provisioner.accept(ref)
        ready = [place for place in self._unclaimed() if place.standby.exists() and self._is_fresh(place)]
        record = self._record() if ready else None
        for place in sorted(ready, key=_oldest_first):
            if _record(place) != record or not place.claim(ref):
                continue
            if self._provisioner.answers(place.kubeconfig):
                self._places.count(_CLAIMED)
                return place.kubeconfig
            log.warning("standby cluster ended", boundary=place.name, why="does not answer who claimed it")
            self._places.count(_FAILED)
            self._clear(place)
        return None

    def standing(self) -> Standing:
        """For metrics; asks nobody, and never raises for what is not there."""
        unclaimed = self._unclaimed()
        ready = sum(1 for place in unclaimed if place.standby.exists())
        return Standing(
            wanted=self._wanted, ready=ready, being_made=len(unclaimed) - ready,
            claimed=self._places.counted(_CLAIMED), expired=self._places.counted(_EXPIRED),
            failed=self._places.counted(_FAILED),
        )  # fmt: skip

    def states(self) -> Mapping[str, StandbyState]:
        """Of those that there are, by the boundary's name; of a claimed one also by its run's, since both may have been
        listed. One that is being ended is none any more."""
        found: dict[str, StandbyState] = {}
        for place in self._places.all():
            ref, owner = place.ref(), place.claimed_by()
            if ref is None or ref.tenant != STANDBY or (owner is not None and owner.name == place.name):
                continue
            if owner is not None:
                found |= dict.fromkeys((place.name, owner.name), StandbyState.CLAIMED)
            else:
                found[place.name] = StandbyState.READY if place.standby.exists() else StandbyState.BEING_MADE
        return found

    def _unclaimed(self) -> list[Place]:
        """Ready ones, and what is being made."""
        made_for = [(place, place.ref()) for place in self._places.all()]
        return [
            place for place, ref in made_for if ref is not None and ref.tenant == STANDBY and place.claimed_by() is None
        ]

    def _is_fresh(self, place: Place) -> bool:
        ref = place.ref()
        return ref is not None and self._now() + _MARGIN < ref.expires_at

    def _is_kept(self, place: Place, record: str) -> bool:
        """False after it was ended. Nobody else makes any now: what is half-made was left by one who died over it, or
        has lost the record of whose it is; nobody gets it then."""
        if not place.standby.exists():
            why, count = "half-made", _FAILED
        elif not self._is_fresh(place):
            why, count = "too old", _EXPIRED
        elif _record(place) != record:
            why, count = "not made of what it would be now", _EXPIRED
        elif not self._provisioner.answers(place.kubeconfig):
            why, count = "does not answer", _FAILED
        else:
            return True
        if self._end(place, why=why):
            self._places.count(count)
        return False

    def _end_lost(self) -> None:
        """What has a network and no directory: whoever made it, or claimed it, is gone."""
        for ref in self._provisioner.discover():
            place = self._places.place(ref.name)
            if ref.tenant == STANDBY and not place.exists:
                log.info("standby cluster ended", boundary=ref.name, why="its directory is lost")
                self._places.count(_FAILED)
                self._clear(place)

    def _end(self, place: Place, *, why: str) -> bool:
        """Unless a run gets it first. Should it resist, it says of itself that its time is over."""
        ref = place.ref()
        if ref is None or not place.claim(ref.model_copy(update={"expires_at": self._now()})):
            return False
        log.info("standby cluster ended", boundary=place.name, why=why)
        self._clear(place)
        return True

    def _clear(self, place: Place) -> None:
        with suppress(NotYetDestroyed):  # the reaper finds it
            self._provisioner.clear(place.name)

    def _make_one(self, record: str, cancelled: Cancellation) -> None:
        now = self._now()
        host = self._provisioner.host
        ref = BoundaryRef(
            installation=host.installation, kind=BoundaryKind.CLUSTER, variant=VARIANT, site=host.site, tenant=STANDBY,
            run_id=new_run_id(), fence=0, expires_at=now + self._lifetime, created_at=now,
        )  # fmt: skip
        if not self._provisioner.has_room():
            return
        started = time.monotonic()
        try:
            kubeconfig = self._provisioner.create(ref, cancelled=cancelled, tell=lambda _: None)
            self._prepare(kubeconfig, cancelled)
            self._provisioner.places.place(ref.name).say_ready(record)
        except BaseException as error:
            if not isinstance(error, NameTaken):
                with suppress(NotYetDestroyed):  # the reaper has its label
                    self._provisioner.destroy(ref)
            if not isinstance(error, BlastdoorError | OSError):
                raise
            if not cancelled.is_set():
                self._places.count(_FAILED)
                self._failures += 1
                self._not_before = time.monotonic() + min(_AGAIN_S * 2 ** (self._failures - 1), _AGAIN_AT_MOST_S)
                log.warning("no standby cluster", error=str(error), failures=self._failures)
            return
        self._failures = 0
        log.info("standby cluster ready", boundary=ref.name, seconds=round(time.monotonic() - started, 1))

    def _record(self) -> str | None:
        """What a cluster that is made now is made of; None when there is nothing to make it of."""
        image = self._provisioner.image_id()
        return None if image is None else json.dumps({"node_image": image, "made_of": self._made_of})


def _record(place: Place) -> str:
    with suppress(FileNotFoundError):
        return place.standby.read_text()
    return ""


def _oldest_first(place: Place) -> datetime:
    ref = place.ref()
    return ref.expires_at if ref is not None else datetime.max.replace(tzinfo=UTC)
