"""The first process inside an engine: makes its private world, starts dockerd in it, and is the end of everything there
when dockerd ends, unless it was stopped on purpose (`Engine.stop_docker`), or it is killed itself.

Run by `outside.py` under `unshare`, in pid, mount, ipc and uts namespaces of its own:

    python -m tests.cluster.engine.inside STATE CGROUP

It leaves the machine's network only after it has started the one process that stays there, `forward.py`.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.engine.place import START_DOCKERD, Place
from tests.cluster.lab.cgroups import join
from tests.cluster.lab.parts import Parts

CLONE_NEWNET = 0x40000000


class Ended(Exception):
    """dockerd ended, or did not become ready."""


def make_private(place: Place) -> None:
    """Mounts of our own. The machine's files can be read, and written nowhere but in the engine's folder."""
    _run("mount", "--bind", str(place.state), str(place.state))
    volatile = str(place.volatile)
    for folder in ("/run", "/var/log", "/var/lib", volatile):
        _run("mount", "-t", "tmpfs", "-o", "mode=755", "blastdoor-engine", folder)
    _give_modules(place)
    _run("mount", "-o", "remount,bind,ro", "/")
    _run("mount", "--bind", str(place.data), str(place.data))  # dockerd would do it, and hide what is mounted below
    _run("mount", "--make-shared", str(place.data))


def give_layers(place: Place) -> None:
    """Of the node image: shared by all engines, changed by none. A dockerd that ends takes them away."""
    for layer in place.layers():
        diff = place.data / "overlay2" / layer.name / "diff"
        if not os.path.ismount(diff):
            _run("mount", "--bind", "-o", "ro", str(layer / "diff"), str(diff))


def _give_modules(place: Place) -> None:
    """kind shares /lib/modules with its nodes, and a kernel without modules has no such folder."""
    if Path("/lib/modules").is_dir():
        return
    above, work = place.volatile / "lib", place.volatile / "lib-work"
    above.mkdir()
    work.mkdir()
    library = Path("/lib").resolve()
    options = f"lowerdir={library},upperdir={above},workdir={work}"
    _run("mount", "-t", "overlay", "-o", options, "blastdoor-engine", str(library))
    Path("/lib/modules").mkdir()


def leave_network() -> int:
    """-> the network namespace of the machine, as a descriptor; this process is then in a new one."""
    outer = os.open("/proc/self/ns/net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise Ended(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    _run("ip", "link", "set", "lo", "up")
    return outer


def _run(*argv: str) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Ended(f"{' '.join(argv)}: {done.stderr.strip()}")


def dockerd(place: Place, parts: Parts, cgroup: str) -> list[str]:
    """Everything that it writes is below the engine's folder, or in memory that goes with the mount namespace."""
    return [
        str(parts.program("dockerd")),
        f"--config-file={place.config}/daemon.json",
        f"--host=unix://{place.socket}",
        "--group=root",
        f"--data-root={place.data}",
        "--exec-root=/run/docker",
        "--pidfile=/run/docker.pid",
        "--storage-driver=overlay2",
        f"--cgroup-parent={cgroup}",
        f"--userland-proxy-path={parts.program('docker-proxy')}",
        f"--init-path={parts.program('tini-static')}",
        "--ip=127.0.0.1",
        "--log-level=warn",
    ]


def environment(place: Place, parts: Parts) -> dict[str, str]:
    (extensions,) = parts.folders["iptables"].glob("usr/lib/*-linux-gnu/xtables")
    libraries = [str(one) for one in parts.folders["iptables"].glob("usr/lib/*-linux-gnu")]
    return {
        "PATH": f"{place.programs}:{parts.path}",
        "LD_LIBRARY_PATH": ":".join([*libraries, parts.libraries]),
        "XTABLES_LIBDIR": str(extensions),
        "HOME": str(place.volatile),
        "TMPDIR": str(place.volatile),
        "LANG": "C.UTF-8",
    }


def start(name: str, place: Place, argv: list[str], env: dict[str, str], *fds: int) -> "subprocess.Popen[bytes]":
    with (place.logs / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=fds
        )


@dataclass
class Running:
    """The processes whose end is the engine's. dockerd alone may be stopped and started again: on the same data, in the
    same namespaces, as when an operator restarts the service."""

    place: Place
    dockerd: Callable[[], "subprocess.Popen[bytes]"]
    pids: dict[str, int]

    def start_dockerd(self) -> None:
        give_layers(self.place)
        self.pids["dockerd"] = self.dockerd().pid
        written = self.place.processes.with_suffix(".new")
        written.write_text(json.dumps(self.pids))
        written.rename(self.place.processes)

    def watch(self) -> None:
        """Reaps whoever dies here, as the first process must, until one of ours does."""
        while True:
            pid, status = os.waitpid(-1, 0)
            names = {number: name for name, number in self.pids.items()}
            if pid in names and not (names[pid] == "dockerd" and self.place.stopped.exists()):
                raise Ended(f"{names[pid]} ended with {os.waitstatus_to_exitcode(status)}")


def main(state: str, cgroup: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the first process has no default action
    place = Place(Path(state))
    join(cgroup)
    try:
        make_private(place)
        parts = Parts.read(place.config / "parts.json")
        outer = leave_network()
        own = dict(os.environ)
        forward = [sys.executable, "-m", "tests.cluster.engine.forward", str(outer)]
        running = Running(
            place,
            lambda: start("dockerd", place, dockerd(place, parts, cgroup), environment(place, parts)),
            {"inside": os.getpid(), "forward": start("forward", place, forward, own, outer).pid},
        )
        os.close(outer)
        running.start_dockerd()
        signal.signal(START_DOCKERD, lambda *_: running.start_dockerd())
        running.watch()
    except Ended as why:
        (place.state / "ended").write_text(str(why))
        raise SystemExit(str(why)) from why


if __name__ == "__main__":
    main(*sys.argv[1:])
