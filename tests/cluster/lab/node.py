"""The first process inside a lab: makes its private world, starts the components in order, and is the end of all of
them when one ends or it is killed itself.

Run by `outside.py` under `unshare`, in pid, mount, network, ipc and uts namespaces of its own:

    python -m tests.cluster.lab.node STATE CGROUP DESCRIPTOR

where DESCRIPTOR is a listening socket of the namespace outside. All that is changed here goes with the namespaces,
the folder STATE excepted, and the cgroups, which `outside.py` removes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import httpx

from tests.cluster.lab import components, policy
from tests.cluster.lab.cgroups import join
from tests.cluster.lab.client import connect
from tests.cluster.lab.components import ADDRESS, Place
from tests.cluster.lab.parts import Parts

WITHIN_S = 120.0
SHADOWED = {  # the kubelet sets these for the whole machine, and gives up when it cannot
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
}
OWN_SYSCTLS = {  # of this network namespace
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/rp_filter": "1",  # a pod may use no address but its own
    "net/ipv4/conf/default/rp_filter": "1",
    "net/ipv6/conf/all/disable_ipv6": "1",  # no way past the packet filter, which is for IPv4
    "net/ipv6/conf/default/disable_ipv6": "1",
}


class Ended(Exception):
    """A component ended, or did not become ready."""


def make_private(place: Place) -> None:
    """Mounts and network of our own. The machine's files can be read, and written nowhere but in the lab's folder."""
    _run("mount", "--bind", str(place.state), str(place.state))
    for folder in ("/run", "/var/log", "/var/lib", str(place.volatile)):
        _run("mount", "-t", "tmpfs", "-o", "mode=755", "blastdoor-lab", folder)
    _run("mount", "-o", "remount,bind,ro", "/")
    shadows = place.volatile / "sysctl"
    shadows.mkdir()
    for name, value in SHADOWED.items():
        shadow = shadows / name.replace("/", ".")
        shadow.write_text(f"{value}\n")
        _run("mount", "--bind", str(shadow), f"/proc/sys/{name}")
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")
    for name, value in OWN_SYSCTLS.items():
        Path("/proc/sys", name).write_text(value)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Ended(f"{' '.join(argv)}: {done.stderr.strip()}")


class Node:
    def __init__(self, place: Place, parts: Parts) -> None:
        self.place = place
        self.parts = parts
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            "PATH": parts.path,
            "LD_LIBRARY_PATH": parts.libraries,
            "HOME": str(place.volatile),
            "TMPDIR": str(place.volatile),
            "LANG": "C.UTF-8",
        }

    def start(self, name: str, argv: list[str], *, pass_fds: tuple[int, ...] = ()) -> None:
        with (self.place.logs / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                argv,
                executable=str(self.parts.program(argv[0])) if "/" not in argv[0] else None,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
            )

    def start_own(self, name: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> None:
        self.start(name, [sys.executable, "-m", f"tests.cluster.lab.{name}", *arguments], pass_fds=pass_fds)

    def until(self, what: str, look: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not look():
            for name, process in self.running.items():
                if process.poll() is not None:
                    raise Ended(f"{name} ended with {process.returncode} before {what}")
            if time.monotonic() > deadline:
                raise Ended(f"not within {WITHIN_S:g} s: {what}")
            time.sleep(0.03)

    def succeeds(self, *argv: str) -> bool:
        done = subprocess.run(argv, env=self.environment, capture_output=True, check=False)
        return done.returncode == 0

    def bring_up(self, door: int) -> None:
        place = self.place
        self.start("etcd", components.etcd(place))
        self.start("containerd", components.containerd(place))
        self.start("kube-apiserver", components.api_server(place))
        self.start_own("gate", str(door), pass_fds=(door,))
        os.close(door)
        ctr = [str(self.parts.program("ctr")), "--address", str(place.containerd), "--namespace", "k8s.io"]
        self.until("containerd answers", lambda: self.succeeds(*ctr, "version"))
        for archive in sorted(place.images.iterdir()):
            if not self.succeeds(*ctr, "images", "import", str(archive)):
                raise Ended(f"containerd did not take {archive.name}")
        with connect(place.kubeconfig("inside")) as client:
            self.until("the API server is ready", lambda: _is_ready(client))
        self.start("kube-controller-manager", components.controllers(place))
        self.start("kube-scheduler", components.scheduler(place))
        self.start("kubelet", components.kubelet(place))
        self.start_own("policy", str(place.kubeconfig("inside")))
        self.until("network policy is enforced", lambda: policy.IN_FORCE in (place.logs / "policy.log").read_text())
        (place.state / "processes.json").write_text(json.dumps({name: one.pid for name, one in self.running.items()}))

    def watch_over(self) -> NoReturn:
        """Reaps whoever dies here, as the first process must, until one of the components does."""
        names = {process.pid: name for name, process in self.running.items()}
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid in names:
                raise Ended(f"{names[pid]} ended with {os.waitstatus_to_exitcode(status)}")


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def main(state: str, cgroup: str, door: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the first process has no default action
    place = Place(Path(state))
    join(cgroup)
    try:
        make_private(place)
        parts = Parts.read(place.config / "parts.json")
        components.write_configuration(place, parts, cgroup=cgroup)
        node = Node(place, parts)
        node.bring_up(int(door))
        node.watch_over()
    except Ended as why:
        (place.state / "ended").write_text(str(why))
        raise SystemExit(str(why)) from why


if __name__ == "__main__":
    main(*sys.argv[1:])
