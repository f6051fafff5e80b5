"""Starting and ending an engine from outside of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.engine.place import START_DOCKERD, Node, Place
from tests.cluster.lab import cgroups
from tests.cluster.lab.outside import HIDDEN, ROOT, Lab, NoLab, started_at, stop
from tests.cluster.lab.parts import Parts, one_at_a_time

READY_WITHIN_S = 120.0
SOCKET_NAME_LIMIT = 100


def default_state() -> Path:
    return Path(tempfile.gettempdir()) / "blastdoor-engine"


@dataclass(frozen=True)
class Engine:
    """A Docker engine that runs, with the programs and the node image that make clusters in it."""

    state: Path
    docker: Path
    kind: Path
    node_image: str
    """For `kind create cluster --image`; empty while it is being made."""
    parts: Parts
    lab: Lab
    """Holds the engine's first process and its cgroups."""

    @property
    def docker_host(self) -> str:
        return f"unix://{Place(self.state).socket}"

    @property
    def environment(self) -> dict[str, str]:
        """What `docker` and `kind` need of it; kind looks for `docker` on its PATH."""
        return {
            "DOCKER_HOST": self.docker_host,
            "DOCKER_CONFIG": str(Place(self.state).config),
            "HOME": str(Place(self.state).config),
            "PATH": f"{self.docker.parent}:{self.kind.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        }

    @property
    def pid(self) -> int | None:
        """The process whose end is the engine's, with all containers; None when it is gone."""
        return self.lab.holder()

    def run(self, program: Path, *arguments: str, input: bytes | None = None) -> str:
        """-> what `docker` or `kind` prints; NoLab with what it complained of when it fails."""
        asked = [str(program), *arguments]
        done = subprocess.run(asked, env=self.environment, input=input, capture_output=True, check=False)
        if done.returncode != 0:
            raise NoLab(f"{program.name} {' '.join(arguments)}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode(errors="replace")

    @property
    def kubectl(self) -> Path:
        return self.parts.program("kubectl")

    def stop_docker(self) -> None:
        """dockerd ends, as when an operator stops the service, and with it what its containers ran. The rest of the
        engine stays: what it had on disk, its network, its control groups."""
        place, pid = Place(self.state), self.lab.pid("dockerd")
        place.stopped.touch()
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + READY_WITHIN_S
        while _is_there(pid):
            if time.monotonic() > deadline:
                raise NoLab(f"dockerd did not end within {READY_WITHIN_S:g} s")
            time.sleep(0.1)

    def start_docker(self) -> None:
        """A new dockerd, on what the last one left. Returns when it answers."""
        os.kill(self.lab.pid("inside"), START_DOCKERD)
        _wait_until_ready(self)
        Place(self.state).stopped.unlink()

    def quit(self) -> None:
        """Ends it, and leaves its folder."""
        stop(self.lab)

    def end(self) -> None:
        """As `down`, and nothing of it is left in this process either."""
        self.lab.end()


def start(state: Path, parts: Parts, node: Node | None, *, with_us: bool) -> Engine:
    """A new engine in place of whatever is left of one there; without a node image when there is none yet."""
    if os.geteuid() != 0:
        raise NoLab("the engine needs root")
    if any(state.is_relative_to(hidden) for hidden in HIDDEN):
        raise NoLab(f"the state folder cannot be below any of {', '.join(HIDDEN)}")
    if len(str(Place(state).socket)) > SOCKET_NAME_LIMIT:
        raise NoLab(f"the state folder has too long a name for a socket in it: {state}")
    down(state)
    engine = _start(Lab(state), parts, node, with_us=with_us)
    try:
        _wait_until_ready(engine)
    except BaseException:
        stop(engine.lab)  # its logs stay
        raise
    return engine


def down(state: Path) -> None:
    """Ends an engine and removes all that is left of it. Nothing happens when there is none."""
    Lab(state.resolve()).end()


def engine_of(lab: Lab, parts: Parts, node_image: str) -> Engine:
    return Engine(lab.state, parts.program("docker"), parts.program("kind"), node_image, parts, lab)


def _start(lab: Lab, parts: Parts, node: Node | None, *, with_us: bool) -> Engine:
    place = Place(lab.state)
    place.make()
    (lab.state / "lab.json").write_text("{}")
    parts.write(place.config / "parts.json")
    (place.config / "daemon.json").write_text("{}")
    _give_iptables(place, parts)
    if node:
        node.put(place)
    tied = ["setpriv", "--pdeathsig", "KILL"] if with_us else []
    apart = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
    inside = [sys.executable, "-m", "tests.cluster.engine.inside", str(lab.state), lab.cgroup]
    with one_at_a_time("start"), (place.logs / "inside.log").open("wb") as log:
        cgroups.sweep()
        cgroups.make(lab.cgroup)
        process = subprocess.Popen(
            [*tied, *apart, *inside],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        (lab.state / "lab.json").write_text(json.dumps({"pid": process.pid, "started": started_at(process.pid)}))
        while not cgroups.processes(lab.cgroup) and process.poll() is None:
            time.sleep(0.02)  # or the next one's sweep would take the empty group away
    return engine_of(Lab(lab.state, process), parts, node.name if node else "")


def _give_iptables(place: Place, parts: Parts) -> None:
    """Under the names that Debian's scripts would have given it when installed."""
    (tables,) = parts.folders["iptables"].glob("usr/sbin/xtables-nft-multi")
    for family in ("iptables", "ip6tables"):
        for name in (family, f"{family}-save", f"{family}-restore"):
            (place.programs / name).symlink_to(tables)


def _wait_until_ready(engine: Engine) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while not answers(engine):
        if (engine.state / "ended").is_file():
            raise NoLab(_why(engine, (engine.state / "ended").read_text()))
        if not engine.pid:
            raise NoLab(_why(engine, "its first process ended"))
        if time.monotonic() > deadline:
            raise NoLab(_why(engine, f"dockerd did not answer within {READY_WITHIN_S:g} s"))
        time.sleep(0.1)


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] not in ("", "Z")
    except OSError:
        return False


def answers(engine: Engine) -> bool:
    if not Place(engine.state).socket.exists():
        return False
    asked = [str(engine.docker), "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(asked, env=engine.environment, capture_output=True, check=False).returncode == 0


def _why(engine: Engine, reason: str) -> str:
    tails = [
        f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}"
        for log in sorted(Place(engine.state).logs.iterdir())
        if log.stat().st_size
    ]
    return "\n".join([reason, *tails])
