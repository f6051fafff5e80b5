"""What most tests of faults share: an installation that is recorded, runs submitted to it, and the judge at the end."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from service.adapters.celery_queue import CeleryDoorbell
from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.run import Phase
from tests.contract.store_steps import add_run, add_tenant
from tests.factories import NOON, make_controls, make_scenario
from tests.faults.history import judge
from tests.faults.paper import PaperWorld
from tests.faults.place import WITHIN_S, Forks, Place, Program, eventually, run_place
from tests.faults.recorder import Recorder
from tests.sweep import pids_in_cgroups

TRUE = ["true"]


@dataclass
class Scene:
    place: Place
    recorder: Recorder
    bell: CeleryDoorbell = field(init=False)

    def __post_init__(self) -> None:
        self.bell = CeleryDoorbell(self.place.redis.url)

    def submit(self, *commands: Sequence[str], boundary: str = "gvisor", rings: int = 1, **more: Any) -> str:
        """Straight to the database and its doorbell, as the API does it. -> the id of the run."""
        steps = [{"name": f"step {n}", "run": list(command)} for n, command in enumerate(commands or (TRUE,))]
        scenario = make_scenario(steps=steps, **more)
        controls = make_controls(limits={"wall": "60s"})
        run = add_run(self.place.store, boundary=boundary, scenario=scenario, controls=controls, max_queued=1000)
        self.recorder.add("accepted", run=run.id, tenant="acme", key=None, token=None)
        for _ in range(rings):
            self.bell.ring(boundary)
        return run.id

    def abandon(self, phase: Phase, *, site: str) -> str:
        """A run whose worker died in that phase, and its boundary of paper on that site. -> the id of the run."""
        run = self.submit(rings=0)
        claim = self.place.store.claim(
            worker_id="wrk_gone", site=site, boundaries=["gvisor"], runtimes=["default"], lease=timedelta(seconds=1)
        )
        assert claim is not None
        assert claim.run.id == run
        if phase is Phase.RUNNING:
            self.place.store.mark_running(run, claim.fence)
        self.build(run, fence=claim.fence, site=site)
        return run

    def build(self, run: str, *, fence: int, site: str) -> None:
        """A boundary of paper that nobody plays in."""
        ref = BoundaryRef(
            installation=self.place.installation, kind=BoundaryKind.GVISOR, site=site, tenant="acme", run_id=run,
            fence=fence, expires_at=NOON,
        )  # fmt: skip
        PaperWorld(self.place.runtime_dir(site) / self.place.installation / "paper").labels[ref.name] = ref

    def row(self, run: str) -> dict[str, Any]:
        return next(row for row in self.place.rows() if row["id"] == run)

    def until(self, run: str, *phases: str) -> None:
        eventually(lambda: self.row(run)["phase"] in phases, why=self.place.told)

    def ended(self, run: str, *, seconds: float = WITHIN_S) -> tuple[str, str | None, int]:
        """Once what it had is known to be gone. -> outcome, reason, attempts."""

        def over() -> bool:
            row = self.row(run)
            return row["phase"] == "finished" and row["fence"] == row["destroyed_fence"]

        eventually(over, seconds=seconds, why=self.place.told)
        row = self.row(run)
        return row["outcome"], row["reason"], row["attempt"]

    def guests(self) -> set[int]:
        """Every process of every real sandbox."""
        return pids_in_cgroups(self.place.installation)

    def wrong_so_far(self) -> set[str]:
        """The invariants that a judge would miss if everything ended now: what shows that it can."""
        return {violation.invariant for violation in judge(self.recorder.so_far(self.place))}

    def judged(self) -> list[str]:
        """Once all is settled, and no process lives that could still write. -> what did not hold. A relay that nobody
        has started yet comes now: one that runs has a canary played, which may take the fault that was meant for
        another run, and its bell."""
        if not any(program.role == "relay" for program in self.place.programs):
            self.place.start("relay")
        eventually(self.place.settled, seconds=90, why=self.place.told)
        for program in self.place.programs:
            program.ask_to_end()
        for program in self.place.programs:
            program.end()
        self.recorder.conclude(self.place)
        return [str(violation) for violation in judge(self.recorder.entries)]


@contextmanager
def open_scene(forks: Forks, directory: Path, **more: Any) -> Iterator[Scene]:
    """With the tenant `acme`, and no process yet; `more` goes to `run_place`."""
    with (
        run_place(forks, directory, **more) as place,
        Recorder(directory / "history.jsonl") as recorder,
        recorder.watching(place),
    ):
        add_tenant(place.store, concurrent=100, queued=1000)
        yield Scene(place, recorder)


@contextmanager
def paused(*programs: Program) -> Iterator[None]:
    for program in programs:
        program.send(signal.SIGSTOP)
        eventually(lambda program=program: program.stopped)  # type: ignore[misc]
    try:
        yield
    finally:
        for program in programs:
            program.send(signal.SIGCONT)
