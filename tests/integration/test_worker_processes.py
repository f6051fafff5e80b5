"""Real workers and reapers, as processes, killed, stopped and restarted while real sandboxes run.

Runs are submitted straight to the database and its doorbell, as the API does it. Times are scaled down: a lease of 3 s.
Whatever happens, each run has one terminal event, and after each test nothing of the installation is left.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from service.adapters.blobs import FileBlobs
from service.adapters.celery_queue import CeleryDoorbell
from service.adapters.sql_store import SqlStore
from service.core.ports.tenants import WorkerRecord
from service.core.run import Outcome, Phase, Reason, Run
from service.core.scenario import Scenario
from tests.contract.store_steps import add_run, add_tenant, told, types_told
from tests.factories import make_controls, make_scenario
from tests.sandboxes import require_gvisor
from tests.servers import PostgresServer, RedisServer, run_redis
from tests.summary import ran
from tests.sweep import pids_in_cgroups, swept
from workers.boundaries.gvisor.driver import GvisorBoundary, GvisorHost
from workers.runtimes.store import RuntimeStore

ROOT = Path(__file__).parents[2]
WITHIN_S = 60.0
LEASE_S, GONE_WITHIN_S = 3.0, 5.0
SLOW_S = 3.0
"""What a busy machine adds between the guest's end and the written result."""
QUEUE = "boundary.gvisor"
SCALED = {
    "BLASTDOOR_ENVIRONMENT": "test",
    "BLASTDOOR_WORKER_CONCURRENCY": "1",
    "BLASTDOOR_LEASE_S": str(LEASE_S),
    "BLASTDOOR_HEARTBEAT_S": "0.5",
    "BLASTDOOR_SELF_FENCE_S": "2",
    "BLASTDOOR_CANCEL_POLL_S": "0.2",
    "BLASTDOOR_RING_AFTER_S": "1",
    "BLASTDOOR_HOUSEKEEPING_S": "0.5",
    "BLASTDOOR_PROBE_S": "1",
}
WHOLE_LIFE = ["run.queued", "run.provisioning", "run.running", "run.collecting", "run.finished", "boundary.destroyed"]

pytestmark = pytest.mark.timeout(240)


