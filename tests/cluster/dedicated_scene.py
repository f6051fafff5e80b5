"""What the tests of faults around dedicated clusters share: a scene whose runs have clusters of their own, and a look
at those from the side of the engine."""

import json
import os
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
from tests.cluster.engine.outside import Engine
from tests.cluster.engine.place import Place as EnginePlace
from tests.contract.store_steps import add_run
from tests.factories import make_controls, make_scenario
from tests.faults.place import SCALED, Forks, Program, eventually
from tests.faults.program import FAULT_FILE
from tests.faults.recorder import _NAME
from tests.faults.scene import Scene, open_scene
from tests.summary import ran
from workers.boundaries.cluster.kind_places import MARK

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
        eventually(lambda: self.left() == NOTHING, seconds=seconds, why=lambda: (self.left(), self.scene.place.told()))

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
