"""Faults around runs in pods: a worker that dies, sleeps or fails at each step of the line, and an API server that
stands still or drops every connection. Real processes, a real cluster. What shows that a check can fail: the same look
while no reaper runs."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.core.boundary import BoundaryRef
from service.core.failpoints import Action, Failpoint
from tests.cluster.lab.outside import Lab
from tests.cluster.namespaces import NamespaceKind, Site, sweep
from tests.contract.store_steps import add_run
from tests.factories import make_controls, make_scenario
from tests.faults.conftest import forks
from tests.faults.place import SCALED, Forks, eventually
from tests.faults.proxy import Proxy
from tests.faults.recorder import _NAME, LOOK_S
from tests.faults.scene import Scene, open_scene
from tests.faults.test_failpoints import Case, Lane, expected
from workers.boundaries.namespace.driver import NamespaceBoundary
from workers.kube import ClusterError

__all__ = ["forks"]

GONE_WITHIN_S = 15.0
AWAY_S = 30.0
SOFT, HARD = "namespace/runc", "namespace/gvisor"
LOST = ("errored", "worker_lost", 1)
KILLED_AT = [
    Failpoint.CLAIM_AFTER, Failpoint.OPEN_BEFORE_CREATE, Failpoint.OPEN_HALF_CREATED, Failpoint.OPEN_CREATED,
    Failpoint.UPLOAD_AFTER, Failpoint.RUNNING_AFTER, Failpoint.STEP_AFTER, Failpoint.COLLECT_BEFORE,
    Failpoint.COLLECT_AFTER, Failpoint.FINISH_BEFORE, Failpoint.FINISH_AFTER, Failpoint.DESTROY_BEFORE,
    Failpoint.DESTROY_AFTER,
]  # fmt: skip
"""Everything that the line and the driver reach; half of it on each variant. `test_namespace_wall.py` has a worker die
while it opens a pod of each."""
SLEPT_AT = [Failpoint.OPEN_BEFORE_CREATE, Failpoint.OPEN_CREATED, Failpoint.RUNNING_AFTER, Failpoint.FINISH_BEFORE]

pytestmark = pytest.mark.timeout(600)


class Ground:
    """A scene whose runs are pods of a cluster, and a look at that from the administrator's side."""

    def __init__(self, scene: Scene, site: Site) -> None:
        self.scene, self.site = scene, site
        self._boundary = NamespaceBoundary(site.host(installation=scene.place.installation))
        self._kinds = {variant: NamespaceKind(self._boundary, variant) for variant in ("runc", "gvisor")}

    def stands(self) -> list[str]:
        """Every namespace and pod that carries a run's label, whoever made it."""
        mine = {"blastdoor.dev/installation": self.scene.place.installation}
        found = [one for kind in ("Namespace", "Pod") for one in self.site.ready.admin.list(kind, labels=mine)]
        return [
            f"{one['kind']} {one['metadata']['name']}"
            for one in found
            if one["metadata"]["labels"].get("blastdoor.dev/run") and not one["metadata"]["name"].endswith("-f0")
        ]

    def refs(self) -> list[BoundaryRef]:
        """All of them are of one tenant, whose name is nowhere in the cluster."""
        return [ref.model_copy(update={"tenant": "acme"}) for ref in self._boundary.discover() if ref.fence]

    def playing(self) -> set[str]:
        """The runs of whose guests anything runs."""
        return {ref.run_id for ref in self.refs() if self._kinds[ref.variant].running(ref)}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Which boundaries stand is written down, for the judge: never two of one run. A run in a namespace of its own
        is its namespace, any other its pod; one list is one instant."""
        stop, seen = threading.Event(), dict[str, list[tuple[str, int]]]()

        def look() -> None:
            while not stop.wait(LOOK_S * 3):
                for kind in ("Namespace", "Pod"):
                    mine = {"blastdoor.dev/installation": self.scene.place.installation}
                    try:
                        names = [one["metadata"]["name"] for one in self.site.ready.admin.list(kind, labels=mine)]
                    except ClusterError:
                        continue
                    matches = [match for match in map(_NAME.fullmatch, names) if match and match[2] != "0"]
                    live = sorted((f"run_{match[1]}", int(match[2])) for match in matches)
                    if live != seen.get(kind):
                        seen[kind] = live
                        self.scene.recorder.add("world", live=live)

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()

    def is_clean(self) -> None:
        """All is settled, every invariant held, and nothing is left by any label."""
        assert self.scene.judged() == []
        assert sweep(self._boundary, self.site.ready) == []

    def close(self) -> None:
        sweep(self._boundary, self.site.ready)


@pytest.fixture
def ground(forks: Forks, tmp_path: Path, site: Site) -> Iterator[Ground]:
    """No process yet."""
    settings = SCALED | {
        "BLASTDOOR_BOUNDARIES": '["namespace"]',
        "BLASTDOOR_KUBECONFIG": str(site.ready.engine_kubeconfig),
        "BLASTDOOR_KUBE_IMAGE": site.image,
        "BLASTDOOR_PROBE_S": "60",
    }
    with open_scene(forks, tmp_path, paper=False, settings=settings) as scene:
        ground = Ground(scene, site)
        with ground.watched():
            yield ground
    ground.close()


def only(boundary: str) -> dict[str, str]:
    return {"BLASTDOOR_NAMESPACE_VARIANTS": f'["{boundary.partition("/")[2]}"]'}


def lane(ground: Ground, boundary: str) -> Lane:
    scene, name = ground.scene, boundary.replace("/", "-")
    return Lane(
        scene.place, scene.recorder, name, boundary=boundary, BLASTDOOR_WORKER_CONCURRENCY="2", **only(boundary)
    )


def has_probed(scene: Scene, workers: int = 1) -> None:
    """A canary passes the same failpoints."""
    eventually(lambda: len(scene.place.query("SELECT id FROM worker")) >= workers, seconds=120, why=scene.place.told)


def test_d44_a_killed_child_and_a_killed_worker_leave_no_guest_that_runs_and_their_runs_end_once(
    ground: Ground,
) -> None:
    scene = ground.scene
    worker = scene.place.start("worker", BLASTDOOR_WORKER_CONCURRENCY="2")
    has_probed(scene)
    runs = {scene.submit(["sleep", "60"], boundary=boundary) for boundary in (SOFT, HARD)}
    for run in runs:
        scene.until(run, "running")
    eventually(lambda: ground.playing() == runs, why=scene.place.told)

    os.kill(worker.pool()[0], signal.SIGKILL)
    eventually(lambda: len(ground.playing()) < 2, seconds=GONE_WITHIN_S, why=scene.place.told)
    assert len(ground.playing()) == 1, "the other child's goes on"
    worker.send(signal.SIGKILL)
    eventually(lambda: not ground.playing(), seconds=GONE_WITHIN_S, why=scene.place.told)

    assert len(ground.refs()) == 2, "nobody has cleaned up yet, and that must show"
    assert scene.wrong_so_far() >= {"I1", "I6"}
    scene.place.start("reaper")
    assert [scene.ended(run) for run in runs] == [LOST, LOST]
    assert ground.stands() == []
    ground.is_clean()


def test_d45_d46_a_worker_that_dies_sleeps_or_fails_at_any_step_leaves_nothing_and_its_run_ends_once(
    ground: Ground,
) -> None:
    scene = ground.scene
    soft, hard = lane(ground, SOFT), lane(ground, HARD)
    has_probed(scene, workers=2)
    first = Case(Failpoint.OPEN_CREATED, Action.EXIT)
    hard.begin(first)
    assert len(ground.refs()) == 1, "what stands there must show, until a reaper comes"
    assert scene.wrong_so_far() >= {"I1", "I6"}
    scene.place.start("reaper")
    hard.see_through(first)

    killed = [Case(point, Action.EXIT) for point in KILLED_AT]
    more = [Case(point, Action.STOP) for point in SLEPT_AT] + [Case(Failpoint.OPEN_HALF_CREATED, Action.RAISE)]
    on_hard, on_soft = [*killed[::2], *more[::2]], [*killed[1::2], *more[1::2]]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(hard.play, on_hard), pool.submit(soft.play, on_soft)]:
            done.result()

    for case in (first, *on_hard, *on_soft):
        assert scene.ended(case.run) in expected(case.point, case.action), (case, scene.place.told())
        told = scene.place.types_told(case.run)
        assert told.count("run.finished") == 1, (case, told)
        assert told.count("boundary.destroyed") == told.count("run.provisioning"), (case, told)
    stale = {entry["what"] for entry in _writes(ground) if not entry["accepted"]}
    assert {"mark_running", "finish"} <= stale, "woken, they have tried"
    assert ground.stands() == []
    ground.is_clean()


def _writes(ground: Ground) -> list[dict[str, Any]]:
    """What workers have tried to write by now."""
    return [entry for entry in ground.scene.recorder.so_far(ground.scene.place) if entry["kind"] == "write"]


@contextmanager
def standing_still(lab: Lab) -> Iterator[None]:
    server = lab.pid("kube-apiserver")
    os.kill(server, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server, signal.SIGCONT)


def _say_begun(*commands: str) -> Sequence[str]:
    return ["/bin/sh", "-c", f"echo begun; {'; '.join(commands)}"]


def _has_begun(scene: Scene, run: str) -> bool:
    rows = scene.place.query("SELECT run_id, data FROM run_news")
    return any(row["run_id"] == run and "begun" in row["data"] for row in rows)


def test_an_api_server_that_stands_still_for_half_a_minute_makes_no_verdict_wrong(ground: Ground) -> None:
    if ground.site.lab is None:
        pytest.skip("only a lab can be broken on purpose")
    scene = ground.scene
    for role in ("worker", "reaper"):
        scene.place.start(role, BLASTDOOR_WORKER_CONCURRENCY="4")
    has_probed(scene)
    ends_well = _submit(scene, HARD, _say_begun("sleep 4"), timeout="15s")
    ends_badly = _submit(scene, SOFT, _say_begun("sleep 4", "exit 3"), timeout="15s")
    goes_on = _submit(scene, HARD, _say_begun("sleep 300"), timeout="8s")
    for run in (ends_well, ends_badly, goes_on):
        eventually(lambda run=run: _has_begun(scene, run), why=scene.place.told)  # type: ignore[misc]
    is_made = scene.submit(boundary=SOFT)

    scene.until(is_made, "provisioning", "running", "collecting", "finished")
    with standing_still(ground.site.lab):
        time.sleep(AWAY_S)

    assert scene.ended(ends_well) == ("passed", None, 1), "it took four seconds of its fifteen"
    assert scene.ended(ends_badly) == ("failed", "exit_code", 1)
    assert scene.ended(goes_on) == ("timed_out", "step_timeout", 1)
    outcome, reason, _ = scene.ended(is_made)
    assert (outcome, reason) in (("passed", None), ("errored", "boundary_lost")), "its step had hardly begun"
    assert ground.stands() == []
    ground.is_clean()


def _submit(scene: Scene, boundary: str, command: Sequence[str], *, timeout: str) -> str:
    """One step that may take so long. -> the id of the run."""
    scenario = make_scenario(steps=[{"name": "only", "run": list(command), "timeout": timeout}])
    controls = make_controls(limits={"wall": "120s"})
    run = add_run(scene.place.store, boundary=boundary, scenario=scenario, controls=controls)
    scene.recorder.add("accepted", run=run.id, tenant="acme", key=None, token=None)
    scene.bell.ring(boundary)
    return run.id


def test_a_connection_that_breaks_ends_the_guest_and_errs_the_run(ground: Ground) -> None:
    """As when an API server is killed, and another takes its place: what was said of a step is lost, and its guest is
    not left alone."""
    scene, kubeconfig = ground.scene, ground.site.ready.engine_kubeconfig
    port = int(ground.site.ready.engine.server.rpartition(":")[2])
    with Proxy(port) as proxy:
        theirs = scene.place.directory / "by-proxy.kubeconfig"
        theirs.touch(mode=0o600)
        theirs.write_text(kubeconfig.read_text().replace(f":{port}", f":{proxy.port}"))
        scene.place.start("worker", BLASTDOOR_KUBECONFIG=str(theirs), BLASTDOOR_WORKER_CONCURRENCY="2")
        scene.place.start("reaper")
        has_probed(scene)
        runs = [scene.submit(_say_begun("sleep 60"), boundary=boundary) for boundary in (SOFT, HARD)]
        for run in runs:
            eventually(lambda run=run: _has_begun(scene, run), why=scene.place.told)  # type: ignore[misc]
        assert ground.playing() == set(runs)
        with proxy.cut():
            time.sleep(1)

        eventually(lambda: not ground.playing(), seconds=GONE_WITHIN_S, why=scene.place.told)
        assert [scene.ended(run) for run in runs] == [("errored", "boundary_lost", 1)] * 2
        assert scene.ended(scene.submit(boundary=SOFT)) == ("passed", None, 1)
        assert ground.stands() == []
        ground.is_clean()