def eventually(true: Callable[[], Any], *, seconds: float = WITHIN_S, why: Callable[[], object] = lambda: "") -> float:
    """-> the seconds it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {why()}"
        time.sleep(0.05)
    return time.monotonic() - began


class Process:
    """`python -m workers ROLE`. Whatever becomes of pytest, it is killed with it."""

    def __init__(self, role: str, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "workers", role],
                cwd=ROOT,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def id(self) -> str:
        """As its row has it."""
        lines = [json.loads(line) for line in self.said().splitlines() if '"worker starts"' in line]
        return str(lines[0]["worker"])

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def said(self) -> str:
        return self.log.read_text()

    def events(self) -> list[str]:
        lines = [line for line in self.said().splitlines() if line.startswith("{")]
        return [str(json.loads(line).get("event")) for line in lines]

    def family(self) -> list[int]:
        """All its descendants."""
        found, todo = [], [self.pid]
        while todo:
            pid = todo.pop()
            with suppress(OSError):
                children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
                found += children
                todo += children
        return found

    def pool(self) -> list[int]:
        """The children that play runs: forks of the parent, by the parent's own command line."""
        own = _cmdline(self.pid)
        with suppress(OSError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            return [int(word) for word in children if _cmdline(int(word)) == own]
        return []

    def stop(self, number: signal.Signals = signal.SIGTERM, *, seconds: float = 40.0) -> int:
        if self.running:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.send_signal(number)
            try:
                self.popen.wait(seconds)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        return int(self.popen.returncode)


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@dataclass
class Site:
    """One installation on this host: its database, Redis, and the processes that a test starts."""

    store: SqlStore
    blobs: FileBlobs
    doorbell: CeleryDoorbell
    redis: redis.Redis
    directory: Path
    environment: dict[str, str]
    processes: list[Process] = field(default_factory=list)
    _shared: dict[str, Process] = field(default_factory=dict)

    @property
    def installation(self) -> str:
        return self.store.installation_id()

    @property
    def runtime_dir(self) -> Path:
        return self.directory / "run"

    @property
    def worker(self) -> Process:
        """One that tests share for as long as they leave it alive."""
        return self._kept("worker")

    @property
    def reaper(self) -> Process:
        return self._kept("reaper")

    def _kept(self, role: str) -> Process:
        if role not in self._shared or not self._shared[role].running:
            self._shared[role] = self.start(role)
        return self._shared[role]

    def start(self, role: str, **environment: str) -> Process:
        log = self.directory / f"{role}-{len(self.processes)}.log"
        process = Process(role, self.environment | environment, log)
        self.processes.append(process)
        return process

    def submit(self, scenario: Scenario, *, ring: bool = True, **more: Any) -> Run:
        run = add_run(self.store, scenario=scenario, controls=make_controls(limits={"wall": "60s"}), **more)
        if ring:
            self.doorbell.ring("gvisor")
        return run

    def shown(self, run: Run) -> Run:
        return self.store.get_run(run.id, None)

    def wait(self, run: Run, *, until: Phase = Phase.FINISHED, seconds: float = WITHIN_S) -> Run:
        eventually(lambda: self.shown(run).phase is until, seconds=seconds, why=self.told)
        return self.shown(run)

    def wait_destroyed(self, run: Run) -> Run:
        eventually(lambda: self.shown(run).boundary_destroyed_at is not None, why=self.told)
        return self.shown(run)

    def told(self) -> str:
        """What a failing test needs."""
        return "\n".join(f"--- {process.log.name}\n{process.said()[-6000:]}" for process in self.processes)

    def guests(self) -> set[int]:
        """Every process of every sandbox."""
        return pids_in_cgroups(self.installation)

    def left(self) -> list[str]:
        """What has the installation's mark on this machine, when nothing more goes away."""
        found = [str(one) for one in swept(self.installation, within_s=10)]
        home = self.runtime_dir / self.installation
        return found + [f"directory {place}" for place in (home.iterdir() if home.is_dir() else ())]

    def workers(self) -> list[WorkerRecord]:
        return list(self.store.live_workers(fresh=timedelta(seconds=90)))

    @contextmanager
    def paused(self, process: Process) -> Iterator[None]:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process.pid, signal.SIGCONT)


def _environment(directory: Path, database: str, server: RedisServer) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "BLASTDOOR_STATE_DIR": str(directory / "state"),
        "BLASTDOOR_RUNTIME_DIR": str(directory / "run"),
        "BLASTDOOR_DATABASE_URL": database,
        "BLASTDOOR_REDIS_URL": server.url,
        "BLASTDOOR_SITE": "here",
        **SCALED,
    }


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def installed(request: pytest.FixtureRequest) -> Iterator[Site]:
    require_gvisor()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bd-site-")))
        server = stack.enter_context(run_redis())
        if request.param == "sqlite":
            database = f"sqlite:///{directory / 'blastdoor.db'}"
        else:
            postgres: PostgresServer = request.getfixturevalue("postgres_server")
            database = stack.enter_context(postgres.fresh_database())
        store = SqlStore(database)
        store.migrate()
        add_tenant(store, concurrent=5)
        client = stack.enter_context(redis.Redis.from_url(server.url))
        environment = _environment(directory, database, server)
        blobs = FileBlobs(directory / "state")
        site = Site(store, blobs, CeleryDoorbell(server.url), client, directory, environment)
        try:
            yield site
        finally:
            for process in site.processes:
                process.stop()
            _clear(site)
            store.close()
        assert swept(str(directory), within_s=10) == [], "processes of ours are left"


def _clear(site: Site) -> None:
    """Also after a test that failed: nothing of ours stays on this machine."""
    boundary = GvisorBoundary(
        GvisorHost(
            installation=site.installation,
            site="here",
            runtime_dir=site.runtime_dir,
            runtimes=RuntimeStore(site.directory / "state" / "runtimes"),
        )
    )
    for ref in boundary.discover():
        boundary.destroy(ref)
    boundary.close()
    shutil.rmtree(site.runtime_dir / site.installation, ignore_errors=True)


