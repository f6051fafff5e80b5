"""Hostile code against the gVisor wall, at the driver. Every case has its positive control: the same program where the
one defence is weakened, and there it must get through; otherwise the case would prove nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.core.boundary import Ended, Execution, Limit, Sandbox, StepSpec
from tests.sandboxes import (
    MIB,
    Never,
    Sink,
    artifact_limits,
    gvisor_boundary,
    make_ref,
    make_spec,
    make_step,
    new_installation,
    require_gvisor,
    shell,
)
from workers.boundaries.gvisor import control, steps
from workers.boundaries.gvisor.driver import GvisorBoundary
from workers.runtimes.store import RootFilesystem, RuntimeStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture
def boundary(tmp_path: Path, store: Path) -> Iterator[GvisorBoundary]:
    require_gvisor()
    with gvisor_boundary(tmp_path / "run", store=store) as made:
        yield made


@contextmanager
def opened(boundary: GvisorBoundary, *, seconds: float = 120, **limits: Any) -> Iterator[tuple[Sandbox, set[int]]]:
    """A sandbox, and a look at its host processes; destroyed afterwards."""
    ref = make_ref(installation=boundary.host.installation, seconds=seconds)
    group = boundary.group(ref)
    with boundary.open(make_spec(**limits), ref, cancelled=Never()) as sandbox:
        yield sandbox, group.pids()
    boundary.destroy(ref)


def played(boundary: GvisorBoundary, step: StepSpec, **limits: Any) -> Execution:
    with opened(boundary, **limits) as (sandbox, _):
        return sandbox.execute(step)


def python(program: str) -> StepSpec:
    return make_step("python3", "-S", "-c", program)


def sentry(pids: set[int]) -> int:
    return next(pid for pid in sorted(pids) if b"boot" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))


SLEEPERS = "for i in $(seq 60); do sleep 60 & done"
"""The shell ends at once when it is refused a process; the others live on."""


class TestLimits:
    def test_memory_ends_the_sandbox_and_the_host_saw_why(self, boundary: GvisorBoundary) -> None:
        step = python("b = bytearray(96 << 20)\nfor i in range(0, len(b), 4096): b[i] = 1")
        hit, control_run = played(boundary, step, memory=64 * MIB), played(boundary, step, memory=256 * MIB)
        assert (hit.ended, hit.limits, hit.sandbox_alive) == (Ended.LIMIT, {Limit.MEMORY}, False)
        assert hit.duration_s < 10
        assert (control_run.ended, control_run.exit_code, control_run.limits) == (Ended.EXITED, 0, frozenset())

    def test_files_in_work_count_as_memory(self, boundary: GvisorBoundary) -> None:
        step = shell("dd if=/dev/zero of=/work/f bs=1M count=96 2>&1")
        hit = played(boundary, step, memory=64 * MIB, disk=256 * MIB)
        control_run = played(boundary, step, memory=256 * MIB, disk=256 * MIB)
        assert Limit.MEMORY in hit.limits
        assert hit.exit_code != 0
        assert (control_run.exit_code, control_run.limits) == (0, frozenset())

    def test_processes_are_refused_and_the_sandbox_lives(self, boundary: GvisorBoundary) -> None:
        step = shell(SLEEPERS)
        with opened(boundary, pids=32) as (sandbox, _):
            hit, after = sandbox.execute(step), sandbox.execute(shell("echo alive"))
        control_run = played(boundary, step, pids=128)
        assert (hit.ended, Limit.PIDS in hit.limits) == (Ended.EXITED, True)
        assert hit.exit_code != 0
        assert after.stdout.data == b"alive\n"
        assert (control_run.exit_code, control_run.limits) == (0, frozenset())

    def test_a_step_that_was_refused_a_process_before_anybody_looked_is_known_by_what_it_leaves(
        self, boundary: GvisorBoundary, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(steps._Play, "_on_processes", lambda *_: None)
        hit, not_hit = played(boundary, shell(SLEEPERS), pids=32), played(boundary, shell(SLEEPERS), pids=64)
        monkeypatch.setattr(steps._Play, "_count_leftovers", lambda _: None)
        unseen = played(boundary, shell(SLEEPERS), pids=32)
        assert [Limit.PIDS in one.limits for one in (hit, not_hit, unseen)] == [True, False, False]

    def test_a_fork_bomb_ends_in_time_and_stays_below_the_host_limit(self, boundary: GvisorBoundary) -> None:
        with opened(boundary, pids=24, memory=256 * MIB) as (sandbox, _):
            started = time.monotonic()
            ended = sandbox.execute(make_step("bash", "-c", "b() { b | b & }; b; sleep 30", timeout_s=3))
            took_s = time.monotonic() - started
        assert ended.ended in (Ended.STEP_TIMEOUT, Ended.LIMIT)
        assert Limit.PIDS in ended.limits
        assert took_s < 9

    @pytest.mark.parametrize(
        ("limit", "command", "tight", "loose"),
        [
            (Limit.DISK, "head -c 12M /dev/zero > /work/f", {"disk": 8 * MIB}, {"disk": 64 * MIB}),
            (Limit.DISK, "head -c 5M /dev/zero > a; head -c 5M /dev/zero > /tmp/b", {"disk": 8 * MIB}, {}),
            (Limit.FILES, "for i in $(seq 150); do : > $i || exit 9; done", {"files": 100}, {"files": 1000}),
            (Limit.FILES, "for i in $(seq 75); do : > $i && : > /tmp/$i || exit 9; done", {"files": 100}, {}),
        ],
    )
    def test_disk_and_files_hold_for_work_and_tmp_together(
        self, boundary: GvisorBoundary, limit: Limit, command: str, tight: dict[str, int], loose: dict[str, int]
    ) -> None:
        hit, control_run = played(boundary, shell(command), **tight), played(boundary, shell(command), **loose)
        assert hit.exit_code != 0
        assert hit.limits == {limit}
        assert b"No space left" in hit.stderr.data
        assert (control_run.exit_code, control_run.limits) == (0, frozenset())

    def test_open_files(self, boundary: GvisorBoundary) -> None:
        step = python("import os\nfor i in range(100): os.open('/dev/null', 0)")
        assert b"Too many open files" in played(boundary, step, open_files=64).stderr.data
        assert played(boundary, step, open_files=256).exit_code == 0

    def test_cpu_is_held_to_its_quota(self, boundary: GvisorBoundary) -> None:
        step = python("import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass")
        held, control_run = played(boundary, step, cpu=0.2), played(boundary, step, cpu=1)
        assert held.cpu_s < 0.55
        assert control_run.cpu_s > 0.6

    def test_a_flood_is_stopped_and_costs_no_memory(self, boundary: GvisorBoundary) -> None:
        flooded = played(boundary, shell("yes AAAAAAAA"), output=64 * 1024)
        control_run = played(boundary, shell("yes AAAAAAAA | head -c 100000"), output=64 * 1024)
        assert (flooded.ended, flooded.limits) == (Ended.LIMIT, {Limit.OUTPUT})
        assert len(flooded.stdout.data) == 64 * 1024
        assert (control_run.ended, control_run.limits) == (Ended.EXITED, frozenset())


class TestDeaths:
    def test_five_ends_that_look_alike_are_told_apart(self, boundary: GvisorBoundary) -> None:
        with opened(boundary) as (sandbox, pids):
            steps = [shell("exit 128"), shell("exit 139"), shell("kill -SEGV $$"), make_step("/no/such/program")]
            four = [sandbox.execute(step) for step in steps]
            killer = subprocess.Popen(
                [sys.executable, "-c", f"import os,time; time.sleep(0.5); os.kill({sentry(pids)}, 9)"]
            )
            with killer:
                lost = sandbox.execute(shell("sleep 20"))
        assert [(e.ended, e.exit_code, e.signal) for e in (*four, lost)] == [
            (Ended.EXITED, 128, None),
            (Ended.EXITED, 139, None),
            (Ended.EXITED, None, signal.SIGSEGV),
            (Ended.NOT_STARTED, None, None),
            (Ended.LOST, None, None),
        ]
        assert not lost.sandbox_alive
        assert lost.limits == frozenset()

    def test_a_killed_supervisor_takes_the_guest_with_it(self, boundary: GvisorBoundary) -> None:
        ref = make_ref(installation=boundary.host.installation)
        group = boundary.group(ref)
        with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            runsc = min(group.pids())
            supervisor = int(Path(f"/proc/{runsc}/stat").read_text().rpartition(")")[2].split()[1])
            assert b"supervisor.py" in Path(f"/proc/{supervisor}/cmdline").read_bytes()
            os.kill(supervisor, signal.SIGKILL)
            ended = sandbox.execute(shell("sleep 20"))
            assert ended.ended is Ended.LOST
            deadline = time.monotonic() + 5
            while group.pids() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not group.pids()
        boundary.destroy(ref)

    def test_a_sentry_that_does_not_answer_cannot_hold_the_step(self, boundary: GvisorBoundary) -> None:
        with opened(boundary) as (sandbox, pids):
            os.kill(sentry(pids), signal.SIGSTOP)
            started = time.monotonic()
            ended = sandbox.execute(shell("sleep 20", timeout_s=0.5))
            took_s = time.monotonic() - started
        assert not ended.sandbox_alive
        assert ended.ended in (Ended.LOST, Ended.STEP_TIMEOUT)
        assert took_s < 15

    def test_the_deadline_ends_it_whatever_the_worker_does(self, boundary: GvisorBoundary) -> None:
        with opened(boundary, seconds=6) as (sandbox, _):  # from before the sandbox starts
            started = time.monotonic()
            ended = sandbox.execute(shell("sleep 30"))
            took_s = time.monotonic() - started
        assert ended.ended is Ended.LOST
        assert "deadline" in ended.message
        assert took_s < 9

    def test_a_timed_out_step_leaves_none_of_its_descendants(self, boundary: GvisorBoundary) -> None:
        stubborn = "trap '' TERM INT HUP QUIT; (setsid sleep 300 &) ; (sleep 300 &); sleep 300"
        count = shell("cat /proc/[0-9]*/comm | grep -c sleep")
        with opened(boundary) as (sandbox, _):
            assert sandbox.execute(shell(stubborn, timeout_s=0.5)).ended is Ended.STEP_TIMEOUT
            after = sandbox.execute(count)
            sandbox.execute(shell("(setsid sleep 300 &) ; sleep 0.2"))
            control_run = sandbox.execute(count)
        assert after.stdout.data == b"0\n"
        assert control_run.stdout.data == b"1\n", "control: a daemon that was not killed is counted"

    def test_init_is_out_of_a_steps_reach(self, boundary: GvisorBoundary) -> None:
        with opened(boundary) as (sandbox, _):
            tried = sandbox.execute(shell("kill -9 1; (sleep 300 &); kill -9 -1; cat /proc/1/environ; exit 7"))
            assert b"not permitted" in tried.stderr.data
            assert sandbox.execute(shell("echo alive")).stdout.data == b"alive\n"


class TestIdentity:
    def test_no_capability_is_held_or_can_be_gained(self, boundary: GvisorBoundary, tmp_path: Path) -> None:
        ref = make_ref(installation=boundary.host.installation)
        status = shell("grep Cap /proc/self/status; id -u; id -G")
        with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            seen = sandbox.execute(status).stdout.data.decode()
            # Control: the same call with the capabilities left out, as a client that knows no better would make it.
            root_fd = os.open(boundary.host.runtime_dir / ref.installation / ref.name / "runsc", os.O_RDONLY)
            read_fd, write_fd = os.pipe()
            with control.Connection(root_fd) as sentry_control:
                weak = {"argv": list(status.argv), "envv": ["PATH=/usr/bin:/bin"], "wd": "/", "KUID": 65532}
                weak |= {"KGID": 65532, "GuestFDs": [0, 1, 2], "ContainerID": control.CONTAINER}
                pid = sentry_control.call("ExecuteAsync", weak, fds=(read_fd, write_fd, write_fd))
                sentry_control.call("WaitPID", {"PID": pid, "CID": control.CONTAINER})
            weakened = os.read(read_fd, 4096).decode()
            for fd in (root_fd, read_fd, write_fd):
                os.close(fd)
        boundary.destroy(ref)
        assert seen.count("0000000000000000") == 4
        assert seen.endswith("65532\n65532\n")
        assert "CapBnd:\t0000000000000000" not in weakened

    def test_the_environment_is_exactly_what_was_declared(self, boundary: GvisorBoundary) -> None:
        seen = played(boundary, make_step("/usr/bin/env", SECRET="declared"))
        names = {line.partition(b"=")[0].decode() for line in seen.stdout.data.splitlines()}
        assert names == {"PATH", "HOME", "LANG", "TMPDIR", "SECRET"}

    def test_a_steps_environment_stands_on_no_command_line_of_the_host(self, boundary: GvisorBoundary) -> None:
        token = f"token{new_installation()}"
        ref = make_ref(installation=boundary.host.installation)
        looked = [sys.executable, "-c", _SEARCH, token[:8], token[8:]]
        with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            searcher = subprocess.Popen(looked, stdout=subprocess.PIPE)
            ended = sandbox.execute(shell("echo $SECRET; sleep 1.5", SECRET=token))
            found, _ = searcher.communicate()
        boundary.destroy(ref)
        assert ended.stdout.data.decode().strip() == token
        assert found == b""
        with subprocess.Popen(["sleep", "5"], env={"SECRET": token}) as leaky:
            control_found = subprocess.run(looked, capture_output=True, check=True).stdout
            leaky.kill()
        assert control_found != b"", "control: an environment on the host would have been found"

    def test_nothing_of_the_host_but_its_distribution_is_seen(
        self, boundary: GvisorBoundary, tmp_path: Path, store: Path
    ) -> None:
        canary = tmp_path / "canary"
        canary.mkdir()
        (canary / "secret").write_text("the canary")
        (canary / "secret").chmod(0o644)
        places = "/root /home /opt /srv /var/lib /usr/local /etc/shadow /run /mnt /media"
        look = shell(f"cat {canary}/secret; ls {places} | grep -v :")
        seen = played(boundary, look)
        assert b"canary" not in seen.stdout.data
        assert seen.stdout.data.strip() == b""
        with gvisor_boundary(tmp_path / "weak", store=store) as weak:
            object.__setattr__(weak.host, "runtimes", _WithBind(store, canary))
            assert played(weak, shell("cat /mnt/secret")).stdout.data == b"the canary"

    def test_writes_outside_work_and_tmp_fail(self, boundary: GvisorBoundary) -> None:
        paths = (
            "/x /etc/x /usr/x /usr/local/x /var/x /var/tmp/x /home/x /root/x /run/x /.blastdoor/x /proc/sys/kernel/x"
        )
        tried = played(boundary, shell(f"for p in {paths} /work/x /tmp/x; do (: > $p) 2>/dev/null && echo $p; done"))
        assert tried.stdout.data.split() == [b"/work/x", b"/tmp/x"]

    def test_no_network_device_reaches_the_host(self, boundary: GvisorBoundary) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 3); print('reached')"
            tried = played(boundary, python(connect))
            assert b"reached" not in tried.stdout.data
            assert tried.exit_code == 1
            host = subprocess.run([sys.executable, "-c", connect], capture_output=True, check=True)
            assert host.stdout == b"reached\n", "control: the listener can be reached from the host"


class TestCollecting:
    def test_planted_links_and_special_files_are_skipped_and_said(
        self, boundary: GvisorBoundary, tmp_path: Path
    ) -> None:
        canary = tmp_path / "canary"
        canary.write_text("the canary")
        ref, sink = make_ref(installation=boundary.host.installation), Sink()
        plant = (
            f"mkdir -p out/d && ln -s {canary} out/link && ln -s / out/root && ln -s {canary.parent} out/dir; "
            "echo twice > out/one && ln out/one out/two; mkfifo out/pipe; "
            "python3 -S -c \"import socket; socket.socket(socket.AF_UNIX).bind('out/sock')\"; "
            "echo fine > out/d/fine; ln -s / \"$(printf 'out/\\377')\"; rmdir /work 2>/dev/null; chmod 0 out/d/fine"
        )
        with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            planted = sandbox.execute(shell(plant))
            limits = artifact_limits(expected=("out/link", "out/root/etc/passwd", "out/one", "out/d", "out/d/fine"))
            found = sandbox.collect(["out/**"], limits=limits, sink=sink)
        boundary.destroy(ref)
        assert planted.exit_code == 0, planted.stderr.data
        assert [artifact.path for artifact in found.kept] == ["out/d/fine"]
        assert set(sink.stored.values()) == {b"fine\n"}, "control: a regular file is collected"
        why = {skipped.path: skipped.why for skipped in found.skipped}
        assert {name: why[f"out/{name}"] for name in ("link", "root", "dir", "one", "two")} == {
            "link": "symlink",
            "root": "symlink",
            "dir": "symlink",
            "one": "hard link",
            "two": "hard link",
        }
        assert why["out/%FF"] == "symlink"
        absent = {path: content.absent_why for path, content in found.expected.items()}
        assert absent == {
            "out/link": "symlink",
            "out/root/etc/passwd": "symlink",
            "out/one": "hard link",
            "out/d": "directory",
            "out/d/fine": None,
        }

    def test_a_sparse_file_and_a_deep_tree_cost_little(self, boundary: GvisorBoundary) -> None:
        ref, sink = make_ref(installation=boundary.host.installation), Sink()
        plant = "truncate -s 100M out; mkdir -p $(printf 'd/%.0s' $(seq 200)); echo x > $(printf 'd/%.0s' $(seq 20))f"
        with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            assert sandbox.execute(shell(plant)).exit_code == 0
            started = time.monotonic()
            found = sandbox.collect(["**"], limits=artifact_limits(total_bytes=MIB), sink=sink)
            took_s = time.monotonic() - started
        boundary.destroy(ref)
        assert [artifact.path for artifact in found.kept] == ["d/" * 20 + "f"]
        assert {skipped.why.split(":")[0] for skipped in found.skipped} == {"too large", "deeper than 32"}
        assert took_s < 2

    def test_what_the_guest_makes_belongs_to_its_uid_and_can_gain_nothing(self, boundary: GvisorBoundary) -> None:
        ref = make_ref(installation=boundary.host.installation)
        with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            made = sandbox.execute(shell("cp /bin/true suid && chmod 6755 suid; mknod dev c 1 3; chown 0 suid"))
            fs = boundary.host.runtime_dir / ref.installation / ref.name / "fs"
            owned = os.lstat(fs / "work/suid")
            options = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {fs} " in line)
            directory = os.stat(fs.parent)
        boundary.destroy(ref)
        assert made.exit_code != 0
        assert owned.st_uid == 65532
        assert {"nosuid", "nodev", "nosymfollow"} <= set(options.split()[3].split(","))
        assert (directory.st_mode & 0o777, directory.st_uid) == (0o700, 0)


class TestEvidence:
    def test_a_limit_loosened_behind_the_drivers_back_shows(self, boundary: GvisorBoundary) -> None:
        ref = make_ref(installation=boundary.host.installation)
        group = boundary.group(ref)
        with boundary.open(make_spec(memory=128 * MIB), ref, cancelled=Never()) as sandbox:
            sandbox.execute(shell("true"))
            before = sandbox.evidence()
            name = "memory.limit_in_bytes" if group.version == 1 else "memory.max"
            swap = group.paths["memory"] / "memory.memsw.limit_in_bytes"
            if swap.exists():
                swap.write_text(str(512 * MIB))
            (group.paths["memory"] / name).write_text(str(512 * MIB))
            after = sandbox.evidence()
        boundary.destroy(ref)
        assert (before.limits["memory_bytes"], after.limits["memory_bytes"]) == (128 * MIB, 512 * MIB)

    def test_each_field_is_what_the_host_sees(self, boundary: GvisorBoundary) -> None:
        with opened(boundary, disk=16 * MIB, files=500, cpu=0.5) as (sandbox, pids):
            sandbox.execute(shell("sleep 0.1"))
            seen = sandbox.evidence()
            running = Path(f"/proc/{sentry(pids)}/exe").resolve()
        version = subprocess.run([running, "--version"], capture_output=True, check=True, text=True).stdout.split()[2]
        digest = subprocess.run(["sha256sum", running], capture_output=True, check=True, text=True).stdout.split()[0]
        assert (seen.runtime_version, seen.runtime_sha256) == (version, digest)
        assert (seen.platform, seen.network, seen.uid) == ("systrap", "none", 65532)
        assert seen.limits == {
            "memory_bytes": 256 * MIB,
            "cpu": 0.5,
            "host_tasks": 96 + 3 * 128,
            "disk_bytes": 16 * MIB,
            "files": 500,
        }


_SEARCH = """
import os, sys, time
token = "".join(sys.argv[1:]).encode()
end = time.monotonic() + 1.2
while time.monotonic() < end:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("cmdline", "environ"):
            try:
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    if token in file.read():
                        print(pid, name)
            except OSError:
                pass
