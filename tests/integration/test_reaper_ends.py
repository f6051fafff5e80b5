"""A reaper that is told to end does, whatever it waits for; the next one goes on from what is there."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.adapters.sql_store import SqlStore
from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.ids import new_run_id
from tests.integration.test_worker_processes import Process, eventually
from workers.boundaries.cluster.kind_places import Places
from workers.boundaries.cluster.kind_render import LABELS, STANDBY, labels, network_name
from workers.pods.render import hashed

SITE, IMAGE = "here", f"registry.example/run@sha256:{'0' * 64}"
UP_KILLS_AFTER_S = 20.0
ENGINE = """#!/bin/sh
cd {folder} || exit 1
case "$1 $2" in
"network ls") case "$*" in *Label*) cat rows;; *.ID*) cut -f1,2 rows;; *) cut -f2 rows;; esac;;
"network rm") echo $$ >> asked; test -e answers || exec sleep 60; grep -v "$3" rows > rest; mv rest rows;;
"image inspect") echo '[{{"Id": "sha256:1"}}]';;
esac
"""
"""Networks and nothing else. To remove one takes a minute, until there is a file `answers`."""

pytestmark = pytest.mark.timeout(120)


@dataclass
class Host:
    store: SqlStore
    folder: Path
    environment: dict[str, str]

    @property
    def places(self) -> Places:
        return Places(state=self.folder / "state" / "clusters" / hashed(SITE)[:12] / "kind")

    def leave(self) -> BoundaryRef:
        """As a worker does that dies before it has made more."""
        return self._network("acme", fence=1)

    def keep(self) -> BoundaryRef:
        """As a reaper does that keeps one ready and is killed; it is of another node image."""
        ref = self._network(STANDBY, fence=0)
        self.places.make()
        self.places.place(ref.name).make(ref)
        self.places.place(ref.name).say_ready("{}")
        return ref

    def _network(self, tenant: str, *, fence: int) -> BoundaryRef:
        now = datetime.now(UTC)
        ref = BoundaryRef(
            installation=self.store.installation_id(), kind=BoundaryKind.CLUSTER, variant="kind", site=SITE,
            tenant=tenant, run_id=new_run_id(), fence=fence, expires_at=now + timedelta(hours=1), created_at=now,
        )  # fmt: skip
        row = "\t".join(["1", network_name(ref.name, ref.installation), *(labels(ref)[name] for name in LABELS)])
        with (self.folder / "rows").open("a") as rows:
            rows.write(row + "\n")
        return ref

    def stands(self, ref: BoundaryRef) -> bool:
        return ref.name in (self.folder / "rows").read_text() or self.places.place(ref.name).exists

    def waiting(self) -> list[int]:
        """The engine's commands that have been asked to remove something."""
        with suppress(FileNotFoundError):
            return [int(line) for line in (self.folder / "asked").read_text().split()]
        return []

    def reaper(self) -> Process:
        return Process("reaper", self.environment, self.folder / f"reaper-{time.monotonic_ns()}.log")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    docker = tmp_path / "docker"
    docker.write_text(ENGINE.format(folder=tmp_path))
    docker.chmod(0o755)
    (tmp_path / "rows").touch()
    (tmp_path / "state").mkdir()
    store = SqlStore(f"sqlite:///{tmp_path}/state/blastdoor.db")
    store.migrate()
    asked = {
        "STATE_DIR": str(tmp_path / "state"), "RUNTIME_DIR": str(tmp_path / "run"), "SITE": SITE,
        "REDIS_URL": "redis://127.0.0.1:1/0", "BOUNDARIES": '["cluster"]', "DOCKER": str(docker),
        "DOCKER_HOST": "unix:///nowhere.sock", "KIND_NODE_IMAGE": "node", "HOUSEKEEPING_S": "0.5",
        "CLUSTER_IMAGES": json.dumps({"default": IMAGE}), "STANDBY_CLUSTERS": "1",
    }  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    made = Host(store, tmp_path, {"PATH": path} | {f"BLASTDOOR_{name}": value for name, value in asked.items()})
    yield made
    for pid in made.waiting():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    store.close()


@pytest.mark.parametrize("what", [Host.leave, Host.keep])
def test_a_reaper_ends_while_an_engine_does_not_and_the_next_takes_up_what_it_gave_up(host: Host, what: object) -> None:
    assert callable(what)
    ref = what(host)
    first = host.reaper()
    eventually(host.waiting, why=first.said)

    began = time.monotonic()
    status = first.stop(seconds=UP_KILLS_AFTER_S)

    assert (status, time.monotonic() - began < UP_KILLS_AFTER_S) == (0, True), first.said()
    assert "something resists as the reaper ends; the next one goes on" in first.events()
    assert host.stands(ref), "it resisted indeed"

    (host.folder / "answers").touch()
    second = host.reaper()
    eventually(lambda: not host.stands(ref), why=second.said)
    began = time.monotonic()
    assert second.stop(seconds=UP_KILLS_AFTER_S) == 0
    assert time.monotonic() - began < 8, "with nothing to wait for it waits for nothing"
    assert not any("resists" in said for said in second.events())