@pytest.fixture
def site(installed: Site, request: pytest.FixtureRequest) -> Iterator[Site]:
    """Afterwards: every run ended once, its boundary is known to be gone, and nothing is left of it here."""
    ran("database", "sqlite" if "sqlite" in request.node.name else "postgresql")
    require_gvisor()
    yield installed
    runs = installed.store.list_runs(None, phase=None, outcome=None, limit=100, before=None).items
    for run in runs:
        installed.wait(run)
        installed.wait_destroyed(run)
        types = types_told(installed.store, run.id)
        assert types.count("run.finished") == 1, types
        assert types.count("boundary.destroyed") == types.count("run.provisioning"), types
    assert installed.left() == []


def sleeps(seconds: float = 60.0) -> Scenario:
    """Ignores what can be ignored, and leaves a child."""
    return make_scenario(run=f"trap '' TERM INT HUP; sleep {seconds:g} & sleep {seconds:g}")


def steps(*commands: str, **more: Any) -> Scenario:
    return make_scenario(steps=[{"name": f"step {n}", "run": command} for n, command in enumerate(commands)], **more)


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


# --- a worker that lives ---------------------------------------------------------------------------------------------


def test_a_run_passes_and_its_artifact_is_stored(site: Site) -> None:
    assert site.worker.running
    run = site.submit(steps("echo 42 > report", "cat report; id -u", artifacts=["report"]))

    done = site.wait(run)

    assert (done.outcome, done.reason) == (Outcome.PASSED, None), site.told()
    assert done.steps[1].stdout.text == "42\n65532\n"
    assert done.evidence is not None
    assert done.evidence["network"] == "none"
    (artifact,) = done.artifacts
    assert site.blobs.path("acme", f"sha256:{artifact.sha256}").read_bytes() == b"42\n"
    site.wait_destroyed(run)
    assert types_told(site.store, run.id) == WHOLE_LIFE
    assert [event["sequence"] for event in told(site.store, run.id)] == sorted(
        event["sequence"] for event in told(site.store, run.id)
    )


def test_the_workers_row_says_where_it_is_and_what_it_can_build(site: Site) -> None:
    worker = site.worker
    assert _next_run_passes(site)

    (row,) = (row for row in site.workers() if row.id == worker.id)

    (gvisor,) = row.capabilities
    assert row.site == "here"
    assert (gvisor.boundary, gvisor.available, gvisor.missing) == ("gvisor", True, ())
    assert "default" in gvisor.runtimes
    assert gvisor.versions["runsc"]
    eventually(lambda: row not in site.workers(), why=lambda: "it is not measured again")


def test_a_cancellation_ends_a_running_guest_within_two_seconds(site: Site) -> None:
    assert site.worker.running
    run = site.submit(sleeps())
    site.wait(run, until=Phase.RUNNING)

    site.store.request_cancel(run.id, None, by="tenant")

    assert eventually(lambda: site.shown(run).phase is Phase.FINISHED, seconds=10) < 2.0 + SLOW_S
    assert site.shown(run).reason is Reason.CANCELLED_BY_TENANT


def test_a_runtime_that_an_operator_adds_is_offered_without_a_restart(site: Site) -> None:
    worker = site.worker
    runtimes = RuntimeStore(site.directory / "state" / "runtimes")
    tree = runtimes.scratch() / "rootfs"
    tree.mkdir()
    name = f"added-{len(site.processes)}"

    runtimes.install(name, digest="sha256:" + "0" * 64, rootfs=tree)
    tree.parent.rmdir()
    eventually(lambda: any(name in row.capabilities[0].runtimes for row in site.workers()), why=site.told)
    run = site.submit(steps("true", runtime=name))

    done = site.wait(run, seconds=20)
    assert done.steps[0].failures[0].actual is not None, "it was played, in a tree that has no shell"
    assert (done.outcome, done.reason) == (Outcome.FAILED, Reason.EXIT_CODE)
    assert worker.running


# --- processes that are killed ---------------------------------------------------------------------------------------


