"""Faults around runs in clusters of their own: a worker that dies or sleeps while it makes one, plays in it or ends it;
an engine that is stopped and started; an API server that dies; a scenario that fills its cluster.

Real processes, a real engine, real kind. What shows that a check can fail: the same look while no reaper runs.
"""

import json
import os
import re
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from service.core.failpoints import Action, Failpoint
from tests.cluster.dedicated_ground import NOTHING, boundary, docker, left, settings
from tests.cluster.engine.fixture import engine
from tests.cluster.engine.outside import Engine
from tests.cluster.engine.place import Place as EnginePlace
from tests.contract.store_steps import add_run
from tests.factories import make_controls, make_scenario
from tests.faults.conftest import forks
from tests.faults.place import SCALED, WRITES_FILE, Forks, Program, eventually
from tests.faults.program import FAULT_FILE
from tests.faults.recorder import _NAME
from tests.faults.scene import Scene, open_scene
from tests.summary import ran
from workers.boundaries.cluster.kind_places import MARK

__all__ = ["engine", "forks"]
pytestmark = pytest.mark.timeout(1200)
KIND = "cluster/kind"
GONE_WITHIN_S = 15.0
MADE_WITHIN_S = 400.0
"""Beside other tests: idle it takes a tenth of this."""
LEASE_S = 12.0
"""A machine that makes a cluster is busy: a lease must outlast that."""
TIMES = SCALED | {
    "BLASTDOOR_LEASE_S": str(LEASE_S),
    "BLASTDOOR_SELF_FENCE_S": "9",
    "BLASTDOOR_HEARTBEAT_S": "2",
    "BLASTDOOR_HOUSEKEEPING_S": "1",
}
NOBODY_DIES = {"BLASTDOOR_LEASE_S": "120", "BLASTDOOR_SELF_FENCE_S": "100"}
"""Of the worker, where its end is not the fault."""
LOST = ("errored", "worker_lost")
BEGUN = "echo begun"


class Ground:
    """A scene whose runs have clusters of their own, and a look at those from the engine's side."""

    def __init__(self, scene: Scene, engine: Engine) -> None:
        self.scene, self.engine = scene, engine
        self.fault = scene.place.directory / "fault"

    def worker(self, **times: str) -> Program:
        """Once it offers clusters. One run at a time."""
        before = len(self.offering())
        worker = self.scene.place.start("worker", **{FAULT_FILE: str(self.fault)}, **times)
        eventually(lambda: len(self.offering()) > before, seconds=120, why=self.scene.place.told)
        return worker

    def offering(self) -> list[str]:
        """The workers that offer clusters now."""
        rows = self.scene.place.query("SELECT id, capabilities FROM worker")
        return [row["id"] for row in rows if self._can(json.loads(row["capabilities"]))]

    def _can(self, capabilities: list[Mapping[str, Any]]) -> bool:
        return any(one["boundary"] == KIND and one["available"] for one in capabilities)

    def submit(self, *commands: str, memory: str = "256MiB", needs: tuple[str, ...] = ()) -> str:
        """A step for each line for the shell. -> the id of the run."""
        steps = [{"name": f"step {n}", "run": ["/bin/sh", "-c", line]} for n, line in enumerate(commands, start=1)]
        run = add_run(
            self.scene.place.store, boundary=KIND, scenario=make_scenario(steps=steps), max_queued=1000,
            controls=make_controls(needs=list(needs), limits={"wall": "600s", "memory": memory}),
        )  # fmt: skip
        self.scene.recorder.add("accepted", run=run.id, tenant="acme", key=None, token=None)
        self.scene.bell.ring(KIND)
        return run.id

    def arm(self, point: Failpoint, action: Action) -> None:
        """The next process that comes there takes it."""
        partial = self.fault.with_suffix(".partial")
        partial.write_text(f"{point}:{action}")
        partial.rename(self.fault)

    def acted(self) -> int:
        """-> the process that took it."""

        def taken() -> int:
            for path in self.fault.parent.glob(f"{self.fault.name}.[0-9]*"):
                path.unlink()
                return int(path.suffix[1:])
            return 0

        return int(eventually(taken, seconds=MADE_WITHIN_S, why=self.scene.place.told))

    def making(self, run: str, fence: int) -> None:
        """Until kind is at work on the cluster of this fence, and its container is there."""
        name = boundary(run, fence)
        eventually(
            lambda: self.makers(name) and docker(self.engine, "ps", "--quiet", f"--filter=name=^{name}-control-plane$"),
            seconds=MADE_WITHIN_S, why=self.scene.place.told,
        )  # fmt: skip

    def makers(self, name: str) -> list[int]:
        """The processes that make this cluster."""
        mark, found = f"{MARK}={name}.{self.scene.place.installation}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def begun(self, run: str) -> int:
        """Until its step has said so. -> its fence: on a busy machine an attempt to make its cluster may fail."""

        def has() -> bool:
            rows = self.scene.place.query("SELECT run_id, data FROM run_news")
            assert self.scene.row(run)["phase"] != "finished", self.told(run)
            return any(one["run_id"] == run and "begun" in one["data"] for one in rows)

        eventually(has, seconds=MADE_WITHIN_S, why=lambda: self.told(run))
        return int(self.scene.row(run)["fence"])

    def sleeps(self, worker: Program) -> list[int]:
        """All of it is stopped. Not with the database's one write lock in its hands: all others would stop too, which
        is another fault. -> the processes."""
        while True:
            pids = [worker.pid, *worker.pool()]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            with closing(sqlite3.connect(self.scene.place.directory / "blastdoor.db", timeout=1)) as database:
                try:
                    database.execute("BEGIN IMMEDIATE")
                    database.rollback()
                except sqlite3.OperationalError:
                    wake(pids)
                    time.sleep(0.1)
                else:
                    return pids

    def told(self, run: str) -> str:
        """What a failing test needs."""
        found = self.scene.place.store.get_run(run, "acme")
        said = [found.reason, found.message, *((step.outcome, step.failures, step.stdout.text) for step in found.steps)]
        return f"{said}\n{self.scene.place.told()}"

    def left(self) -> dict[str, list[str]]:
        return left(self.engine, self.scene.place.directory / "state")

    def stands(self, name: str) -> None:
        """Its container, network and directory are there: what has to go can be seen."""
        found = self.left()
        assert found["containers"], found
        assert any(one.startswith(f"{name}.") for one in found["networks"]), found
        assert any(one.endswith(name) for one in found["directories"]), found
        assert "I6" in self.scene.wrong_so_far()

    def nothing_stands(self, *, seconds: float = GONE_WITHIN_S) -> None:
        began = time.monotonic()
        eventually(lambda: self.left() == NOTHING, seconds=seconds, why=lambda: (self.left(), self.scene.place.told()))
        print(f"nothing stands after {time.monotonic() - began:.1f} s")

    def finished(self, run: str) -> tuple[str, str | None, int]:
        """Whether or not its cluster is gone. -> outcome, reason, attempts."""
        eventually(lambda: self.scene.row(run)["phase"] == "finished", seconds=MADE_WITHIN_S, why=self.scene.place.told)
        row = self.scene.row(run)
        return row["outcome"], row["reason"], row["attempt"]

    def is_clean(self) -> None:
        """All is settled, every invariant held, and nothing is left by any label."""
        assert self.scene.judged() == []
        assert self.left() == NOTHING

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Which clusters stand is written down, for the judge: never two of one run. A cluster is its network."""
        stop, seen = threading.Event(), list[tuple[str, int]]()

        def look() -> None:
            nonlocal seen
            while not stop.wait(0.5):
                networks = asked(self.engine, "/networks")
                if networks is not None:
                    matches = [match for match in map(_NAME.match, (one["Name"] for one in networks)) if match]
                    live = sorted((f"run_{match[1]}", int(match[2])) for match in matches)
                    if live != seen:
                        seen = live
                        self.scene.recorder.add("world", live=live)

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()


def asked(engine: Engine, where: str) -> Any:
    """What the engine's own API answers; None while it is stopped."""
    with socket.socket(socket.AF_UNIX) as connected, suppress(OSError, HTTPException, ValueError):
        connected.settimeout(10)
        connected.connect(str(EnginePlace(engine.state).socket))
        with closing(HTTPConnection("engine")) as connection:
            connection.sock = connected
            connection.request("GET", where)
            return json.loads(connection.getresponse().read())
    return None


