"""The yardstick: `runsc` by hand, as its manual has it, with the same root filesystem and no limits."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("--platform=systrap", "--network=none", "--overlay2=none", "--ignore-cgroups")
PROGRAM = ("/usr/bin/python3", "-c", "print('hello')")


@dataclass(frozen=True)
class Bare:
    """One bundle per call, below `place`; `root` is the root filesystem's skeleton, `mounts` what is bound into it."""

    runsc: Path
    place: Path
    root: Path
    mounts: tuple[dict[str, object], ...]

    def run(self, name: str) -> float:
        """`runsc run` of the program; -> seconds."""
        bundle = self._bundle(name, PROGRAM)
        started = time.monotonic()
        self._call("run", "--bundle", str(bundle), name)
        return time.monotonic() - started

    def lifecycle(self, name: str) -> float:
        """create, start, exec of the program, kill, delete; -> seconds."""
        bundle = self._bundle(name, ("/bin/sleep", "infinity"))
        started = time.monotonic()
        self._call("create", "--bundle", str(bundle), name)
        self._call("start", name)
        self._call("exec", "--user", "65532:65532", name, *PROGRAM)
        self._call("kill", name, "KILL")
        self._call("delete", "--force", name)
        return time.monotonic() - started

    def _call(self, verb: str, *arguments: str) -> None:
        """Run one command. A detached sandbox becomes our orphan (this process is a child subreaper), and `delete`
        waits until it is reaped: so wait for any child until it is the command's turn."""
        command = [str(self.runsc), "--root", str(self.place / "state"), *FLAGS, verb, *arguments]
        output = str(self.place / "output")
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        pid = os.posix_spawn(command[0], command, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, file_actions=actions)
        ended, status = os.waitpid(-1, 0)
        while ended != pid:
            ended, status = os.waitpid(-1, 0)
        if status != 0:
            raise RuntimeError(f"bare runsc {verb}: status {status}: {Path(output).read_text()}")

    def _bundle(self, name: str, argv: tuple[str, ...]) -> Path:
        bundle = self.place / name
        bundle.mkdir(parents=True)
        config = {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 65532, "gid": 65532},
                "args": list(argv),
                "env": ["PATH=/usr/bin:/bin"],
                "cwd": "/",
                "capabilities": {},
                "noNewPrivileges": True,
            },
            "root": {"path": str(self.root), "readonly": True},
            "hostname": "bare",
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, *self.mounts],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
        }
        (bundle / "config.json").write_text(json.dumps(config))
        return bundle
