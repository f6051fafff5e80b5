"""Faults around runs in clusters of their own: a worker that dies or sleeps while it makes one, plays in it or ends it;
an engine that is stopped and started; an API server that dies; a scenario that fills its cluster.

Real processes, a real engine, real kind. What shows that a check can fail: the same look while no reaper runs.
"""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.core.failpoints import Action, Failpoint
from tests.cluster.dedicated_ground import NOTHING, boundary, docker
from tests.cluster.dedicated_scene import (
    BEGUN,
    GONE_WITHIN_S,
    LEASE_S,
    LOST,
    NOBODY_DIES,
    Ground,
    asked,
    given,
    ground,
    wake,
)
from tests.cluster.engine.fixture import engine
from tests.faults.conftest import forks
from tests.faults.place import WRITES_FILE, eventually
from tests.faults.scene import Scene

__all__ = ["engine", "forks", "given", "ground"]
pytestmark = pytest.mark.timeout(1200)


def test_d44_a_child_killed_while_it_makes_a_cluster_and_one_killed_before_it_ends_it_leave_none_and_the_run_passes(
    ground: Ground,
) -> None:
    """Under the first fence it dies beside a kind that goes on; under the second after the result was written."""
    scene = ground.scene
    worker = ground.worker()
    run = ground.submit(BEGUN)
    ground.making(run, 1)
    os.kill(worker.pool()[0], signal.SIGKILL)

    assert ground.makers(boundary(run, 1)), "kind goes on without its worker"
    ground.stands(boundary(run, 1))
    reaper = scene.place.start("reaper")
    eventually(lambda: scene.row(run)["fence"] == 2, why=scene.place.told)
    assert ground.makers(boundary(run, 1)) == []
    ground.arm(Failpoint.DESTROY_BEFORE, Action.EXIT)
    ground.making(run, 2)
    reaper.end()

    ground.acted()
    assert ground.finished(run) == ("passed", None, 2)
    ground.stands(boundary(run, 2))
    scene.place.start("reaper")
    ground.nothing_stands(seconds=LEASE_S + GONE_WITHIN_S)
    assert scene.ended(run) == ("passed", None, 2)
    ground.is_clean()


def test_d44_d45_a_worker_that_dies_before_anything_and_while_it_makes_one_and_a_child_killed_in_its_step(
    ground: Ground,
) -> None:
    scene = ground.scene
    ground.arm(Failpoint.OPEN_BEFORE_CREATE, Action.EXIT)
    worker = ground.worker()
    run = ground.submit(f"{BEGUN}; sleep 600")
    ground.acted()
    assert (scene.row(run)["phase"], scene.row(run)["fence"]) == ("provisioning", 1), "the intent is recorded"
    assert ground.left() == NOTHING, "and nothing more"
    assert "I1" in scene.wrong_so_far()
    scene.place.start("reaper")

    ground.making(run, 2)
    worker.send(signal.SIGKILL)
    assert ground.makers(boundary(run, 2)), "kind goes on without its worker"
    ground.stands(boundary(run, 2))
    ground.nothing_stands(seconds=LEASE_S + GONE_WITHIN_S)

    worker = ground.worker()
    assert ground.begun(run) == 3
    os.kill(worker.pool()[0], signal.SIGKILL)
    ground.stands(boundary(run, 3))
    assert ground.finished(run) == (*LOST, 3)
    ground.nothing_stands()
    assert scene.ended(run) == (*LOST, 3)
    ground.is_clean()


def test_d45_d46_a_worker_that_sleeps_while_it_makes_one_and_at_its_end_writes_nothing_and_one_that_dies_between(
    ground: Ground,
) -> None:
    """Fence 1: all of the worker sleeps past its lease while kind works. Fence 2: another dies when all is made, and
    nothing is played. Fence 3: it sleeps past its lease when all is played, and nothing is written."""
    scene = ground.scene
    worker = ground.worker()
    run = ground.submit(BEGUN)
    ground.making(run, 1)
    asleep = ground.sleeps(worker)
    ground.stands(boundary(run, 1))
    ground.arm(Failpoint.OPEN_CREATED, Action.EXIT)
    ground.worker()
    scene.place.start("reaper")
    eventually(lambda: scene.row(run)["fence"] == 2, why=scene.place.told)
    assert ground.makers(boundary(run, 1)) == []
    wake(asleep)

    ground.acted()
    ground.stands(boundary(run, 2))
    ground.arm(Failpoint.FINISH_BEFORE, Action.STOP)
    sleeper = ground.acted()
    assert scene.row(run)["fence"] == 3
    assert ground.finished(run) == (*LOST, 3)
    ground.nothing_stands()
    wake([sleeper])

    late = eventually(lambda: _refused(scene), why=scene.place.told)
    assert {(one["what"], one["fence"]) for one in late} == {("finish", 3)}
    assert scene.ended(run) == (*LOST, 3)
    ground.is_clean()


def _refused(scene: Scene) -> list[dict[str, Any]]:
    """What workers have tried to write too late."""
    written = (scene.place.directory / WRITES_FILE).read_text().splitlines()
    return [entry for entry in map(json.loads, written) if not entry["accepted"]]