def test_a_killed_child_takes_its_sandbox_along_and_its_run_ends_worker_lost(site: Site) -> None:
    worker, reaper = site.worker, site.reaper
    run = site.submit(sleeps())
    site.wait(run, until=Phase.RUNNING)
    eventually(lambda: site.guests(), why=site.told)
    (child,) = worker.pool()

    with site.paused(reaper):  # so that it is the supervising parent who ends the guest
        os.kill(child, signal.SIGKILL)
        assert eventually(lambda: not site.guests(), seconds=20) < GONE_WITHIN_S
        assert site.shown(run).phase is Phase.RUNNING, "nobody has said yet what became of it"

    done = site.wait(run)
    assert (done.outcome, done.reason) == (Outcome.ERRORED, Reason.WORKER_LOST)
    site.wait_destroyed(run)
    assert types_told(site.store, run.id) == [*WHOLE_LIFE[:3], *WHOLE_LIFE[4:]]
    assert _next_run_passes(site)
    assert worker.running


def test_a_guest_whose_worker_lives_is_not_ended(site: Site) -> None:
    """The positive control: for longer than any lease, a sandbox stands because somebody renews it."""
    assert site.worker.running
    assert site.reaper.running
    run = site.submit(steps(f"sleep {LEASE_S + 2}"))

    site.wait(run, until=Phase.RUNNING)
    eventually(lambda: site.guests(), why=site.told)

    assert site.wait(run).outcome is Outcome.PASSED, site.told()


def test_a_killed_worker_takes_its_sandbox_along_and_its_run_ends_worker_lost(site: Site) -> None:
    worker, reaper = site.worker, site.reaper
    run = site.submit(sleeps())
    site.wait(run, until=Phase.RUNNING)
    eventually(lambda: site.guests(), why=site.told)
    family = worker.family()

    with site.paused(reaper):
        worker.popen.kill()
        assert eventually(lambda: not site.guests(), seconds=20) < GONE_WITHIN_S
    worker.popen.wait()

    assert site.wait(run).reason is Reason.WORKER_LOST
    site.wait_destroyed(run)
    eventually(lambda: gone(family), seconds=10, why=lambda: [(pid, _cmdline(pid)) for pid in family])
    assert _next_run_passes(site), "a new worker takes over"


def test_a_worker_that_sleeps_through_its_lease_writes_nothing_when_it_wakes(site: Site) -> None:
    worker = site.worker
    assert site.reaper.running
    run = site.submit(steps("sleep 2", "echo late"))
    site.wait(run, until=Phase.RUNNING)
    (child,) = worker.pool()

    os.kill(child, signal.SIGSTOP)
    try:
        done = site.wait(run)
        assert (done.outcome, done.reason) == (Outcome.ERRORED, Reason.WORKER_LOST)
        eventually(lambda: not site.guests(), why=site.told)  # by the reaper; the worker still holds its files
    finally:
        os.kill(child, signal.SIGCONT)

    assert _next_run_passes(site), "it is the same child that plays it"
    assert worker.pool() == [child]
    site.wait_destroyed(run)
    assert types_told(site.store, run.id) == [*WHOLE_LIFE[:3], *WHOLE_LIFE[4:]]
    assert (site.shown(run).reason, site.shown(run).steps) == (Reason.WORKER_LOST, ())
    assert any(event.startswith("lease lost") for event in worker.events()), site.told()


# --- messages that are lost ------------------------------------------------------------------------------------------


def test_a_run_whose_message_was_lost_is_rung_for_again(site: Site) -> None:
    reaper = site.reaper
    with site.paused(reaper):
        site.worker.stop()
        run = site.submit(steps("true"))
        assert site.redis.lpop(QUEUE) is not None
        worker = site.worker
        eventually(lambda: "worker starts" in worker.events(), why=site.told)
        time.sleep(3)
        assert site.shown(run).phase is Phase.QUEUED, "nobody has told the worker"

    assert site.wait(run).outcome is Outcome.PASSED, site.told()