def wake(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def given(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    clusters = settings(engine, tmp_path_factory.mktemp("dedicated"))
    return {**TIMES, **clusters, "BLASTDOOR_BOUNDARIES": '["cluster"]'}


def _forget(engine: Engine) -> None:
    """What a test that failed has left is not the next one's."""
    if containers := docker(engine, "ps", "--all", "--quiet"):
        docker(engine, "rm", "--force", "--volumes", *containers)
    if networks := docker(engine, "network", "ls", "--quiet", "--filter=type=custom"):
        docker(engine, "network", "rm", *networks)


@pytest.fixture
def ground(forks: Forks, engine: Engine, given: Mapping[str, str], tmp_path: Path) -> Iterator[Ground]:
    """No process yet."""
    with open_scene(forks, tmp_path, paper=False, settings=given) as scene:
        ground = Ground(scene, engine)
        with ground.watched():
            yield ground
        ran("boundary", KIND)
    _forget(engine)


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
    f"""for n in $(seq 12); do
  echo '{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"pod-'$n'"}},"spec":{{"containers":['
  echo '{{"name":"main","image":"'$BLASTDOOR_IMAGE'","command":["sleep","600"]}}]}}}}'
done > pods
kubectl create -f pods; for n in $(seq 3); do kubectl get pods; sleep 1; done; kubectl get --raw=/readyz; true""",
)
"""Until etcd takes no more; then pods, for which there is no room then. (The quota of pods: test_own_api_requests.py.)"""


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
    began = time.monotonic()
    engine.stop_docker()
    print(f"stopped after {time.monotonic() - began:.1f} s")
    try:
        assert ground.finished(run) == ("errored", "boundary_lost", fence)
        print(f"errored after {time.monotonic() - began:.1f} s")
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
    print(docker(engine, "ps", "--all", "--format={{.Names}} {{.Status}}"))
    ground.stands(boundary(run, fence))
    scene.place.start("reaper")
    eventually(lambda: not _of(ground.left(), boundary(run, fence)), seconds=60, why=ground.left)
    assert scene.ended(run) == ("errored", "boundary_lost", fence)

    fence = ground.begun(waits)
    with _used(ground, boundary(waits, fence)) as used:
        assert ground.finished(waits) == ("passed", None, fence), ground.told(waits)
    told = _printed(scene, waits)
    print(used, told)
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
    began = time.monotonic()
    docker(ground.engine, *node, "mv", "/etc/kubernetes/manifests/kube-apiserver.yaml", "/root")
    docker(ground.engine, *node, "pkill", "-KILL", "-x", "kube-apiserver")
    assert ground.finished(run) == ("errored", "boundary_lost", fence)
    print(f"errored after {time.monotonic() - began:.1f} s")
    ground.nothing_stands()
    assert scene.ended(run) == ("errored", "boundary_lost", fence)
    ground.is_clean()