_NAMES = {"plural": "lumps", "singular": "lump", "kind": "Lump"}
_SCHEMA = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_VERSION = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": _SCHEMA}}
_DEFINITION = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "lumps.example.com"},
    "spec": {"group": "example.com", "scope": "Namespaced", "names": _NAMES, "versions": [_VERSION]},
}
FILLS = (
    f"""{BEGUN}; echo '{json.dumps(_DEFINITION)}' > definition.json
kubectl create -f definition.json && kubectl wait --for=condition=established crd/lumps.example.com || exit 1
head -c 1000000 /dev/zero | tr '\\0' x > filling
for n in $(seq 16); do
  echo '{{"apiVersion":"example.com/v1","kind":"Lump","metadata":{{"generateName":"lump-"}},"filling":"'
  cat filling; echo '"}}'
done | tr -d '\\n' > lumps
for n in $(seq 40); do
  kubectl create --validate=false -f lumps > made 2> said || break
  echo $n
done
tail -c 300 said; grep -q 'database space exceeded' said && echo SPACE""",
    """for n in $(seq 12); do
  echo '{"apiVersion":"v1","kind":"Pod","metadata":{"name":"pod-'$n'"},"spec":{"containers":['
  echo '{"name":"main","image":"'$BLASTDOOR_IMAGE'","command":["sleep","600"]}]}}'
done > pods
kubectl create -f pods; for n in $(seq 3); do kubectl get pods; sleep 1; done; kubectl get --raw=/readyz; true""",
)
"""Until etcd takes no more; then pods, for which there is no room. (Their quota: test_own_api_requests.py.)"""


@contextmanager
def _used(ground: Ground, name: str) -> Iterator[dict[str, int]]:
    """What the engine says of the memory of the run's node, and what the host has left: the worst of it."""
    seen, stop = {"limit": 0, "most": 0, "host_left": 2**62}, threading.Event()
    where = f"/containers/{name}-control-plane/stats?stream=0&one-shot=1"

    def look() -> None:
        while not stop.wait(1):
            memory = (asked(ground.engine, where) or {}).get("memory_stats")
            if memory:  # it is not about to come, or gone
                seen["limit"] = max(seen["limit"], memory["limit"])
                seen["most"] = max(seen["most"], memory.get("max_usage", 0), memory["usage"])
            found = re.search(r"^MemAvailable: +([0-9]+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
            assert found
            seen["host_left"] = min(seen["host_left"], int(found[1]) * 1024)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()


def _printed(scene: Scene, run: str) -> list[str]:
    """What each step printed."""
    found = scene.place.store.get_run(run, "acme")
    return [step.stdout.text + step.stderr.text for step in found.steps]


def _of(found: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """What carries this boundary's name."""
    return [one for many in found.values() for one in many if name in one]


def test_an_engine_that_is_stopped_errs_the_run_leaves_nothing_when_it_is_back_and_the_next_run_fills_its_cluster(
    ground: Ground,
) -> None:
    scene, engine = ground.scene, ground.engine
    worker = ground.worker(**NOBODY_DIES)
    reaper = scene.place.start("reaper")
    run = ground.submit(f"{BEGUN}; sleep 600")
    fence = ground.begun(run)
    engine.stop_docker()
    try:
        assert ground.finished(run) == ("errored", "boundary_lost", fence)
        eventually(lambda: not ground.offering(), why=scene.place.told)
        waits = ground.submit(*FILLS, memory="512MiB", needs=("kubernetes-api",))
        eventually(lambda: worker.events("not yet destroyed; left to the reaper"), why=scene.place.told)
        assert scene.row(waits)["phase"] == "queued", "nobody says that it could make a cluster"
        row = scene.row(run)
        assert row["destroyed_fence"] < row["fence"] == fence, "an engine that is away is not one that has nothing"
        reaper.end()
    finally:
        engine.start_docker()

    time.sleep(3)
    ground.stands(boundary(run, fence))
    scene.place.start("reaper")
    eventually(lambda: not _of(ground.left(), boundary(run, fence)), seconds=60, why=ground.left)
    assert scene.ended(run) == ("errored", "boundary_lost", fence)

    fence = ground.begun(waits)
    with _used(ground, boundary(waits, fence)) as used:
        assert ground.finished(waits) == ("passed", None, fence), ground.told(waits)
    told = _printed(scene, waits)
    assert "SPACE\n" in told[0]
    assert "space exceeded" in told[1]
    assert "ok" in told[1], "its API server is well"
    assert used["limit"] == 3 * 2**30, "of which the host has more"
    assert 0 < used["most"] <= used["limit"]
    ground.nothing_stands()
    assert scene.ended(waits) == ("passed", None, fence)
    ground.is_clean()


def test_a_cluster_whose_api_server_dies_and_stays_away_errs_its_run_and_goes(ground: Ground) -> None:
    scene = ground.scene
    ground.worker(**NOBODY_DIES)
    scene.place.start("reaper")
    run = ground.submit(f"{BEGUN}; sleep 600", needs=("kubernetes-api",))
    fence = ground.begun(run)
    node = ["exec", f"{boundary(run, fence)}-control-plane"]
    assert docker(ground.engine, *node, "pgrep", "-x", "kube-apiserver")
    docker(ground.engine, *node, "mv", "/etc/kubernetes/manifests/kube-apiserver.yaml", "/root")
    docker(ground.engine, *node, "pkill", "-KILL", "-x", "kube-apiserver")
    assert ground.finished(run) == ("errored", "boundary_lost", fence)
    ground.nothing_stands()
    assert scene.ended(run) == ("errored", "boundary_lost", fence)
    ground.is_clean()
