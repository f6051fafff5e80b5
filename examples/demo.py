"""`make demo`: everything started in a fresh state directory, four scenarios behind real walls, nothing left behind.

It uses the `blastdoor` command as a person would, and then looks at this machine for anything that carries the mark of
the installation that it made: processes, mounts, cgroups, directories, open ports. The same look is taken all the time
while the scenarios run, so that finding nothing afterwards means something. Exit code 0 only if all is as it should be.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from examples.demo_application import application, show
from service.adapters.sql_store import SqlStore
from service.cli.printing import visible
from service.cli.up.state import free_port

SCENARIOS = Path(__file__).parent / "scenarios"
EXAMPLES = ("rule-engine", "c-program", "data-report", "hostile")
BLASTDOOR = (sys.executable, "-I", "-m", "service.cli.main")
STOPPED_WITHIN_S = 60.0


def main() -> int:
    started = time.monotonic()
    state = Path(tempfile.mkdtemp(prefix="blastdoor-demo-"))
    demo = Demo(state)
    try:
        up = demo.start()
        try:
            for name in EXAMPLES:
                demo.play(name)
            demo.show_attacks()
            demo.show_events()
            demo.show_application()
        finally:
            demo.stop(up)
        demo.show_sweep()
    except Disappointed as problem:
        demo.failures.append(str(problem))
    finally:
        shutil.rmtree(state, ignore_errors=True)
    print(f"\n{time.monotonic() - started:.0f} seconds in all.")
    for failure in demo.failures:
        print(f"NOT AS EXPECTED: {failure}")
    if not demo.failures:
        print("Everything was as expected.")
    return 1 if demo.failures else 0


class Disappointed(Exception):
    """The demo cannot go on."""


@dataclass
class Demo:
    state: Path
    failures: list[str] = field(default_factory=list)
    ready: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    application_port: int = field(default_factory=free_port)

    def start(self) -> subprocess.Popen[str]:
        title("Starting everything on this machine:  blastdoor up")
        up = subprocess.Popen(
            [*BLASTDOOR, "up", "--state", str(self.state), "--port", "0", "--json"],
            stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=dict(os.environ) | {"BLASTDOOR_WEBHOOK_ALLOW": f"127.0.0.1:{self.application_port}"},
        )  # fmt: skip
        assert up.stdout is not None
        try:
            line = up.stdout.readline()
        except KeyboardInterrupt:
            self.end(up)
            raise
        if not line:
            raise Disappointed(f"`blastdoor up` ended with {up.wait()}")
        self.ready = json.loads(line)
        self.sweeper = Sweeper(self.state, [port_of(self.ready["url"]), port_of(self.ready["redis_url"])])
        self.sweeper.start()
        print(
            f"It listens on {self.ready['url']}, keeps its state in {self.state}, and has one tenant, untrusted: demo."
        )
        return up

    def play(self, name: str) -> None:
        directory = SCENARIOS / name
        title(f"blastdoor run {directory.relative_to(SCENARIOS.parents[1])}")
        played = blastdoor("run", str(directory), state=self.state, stderr=subprocess.PIPE)
        print(played.stdout, end="")
        if played.returncode != 0:
            print(played.stderr, end="")
            self.failures.append(f"{name} ended with exit code {played.returncode}")
        newest = json.loads(blastdoor("runs", "--limit", "1", "--json", state=self.state).stdout)["items"][0]
        run = eventually(lambda: self._destroyed(newest["id"]), seconds=20)
        if run is None:
            self.failures.append(f"{name}: nobody has seen its boundary gone")
            return
        self.runs[name] = run
        print(f"its wall was gone at {run['boundary_destroyed_at']}")
        if run["placement"]["guarantees"]["kernel"] == "shared":
            self.failures.append(f"{name} of an untrusted tenant ran on a shared kernel")

    def _destroyed(self, run_id: str) -> dict[str, Any] | None:
        run = self.asked("runs", "show", run_id, "--json")
        return run if run["boundary_destroyed_at"] else None

    def asked(self, *arguments: str) -> dict[str, Any]:
        """What a command with --json prints."""
        said: dict[str, Any] = json.loads(blastdoor(*arguments, state=self.state).stdout)
        return said

    def show_attacks(self) -> None:
        run = self.runs.get("hostile")
        if run is None:
            return
        title("What the hostile one tried, in its own words")
        print(visible(run["steps"][0]["stdout"]["text"]), end="")
        kept = [artifact["path"] for artifact in run["artifacts"]]
        skipped = {row["path"]: row["why"] for row in run["skipped_artifacts"]}
        print(f"collected of its loot: {', '.join(kept)}")
        print(
            "not followed:          " + ", ".join(f"{visible(path)} ({why})" for path, why in sorted(skipped.items()))
        )
        if kept != ["loot/note.txt"] or not skipped.keys() >= {"loot/shadow", "loot/host", "loot/environ"}:
            self.failures.append("the collector took, or missed, something of the loot")

    def show_events(self) -> None:
        title("What an application reads on the bus about the last run")
        last = self.runs[EXAMPLES[-1]]["id"] if EXAMPLES[-1] in self.runs else None
        with redis.Redis.from_url(self.ready["redis_url"], decode_responses=True) as client:
            events = eventually(lambda: self._events_until_destroyed(client, last), seconds=10) or []
        for event in events:
            print(f"  {event['time']}  {event['type']:<36} sequence {event['sequence']}")
        if not events:
            self.failures.append("the bus has no complete story of the last run")

    def _events_until_destroyed(self, client: "redis.Redis", run_id: str | None) -> list[dict[str, Any]] | None:
        rows: Any = client.xrange("blastdoor:events")
        events = [json.loads(fields["event"]) for _, fields in rows]
        own = [event for event in events if event["subject"] == run_id]
        kinds = [event["type"] for event in own]
        complete = "dev.blastdoor.run.finished" in kinds and "dev.blastdoor.boundary.destroyed" in kinds
        return own if complete else None

    def show_application(self) -> None:
        title("An application of many customers at the other end:  examples/main_app")
        with application(self.ready, port=self.application_port, state=self.state / "main-app") as links:
            self.failures += show(links, say=print)

    def stop(self, up: subprocess.Popen[str]) -> None:
        title("Stopping it")
        self.sweeper.stop()
        if (code := self.end(up)) != 0:
            self.failures.append(f"`blastdoor up` ended with {code}")

    def end(self, up: subprocess.Popen[str]) -> int:
        up.send_signal(signal.SIGINT)
        try:
            return up.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            up.kill()
            raise Disappointed(f"`blastdoor up` did not stop within {STOPPED_WITHIN_S:g} s") from None

    def show_sweep(self) -> None:
        title(f"What is left on this machine of installation {self.sweeper.installation}")
        left = self.sweeper.look()
        for kind, most in self.sweeper.most.items():
            now = left[kind]
            say_left(kind, most, len(now))
            if most == 0:
                self.failures.append(f"the sweep never saw any {kind}, so that it sees none now proves nothing")
            if now:
                self.failures.append(f"left behind: {kind}: {', '.join(sorted(now)[:5])}")


class Sweeper:
    """Looks for the installation's mark in what the kernel says, whoever made the thing that carries it."""

    def __init__(self, state: Path, ports: list[int]) -> None:
        store = SqlStore(f"sqlite:///{state / 'blastdoor.db'}")
        self.installation = store.installation_id()
        store.close()
        self._marks = (self.installation.encode(), os.fsencode(state))
        self._ports = ports
        self._runtime_dir = Path(os.environ.get("BLASTDOOR_RUNTIME_DIR", "/run/blastdoor"))
        self.most: dict[str, int] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _keep_looking(self) -> None:
        while not self._stopping.is_set():
            for kind, found in self.look().items():
                self.most[kind] = max(self.most.get(kind, 0), len(found))
            self._stopping.wait(0.25)

    def look(self) -> dict[str, set[str]]:
        return {
            "processes": self._processes(),
            "mounts": self._mounts(),
            "cgroups": self._cgroups(),
            "directories": self._directories(),
            "ports": self._open_ports(),
        }

    def _processes(self) -> set[str]:
        """By command line, environment or cgroup; but for this process and its own commands."""
        found = set()
        own = {os.getpid()}
        for directory in Path("/proc").iterdir():
            if not directory.name.isdigit() or int(directory.name) in own:
                continue
            for name in ("cmdline", "environ", "cgroup"):
                with suppress(OSError):
                    content = (directory / name).read_bytes()
                    if any(mark in content for mark in self._marks) and not self._is_command_of_ours(directory):
                        found.add(f"{directory.name} {(directory / 'comm').read_text().strip()}")
        return found

    def _is_command_of_ours(self, directory: Path) -> bool:
        """`blastdoor run` and the like have the state directory on their command line."""
        return (
            f"\nPPid:\t{os.getpid()}\n" in (directory / "status").read_text()
            and b"\0up\0" not in (directory / "cmdline").read_bytes()
        )

    def _mounts(self) -> set[str]:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
        return {line.split()[4].decode() for line in lines if any(mark in line for mark in self._marks)}

    def _cgroups(self) -> set[str]:
        found = set()
        for top, directories, _ in os.walk("/sys/fs/cgroup"):
            found |= {os.path.join(top, name) for name in directories if self.installation in name}
        return found

    def _directories(self) -> set[str]:
        """The place of live boundaries, and what is in it. The state directory is the user's, and not counted."""
        home = self._runtime_dir / self.installation
        return {str(path) for path in (home, *home.glob("*")) if path.exists()}

    def _open_ports(self) -> set[str]:
        """Listening TCP sockets on our two ports, of any process (proc(5): state 0A)."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        listening = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}
        return {str(port) for port in self._ports if port in listening}


def blastdoor(*arguments: str, state: Path, stderr: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("BLASTDOOR_URL", "BLASTDOOR_KEY")}
    argv = [*BLASTDOOR, *arguments, "--state", str(state)]
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False, env=environment)


def eventually(ask: Callable[[], Any], *, seconds: float) -> Any:
    """The first answer that is not None, or None when there was none in time."""
    deadline = time.monotonic() + seconds
    while (answer := ask()) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    return answer


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


def title(words: str) -> None:
    print(f"\n== {words}\n", flush=True)


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def say_left(kind: str, most: int, now: int) -> None:
    print(f"  {kind:<12} {most:>4} at most while it ran, {now} now")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
