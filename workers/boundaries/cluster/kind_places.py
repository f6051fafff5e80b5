"""Where a kind cluster's things are on this host, by names alone: any process that knows the reference can find them.

<state>/clusters/<name>/       0700, ours; the network is made before it, and removed after it
    ref.json                   who and what this is, as on the network's labels
    kind.yaml                  what kind was told
    kubeconfig                 0600, of the cluster's administrator
    standby.json               of an unused cluster: it is ready to be claimed
    claimed.json               whose it has become: of one run, for good
<state>/home/                  empty: the home of kind and docker
<state>/*.lock                 held while clusters are counted, and by whoever keeps the standby clusters
<state>/counts/                how often something happened, a byte for each time
"""

import fcntl
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from service.core.boundary import BoundaryRef
from workers.boundaries.cluster.kind_render import is_name

MARK = "BLASTDOOR_CLUSTER"
"""In the environment of kind, and so of all that it starts: whose cluster they are making."""


@dataclass(frozen=True)
class Place:
    """One cluster's directory."""

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def config(self) -> Path:
        return self.directory / "kind.yaml"

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    @property
    def standby(self) -> Path:
        return self.directory / "standby.json"

    @property
    def exists(self) -> bool:
        return os.path.lexists(self.directory)

    def make(self, ref: BoundaryRef) -> None:
        """Raises FileExistsError."""
        self.directory.mkdir(mode=0o700)
        (self.directory / "ref.json").write_text(ref.model_dump_json())

    def ref(self) -> BoundaryRef | None:
        """For whom it was made, and its lifetime; None where that was not written, or cannot be read."""
        return _read(self.directory / "ref.json")

    def claimed_by(self) -> BoundaryRef | None:
        """Whose it is since it was claimed; None for one that nobody claimed, or whose record was lost."""
        return _read(self.directory / "claimed.json")

    def claim(self, ref: BoundaryRef) -> bool:
        """Make it `ref`'s, for good and on disk; False when it is somebody's already, or gone. Of many processes one
        gets it: a link is made or there is one. Raises OSError."""
        new = self.directory / f".claim-{secrets.token_hex(8)}"
        try:
            with new.open("x") as file:
                file.write(ref.model_dump_json())
                file.flush()
                os.fsync(file.fileno())
            os.link(new, self.directory / "claimed.json")
            self.standby.unlink(missing_ok=True)  # so that nobody else could get it even if the record were lost
            _sync(self.directory)
        except (FileNotFoundError, FileExistsError):
            return False
        finally:
            new.unlink(missing_ok=True)
        return True

    def say_ready(self, record: str) -> None:
        """It appears whole, or not at all. Raises OSError."""
        new = self.directory / ".standby"
        new.write_text(record)
        new.rename(self.standby)

    def remove(self) -> None:
        """Raises OSError."""
        with suppress(FileNotFoundError):  # another process removes it too
            shutil.rmtree(self.directory)


@dataclass(frozen=True, kw_only=True)
class Places:
    """All clusters of one worker's host."""

    state: Path

    @property
    def home(self) -> Path:
        return self.state / "home"

    def make(self) -> None:
        """Raises OSError."""
        for directory in (self.state, self.home, self.state / "clusters", self.state / "counts"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def place(self, name: str) -> Place:
        if not is_name(name):
            raise ValueError(f"{name!r} is no boundary's name")
        return Place(self.state / "clusters" / name)

    def all(self) -> list[Place]:
        with suppress(FileNotFoundError):
            return [Place(path) for path in sorted((self.state / "clusters").iterdir()) if is_name(path.name)]
        return []

    def claimed_for(self, ref: BoundaryRef) -> Iterator[Place]:
        """Standby clusters that have become this run's."""
        for place in self.all():
            owner = place.claimed_by()
            if owner is not None and (owner.installation, owner.name) == (ref.installation, ref.name):
                yield place

    @contextmanager
    def locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """-> whether we hold it: False only when another does and it is not waited for. It ends with the process."""
        fd = os.open(self.state / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield _take(fd, wait=wait)
        finally:
            os.close(fd)

    def count(self, what: str) -> None:
        """Once more. Bytes that are appended get lost in no race, and whoever counts need not be the one who looks."""
        fd = os.open(self.state / "counts" / what, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b".")
        finally:
            os.close(fd)

    def counted(self, what: str) -> int:
        try:
            return (self.state / "counts" / what).stat().st_size
        except FileNotFoundError:
            return 0


def kill_makers(network: str) -> int:
    """End what is still making the cluster of that network, if its worker died under it. -> how many were killed. A
    process of a guest that has the mark would only be asking for its own end."""
    wanted = f"{MARK}={network}".encode()
    killed = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):  # it is gone, or not ours to look at
                if wanted in (Path(entry.path) / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed += 1
    return killed


def _take(fd: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> BoundaryRef | None:
    try:
        return BoundaryRef.model_validate_json(path.read_text())
    except (OSError, ValidationError):
        return None


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
