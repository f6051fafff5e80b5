"""What holds a run in a pod, on a real cluster: each defence attacked from inside, and seen from outside."""

import io
import os
import signal
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from service.core.boundary import Bundle, Ended, Limit, Sandbox
from service.core.errors import NotYetDestroyed, ProvisionFailed, SandboxBroken
from service.core.failpoints import Failpoint
from tests.cluster.lab import cgroups
from tests.cluster.lab.outside import Lab
from tests.cluster.namespaces import NamespaceKind, Site, sweep
from tests.faults.place import eventually
from tests.sandboxes import MIB, Never, Sink, artifact_limits, make_spec, shell
from workers.boundaries.namespace.driver import NamespaceBoundary
from workers.kube import ExecEnded
from workers.pods.pod import Pod
from workers.pods.render import namespace_name


@pytest.fixture(scope="module")
def boundary(site: Site) -> Iterator[NamespaceBoundary]:
    boundary = NamespaceBoundary(site.host())
    boundary.listener.address()
    yield boundary
    assert sweep(boundary, site.ready) == []


@pytest.fixture(params=["runc", "gvisor"])
def kind(request: pytest.FixtureRequest, boundary: NamespaceBoundary) -> Iterator[NamespaceKind]:
    kind = NamespaceKind(boundary, request.param)
    yield kind
    for ref in boundary.discover():
        boundary.destroy(ref)


@contextmanager
def opened(kind: NamespaceKind, **limits: object) -> Iterator[Sandbox]:
    with kind.boundary.open(make_spec(**limits), kind.ref(), cancelled=Never()) as sandbox:
        yield sandbox


@pytest.fixture
def breakable(site: Site) -> Lab:
    if site.lab is None:
        pytest.skip("only a lab can be broken on purpose")
    return site.lab


class CancelledAfter:
    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def is_set(self) -> bool:
        return time.monotonic() > self._at


def test_while_policy_is_not_enforced_no_pod_opens(boundary: NamespaceBoundary, breakable: Lab) -> None:
    """A controller that is installed, running and inert: everything looks as it should, and nothing is enforced."""
    kind = NamespaceKind(boundary, "runc")
    controller = breakable.pid("policy")
    os.kill(controller, signal.SIGUSR1)
    try:
        wanted = boundary.open(make_spec(), kind.ref(), cancelled=CancelledAfter(4))
        with pytest.raises(ProvisionFailed, match="policy"), wanted:
            pytest.fail("a step could run in it")
        assert list(boundary.discover()) == [], "and it leaves nothing"
    finally:
        os.kill(controller, signal.SIGUSR2)
    with boundary.open(make_spec(), ref := kind.ref(), cancelled=Never()) as sandbox:
        assert sandbox.evidence().network == "none"
    boundary.destroy(ref)


def test_a_guest_sees_only_its_own_and_reaches_nothing(kind: NamespaceKind, site: Site) -> None:
    looks = (
        "env | cut -d= -f1 | sort | xargs; id -u; ls /var/run/secrets /run/secrets 2>&1;"
        "cat /proc/1/environ /proc/1/maps; ls /proc/1/fd; cat /proc/$PPID/environ; ls -l /proc/$PPID/fd;"
        "touch /x /etc/x /bin/x; mount -t tmpfs x /tmp; unshare -m true; ls /dev | xargs;"
        "for a in $0; do nc -w 1 ${a%:*} ${a#*:} </dev/null && echo reached $a; done; echo end"
    )
    addresses = (
        f"10.30.0.1:6443 10.30.0.1:10250 10.96.0.1:443 169.254.169.254:80 {kind.boundary.listener.address()}:4711"
    )
    with opened(kind) as sandbox:
        seen = sandbox.execute(shell(looks.replace("$0", addresses), SECRET="1", timeout_s=60))
    out, err = seen.stdout.data.decode(), seen.stderr.data.decode()
    lines = out.splitlines()
    assert lines[0] == "HOME LANG PATH PWD SECRET SHLVL TMPDIR", "PWD and SHLVL are the shell's own"
    assert int(lines[1]) >= 100_000
    assert "KUBERNETES" not in out
    assert "reached" not in out
    assert lines[-1] == "end"
    assert err.count("ermission denied") >= 4, err
    assert err.count("touch: ") == 3, err
    assert "docker" not in out
    assert "No such file" in out, "there is no token"


