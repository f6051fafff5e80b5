"""The state directory of one `blastdoor up`: who may use it, who uses it now, and what it remembers.

blastdoor.db  blobs/   the installation: the database, uploads and results
redis/                 our Redis' append-only file
logs/                  a log for each process
client.json            0600: the address and this start's keys, for the other commands
secrets.key            0600: what the secrets of webhooks are encrypted with in the database
up.json                the ports, and the processes of the last start
lock                   held while `up` runs
"""

import fcntl
import json
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet

from service.cli.up.redis import LOOPBACK

LOCK = "lock"


class CannotUse(Exception):
    """This directory, or a port, is not one that `up` can use; the message says why and what to do."""


@dataclass(frozen=True)
class Remembered:
    """A process of an earlier start: a pid is reused, a pid with its start time on one boot is not."""

    name: str
    pid: int
    identity: str


class StateDirectory:
    """Opened and locked. The lock ends with this process, however that ends."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def redis(self) -> Path:
        return self.path / "redis"

    def close(self) -> None:
        os.close(self._lock)

    def redis_port(self) -> int:
        """The port of last time when it is still free, so that consumers find the bus again; else another."""
        known = self._memory().get("redis_port")
        port = known if isinstance(known, int) and port_is_free(known) else free_port()
        self._remember(redis_port=port)
        return port

    def secrets_key(self) -> str:
        """Made at the first start and kept: without it no webhook of this directory could be signed any more."""
        path = self.path / "secrets.key"
        if not path.exists():
            unfinished = self.path / "secrets.key.new"
            unfinished.unlink(missing_ok=True)
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(Fernet.generate_key() + b"\n")
                file.flush()
                os.fsync(descriptor)
            unfinished.replace(path)
        return path.read_text().strip()

    def remember_process(self, name: str, pid: int) -> None:
        """Call at once after each start, so that even a killed `up` can be cleaned up after."""
        processes = self._memory().get("processes", {})
        self._remember(processes={**processes, name: {"pid": pid, "identity": process_identity(pid)}})

    def forget_processes(self) -> None:
        self._remember(processes={})

    def left_over(self) -> list[Remembered]:
        """Processes of an earlier `up` that are still there: it was killed, and they resisted."""
        found = [
            Remembered(name, int(row["pid"]), str(row["identity"]))
            for name, row in self._memory().get("processes", {}).items()
        ]
        return [process for process in found if process_identity(process.pid) == process.identity]

    def _memory(self) -> dict[str, Any]:
        try:
            memory = json.loads((self.path / "up.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return memory if isinstance(memory, dict) else {}

    def _remember(self, **news: object) -> None:
        unfinished = self.path / "up.json.new"
        unfinished.write_text(json.dumps(self._memory() | news))
        unfinished.replace(self.path / "up.json")


def open_state(path: Path) -> StateDirectory:
    """Make or check the directory, and lock it. Raises CannotUse when it is another's, has other things in it, or is
    in use by another `up`."""
    path = path.absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        names = os.listdir(path)
    except OSError as error:
        raise CannotUse(f"the state directory {path} cannot be used: {error.strerror}") from error
    if status.st_uid != os.geteuid():
        raise CannotUse(f"the state directory {path} belongs to another user; name one of your own with --state")
    if names and LOCK not in names:
        raise CannotUse(f"{path} has other things in it; name a new or an empty directory with --state")
    if stat.S_IMODE(status.st_mode) != 0o700:
        path.chmod(0o700)
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(lock, 20).decode("ascii", "replace").strip()
        os.close(lock)
        raise CannotUse(f"another `blastdoor up` (pid {holder}) runs on {path}; stop it or use --state") from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    state = StateDirectory(path, lock)
    for directory in (state.logs, state.redis):
        directory.mkdir(mode=0o700, exist_ok=True)
    return state


def process_identity(pid: int) -> str | None:
    """The boot's id and the start time in ticks since then (proc(5), stat field 22); None when there is no such process
    or only its exit status is left."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else f"{boot}/{fields[19].decode()}"


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