def test_a_flushed_redis_loses_no_run(site: Site) -> None:
    assert site.worker.running
    assert site.reaper.running
    playing = site.submit(steps("sleep 2"))
    site.wait(playing, until=Phase.RUNNING)
    waiting = [site.submit(steps("true")) for _ in range(2)]

    site.redis.flushall()

    assert site.wait(playing).outcome is Outcome.PASSED
    assert [site.wait(run).outcome for run in waiting] == [Outcome.PASSED] * 2, site.told()


# --- workers that are told to stop -----------------------------------------------------------------------------------


def test_an_idle_worker_stops_at_once_and_is_no_longer_counted_on(site: Site) -> None:
    worker = site.worker
    assert _next_run_passes(site)
    assert worker.id in {row.id for row in site.workers()}
    family = worker.family()
    began = time.monotonic()

    worker.popen.send_signal(signal.SIGTERM)
    worker.popen.wait(30)

    assert time.monotonic() - began < 5.0, site.told()
    assert worker.id not in {row.id for row in site.workers()}, "it has said goodbye"
    eventually(lambda: gone(family), seconds=5, why=lambda: [(pid, _cmdline(pid)) for pid in family])


def test_a_worker_that_is_told_to_stop_lets_its_run_end_and_then_stops_at_once(site: Site) -> None:
    worker = site.worker
    assert site.reaper.running
    run = site.submit(steps("sleep 3", "echo done"))
    waits = site.submit(steps("true"))
    site.wait(run, until=Phase.RUNNING)

    worker.popen.send_signal(signal.SIGTERM)
    eventually(lambda: not worker.running, seconds=40, why=site.told)
    stopped = datetime.now(UTC)

    done = site.shown(run)
    assert (done.phase, done.outcome) == (Phase.FINISHED, Outcome.PASSED), site.told()
    assert done.boundary_destroyed_at is not None
    assert types_told(site.store, run.id) == WHOLE_LIFE
    took = stopped - done.boundary_destroyed_at
    assert timedelta(0) < took < timedelta(seconds=GONE_WITHIN_S), f"as soon as its run has ended: {took}"
    assert site.shown(waits).phase is Phase.QUEUED, "nothing new was begun"
    assert worker.id not in {row.id for row in site.workers()}
    assert site.worker is not worker
    assert site.wait(waits).outcome is Outcome.PASSED, "the next worker plays it"


def test_a_worker_that_is_told_twice_drops_its_run_and_leaves_nothing_standing(site: Site) -> None:
    worker = site.worker
    assert site.reaper.running
    run = site.submit(sleeps())
    site.wait(run, until=Phase.RUNNING)
    eventually(lambda: site.guests(), why=site.told)

    worker.popen.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert site.guests(), "told once, it lets the run go on"
    worker.popen.send_signal(signal.SIGTERM)
    eventually(lambda: not worker.running, seconds=20, why=site.told)

    eventually(lambda: not site.guests(), seconds=GONE_WITHIN_S, why=site.told)
    assert site.wait(run).reason is Reason.WORKER_LOST


def test_a_reaper_that_is_told_to_stop_looks_once_more_and_ends(site: Site) -> None:
    reaper = site.start("reaper")
    eventually(lambda: "reaper starts" in reaper.events(), why=site.told)

    assert reaper.stop(seconds=10) == 0


# --- hosts that can build nothing ------------------------------------------------------------------------------------


def test_a_worker_without_a_runtime_says_why_and_does_not_start(site: Site) -> None:
    worker = site.start("worker", BLASTDOOR_RUNSC="/nonexistent/runsc")

    assert worker.popen.wait(60) == 3

    (said,) = (json.loads(line) for line in worker.said().splitlines() if "cannot build a boundary" in line)
    assert "/nonexistent/runsc" in said["missing"][0]
    assert "this host can build no boundary; run `blastdoor doctor`" in worker.events()
    unable = [row for row in site.workers() if not row.capabilities[0].available]
    assert [row.capabilities[0].boundary for row in unable] == ["gvisor"]
    assert "/nonexistent/runsc" in unable[0].capabilities[0].missing[0]
    site.store.forget_worker(unable[0].id)


def _next_run_passes(site: Site) -> bool:
    assert site.worker.running
    return site.wait(site.submit(steps("true"))).outcome is Outcome.PASSED