def test_a_guest_that_ends_all_it_can_gains_nothing(kind: NamespaceKind) -> None:
    with opened(kind) as sandbox:
        killed = sandbox.execute(shell("kill -9 $PPID; sleep 20"))
        assert (killed.ended, killed.exit_code, killed.signal) == (Ended.BROKEN, None, None)
        assert killed.message == "the guest killed the process that watched the step"
        after = sandbox.execute(shell("echo still here; ps | grep -c 'sleep 2[0]'"))
        assert after.stdout.data == b"still here\n0\n", "and what it left behind has ended"
        first = sandbox.execute(shell("kill -9 1; sleep 1; echo still here; exit 6"))
        if kind.variant == "runc":
            assert (first.ended, first.exit_code) == (Ended.EXITED, 6), "the kernel keeps a pod's first process from it"
        else:
            assert (first.ended, first.exit_code, first.sandbox_alive) == (Ended.BROKEN, None, False)
            assert first.message == "the guest ended the first process of its pod"
            found = sandbox.collect(["**"], limits=artifact_limits(expected=("x",)), sink=Sink())
            assert (found.kept, found.expected["x"].absent_why) == ((), "absent")


def test_a_guest_that_ends_its_pod_before_it_is_collected_has_failed_and_not_we(boundary: NamespaceBoundary) -> None:
    kind = NamespaceKind(boundary, "gvisor")
    with opened(kind) as sandbox:
        left = sandbox.execute(shell("echo x > out; (sleep 1; kill -9 1) & exit 0"))
        assert (left.ended, left.exit_code) == (Ended.EXITED, 0)
        eventually(lambda: list(boundary.discover()) and not kind.running(next(boundary.discover())))
        with pytest.raises(SandboxBroken, match="the guest ended the first process"):
            sandbox.collect(["**"], limits=artifact_limits(), sink=Sink())


def test_a_sandbox_that_dies_as_a_whole_is_not_the_guests_doing(boundary: NamespaceBoundary, breakable: Lab) -> None:
    """The control of the two above: the same sight for the guest, and somebody on the node did it."""
    kind = NamespaceKind(boundary, "gvisor")
    with opened(kind) as sandbox:
        enemy = threading.Timer(1, lambda: _kill_kernels(breakable))
        enemy.start()
        seen = sandbox.execute(shell("sleep 20"))
        enemy.join()
    assert (seen.ended, seen.sandbox_alive) == (Ended.LOST, False), seen.message


def _kill_kernels(lab: Lab) -> None:
    """gVisor's, of every pod that has one: the listener has none."""
    for pid in cgroups.processes(lab.cgroup):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"runsc-sandbox"):
                os.kill(pid, signal.SIGKILL)


