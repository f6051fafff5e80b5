"""Starting and ending a lab from outside of it."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from tests.cluster.lab import cgroups, images, pki
from tests.cluster.lab.client import connect
from tests.cluster.lab.components import ADDRESS, API_PORT, NODE, SERVICE_OF_API, Place
from tests.cluster.lab.parts import Parts, build, one_at_a_time

ROOT = Path(__file__).parents[3]
READY_WITHIN_S = 180.0
HIDDEN = ("/run", "/var/run", "/var/lib", "/var/log", "/proc", "/sys", "/dev")
"""What the lab has of its own: a state folder below one of these could not be seen inside."""
RUNTIME_CLASS = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "gvisor"},
    "handler": "runsc",
}


class NoLab(Exception):
    """The lab cannot run here, or did not start; the message says why."""


def default_state() -> Path:
    return Path(tempfile.gettempdir()) / "blastdoor-lab"


@dataclass(frozen=True)
class Lab:
    """A lab that runs."""

    state: Path
    process: "subprocess.Popen[bytes] | None" = field(default=None, compare=False)
    """Where it is a child of this very process, which then has to wait for its end."""

    @property
    def kubeconfig(self) -> Path:
        """Of a user who may do everything, by way of a port on this machine's loopback."""
        return Place(self.state).kubeconfig("admin")

    @property
    def cgroup(self) -> str:
        """Its folder in every control group hierarchy."""
        return f"/{cgroups.PREFIX}{hashlib.sha256(str(self.state).encode()).hexdigest()[:8]}"

    def end(self) -> None:
        """As `down`, and nothing of it is left in this process either."""
        stop(self)
        down(self.state)

    def holder(self) -> int | None:
        """The process whose end is the lab's; None when it is gone."""
        try:
            started = json.loads((self.state / "lab.json").read_text())
        except FileNotFoundError:
            return None
        if "pid" in started and started_at(started["pid"]) == started["started"]:  # an id may have become another's
            pid: int = started["pid"]
            return pid
        return None

    def pid(self, component: str) -> int:
        """The id, out here, of a component: "kube-apiserver", "kubelet", "containerd", "policy" ...

        A signal to it is how a test breaks the cluster: SIGSTOP and SIGCONT, or SIGUSR1 to "policy", which makes the
        network policy controller inert. A component that ends takes the lab with it.
        """
        if not self.holder():
            raise NoLab(f"no lab runs in {self.state}")
        inner = json.loads((self.state / "processes.json").read_text())[component]
        for pid in cgroups.processes(self.cgroup):
            if _ids(pid)[1:] == [inner]:
                return pid
        raise NoLab(f"{component} is not running")

    def beside(self, component: str, *argv: str) -> None:
        """Runs a program of this machine in the network namespace of a component. Raises NoLab when it fails."""
        asked = ["nsenter", f"--target={self.pid(component)}", "--net", *argv]
        done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NoLab(f"{' '.join(argv)}: {done.stderr.strip()}")

    def load(self, archive: Path) -> None:
        """Makes the images of an OCI archive known to the node; nothing is ever pulled."""
        self.run(
            "ctr", "--address", str(Place(self.state).containerd), "-n", "k8s.io", "images", "import", str(archive)
        )

    def run(self, program: str, *arguments: str) -> str:
        """-> what one of the lab's own programs prints, run on the node, as root."""
        node = self.pid("etcd")
        parts = Parts.read(Place(self.state).config / "parts.json")
        done = subprocess.run(
            ["nsenter", f"--target={node}", "--mount", "--net", "--pid", parts.program(program), *arguments],
            env={"PATH": parts.path, "LD_LIBRARY_PATH": parts.libraries},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise NoLab(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout


@contextmanager
def running_lab(state: Path, say: Callable[[str], None]) -> Iterator[Lab]:
    """A lab for as long as the block lasts; it ends with this process as well."""
    lab = up(state, say, with_us=True)
    try:
        yield lab
    finally:
        lab.end()


def up(state: Path, say: Callable[[str], None], *, with_us: bool = False) -> Lab:
    """-> a lab whose node is ready; the one that already runs there, if one does. With `with_us` it ends when we do.

    Raises NoLab, or NoParts when a part of it cannot be had here.
    """
    state = state.resolve()
    if os.geteuid() != 0:
        raise NoLab("the lab needs root")
    if any(state.is_relative_to(hidden) for hidden in HIDDEN):
        raise NoLab(f"the state folder cannot be below any of {', '.join(HIDDEN)}")
    lab = Lab(state)
    if lab.holder() and _is_up(lab):
        return lab
    parts = build(say)
    try:
        return _started_anew(state, parts, with_us=with_us)
    except NoLab as why:  # on a machine that is very busy a component may give up before another is there
        say(f"the lab did not start, so once more: {why}")
        return _started_anew(state, parts, with_us=with_us)


def _started_anew(state: Path, parts: Parts, *, with_us: bool) -> Lab:
    down(state)
    lab = _start(Lab(state), parts, with_us=with_us)
    try:
        _wait_until_ready(lab)
    except BaseException:
        stop(lab)  # its logs stay
        raise
    return lab


def down(state: Path) -> None:
    """Ends a lab and removes all that is left of it. Nothing happens when there is none."""
    lab = Lab(state.resolve())
    stop(lab)
    if lab.state.is_dir():
        if not (lab.state / "lab.json").is_file():
            raise NoLab(f"{lab.state} is not the folder of a lab: left as it is")
        shutil.rmtree(lab.state)


def _start(lab: Lab, parts: Parts, *, with_us: bool) -> Lab:
    place = Place(lab.state)
    place.make()
    (lab.state / "lab.json").write_text("{}")
    images.write_pause(place.images / "pause.tar", parts.program("pause"))
    images.write_busybox(place.images / "busybox.tar", parts.program("busybox"))
    parts.write(place.config / "parts.json")
    with socket.create_server(("127.0.0.1", 0)) as door:
        _write_identities(place, port=door.getsockname()[1])
        tied = ["setpriv", "--pdeathsig", "KILL"] if with_us else []
        apart = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
        inside = [sys.executable, "-m", "tests.cluster.lab.node", str(lab.state), lab.cgroup, str(door.fileno())]
        with one_at_a_time("start"), (place.logs / "node.log").open("wb") as log:
            cgroups.sweep()
            cgroups.make(lab.cgroup)
            process = subprocess.Popen(
                [*tied, *apart, *inside],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(door.fileno(),),
                start_new_session=True,
            )
            started = {"pid": process.pid, "started": started_at(process.pid)}
            (lab.state / "lab.json").write_text(json.dumps(started))
            while not cgroups.processes(lab.cgroup) and process.poll() is None:
                time.sleep(0.02)  # or the next one's sweep would take the empty group away
    return Lab(lab.state, process)


def _write_identities(place: Place, *, port: int) -> None:
    folder = place.pki
    authority = pki.Authority.make()
    authority.write(folder)
    names = ("localhost", "127.0.0.1", ADDRESS, SERVICE_OF_API, "kubernetes", "kubernetes.default.svc")
    authority.issue(folder, "api", name="kube-apiserver", addresses=names)
    authority.issue(folder, "kubelet", name=f"system:node:{NODE}", group="system:nodes", addresses=(NODE, ADDRESS))
    authority.issue(folder, "controllers", name="system:kube-controller-manager")
    authority.issue(folder, "scheduler", name="system:kube-scheduler")
    for file in ("admin", "inside", "api-to-kubelet"):
        authority.issue(folder, file, name=file, group="system:masters")
    pki.write_key(folder / "service-accounts.key", ec.generate_private_key(ec.SECP256R1()))
    outer = f"https://127.0.0.1:{port}"
    inner = f"https://{ADDRESS}:{API_PORT}"
    for user in ("kubelet", "controllers", "scheduler", "inside", "admin"):
        server = outer if user == "admin" else inner
        pki.write_kubeconfig(place.kubeconfig(user), server=server, pki=folder, file=user)


def _wait_until_ready(lab: Lab) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while not _is_up(lab):
        if (lab.state / "ended").is_file():
            raise NoLab(_why(lab, (lab.state / "ended").read_text()))
        if not lab.holder():
            raise NoLab(_why(lab, "its first process ended"))
        if time.monotonic() > deadline:
            raise NoLab(_why(lab, f"the node was not ready within {READY_WITHIN_S:g} s"))
        time.sleep(0.1)


def _is_up(lab: Lab) -> bool:
    """Whether everything was started, and the node is ready and takes pods, with the RuntimeClass in place."""
    if not (lab.state / "processes.json").is_file():
        return False
    try:
        with connect(lab.kubeconfig) as client:
            made = client.post("/apis/node.k8s.io/v1/runtimeclasses", json=RUNTIME_CLASS)
            if made.status_code not in {httpx.codes.CREATED, httpx.codes.CONFLICT}:
                return False
            node = client.get(f"/api/v1/nodes/{NODE}")
            account = client.get("/api/v1/namespaces/default/serviceaccounts/default")
    except (OSError, httpx.HTTPError):
        return False
    return node.is_success and account.is_success and _takes_pods(node.json())


def _takes_pods(node: dict[str, Any]) -> bool:
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in node["status"].get("conditions", []))
    return ready and not node["spec"].get("taints")


def _why(lab: Lab, reason: str) -> str:
    tails = [
        f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}"
        for log in sorted(Place(lab.state).logs.iterdir())
        if log.stat().st_size
    ]
    return "\n".join([reason, *tails])


def stop(lab: Lab) -> None:
    """Kills the one process that holds the lab's namespaces, and with it everything in them; then the cgroups go."""
    if holder := lab.holder():
        os.kill(holder, signal.SIGKILL)
    if lab.process:
        lab.process.wait()
    for pid in cgroups.processes(lab.cgroup):  # whose holder is not on record: `up` was killed in the middle
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    cgroups.remove(lab.cgroup)


def started_at(pid: int) -> str | None:
    """When a process began, in ticks since the machine's start; None for one that is dead, or only not yet reaped."""
    try:
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if after[0] in {"Z", "X"} else after[19]


def _ids(pid: int) -> list[int]:
    """A process's id out here, then in each namespace below."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(one) for line in status.splitlines() if line.startswith("NSpid:") for one in line.split()[1:]]