"""


class _WithBind(RuntimeStore):
    """The weakened wall of a control: the host view, and one directory more."""

    def __init__(self, directory: Path, extra: Path) -> None:
        super().__init__(directory)
        self._extra = extra

    def get(self, name: str) -> RootFilesystem:
        root = super().get(name)
        return RootFilesystem(
            name=root.name,
            digest=root.digest,
            path=root.path,
            binds=(*root.binds, (self._extra, Path("/mnt"))),
            masks=root.masks,
        )


THREADS = """
import threading, time
held = threading.Event()
made = 0
try:
    for _ in range({count}):
        threading.Thread(target=held.wait, daemon=True).start()
        made += 1
except RuntimeError:
    pass
print(made, flush=True)
time.sleep(1)
raise SystemExit(made < {count})
"""


class TestLimitsThatShowNowhereElse:
    """What the kernel announces nowhere, and what a guest could use to look like a defect of ours."""

    @pytest.mark.parametrize(("pids", "held"), [(64, True), (256, False)])
    def test_threads_of_one_process_hit_the_pids_limit_and_the_host_sees_it(
        self, boundary: GvisorBoundary, pids: int, held: bool
    ) -> None:
        with opened(boundary, pids=pids) as (sandbox, _):
            ended = sandbox.execute(python(THREADS.format(count=100)))
        assert (ended.exit_code, Limit.PIDS in ended.limits) == ((1, True) if held else (0, False))

    def test_filling_tmp_beyond_the_memory_limit_is_the_runs_own_end_and_never_ours(
        self, boundary: GvisorBoundary
    ) -> None:
        fill = (
            "python3 -c \"f = open('/tmp/bomb', 'wb', buffering=0); [f.write(b'x' * (1 << 20)) for _ in range(112)]\""
        )
        for _ in range(4):
            with opened(boundary, memory=64 * MIB, disk=256 * MIB) as (sandbox, _):
                ended = sandbox.execute(shell(fill))
            # It ends with ENOMEM, at times too soon to be seen by the host, or with the sandbox.
            assert ended.ended is Ended.LIMIT or (ended.ended, ended.exit_code) == (Ended.EXITED, 1)
        with opened(boundary, memory=256 * MIB, disk=256 * MIB) as (sandbox, _):
            control = sandbox.execute(shell(fill))
        assert (control.ended, control.exit_code, control.limits) == (Ended.EXITED, 0, frozenset())