def test_a_guest_that_kills_whatever_comes_is_not_collected_and_does_not_pass(
    kind: NamespaceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No guest was seen to win this race; what if one does: our program, killed as the guest can kill it."""
    with opened(kind) as sandbox:
        assert sandbox.execute(shell("echo x > out; sleep 60 & exit 0")).exit_code == 0
        command, program = Pod.command, ["/bin/sh", "-c", "kill -9 $$"]

        def killed(pod: Pod, *words: str, **more: Any) -> ExecEnded:
            if words[0] not in ("kill", "list"):
                return command(pod, *words, **more)
            more.pop("stdin", None)
            return pod.cluster.exec_(pod.namespace, pod.name, "run", program, **more)

        monkeypatch.setattr(Pod, "command", killed)
        with pytest.raises(SandboxBroken, match="the guest killed what was sent"):
            sandbox.collect(["**"], limits=artifact_limits(), sink=Sink())


def test_what_a_guest_writes_to_its_streams_is_output_and_no_more(kind: NamespaceKind) -> None:
    """Our own frames, byte for byte, printed and written to every descriptor that can be found."""
    forged = r"s\060\000\000\000exited 0\ncpu_us 0\ntasks 0\ndisk_full 0\n"
    everywhere = f"for p in /proc/[0-9]*/fd/*; do printf '{forged}' > $p; done 2>/dev/null"
    program = f"printf '{forged}'; printf '{forged}' >&2; {everywhere}; exit 7"
    with opened(kind) as sandbox:
        seen = sandbox.execute(shell(program))
    assert (seen.ended, seen.exit_code) == (Ended.EXITED, 7)
    assert b"exited 0" in seen.stdout.data


def test_memory_and_disk_and_processes_are_limited(kind: NamespaceKind) -> None:
    with opened(kind, disk=4 * MIB, pids=16) as sandbox:
        disk = sandbox.execute(shell("head -c 3145728 /dev/zero > a; head -c 3145728 /dev/zero > /tmp/b; sleep 0.3"))
        sandbox.execute(shell("rm -f a /tmp/b"))
        pids = sandbox.execute(shell("for i in $(seq 40); do sleep 2 & done; wait", timeout_s=30))
    assert Limit.DISK in disk.limits, "one limit for /work and /tmp together"
    assert Limit.PIDS in pids.limits
    assert b"fork" in pids.stderr.data
    with opened(kind, memory=64 * MIB) as sandbox:
        memory = sandbox.execute(shell("dd if=/dev/zero of=/dev/null bs=300M count=1", timeout_s=60))
    assert memory.ended is Ended.LIMIT, memory
    assert memory.limits == {Limit.MEMORY}
    assert not memory.sandbox_alive


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_the_bundle_comes_in_as_it_was_packed(kind: NamespaceKind, tmp_path: Path, form: str) -> None:
    files = {"src/run.sh": (b"#!/bin/sh\necho ran $0\n", 0o755), "data/deep/er/big": (os.urandom(700_000), 0o644)}
    path = tmp_path / "bundle"
    if form == "tar":
        with tarfile.open(path, "w:gz") as tar:
            for name, (data, mode) in files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(data), mode
                tar.addfile(entry, io.BytesIO(data))
    else:
        with zipfile.ZipFile(path, "w") as packed:
            for name, (data, mode) in files.items():
                info = zipfile.ZipInfo(name)
                info.external_attr, info.create_system = (0o100000 | mode) << 16, 3
                packed.writestr(info, data)
    bundle = Bundle(digest="x", bytes_=path.stat().st_size, files=2, content_bytes=700_100, path=path)
    sink = Sink()
    with opened(kind) as sandbox:
        sandbox.upload(bundle)
        ran = sandbox.execute(shell("src/run.sh && stat -c '%a %n' src data src/run.sh data/deep/er/big"))
        found = sandbox.collect(["data/**"], limits=artifact_limits(), sink=sink)
    assert ran.stdout.data.decode().splitlines() == [
        "ran src/run.sh", "755 src", "755 data", "755 src/run.sh", "644 data/deep/er/big"
    ]  # fmt: skip
    assert [artifact.path for artifact in found.kept] == ["data/deep/er/big"]
    assert sink.stored[found.kept[0].sha256] == files["data/deep/er/big"][0]


def test_a_bundle_that_does_not_fit_is_no_run(kind: NamespaceKind, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("big", os.urandom(3 * MIB))
    with opened(kind, disk=MIB) as sandbox, pytest.raises(ProvisionFailed, match="unpacked"):
        sandbox.upload(Bundle(digest="x", bytes_=1, files=1, content_bytes=3 * MIB, path=path))


def test_planted_links_and_the_like_are_skipped_and_said(kind: NamespaceKind) -> None:
    plant = (
        "mkdir out; ln -s /etc/passwd out/link; echo a > out/a; ln out/a out/b; mkfifo out/fifo; echo c > out/c;"
        "chmod 0 out/c; printf x > \"out/$(printf 'two\\nlines')\"; ln -s /etc way;"
        "mkdir -p out/shut/in; echo d > out/shut/in/d; chmod 0 out/shut"
    )
    sink = Sink()
    with opened(kind) as sandbox:
        assert sandbox.execute(shell(plant)).exit_code == 0
        limits = artifact_limits(expected=("way/passwd", "out/link", "out/c"))
        found = sandbox.collect(["out/**"], limits=limits, sink=sink)
    assert {artifact.path for artifact in found.kept} == {"out/c", "out/two%0Alines", "out/shut/in/d"}
    assert {one.path: one.why for one in found.skipped} == {
        "out/a": "hard link", "out/b": "hard link", "out/fifo": "fifo", "out/link": "symlink",
    }  # fmt: skip
    assert found.expected["out/c"].data == b"c\n"
    assert found.expected["way/passwd"].absent_why == found.expected["out/link"].absent_why == "symlink"
    assert not any(b"root:" in data for data in sink.stored.values())


def test_evidence_is_what_stands_in_the_cluster(site: Site, boundary: NamespaceBoundary) -> None:
    seen = {}
    for variant in ("runc", "gvisor"):
        kind = NamespaceKind(boundary, variant)
        ref = kind.ref()
        with boundary.open(make_spec(memory=96 * MIB, disk=24 * MIB, cpu=0.25), ref, cancelled=Never()) as sandbox:
            said = sandbox.execute(shell("id -u")).stdout.data
            seen[variant] = evidence = sandbox.evidence().model_dump()
            pod = site.ready.admin.get("Pod", ref.name, namespace_name(ref))
            assert pod is not None
            assert evidence["pod_spec"]["uid"] == pod["metadata"]["uid"]
            assert evidence["uid"] == int(said), "the guest agrees; it was not asked"
        boundary.destroy(ref)
        sizes = {"memory_bytes": 96 * MIB, "disk_bytes": 24 * MIB, "cpu": 0.25}
        assert {name: evidence["limits"][name] for name in sizes} == sizes, evidence["limits"]
        assert evidence["namespace"]["pod_security"] == "restricted v1.34"
        assert evidence["image"].endswith(site.image.rpartition("@")[2])
        assert "blastdoor-pods" in evidence["admission"]
        assert evidence["policy"]["uid"]
    assert (seen["gvisor"]["runtime"], seen["gvisor"]["runtime_class"]) == ("runsc", "gvisor")
    assert (seen["runc"]["runtime"], seen["runc"]["runtime_class"]) == ("node default", None)


def test_a_namespace_that_does_not_go_is_not_called_gone(site: Site, boundary: NamespaceBoundary) -> None:
    kind = NamespaceKind(boundary, "gvisor")
    ref = kind.ref()
    with boundary.open(make_spec(), ref, cancelled=Never()):
        pass
    held = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": ref.name, "finalizers": ["test.example/held"]},
    }
    site.ready.admin.apply(held, owner="holder")
    with pytest.raises(NotYetDestroyed, match=r"test\.example/held"):
        boundary.destroy(ref)
    assert list(boundary.discover()) == [kind.as_discovered(ref)], "it is still listed"
    held["metadata"] = {"name": ref.name, "finalizers": []}
    site.ready.admin.apply(held, owner="holder")
    boundary.destroy(ref)
    assert list(boundary.discover()) == []


def test_what_is_another_installations_is_left_alone(site: Site, boundary: NamespaceBoundary) -> None:
    theirs = NamespaceBoundary(site.host("gvisor"))
    kind = NamespaceKind(theirs, "gvisor")
    ref = kind.ref()
    with theirs.open(make_spec(), ref, cancelled=Never()) as sandbox:
        assert list(boundary.discover()) == []
        boundary.destroy(ref.model_copy(update={"installation": boundary.host.installation}))
        assert sandbox.execute(shell("exit 5")).exit_code == 5
    assert list(theirs.discover()) == [kind.as_discovered(ref)]
    theirs.destroy(ref)
    assert sweep(theirs, site.ready) == []


def test_an_api_server_that_stands_still_for_a_while_ends_no_step(boundary: NamespaceBoundary, breakable: Lab) -> None:
    kind = NamespaceKind(boundary, "gvisor")
    server = breakable.pid("kube-apiserver")
    heard = threading.Event()

    def stand_still() -> None:
        heard.wait(20)
        os.kill(server, signal.SIGSTOP)
        time.sleep(5)
        os.kill(server, signal.SIGCONT)

    standstill = threading.Thread(target=stand_still)
    standstill.start()
    try:
        with boundary.open(make_spec(), ref := kind.ref(), cancelled=Never()) as sandbox:
            played = sandbox.execute(
                shell("echo begun; sleep 2; mkdir out; echo x > out/x; exit 3", timeout_s=40),
                listener=lambda *_: heard.set(),
            )
            found = sandbox.collect(["out/*"], limits=artifact_limits(), sink=Sink())
    finally:
        heard.set()
        standstill.join()
    boundary.destroy(ref)
    assert (played.ended, played.exit_code) == (Ended.EXITED, 3)
    assert [artifact.path for artifact in found.kept] == ["out/x"]


def test_a_pod_that_somebody_deletes_is_lost_and_nobody_says_passed(site: Site, kind: NamespaceKind) -> None:
    ref = kind.ref()
    with kind.boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
        enemy = threading.Timer(0.5, lambda: site.ready.engine.delete("Pod", ref.name, namespace_name(ref), grace_s=1))
        enemy.start()
        ended = sandbox.execute(shell("trap '' TERM; sleep 20; exit 0"))
        enemy.join()
        assert (ended.ended, ended.exit_code, ended.sandbox_alive) == (Ended.LOST, None, False)
        found = sandbox.collect(["**"], limits=artifact_limits(expected=("x",)), sink=Sink())
    assert (found.kept, found.expected["x"].absent_why) == ((), "absent")


@pytest.mark.parametrize("point", [Failpoint.OPEN_BEFORE_CREATE, Failpoint.OPEN_HALF_CREATED, Failpoint.OPEN_CREATED])
def test_a_worker_that_dies_while_it_opens_leaves_nothing_that_is_not_found(
    kind: NamespaceKind, site: Site, point: Failpoint
) -> None:
    ref = kind.ref()
    kind.worker_dies_at(point, ref)
    found = list(kind.boundary.discover())
    if point is Failpoint.OPEN_BEFORE_CREATE or (point is Failpoint.OPEN_HALF_CREATED and kind.variant == "runc"):
        assert found == [], "of a soft run there is nothing before its pod: the namespace is its tenant's"
    else:
        assert found == [kind.as_discovered(ref)]
        kind.another_process().destroy(found[0])  # as the reaper does, with what the labels say
    labels = {"blastdoor.dev/run": ref.run_id}
    assert [one for what in ("Namespace", "Pod") for one in site.ready.admin.list(what, labels=labels)] == []


def test_runs_of_one_tenant_share_a_namespace_and_each_ends_alone(boundary: NamespaceBoundary, site: Site) -> None:
    kind = NamespaceKind(boundary, "runc")
    one, other = kind.ref(), kind.ref()
    assert namespace_name(one) == namespace_name(other)
    with (
        boundary.open(make_spec(), one, cancelled=Never()),
        boundary.open(make_spec(), other, cancelled=Never()) as sandbox,
    ):
        boundary.destroy(one)
        assert sandbox.execute(shell("exit 4")).exit_code == 4
    assert list(boundary.discover()) == [kind.as_discovered(other)]
    boundary.destroy(other)
    assert site.ready.admin.get("Namespace", namespace_name(one)) is not None, "it is kept for the tenant's next run"
