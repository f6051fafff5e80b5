"""The fake boundary with its world on disk, so that workers and reapers of one host share it as they share a kernel.

It is put in the registry by `tests.faults.program` alone. Everything that happens in a world is in its journal, in the
order of its lock: what was opened, what stood beside it, what was played, what was closed.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, MutableMapping, MutableSet
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from service.core.boundary import BoundaryKind, BoundaryRef, Capabilities, Execution, Host, StepSpec
from workers.boundaries.fake import FakeBoundary, FakeSandbox, FakeWorld

JOURNAL = "journal.jsonl"
KIND = "PAPER_BOUNDARY"
"""Of the environment: the boundary that a worker offers, `gvisor` when absent; `namespace/w1` has its own queue."""


class PaperWorld(FakeWorld):
    """<runtime_dir>/<installation>/paper/{labels,running}/<name>, and the journal beside them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in ("labels", "running"):
            (home / name).mkdir(parents=True, exist_ok=True)
        super().__init__(labels=_Labels(self), running=_Running(self))  # type: ignore[arg-type]

    @contextmanager
    def journal(self) -> Iterator[Any]:
        """-> write(**entry). Nobody else changes the world meanwhile."""
        with (self.home / JOURNAL).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)

            def write(**entry: Any) -> None:
                file.write(json.dumps({"kind": "boundary", "at": time.time(), "pid": os.getpid()} | entry) + "\n")
                file.flush()

            yield write

    def standing(self) -> list[BoundaryRef]:
        found = []
        for path in sorted((self.home / "labels").iterdir()):
            with suppress(FileNotFoundError):  # gone while we looked
                found.append(BoundaryRef.model_validate_json(path.read_text()))
        return found


class _Labels(MutableMapping[str, BoundaryRef]):
    """What exists. A label appears and goes under the journal's lock; its end is written down before it goes, so that
    a process which dies in between leaves a boundary that stands, never one that the journal takes for open."""

    def __init__(self, world: PaperWorld) -> None:
        self._world, self._directory = world, world.home / "labels"

    def __getitem__(self, name: str) -> BoundaryRef:
        try:
            return BoundaryRef.model_validate_json((self._directory / name).read_text())
        except FileNotFoundError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, ref: BoundaryRef) -> None:
        with self._world.journal() as write:
            beside = [one.fence for one in self._world.standing() if one.run_id == ref.run_id]
            partial = self._directory.parent / f".{name}"
            partial.write_text(ref.model_dump_json())
            partial.rename(self._directory / name)
            write(what="opened", run=ref.run_id, fence=ref.fence, beside=beside)

    def __delitem__(self, name: str) -> None:
        with self._world.journal() as write:
            ref = self[name]
            write(what="closed", run=ref.run_id, fence=ref.fence)
            (self._directory / name).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.name for path in self._directory.iterdir()))

    def __len__(self) -> int:
        return sum(1 for _ in self._directory.iterdir())

    def values(self) -> Any:
        return self._world.standing()


class _Running(MutableSet[str]):
    def __init__(self, world: PaperWorld) -> None:
        self._directory = world.home / "running"

    def __contains__(self, name: object) -> bool:
        return (self._directory / str(name)).exists()

    def add(self, value: str) -> None:
        (self._directory / value).touch()

    def discard(self, value: str) -> None:
        (self._directory / value).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.name for path in self._directory.iterdir()))

    def __len__(self) -> int:
        return sum(1 for _ in self._directory.iterdir())


class PaperSandbox(FakeSandbox):
    """Understands in addition what a real guest does by the same words: `printf TEXT`, `true`."""

    def _play(self, step: StepSpec) -> Execution:
        ref, world = self._guest.ref, self._world
        assert isinstance(world, PaperWorld)
        with world.journal() as write:
            write(what="played", run=ref.run_id, fence=ref.fence, n=step.n)
        word = {"printf": "print", "true": "exit"}.get(step.argv[0], step.argv[0])
        execution = super()._play(step.model_copy(update={"argv": (word, *(step.argv[1:] or ("0",)))}))
        # A guest that was destroyed while it slept has no result.
        if ref.name not in world.running:
            return execution.model_copy(update={"ended": "lost", "exit_code": None, "sandbox_alive": False})
        return execution


class PaperBoundary(FakeBoundary):
    @classmethod
    def for_host(cls, host: Host) -> "PaperBoundary":
        home = host.runtime_dir / host.installation / "paper"
        return cls(installation=host.installation, site=host.site, world=PaperWorld(home), sleep=time.sleep)

    @property
    def offered(self) -> str:
        return os.environ.get(KIND, "gvisor")

    @property
    def kind(self) -> BoundaryKind:
        return BoundaryKind(self.offered.partition("/")[0])

    def probe(self) -> tuple[Capabilities, ...]:
        (row,) = super().probe()
        return (row.model_copy(update={"boundary": self.offered}),)

    def _sandbox(self, guest: Any) -> PaperSandbox:
        return PaperSandbox(guest, self.world)
